"""Compare finished runs of main.py: group them by their settings, print a table over seeds, draw the curves.

Standard library only, so that it answers at once and runs without torch. --plot needs matplotlib.
"""

import argparse
import json
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

from training.finished import FinishedRun, find_runs, read_runs, warn
from utils import UserError, run_script

# Okabe and Ito's palette, whose colours stay apart for the colour-blind; without its yellow, which is too pale.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
DASH = "–"  # noqa: RUF001
MODEL_AND_DATA = ("model", "model_kwargs", "data_set", "data_path", "data_fraction")


def group_runs(runs: list[FinishedRun], ignore: list[str]) -> dict[str, list[FinishedRun]]:
    """Group runs of equal settings, by a label that shows what differs. Of a repeated seed the first run counts."""
    known = sorted({name for run in runs for name in run.settings})
    for name in ignore:
        if name not in known:
            raise UserError(f"--ignore {name}: no such setting; the settings are {', '.join(known)}")
    files = initialization_names(runs)
    if "initialize" in ignore:  # but keep random init apart from the rest, or there would be no baseline
        files = {sha256: "any" if sha256 else "" for sha256 in files}
    by_settings: dict[tuple, dict[int, FinishedRun]] = defaultdict(dict)
    for run in runs:
        kept = {name: value for name, value in run.settings.items() if name not in ignore}
        kept["initialize"] = files[run.settings["initialize"]]
        first = by_settings[tuple(sorted(kept.items()))].setdefault(run.seed, run)
        if first is not run:
            warn(f"{run.folder} is left out: settings and seed {run.seed} are those of {first.folder}")
    labels = label([dict(settings) for settings in by_settings])
    return {name: list(by_seed.values()) for name, by_seed in zip(labels, by_settings.values(), strict=True)}


def initialization_names(runs: list[FinishedRun]) -> dict[str, str]:
    """Return {sha256: file name}, with the file's folder or part of the sha256 if names alone are not distinct."""
    paths = {run.settings["initialize"]: Path(run.initialize_path) for run in reversed(runs)}
    for style in ("{0.name}", "{0.parent.name}/{0.name}", "{0.name} ({1:.8})"):
        names = {sha256: style.format(path, sha256) for sha256, path in paths.items()}
        if len(set(names.values())) == len(names):
            break
    return names | {"": ""}


def label(settings: list[dict[str, str]]) -> list[str]:
    """Return a label for each of `settings`, made of what differs among them, the initialization first."""
    names = ["initialize", *sorted({name for each in settings for name in each} - {"initialize"})]
    differing = [name for name in names if len({each.get(name) for each in settings}) > 1] or ["initialize"]

    def text(name: str, value: str) -> str:
        return "random init" if (name, value) == ("initialize", "") else f"{name}={value}"

    return [", ".join(text(name, each.get(name, "unset")) for name in differing) for each in settings]


def find_baselines(groups: dict[str, list[FinishedRun]], wanted: str | None) -> dict[str, str]:
    """Return {label of a group: label of its baseline}: the group that `wanted` names, for all groups.

    Without `wanted`, groups that train the same model on the same data share a baseline: their first with random init,
    or else their first.
    """
    if wanted is None:
        alike: dict[tuple, list[str]] = defaultdict(list)
        for name, runs in groups.items():
            alike[tuple(runs[0].settings.get(setting) for setting in MODEL_AND_DATA)].append(name)
        return {
            name: next((each for each in names if not groups[each][0].settings["initialize"]), names[0])
            for names in alike.values()
            for name in names
        }
    folder = Path(wanted).resolve()
    for name, runs in groups.items():
        if name == wanted or any(run.folder.resolve().is_relative_to(folder) for run in runs):
            return dict.fromkeys(groups, name)
    raise UserError(f"--baseline {wanted}: no group and no folder of one; the groups are: {'; '.join(groups)}")


def spread(values: list[float]) -> dict:
    """Return n, mean (None without values) and sample standard deviation (None for fewer than two)."""
    from statistics import mean, stdev  # here, because -h need not wait for it

    n = len(values)
    return {"n": n, "mean": mean(values) if n else None, "std": stdev(values) if n > 1 else None}


