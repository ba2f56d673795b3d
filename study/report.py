"""Make the tables and figures of a study from its result folders alone.

    python -m study.report results/study-cpu

writes tables.md, curves-<question>.png and gains.png there and prints the tables. A study under way is reported as far
as it has come; n says how many seeds there are. The results of several folders are taken together.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import compare
from files import read_text
from options.parser import Parser
from study.arms import ARMS
from training.finished import FinishedRun, find_runs, read_runs
from training.groups import START
from utils import UserError, run_script

METRIC = "test_acc1"
MACHINE = "{device}, {processes} process, {threads} threads, torch {torch}, timm {timm}"


class Question(NamedTuple):
    name: str  # part of the figure's file name
    text: str
    baseline: str
    arms: str


QUESTIONS = (
    Question("gain", "Gain of weight selection, and of a teacher's statistics alone", "random", "selected shuffled"),
    Question(
        "elements", "Element rules and heads", "selected", "keep consecutive random_slots random_inconsistent magnitude"
    ),
    Question("layers", "Layer rules", "selected", "last_layers middle_layers uniform_layers"),
    Question("width", "A wider teacher", "selected", "keep twice_blend twice_keep wide_blend wide_keep"),
)
# two arms that answer a question by their difference: the second minus the first
PAIRS = (
    ("shuffled", "selected"),
    ("twice_blend", "twice_keep"),
    ("wide_blend", "wide_keep"),
    ("twice_blend", "wide_blend"),
    ("twice_keep", "wide_keep"),
)
SHARES_OF_RUN = (("after 1/10", 1 / 10), ("after 1/3", 1 / 3), ("at the end", 1.0))

Section = dict[str, list[FinishedRun]]  # the runs of each arm on one family and share of the data, such as "vit/full"


def read_study(roots: list[Path]) -> tuple[dict[str, Section], list[FinishedRun]]:
    """Return the students by section and arm, and the teachers. UserError if some runs cannot be compared."""
    sections: dict[str, Section] = defaultdict(lambda: defaultdict(list))
    teachers = []
    for root in roots:
        for run in read_runs(find_runs([root]), METRIC):
            arm = run.folder.name.rpartition("-")[0]
            if not arm:
                teachers.append(run)
            elif arm in ARMS:
                sections[run.folder.relative_to(root).parent.as_posix()][arm].append(run)
            else:
                raise UserError(f"{run.folder}: {arm} is none of the arms, {', '.join(ARMS)}")
    for section in sections.values():
        for arm, runs in section.items():
            check_seeds(runs)
            check_teacher(arm, runs)
        check_settings([run for runs in section.values() for run in runs])
    return sections, teachers


def check_seeds(runs: list[FinishedRun]) -> None:
    """Raise UserError if two runs of an arm have the same seed, as runs in two folders may."""
    first: dict[int, FinishedRun] = {}
    for run in runs:
        if first.setdefault(run.seed, run) is not run:
            raise UserError(f"{first[run.seed].folder} and {run.folder} are the same seed {run.seed} of an arm")


def check_teacher(arm: str, runs: list[FinishedRun]) -> None:
    """Raise UserError if an arm's runs inherit from different teachers.

    An arm that draws nothing starts from the same weights for every seed, unless teachers were mixed.
    """
    if "{seed}" in (ARMS[arm].selection or ""):
        return
    for run in runs[1:]:
        if run.settings["initialize"] != runs[0].settings["initialize"]:
            raise UserError(f"{runs[0].folder} and {run.folder} cannot be compared: they inherit from two teachers")


def check_settings(runs: list[FinishedRun]) -> None:
    """Raise UserError unless the runs of a section differ only in initialization and seed."""
    for run in runs[1:]:
        for name in sorted((run.settings.keys() | runs[0].settings.keys()) - START):
            if run.settings.get(name) != runs[0].settings.get(name):
                raise UserError(f"{runs[0].folder} and {run.folder} cannot be compared: they differ in {name}")


def summaries_of(section: Section, question: Question) -> list[dict]:
    """Return compare.py's figures for the question's baseline and each of its arms; [] without both."""
    arms = [arm for arm in question.arms.split() if arm in section]
    if question.baseline not in section or not arms:
        return []
    baseline = section[question.baseline]
    return [
        compare.summarize(ARMS[arm].title, section[arm], baseline, METRIC)
        | {"at": [compare.spread([accuracy(run, share) for run in section[arm]]) for _, share in SHARES_OF_RUN]}
        for arm in (question.baseline, *arms)
    ]


def accuracy(run: FinishedRun, share: float) -> float:
    """Return the accuracy after a share of the run's epochs, rounded to at least one epoch."""
    return run.values[max(1, round(share * (max(run.values) + 1))) - 1]


def differences(first: list[FinishedRun], second: list[FinishedRun], share: float) -> list[float]:
    """Return `second` minus `first` after that share of the epochs, for each seed that both have."""
    before = {run.seed: accuracy(run, share) for run in first}
    return [accuracy(run, share) - before[run.seed] for run in second if run.seed in before]


def link(name: str, folder: Path, out: Path) -> str:
    """Return a Markdown link from a page in `out` to the folder."""
    return f"[{name}]({Path(os.path.relpath(folder, out)).as_posix()})"


