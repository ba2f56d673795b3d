"""Compare finished runs of main.py: group them by their settings, print a table over seeds, draw the curves.

Standard library only, so that it answers at once and runs without torch. --plot needs matplotlib.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path

try:
    from options.parser import Parser
except ImportError as error:  # Python was told not to look beside this file
    sys.exit(f"compare.py: error: {error}: unset PYTHONSAFEPATH, and start python without -P and -I")
from training.finished import FinishedRun, find_runs, read_runs
from training.groups import (
    Group,
    baseline_of,
    differences,
    group_runs,
    named_group,
    why_without_baseline,
)
from utils import UserError, few, run_script

# Okabe and Ito's palette, whose colours stay apart for the colour-blind; without its yellow, which is too pale.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
DASH = "–"  # noqa: RUF001


def spread(values: Collection[float]) -> dict:
    """Return n, mean (None without values) and sample standard deviation (None for fewer than two)."""
    from statistics import mean, stdev  # here, because -h need not wait for it

    n = len(values)
    return {"n": n, "mean": mean(values) if n else None, "std": stdev(values) if n > 1 else None}


def summarize(name: str, runs: list[FinishedRun], baseline: list[FinishedRun] | None, metric: str) -> dict:
    """Return a group's figures, compared with its baseline unless that is itself. A positive gain is the better one."""
    best, sign = (min, -1) if "loss" in metric else (max, 1)
    compared = runs if baseline and baseline is not runs else []
    by_seed = {run.seed: run.last for run in baseline or ()}
    target = spread(by_seed.values())["mean"]
    reached = [
        min((epoch + 1 for epoch, value in run.values.items() if sign * value >= sign * target), default=None)
        for run in compared
    ]
    epochs = sorted(set.intersection(*(set(run.values) for run in runs)))
    curve = [spread([run.values[epoch] for run in runs]) for epoch in epochs]
    return {
        "label": name,
        "n": len(runs),
        "best": spread([best(run.values.values()) for run in runs]),
        "last": spread([run.last for run in runs]),
        "baseline_last": target,
        "epochs_to_baseline": spread([epoch for epoch in reached if epoch]) | {"never": reached.count(None)},
        "gain": spread([sign * (run.last - by_seed[run.seed]) for run in compared if run.seed in by_seed]),
        "curve": {"epoch": epochs, **{key: [point[key] for point in curve] for key in ("mean", "std")}},
        "runs": [{"folder": str(run.folder), "seed": run.seed, "last": run.last} for run in runs],
    }


def cell(figures: dict, decimals: int, *, sign: str = "", note: str = "") -> str:
    """Return "49.1 ± 2.0 (note)": no deviation for a single value, a dash for none."""
    text = DASH if figures["mean"] is None else f"{figures['mean']:{sign}.{decimals}f}"
    text += "" if figures["std"] is None else f" ± {figures['std']:.{decimals}f}"
    return f"{text} ({note})" if note else text


def cells_against_baseline(summary: dict, decimals: int) -> tuple[str, str]:
    """Return the cells of the epochs to the baseline's last value and of the gain."""
    n, epochs, gain = summary["n"], summary["epochs_to_baseline"], summary["gain"]
    never = f"{epochs['never']} of {n} never" if epochs["never"] else ""
    is_compared = epochs["n"] + epochs["never"] > 0
    paired = f"{gain['n']} of {n} seeds" if is_compared and gain["n"] < n else ""
    return cell(epochs, 1, note=never), cell(gain, decimals, sign="+", note=paired)


def markdown(rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in rows]


def table(summaries: list[dict], metric: str) -> str:
    """Return the Markdown table of these groups, and lines that say what they are compared with."""
    decimals, unit = (1, " %") if "acc" in metric else (3, "")
    head = f"group|n|best {metric}{unit}|last {metric}{unit}|epochs to the baseline's last|gain, same seed".split("|")
    rows = [head, ["---", *["---:"] * 5]]
    for each in summaries:
        own = [cell(each["best"], decimals), cell(each["last"], decimals)]
        rows.append([each["label"].replace("|", "\\|"), str(each["n"]), *own, *cells_against_baseline(each, decimals)])
    notes = [each["note"] for each in summaries if each["note"]]
    ends = dict.fromkeys(
        f"{each['baseline']}, which ends at {each['baseline_last']:.{decimals}f}{unit}"
        for each in summaries
        if each["baseline"]
    )
    how_to_read = "Mean ± sample standard deviation over n seeds." + f" Baseline: {'; '.join(ends)}." * bool(ends)
    return "\n".join([*markdown(rows), "", how_to_read, *notes]) + "\n"


