"""Compares finished runs of main.py: groups them by their settings, prints a table over seeds, draws the curves.

Standard library only, so that it answers at once and runs where no torch is; matplotlib for --plot alone.
"""

import argparse
import json
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from options import FREE_ON_RESUME

# The palette of Okabe and Ito, which stays apart in the common kinds of colour blindness; yellow left out (too pale).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
DASH = "–"  # noqa: RUF001
MODEL_AND_DATA = ("model", "model_kwargs", "data_set", "data_path", "data_fraction")


class CompareError(Exception):
    """What cannot be compared, and why, in one line."""


@dataclass(frozen=True)
class Run:
    folder: Path
    seed: int
    settings: dict[str, str]  # "initialize" is the sha256 of the file, "" for random values
    initialize_path: str
    values: dict[int, float]  # the metric by epoch, counted from 0
    last: float


def warn(message: str) -> None:
    print(f"compare.py: warning: {message}", file=sys.stderr)


# ---- reading ----


def find_runs(paths: list[Path]) -> list[Path]:
    """The folders at or below `paths` that hold a config.json or a log.txt, each once."""
    found: dict[Path, Path] = {}
    for path in paths:
        folders = sorted({file.parent for name in ("config.json", "log.txt") for file in path.rglob(name)})
        if not folders:
            raise CompareError(f"{path}: no run in it or below it, expected a folder with config.json and log.txt")
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def read_run(folder: Path, metric: str) -> Run:
    """The finished run in `folder`; CompareError says why there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        records = [json.loads(line) for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]
        # a value that was not finite is null
        values = {record["epoch"]: record[metric] for record in records if record.get(metric) is not None}
        initialization = config["initialization"] or {"sha256": "", "path": ""}
        settings = settings_of(config["options"], config["environment"]["processes"], initialization["sha256"])
        epochs, seed = config["options"]["epochs"], config["options"]["seed"]
    except OSError as error:
        raise CompareError(f"{Path(error.filename).name}: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CompareError(f"config.json or log.txt is damaged ({type(error).__name__}: {error})") from error
    if records and not values:
        raise CompareError(f"no {metric} in log.txt, which has {', '.join(sorted(records[-1]))}")
    if epochs - 1 not in values:
        raise CompareError(f"unfinished, {len(values)} of {epochs} epochs have {metric}")
    return Run(folder, seed, settings, initialization["path"], values, last=values[epochs - 1])


def settings_of(options: dict, processes: int, sha256: str) -> dict[str, str]:
    """Everything that can change the result, the seed apart, as text by name.

    An initialization counts by its content, the batch by the images of an update, folders of images by their names.
    """
    counted_otherwise = {"seed", "batch_size", "update_freq"}
    settings = {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True).replace('"', "")
        for name, value in options.items()
        if name not in FREE_ON_RESUME | counted_otherwise
    }
    settings["images_per_update"] = str(options["batch_size"] * options["update_freq"] * processes)
    settings["initialize"] = sha256
    for name in ("data_path", "eval_data_path"):
        if options["data_set"] in ("image_folder", "IMNET") and options[name]:
            settings[name] = Path(options[name]).name
    return settings


def read_runs(folders: list[Path], metric: str) -> list[Run]:
    """The runs that can be compared; a warning names each of the others and why."""
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder, metric))
        except CompareError as reason:
            warn(f"{folder} is left out: {reason}")
    if not runs:
        raise CompareError(f"no finished run with {metric} is left to compare")
    return runs


# ---- grouping ----


def group_runs(runs: list[Run], ignore: list[str]) -> dict[str, list[Run]]:
    """Runs of equal settings by what tells their settings from the others'; of a repeated seed the first run counts."""
    known = sorted({name for run in runs for name in run.settings})
    for name in ignore:
        if name not in known:
            raise CompareError(f"--ignore {name}: no such setting; the settings are {', '.join(known)}")
    files = initialization_names(runs)
    if "initialize" in ignore:  # random or not remains a difference, or the baseline would be lost
        files = {sha256: "any" if sha256 else "" for sha256 in files}
    by_settings: dict[tuple, dict[int, Run]] = defaultdict(dict)
    for run in runs:
        kept = {name: value for name, value in run.settings.items() if name not in ignore}
        kept["initialize"] = files[run.settings["initialize"]]
        first = by_settings[tuple(sorted(kept.items()))].setdefault(run.seed, run)
        if first is not run:
            warn(f"{run.folder} is left out: settings and seed {run.seed} are those of {first.folder}")
    labels = label([dict(settings) for settings in by_settings])
    return {name: list(by_seed.values()) for name, by_seed in zip(labels, by_settings.values(), strict=True)}