def table(question: Question, summaries_by_data: dict[str, list[dict]], out: Path) -> str:
    """Return the question's Markdown table for a page in `out`, with a row for each section and arm."""
    heads = ["data", "start", "n", *(head for head, _ in SHARES_OF_RUN), "gain, same seed", "epochs to the baseline"]
    rows = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for name, summaries in summaries_by_data.items():
        for summary in summaries:
            data = link(name, Path(summary["runs"][0]["folder"]).parent, out)
            at_shares = [compare.cell(value, 1) for value in summary["at"]]
            epochs, gain = compare.cells_against_baseline(summary, 1)
            rows.append([data, summary["label"], str(summary["n"]), *at_shares, gain, epochs])
    return "\n".join([f"## {question.text}", "", *compare.markdown(rows), ""])


def table_of_pairs(sections: dict[str, Section]) -> list[str]:
    """Return the lines of the table of PAIRS, with a row for each section that has both arms; [] without rows."""
    heads = ["data", "difference", "n", *(head for head, _ in SHARES_OF_RUN)]
    rows = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for name, section in sections.items():
        for first, second in PAIRS:
            if first in section and second in section:
                gains = [differences(section[first], section[second], share) for _, share in SHARES_OF_RUN]
                title = f"{ARMS[second].title} above {ARMS[first].title}"
                cells = (compare.cell(compare.spread(each), 1, sign="+") for each in gains)
                rows.append([name, title, str(len(gains[0])), *cells])
    return ["## Pairs of the same seed", "", *compare.markdown(rows), ""] if len(rows) > 2 else []


HOW_TO_READ = (
    "Top-1 accuracy in %, after a tenth, a third and all of the epochs: mean ± sample standard deviation over n seeds. "
    "The first row of a data set is the baseline; gains pair the seeds; the last column counts epochs to the "
    "baseline's mean final accuracy."
)


def notes(sections: dict[str, Section], teachers: list[FinishedRun], out: Path) -> str:
    """Return how to read the tables, what the teachers reached, and the machines and code that ran."""
    by_name = {name: [run for runs in section.values() for run in runs] for name, section in sections.items()}
    reached = []
    for run in teachers:
        name = "/".join(run.folder.parts[-2:])
        by_name.setdefault(name, []).append(run)  # teachers in several folders may share a name
        reached.append(f"- {link(name, run.folder, out)}: {run.last:.1f} % after {len(run.values)} epochs.")
    machines, revisions = defaultdict(set), set()
    for name, runs in by_name.items():
        for run in runs:
            config = json.loads(read_text(run.folder / "config.json"))
            machines[MACHINE.format(**config["environment"])].add(name)
            commit, *dirty = (config["revision"] or "unknown").split("-")
            revisions.add("`" + "-".join([commit[:12], *dirty]) + "`")
    ran = [f"- Ran on {machine}: {', '.join(sorted(names))}." for machine, names in sorted(machines.items())]
    code = f"- Code: {', '.join(sorted(revisions))}."
    return "\n".join([HOW_TO_READ, "", *reached, *ran, code]) + "\n"


def draw_gains(sections: dict[str, Section], path: Path) -> None:
    """Draw the gain of every arm over random init: a point for each pair of seeds, a bar for their mean."""
    rows = [
        (name, arm, gains)
        for name, section in sections.items()
        for arm in ARMS
        if arm != "random" and (gains := differences(section.get("random", []), section.get(arm, []), 1.0))
    ]
    if not rows:
        return
    figure = compare.new_figure(figsize=(9, 1.2 + 0.35 * len(rows)))
    axes = figure.add_subplot()
    names = list(dict.fromkeys(name for name, _, _ in rows))
    for place, (name, _, gains) in enumerate(rows):
        colour = compare.COLOURS[names.index(name) % len(compare.COLOURS)]
        axes.barh(place, sum(gains) / len(gains), color=colour, alpha=0.35)
        axes.plot(gains, [place] * len(gains), "o", color=colour, ms=5)
    labels = [f"{name}: {ARMS[arm].title} (n = {len(gains)})" for name, arm, gains in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=11)
    axes.invert_yaxis()
    axes.axvline(0, color="black", lw=1)
    axes.set_xlabel("points of accuracy", fontsize=12)
    title = "gain over random init of the same seed, bar: mean"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", color="#555555")
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def report(roots: list[Path], out: Path) -> str:
    """Write the tables and figures to `out` and return the tables. UserError if there is nothing to compare."""
    sections, teachers = read_study(roots)
    tables = []
    for question in QUESTIONS:
        summaries_by_data = {
            name: made for name, section in sections.items() if (made := summaries_of(section, question))
        }
        if summaries_by_data:
            tables.append(table(question, summaries_by_data, out))
            compare.draw(summaries_by_data, METRIC, out / f"curves-{question.name}.png")
    if not tables:
        raise UserError("no arm has both runs and runs of its baseline yet")
    draw_gains(sections, out / "gains.png")
    text = "\n".join([*tables, *table_of_pairs(sections), notes(sections, teachers, out)])
    (out / "tables.md").write_text(text, encoding="utf-8")
    return text


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m study.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="FOLDER", help="what study.run had as --results")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: the first FOLDER)")
    options = parser.parse_args(argv)
    out = options.out or options.results[0]
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = report(options.results, out)
    except OSError as error:
        raise UserError(str(error)) from error
    print(text, end="")


if __name__ == "__main__":
    sys.exit(run_script(main))
