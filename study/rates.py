"""Make the table of a study whose arms have learning rates of their own, from its result folders alone.

    python -m study.rates results/study-refit

writes rates.md there and prints it; it draws lengths.png if arms have runs of several lengths. An arm's rate is the best
of those that were tried with one seed, which is not reported otherwise. Arms without another seed yet are listed with
their rates alone.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import compare
from files import read_text
from options.parser import Parser
from study import lengths
from study.arms import ARMS
from study.report import METRIC, differences
from study.runs import arm_and_rate
from study.search import best_of
from study.studies import CALIBRATION_IMAGES, RATE_SEED
from training.finished import FinishedRun, find_runs, read_runs
from utils import run_script

BASELINE, PAPER = "random", "selected"
# of a forward and a backward pass, in units of a training step of the same image
FORWARD = 1 / 3


class Tried(NamedTuple):
    """An arm: its runs at the best rate, and where each rate ended with the seed that chose it."""

    rate: str
    runs: list[FinishedRun]
    ends: dict[str, float]


Section = dict[str, Tried]


def read_sections(root: Path) -> tuple[dict[str, Section], dict[str, FinishedRun]]:
    """Return the arms by section, such as "vit/tenth", and the teachers by name."""
    runs: dict[tuple[str, str], list[tuple[str, FinishedRun]]] = defaultdict(list)
    teachers: dict[str, FinishedRun] = {}
    for run in read_runs(find_runs([root]), METRIC):
        name = run.folder.relative_to(root)
        arm, rate = arm_and_rate(run.folder.name)
        if rate:
            runs[name.parent.as_posix(), arm].append((rate, run))
        else:
            teachers[name.as_posix()] = run
    sections: dict[str, Section] = defaultdict(dict)
    for (section, arm), tried in runs.items():
        ends = {rate: run.last for rate, run in tried if run.seed == RATE_SEED}
        best = best_of(ends) if ends else tried[0][0]  # or it was chosen elsewhere
        chosen = [run for rate, run in tried if rate == best and run.seed != RATE_SEED]
        sections[section][arm] = Tried(best, chosen, ends)
    return sections, teachers


def work(run: FinishedRun) -> tuple[float, float]:
    """Return the images that a run trained on, each as often as it was seen, and its model's parameters."""
    *_, last = read_text(run.folder / "log.txt").splitlines()
    record = json.loads(last)
    return record["step"] * int(run.settings["images_per_update"]), record["n_parameters"]


def parameters_of(model: dict) -> int:
    """Count the parameters of a model that no run trained, by its name and arguments."""
    from models.build import create  # here, because few reports need torch

    outline = create(model["model"], model["kwargs"], device="meta", short=False)
    return sum(parameter.numel() for parameter in outline.parameters())


def cost(section: str, arm: str, run: FinishedRun, teachers: dict[str, FinishedRun]) -> float:
    """Return images times parameters of all that an arm trains and runs, in units of its student's training.

    The teacher's training on its own data does not count: it is there already.
    """
    choices, (images, parameters) = ARMS[arm], work(run)
    own, total = images * parameters, images * parameters

    def teacher(role: str) -> tuple[float, float]:
        tuned = role.startswith("tuned")
        name = f"{section if tuned else section.partition('/')[0]}/{role}"
        if tuned or name in teachers:
            return work(teachers[name])
        config = json.loads(read_text(run.folder / "config.json"))  # no run made it: it is a file
        return 0.0, parameters_of(config["initialization"]["teacher"])

    for role in {choices.teacher, choices.distilled}:
        if role.startswith("tuned"):
            total += math.prod(teacher(role))
    if choices.distilled:
        total += FORWARD * images * teacher(choices.distilled)[1]
    words = (choices.selection or "").split()
    if "--data_path" in words:
        passes = 2 * teacher(choices.teacher)[1] + (5 * parameters if "--refit" in words else 0)
        option = "--calibration_images"
        calibration = int(words[words.index(option) + 1]) if option in words else CALIBRATION_IMAGES
        total += FORWARD * calibration * passes
    return total / own


def untrained(run: FinishedRun) -> float | None:
    """Return the accuracy before any training; None if it was not measured."""
    file = run.folder / "untrained.json"
    return json.loads(read_text(file))[METRIC] if file.is_file() else None


