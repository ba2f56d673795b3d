"""Read finished runs of main.py from their folders. Standard library only, for compare.py and study/report.py."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from options import FREE_ON_RESUME
from utils import UserError


class FinishedRun(NamedTuple):  # a dataclass would make compare.py -h wait for another import
    folder: Path
    seed: int
    settings: dict[str, str]  # "initialize" is the sha256 of the file, "" for random init
    initialize_path: str
    values: dict[int, float]  # the metric by epoch, counted from 0
    last: float  # the metric after the last epoch


def warn(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: warning: {message}", file=sys.stderr)


def find_runs(paths: list[Path]) -> list[Path]:
    """Return the folders at or below `paths` that hold a config.json or a log.txt, each once."""
    by_place: dict[Path, Path] = {}
    for path in paths:
        folders = sorted({file.parent for name in ("config.json", "log.txt") for file in path.rglob(name)})
        if not folders:
            raise UserError(f"{path}: no run in it or below it, expected a folder with config.json and log.txt")
        for folder in folders:
            by_place.setdefault(folder.resolve(), folder)
    return list(by_place.values())


def read_run(folder: Path, metric: str) -> FinishedRun:
    """Read the finished run in `folder`; UserError says why there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        records = [json.loads(line) for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]
        # main.py writes null for a value that was not finite
        values = {record["epoch"]: record[metric] for record in records if record.get(metric) is not None}
        initialization = config["initialization"] or {"sha256": "", "path": ""}
        settings = settings_of(config["options"], config["environment"]["processes"], initialization["sha256"])
        # what options left open, or a resumed run on other processes changed
        settings |= {name: json.dumps(value) for name, value in config.get("in_effect", {}).items()}
        if "teacher" in config:
            settings["teacher"] = config["teacher"]["sha256"][:12]
        epochs, seed = config["options"]["epochs"], config["options"]["seed"]
    except OSError as error:
        raise UserError(f"{Path(error.filename).name}: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"config.json or log.txt is damaged ({type(error).__name__}: {error})") from error
    if records and not values:
        raise UserError(f"no {metric} in log.txt, which has {', '.join(sorted(records[-1]))}")
    if epochs - 1 not in values:
        raise UserError(f"unfinished, {len(values)} of {epochs} epochs have {metric}")
    return FinishedRun(folder, seed, settings, initialization["path"], values, last=values[epochs - 1])


def settings_of(options: dict, processes: int, sha256: str) -> dict[str, str]:
    """Return everything except the seed that can change the result, as text by name.

    The initialization counts by its content, the batch by its images per update, a folder of images by its name.
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


def read_runs(folders: list[Path], metric: str) -> list[FinishedRun]:
    """Read the runs that can be compared, with a warning for each of the others that says why it cannot."""
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder, metric))
        except UserError as reason:
            warn(f"{folder} is left out: {reason}")
    if not runs:
        raise UserError(f"no finished run with {metric} is left to compare")
    return runs