def initialization_names(runs: list[Run]) -> dict[str, str]:
    """{sha256: the file's name}, with its folder or some of the sha256 where names alone are not distinct."""
    paths = {run.settings["initialize"]: Path(run.initialize_path) for run in reversed(runs)}
    choices = (
        {sha256: text.format(path, sha256) for sha256, path in paths.items()}
        for text in ("{0.name}", "{0.parent.name}/{0.name}", "{0.name} ({1:.8})")
    )
    return next(names for names in choices if len(set(names.values())) == len(names)) | {"": ""}


def label(settings: list[dict[str, str]]) -> list[str]:
    """A label for each of `settings`, made of what differs among them, the initialization first."""
    names = ["initialize", *sorted({name for each in settings for name in each} - {"initialize"})]
    differing = [name for name in names if len({each.get(name) for each in settings}) > 1] or ["initialize"]

    def text(name: str, value: str) -> str:
        return "random init" if (name, value) == ("initialize", "") else f"{name}={value}"

    return [", ".join(text(name, each.get(name, "unset")) for name in differing) for each in settings]


def find_baselines(groups: dict[str, list[Run]], wanted: str | None) -> dict[str, str]:
    """{a group's label: its baseline's}: the group that `wanted` names, for all of them.

    Without it the first of random values that trains the same model on the same data, or else the first that does.
    """
    if wanted is None:
        questions: dict[tuple, list[str]] = defaultdict(list)
        for name, runs in groups.items():
            questions[tuple(runs[0].settings.get(setting) for setting in MODEL_AND_DATA)].append(name)
        return {
            name: next((each for each in names if not groups[each][0].settings["initialize"]), names[0])
            for names in questions.values()
            for name in names
        }
    folder = Path(wanted).resolve()
    for name, runs in groups.items():
        if name == wanted or any(run.folder.resolve().is_relative_to(folder) for run in runs):
            return dict.fromkeys(groups, name)
    raise CompareError(f"--baseline {wanted}: no group and no folder of one; the groups are: {'; '.join(groups)}")


# ---- figures ----


def spread(values: list[float]) -> dict:
    """n, mean (None for no value) and sample standard deviation (None for fewer than two)."""
    n = len(values)
    return {"n": n, "mean": mean(values) if n else None, "std": stdev(values) if n > 1 else None}


def summarize(name: str, runs: list[Run], baseline: list[Run], metric: str) -> dict:
    """The figures of a group, a positive gain being the better; the baseline is not compared with itself."""
    best, sign = (min, -1) if "loss" in metric else (max, 1)
    target = mean(run.last for run in baseline)
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


# ---- output ----


def cell(figures: dict, decimals: int, *, sign: str = "", note: str = "") -> str:
    """ "49.1 ± 2.0", without the deviation where there is one value, a dash where there is none; `note` in brackets."""
    text = DASH if figures["mean"] is None else f"{figures['mean']:{sign}.{decimals}f}"
    text += "" if figures["std"] is None else f" ± {figures['std']:.{decimals}f}"
    return f"{text} ({note})" if note else text


def row(summary: dict, decimals: int) -> list[str]:
    n, epochs, gain = summary["n"], summary["epochs_to_baseline"], summary["gain"]
    return [
        summary["label"].replace("|", "\\|"),
        str(n),
        cell(summary["best"], decimals),
        cell(summary["last"], decimals),
        cell(epochs, 1, note=f"{epochs['never']} of {n} never" if epochs["never"] else ""),
        cell(gain, decimals, sign="+", note=f"{gain['n']} of {n} seeds" if 0 < gain["n"] < n else ""),
    ]