def table_of(section: str, arms: Section, chosen: list[str], teachers: dict[str, FinishedRun]) -> list[str]:
    """Return a Markdown table of the chosen arms, the best last; [] if none has runs."""
    rows = rows_of(section, arms, chosen, teachers)
    heads = [
        "start",
        "rate",
        "n",
        "untrained",
        "after 1 epoch",
        "at the end",
        "over random init",
        "over weight selection",
    ]
    columns = [*heads, "reaches random init's end in epoch", "cost"]
    kept = [n for n, head in enumerate(columns) if head != "untrained" or any(row[n] for row in rows)]
    table = [[row[n] for n in kept] for row in (columns, ["---", *["---:"] * (len(columns) - 1)], *rows)]
    return [*compare.markdown(table), ""] if rows else []


def rows_of(section: str, arms: Section, chosen: list[str], teachers: dict[str, FinishedRun]) -> list[list[str]]:
    """Return the cells of the chosen arms' rows, the best last."""
    baseline = [run.last for run in arms[BASELINE].runs] if BASELINE in arms else []
    rows, ready = [], {arm: arms[arm] for arm in chosen if arms[arm].runs}
    for arm, tried in sorted(ready.items(), key=lambda item: sum(run.last for run in item[1].runs) / len(item[1].runs)):
        runs = sorted(tried.runs, key=lambda run: run.seed)
        means = {epoch: sum(run.values[epoch] for run in runs) / len(runs) for epoch in sorted(runs[0].values)}
        reached = _epoch_of(sum(baseline) / len(baseline), means) if baseline and arm != BASELINE else ""
        gains = [_gain(runs, arms.get(other)) for other in (BASELINE, PAPER)]
        accuracies = [compare.spread([run.values[epoch] for run in runs]) for epoch in (min(means), max(means))]
        before = [value for value in map(untrained, runs) if value is not None]
        rows.append(
            [
                ARMS[arm].title,
                tried.rate,
                str(len(runs)),
                compare.cell(compare.spread(before), 1) if before else "",
                *(compare.cell(each, 1) for each in accuracies),
                *gains,
                reached,
                # the log of a linear probe counts the classifier alone
                ""
                if runs[0].settings.get("linear_probe") == "true"
                else f"{cost(section, arm, runs[0], teachers):.1f}",
            ]
        )
    return rows


def _epoch_of(goal: float, means: dict[int, float]) -> str:
    return next((str(epoch + 1) for epoch, mean in means.items() if mean >= goal), "never")


def _gain(runs: list[FinishedRun], other: Tried | None) -> str:
    """Return the cell of the difference to another arm, paired by seed; "" to itself."""
    if other is None or not other.runs or runs[0] in other.runs:
        return ""
    return compare.cell(compare.spread(differences(other.runs, runs, 1.0)), 1, sign="+")


def report(root: Path) -> str:
    """Return the page: a table for each section, as far as it has come, what was tried, and lengths."""
    sections, teachers = read_sections(root)
    lines = []
    for section, arms in sections.items():
        lines += [
            f"## {section}",
            "",
            *table_of(section, arms, [arm for arm in arms if not ARMS[arm].rate_of], teachers),
        ]
        family, own = section.partition("/")[0], f"{section}/"
        these = {
            name: run for name, run in teachers.items() if name.startswith(own) or name.rpartition("/")[0] == family
        }
        lines += [f"- {name}: {run.last:.1f} %" for name, run in these.items()] + [""]
        for base in dict.fromkeys(ARMS[arm].rate_of for arm in arms if ARMS[arm].rate_of):
            ablations = [arm for arm in arms if ARMS[arm].rate_of == base]
            table = table_of(section, arms, [base, *ablations] if base in arms else ablations, teachers)
            lines += [f"### Changes of {ARMS[base].title}", "", *table] if table else []
        rates = sorted({rate for tried in arms.values() for rate in tried.ends}, key=float)
        table = [["start", *rates], ["---", *["---:"] * len(rates)]]
        table += [
            [ARMS[arm].title, *(f"{tried.ends[rate]:.1f}" if rate in tried.ends else "" for rate in rates)]
            for arm, tried in arms.items()
            if tried.ends
        ]
        lines += [f"### Rates, seed {RATE_SEED}", "", *compare.markdown(table), ""] if rates else []
    by_length = lengths.tables_of(sections, BASELINE)
    for title, ends in by_length.items():
        lines += lengths.table_of(title, ends, BASELINE)
    if by_length:
        lengths.draw(by_length, root / "lengths.png")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m study.rates", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="FOLDER", help="what study.run had as --results")
    options = parser.parse_args(argv)
    text = report(options.results)
    (options.results / "rates.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    sys.exit(run_script(main))