def summarize(name: str, runs: list[FinishedRun], baseline: list[FinishedRun], metric: str) -> dict:
    """Return a group's figures. A positive gain is the better one; the baseline is not compared with itself."""
    best, sign = (min, -1) if "loss" in metric else (max, 1)
    target = spread([run.last for run in baseline])["mean"]
    compared = [] if runs is baseline else runs
    reached = [
        min((epoch + 1 for epoch, value in run.values.items() if sign * value >= sign * target), default=None)
        for run in compared
    ]
    by_seed = {run.seed: run.last for run in baseline}
    epochs = sorted(set.intersection(*(set(run.values) for run in runs)))
    curve = [spread([run.values[epoch] for run in runs]) for epoch in epochs]
    return {
        "label": name,
        "n": len(runs),
        "best": spread([best(run.values.values()) for run in runs]),
        "last": spread([run.last for run in runs]),
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
    paired = f"{gain['n']} of {n} seeds" if 0 < gain["n"] < n else ""
    return cell(epochs, 1, note=never), cell(gain, decimals, sign="+", note=paired)


def markdown(rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in rows]


def table(summaries: list[dict], metric: str) -> str:
    """Return the Markdown table, each baseline before what is compared with it, and a line on how to read it."""
    decimals, unit = (1, " %") if "acc" in metric else (3, "")
    head = f"group|n|best {metric}{unit}|last {metric}{unit}|epochs to the baseline's last|gain, same seed".split("|")
    rows = [head, ["---", *["---:"] * 5]]
    for each in summaries:
        own = [cell(each["best"], decimals), cell(each["last"], decimals)]
        rows.append([each["label"].replace("|", "\\|"), str(each["n"]), *own, *cells_against_baseline(each, decimals)])
    ends = "; ".join(
        f"{each['label']}, which ends at {each['last']['mean']:.{decimals}f}{unit}"
        for each in summaries
        if each["baseline"] == each["label"]
    )
    note = f"Mean ± sample standard deviation over n seeds. Baseline: {ends}."
    return "\n".join([*markdown(rows), "", note]) + "\n"


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


def draw(summaries: list[dict], metric: str, path: Path) -> None:
    """Write the picture of the curves."""
    figure = new_figure(figsize=(8, 5))
    axes = figure.add_subplot()
    plot_curves(axes, summaries, metric)
    axes.set_title("mean over seeds, band: ± 1 standard deviation", fontsize=11, loc="left", color="#555555")
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare.py",
        allow_abbrev=False,
        description="Group finished runs by their settings and compare them over seeds.",
        epilog="Runs belong together if all options that can change the result agree, except the seed. With --ignore "
        "initialize all initialized runs count as one setting, for example when each seed has its own teacher.",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder with runs below it")
    add("--metric", default="test_acc1", help="key of log.txt (default: %(default)s)")
    baseline = "label of a group, or folder with its runs (default: random init of the same model on the same data)"
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
        compare(options)
    except OSError as error:
        raise UserError(str(error)) from error


def compare(options: argparse.Namespace) -> None:
    groups = group_runs(read_runs(find_runs(options.runs), options.metric), options.ignore)
    baselines = find_baselines(groups, options.baseline)
    order = list(dict.fromkeys(baselines.values()))
    names = sorted(baselines, key=lambda name: (order.index(baselines[name]), name != baselines[name]))
    summaries = [
        summarize(name, groups[name], groups[baselines[name]], options.metric) | {"baseline": baselines[name]}
        for name in names
    ]
    text = table(summaries, options.metric)
    print(text, end="")
    for file in filter(None, (options.markdown, options.json, options.plot)):
        file.parent.mkdir(parents=True, exist_ok=True)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json:
        result = {"metric": options.metric, "groups": summaries}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        draw(summaries, options.metric, options.plot)


if __name__ == "__main__":
    sys.exit(run_script(main))