def markdown(rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table, its columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in rows]


def table(summaries: list[dict], metric: str) -> str:
    """The Markdown table, each baseline before what is compared with it, and the line that says how to read it."""
    decimals, unit = (1, " %") if "acc" in metric else (3, "")
    head = f"group|n|best {metric}{unit}|last {metric}{unit}|epochs to the baseline's last|gain, same seed".split("|")
    lines = markdown([head, ["---", *["---:"] * 5], *(row(summary, decimals) for summary in summaries)])
    ends = "; ".join(
        f"{each['label']}, which ends at {each['last']['mean']:.{decimals}f}{unit}"
        for each in summaries
        if each["baseline"] == each["label"]
    )
    note = f"Mean ± sample standard deviation over n seeds. Baseline: {ends}."
    return "\n".join([*lines, "", note]) + "\n"


def new_figure(**options):
    """A matplotlib figure, without a window; CompareError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CompareError("a figure needs the package matplotlib: pip install matplotlib") from error
    return Figure(layout="constrained", **options)


def plot_curves(axes, summaries: list[dict], metric: str) -> None:
    """Draw into `axes` the mean over seeds, and a band of one standard deviation, of each group."""
    for index, summary in enumerate(summaries):
        colour, style = COLOURS[index % len(COLOURS)], LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
        # a dollar sign would start a formula
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
    """Write the curves: mean over seeds, band of one standard deviation."""
    figure = new_figure(figsize=(8, 5))
    axes = figure.add_subplot()
    plot_curves(axes, summaries, metric)
    axes.set_title("mean over seeds, band: ± 1 standard deviation", fontsize=11, loc="left", color="#555555")
    figure.savefig(path, dpi=150)


# ---- command line ----


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare.py",
        allow_abbrev=False,
        description="Group finished runs by their settings and compare them over seeds.",
        epilog="Runs belong together when all options agree that can change the result, the seed apart. With --ignore "
        "initialize all initialized runs count as one setting, as where each seed has a teacher of its own.",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder with runs below it")
    add("--metric", default="test_acc1", help="key of log.txt (default: %(default)s)")
    add(
        "--baseline",
        metavar="GROUP",
        help="label of a group, or folder with its runs (default: random init of the same model on the same data)",
    )
    add("--ignore", action="append", default=[], metavar="SETTING", help="a setting that parts no groups; repeatable")
    add("--plot", type=Path, metavar="FILE", help="draw the curves (.png, .svg, .pdf)")
    add("--markdown", type=Path, metavar="FILE", help="write the table to a file too")
    add("--json", type=Path, metavar="FILE", help="write all figures and curves")
    wanted = parser.parse_args(arguments)
    if wanted.plot and wanted.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot {wanted.plot}: expected a name that ends in .png, .svg or .pdf")
    return wanted


def compare(wanted: argparse.Namespace) -> None:
    groups = group_runs(read_runs(find_runs(wanted.runs), wanted.metric), wanted.ignore)
    baselines = find_baselines(groups, wanted.baseline)
    order = list(dict.fromkeys(baselines.values()))
    names = sorted(baselines, key=lambda name: (order.index(baselines[name]), name != baselines[name]))
    summaries = [
        summarize(name, groups[name], groups[baselines[name]], wanted.metric) | {"baseline": baselines[name]}
        for name in names
    ]
    text = table(summaries, wanted.metric)
    print(text, end="")
    for file in filter(None, (wanted.markdown, wanted.json, wanted.plot)):
        file.parent.mkdir(parents=True, exist_ok=True)
    if wanted.markdown:
        wanted.markdown.write_text(text, encoding="utf-8")
    if wanted.json:
        result = {"metric": wanted.metric, "groups": summaries}
        wanted.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if wanted.plot:
        draw(summaries, wanted.metric, wanted.plot)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0, or 1 after a one-line error. Usage errors exit with 2."""
    wanted = parse(arguments)
    try:
        compare(wanted)
    except (CompareError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without the table's signs shows a question mark for them
    sys.exit(main())
