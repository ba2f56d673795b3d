"""Read finished runs of main.py from their folders. Standard library only, for compare.py, sweep.py and the study."""

import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

from files import read_text
from options.table import FREE_ON_RESUME
from options.training import training_defaults
from utils import UserError, escaped

READING_IT = ("model_key", "model_prefix")  # options on how to read the file of --initialize


class FinishedRun(NamedTuple):  # a dataclass would make compare.py -h wait for another import
    folder: Path
    seed: int
    settings: dict[str, str]  # "initialize" is the sha256 of the file, "" for random init
    facts: dict[str, str]  # the precision and the numbers of images; {} for runs of older versions
    recipe: str
    initialize_path: str
    values: dict[int, float]  # the metric by epoch, counted from 0
    last: float  # the metric after the last epoch


def warn(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: warning: {escaped(message)}", file=sys.stderr)


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


def is_finished(folder: Path, epochs: int) -> bool:
    """Return whether the run's log has its last epoch and, unless its checkpoints were deleted, its state is saved too.

    A run that was killed between the two still has to save its last checkpoint.
    """
    try:
        *_, line = read_text(folder / "log.txt").splitlines()
        last = json.loads(line)["epoch"]
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return False
    checkpoints = {path.name for path in folder.glob("checkpoint-[0-9]*.pth")}
    return last == epochs - 1 and (not checkpoints or f"checkpoint-{last}.pth" in checkpoints)


def read_run(folder: Path, metric: str) -> FinishedRun:
    """Read the finished run in `folder`; UserError says why there is none."""
    try:
        config = json.loads(read_text(folder / "config.json"))
        settings = settings_of(config)
        epochs, seed = (_whole(config["options"][name]) for name in ("epochs", "seed"))
        initialize_path = _as_text((config["initialization"] or {"path": ""})["path"])
        in_effect = {name: _as_text(value) for name, value in config.get("in_effect", {}).items()}
        recipe = _as_text(config["options"].get("recipe", "paper"))
        records = [json.loads(line) for line in read_text(folder / "log.txt").splitlines()]
        # main.py writes null for a value that was not finite
        values = {
            _whole(record["epoch"]): _finite(record[metric]) for record in records if record.get(metric) is not None
        }
    except OSError as error:
        raise UserError(f"{Path(error.filename).name}: {error.strerror}") from error
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise UserError(f"config.json or log.txt is damaged ({type(error).__name__}: {error})") from error
    if records and not values:
        raise UserError(f"no {metric} in log.txt, which has {', '.join(sorted(records[-1]))}")
    if epochs - 1 not in values:
        raise UserError(f"unfinished, {len(values)} of {epochs} epochs have {metric}")
    facts = {name: value for name, value in in_effect.items() if name not in settings}
    last = values[epochs - 1]
    return FinishedRun(folder, seed, settings, facts, recipe, initialize_path, values, last)


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r:.50} is not a whole number")
    return value


def _finite(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError(f"{value!r:.50} is not a finite number")
    return value


@functools.cache
def _defaults() -> dict:
    return training_defaults()


def _as_text(value: object) -> str:
    return escaped(value) if isinstance(value, str) else json.dumps(value, sort_keys=True).replace('"', "")


def settings_of(config: dict) -> dict[str, str]:
    """Return everything in a run's config.json except the seed that can change the result, as text by name.

    The initialization and the teacher count by their content, the batch by its images per update, a folder of images
    by its name. Options that the run's version did not have yet count with their defaults. Raises TypeError, KeyError
    or ValueError if config.json holds something else than main.py writes.
    """
    options = _defaults() | config["options"]
    batch = (options["batch_size"], options["update_freq"], config["environment"]["processes"])
    counted_otherwise = {"seed", "batch_size", "update_freq"}
    settings = {
        name: _as_text(value) for name, value in options.items() if name not in FREE_ON_RESUME | counted_otherwise
    }
    settings["images_per_update"] = str(math.prod(map(_whole, batch)))
    # what options left open, or a run changed that was resumed on other processes
    settings |= {name: _as_text(value) for name, value in config.get("in_effect", {}).items() if name in settings}
    settings["initialize"] = _as_text((config["initialization"] or {"sha256": ""})["sha256"])
    if not settings["initialize"]:  # without a file, the options on how to read it have no effect
        settings = {name: value for name, value in settings.items() if name not in READING_IT}
    if "teacher" in config:
        settings["teacher"] = escaped(config["teacher"]["sha256"])[:12]
    for name in ("data_path", "eval_data_path"):
        if options["data_set"] in ("image_folder", "IMNET") and options[name]:
            settings[name] = escaped(os.path.basename(os.path.normpath(options[name])))
    # fewer epochs, unless an earlier run made those before it
    settings["start_epoch"] = str(0 if options["resume"] else options["start_epoch"])
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
