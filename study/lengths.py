"""How long each start has to train: runs of several lengths, each with a whole schedule of its own."""

import itertools
from pathlib import Path

import compare
from study.arms import ARMS

# settings that differ in nothing but their epochs, by these, and what they train on
LENGTHS = (
    ("all images", {1: "epochs_1", 3: "epochs_3", 7: "epochs_7", 10: "full"}),
    ("a tenth", {3: "tenth_3", 10: "tenth", 30: "tenth_30", 100: "tenth_100"}),
)


def epochs_to(goal: float, ends: dict[int, float]) -> str:
    """Return the length that ends at `goal`, linear between two lengths that were run; "" if none of them reaches it."""
    below, before = 0, None
    for epochs, end in sorted(ends.items()):
        if end >= goal:
            if before is None:
                return f"at most {epochs}"
            return f"{below + (epochs - below) * (goal - before) / (end - before):.1f}"
        below, before = epochs, end
    return ""


def by_length(section_of: dict[int, dict], baseline: str) -> dict[str, dict[int, list[float]]]:
    """Return {arm: {epochs: final accuracies}} of the arms that have runs of each length that the baseline has."""
    ends: dict[str, dict[int, list[float]]] = {}
    for epochs, section in section_of.items():
        for arm, tried in section.items():
            if tried.runs:
                ends.setdefault(arm, {})[epochs] = [run.last for run in tried.runs]
    lengths = ends.get(baseline, {}).keys()
    return {arm: each for arm, each in ends.items() if len(lengths) > 1 and each.keys() >= lengths}


def tables_of(sections: dict, baseline: str) -> dict[str, dict[str, dict[int, list[float]]]]:
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


def table_of(title: str, ends: dict[str, dict[int, list[float]]], baseline: str) -> list[str]:
    """Return the lines of a Markdown table of final accuracy by length."""
    lengths = sorted({epochs for each in ends.values() for epochs in each})
    means = {arm: {epochs: sum(values) / len(values) for epochs, values in each.items()} for arm, each in ends.items()}
    goal = means[baseline][max(means[baseline])]
    heads = ["start", *(f"{n} epochs" if n > 1 else "1 epoch" for n in lengths), f"epochs to {goal:.1f} %"]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for arm, each in ends.items():
        cells = [compare.cell(compare.spread(each[n]), 1) if n in each else "" for n in lengths]
        rows.append([ARMS[arm].title, *cells, epochs_to(goal, means[arm])])
    return [f"## {title}: runs of several lengths", "", *compare.markdown(rows), ""]


def draw(tables: dict[str, dict[str, dict[int, list[float]]]], path: Path) -> None:
    """Draw the final accuracy over the length of the run, a panel for each table: means, and a point for each seed."""
    figure = compare.new_figure(figsize=(5.5 * len(tables), 4))
    for panel, (title, ends) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        for (arm, each), colour in zip(ends.items(), itertools.cycle(compare.COLOURS), strict=False):
            lengths = sorted(each)
            panel.plot(lengths, [sum(each[n]) / len(each[n]) for n in lengths], color=colour, label=ARMS[arm].title)
            points = [(n, value) for n in lengths for value in each[n]]
            panel.plot(*zip(*points, strict=True), "o", color=colour, ms=4, alpha=0.5)
        panel.set(title=title, xlabel="epochs of the whole run", ylabel="accuracy at its end, %")
        panel.legend(frameon=False)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
