"""How long each start has to train: runs of several lengths, each with a whole schedule of its own."""

import itertools
import math
from pathlib import Path

import compare
from study.arms import ARMS

# settings that differ in nothing but their epochs, by these, and what they train on
LENGTHS = (
    ("all images", {1: "epochs_1", 3: "epochs_3", 7: "epochs_7", 10: "full"}),
    ("a tenth", {3: "tenth_3", 10: "tenth", 30: "tenth_30", 100: "tenth_100"}),
)
Ends = dict[str, dict[int, dict[int, float]]]  # final accuracies by arm, epochs and seed


def epochs_to(goal: float, ends: dict[int, float]) -> tuple[float, bool] | None:
    """Return the length that ends at `goal`, and whether it is not only an upper bound; None if no run reaches it.

    Between two lengths that were run, accuracy is taken as linear in the logarithm of the epochs.
    """
    below, before = 1, None
    for epochs, end in sorted(ends.items()):
        if end >= goal:
            if before is None:
                return float(epochs), False
            return below * math.exp(math.log(epochs / below) * (goal - before) / (end - before)), True
        below, before = epochs, end
    return None


def by_length(section_of: dict[int, dict], baseline: str) -> Ends:
    """Return the ends of the arms that have runs of each length that the baseline has."""
    ends: Ends = {}
    for epochs, section in section_of.items():
        for arm, tried in section.items():
            if tried.runs:
                ends.setdefault(arm, {})[epochs] = {run.seed: run.last for run in tried.runs}
    lengths = ends.get(baseline, {}).keys()
    return {arm: each for arm, each in ends.items() if len(lengths) > 1 and each.keys() >= lengths}


def tables_of(sections: dict, baseline: str) -> dict[str, Ends]:
    """Return by_length's figures for each family and kind of data that has some."""
    families = dict.fromkeys(section.partition("/")[0] for section in sections)
    made = {
        f"{family}, {data}": by_length(
            {epochs: sections.get(f"{family}/{setting}", {}) for epochs, setting in settings.items()}, baseline
        )
        for family in families
        for data, settings in LENGTHS
    }
    return {title: ends for title, ends in made.items() if ends}


def table_of(title: str, ends: Ends, baseline: str) -> list[str]:
    """Return the lines of a Markdown table of final accuracy by length, and of the length to the baseline's end."""
    lengths = sorted({epochs for each in ends.values() for epochs in each})
    heads = [
        "start",
        *(f"{n} epochs" if n > 1 else "1 epoch" for n in lengths),
        f"epochs to {ARMS[baseline].title}'s end",
    ]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for arm, each in ends.items():
        cells = [compare.cell(compare.spread([*each[n].values()]), 1) if n in each else "" for n in lengths]
        rows.append([ARMS[arm].title, *cells, _length_to_the_end(ends[baseline], each)])
    return [f"## {title}: runs of several lengths", "", *compare.markdown(rows), ""]


def _length_to_the_end(baseline: dict[int, dict[int, float]], ends: dict[int, dict[int, float]]) -> str:
    """Return the cell of the epochs to the baseline's end of the same seed."""
    goals = baseline[max(baseline)]
    seeds = [seed for seed in goals if all(seed in each for each in ends.values())]
    found = [epochs_to(goals[seed], {epochs: each[seed] for epochs, each in ends.items()}) for seed in seeds]
    if not found or None in found:
        return "not reached"
    if not all(exact for _, exact in found):
        return f"at most {max(epochs for epochs, _ in found):.1f}"
    return compare.cell(compare.spread([epochs for epochs, _ in found]), 1)


def draw(tables: dict[str, Ends], path: Path) -> None:
    """Draw the final accuracy over the length of the run, a panel for each table: means, and a point for each seed."""
    figure = compare.new_figure(figsize=(5.5 * len(tables), 4))
    for panel, (title, ends) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        for (arm, each), colour in zip(ends.items(), itertools.cycle(compare.COLOURS), strict=False):
            lengths = sorted(each)
            means = [sum(each[n].values()) / len(each[n]) for n in lengths]
            panel.plot(lengths, means, color=colour, label=ARMS[arm].title)
            points = [(n, value) for n in lengths for value in each[n].values()]
            panel.plot(*zip(*points, strict=True), "o", color=colour, ms=4, alpha=0.5)
        panel.set(title=title, xlabel="epochs of the whole run", ylabel="accuracy at its end, %", xscale="log")
        panel.set_xticks(lengths, map(str, lengths))
        panel.minorticks_off()
        panel.legend(frameon=False)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