def new_figure(**options):
    """Return a matplotlib figure without a window; UserError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a figure needs the package matplotlib: pip install matplotlib") from error
    return Figure(layout="constrained", **options)


def plot_curves(axes, summaries: list[dict], metric: str) -> None:
    """Draw each group's mean over seeds into `axes`, with a band of one standard deviation."""
    for index, summary in enumerate(summaries):
        colour, style = COLOURS[index % len(COLOURS)], LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
        # matplotlib would read a dollar sign as the start of a formula
        text = textwrap.fill(f"{summary['label']} (n = {summary['n']})", 60).replace("$", r"\$")
        epochs, means = [epoch + 1 for epoch in summary["curve"]["epoch"]], summary["curve"]["mean"]
        marker = "o" if len(epochs) <= 40 else None
        axes.plot(epochs, means, style, color=colour, marker=marker, ms=4, lw=2, label=text)
        if summary["n"] > 1:
            sides = list(zip(means, summary["curve"]["std"], strict=True))
            low, high = [value - std for value, std in sides], [value + std for value, std in sides]
            axes.fill_between(epochs, low, high, color=colour, alpha=0.2, lw=0)
    axes.set_xlabel("epoch", fontsize=13)
    axes.set_ylabel("test accuracy, %" if metric == "test_acc1" else metric, fontsize=13)
    axes.tick_params(labelsize=12)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=12, frameon=False)


def draw(tables: dict[str, list[dict]], metric: str, path: Path) -> None:
    """Write a picture with a panel of curves for each table, by its title."""
    columns = min(2, len(tables))
    rows = -(-len(tables) // columns)
    most = max(map(len, tables.values()))
    figure = new_figure(figsize=(8 * columns, max(5, 0.5 * most) * rows))  # the legend needs its height
    for index, (title, summaries) in enumerate(tables.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        plot_curves(axes, summaries, metric)
        axes.set_title(textwrap.fill(title, 60).replace("$", r"\$"), fontsize=13, loc="left")
    figure.suptitle("mean over seeds, band: ± 1 standard deviation", fontsize=11, x=0.01, ha="left", color="#555555")
    figure.savefig(path, dpi=120)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="compare.py",
        description="Group finished runs by their settings and compare them over seeds.",
        epilog="Runs belong together if all options that can change the result agree, except the seed. With --ignore "
        "initialize all initialized runs count as one setting, for example when each seed has its own teacher.",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder with runs below it")
    add("--metric", default="test_acc1", help="key of log.txt (default: %(default)s)")
    baseline = "label of a group, or folder with its runs (default: random init with the same settings)"
    add("--baseline", metavar="GROUP", help=baseline)
    add("--ignore", action="append", default=[], metavar="SETTING", help="do not group by this setting; repeatable")
    add("--plot", type=Path, metavar="FILE", help="draw the curves (.png, .svg, .pdf)")
    add("--markdown", type=Path, metavar="FILE", help="write the table to a file too")
    add("--json", type=Path, metavar="FILE", help="write all figures and curves")
    options = parser.parse_args(argv)
    if options.plot and options.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot {options.plot}: expected a name that ends in .png, .svg or .pdf")
    return options


def main(argv: list[str] | None = None) -> None:
    """Print the table, and write the files that the options name."""
    options = parse(argv)
    try:
        text = compare(options)
    except OSError as error:
        raise UserError(str(error)) from error
    print(text, end="")


def compare(options: argparse.Namespace) -> str:
    """Return the table, and write the files that the options name."""
    groups = group_runs(read_runs(find_runs(options.runs), options.metric), options.ignore)
    tables = summaries_by_table(groups, options.baseline and named_group(groups, options.baseline), options.metric)
    titles = {title: f"## {title}\n\n" if len(tables) > 1 else "" for title in tables}
    text = "\n".join(titles[title] + table(summaries, options.metric) for title, summaries in tables.items())
    for file in filter(None, (options.markdown, options.json, options.plot)):
        file.parent.mkdir(parents=True, exist_ok=True)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json:
        result = {"metric": options.metric, "groups": [each for summaries in tables.values() for each in summaries]}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        draw(tables, options.metric, options.plot)
    return text


def summaries_by_table(groups: list[Group], wanted: Group | None, metric: str) -> dict[str, list[dict]]:
    """Return the figures of each table's groups, each baseline before what is compared with it.

    The baseline is `wanted`, or else for each initialized group the random-init group of its settings.
    """
    baselines = [wanted or baseline_of(group, groups) for group in groups]

    def place(index: int) -> tuple[bool, int, bool]:
        without = baselines[index] is None and not groups[index].is_random
        anchor = groups.index(baselines[index] or groups[index])
        return without, anchor, anchor != index

    tables = {group.table: [] for group in groups}
    for index in sorted(range(len(groups)), key=place):
        group, baseline = groups[index], baselines[index]
        figures = summarize(group.label, group.runs, baseline and baseline.runs, metric)
        compared_with = {"table": group.table, "baseline": None, "note": ""}
        if baseline and baseline is not group:
            compared_with["baseline"] = baseline.label if baseline.table == group.table else baseline.name
            if others := differences(group, baseline):
                compared_with["note"] = f"{group.label} differs from its baseline in {few(others)}."
        elif not group.is_random and not baseline:
            compared_with["note"] = f"No baseline for {group.label}: {why_without_baseline(group, groups)}."
        tables[group.table].append(figures | compared_with)
    return tables


if __name__ == "__main__":
    sys.exit(run_script(main))
