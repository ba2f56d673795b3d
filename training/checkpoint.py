"""The training state of a run: where it is, what a checkpoint holds, and the files."""

import argparse
import contextlib
import io
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from files import regular
from options.training import training_defaults
from training.folder import RunFolder
from utils import Stopped, UserError, first_line, lacked_resources
from weightfiles.read import read_file

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "weight-selection checkpoint 1"
STATE = {
    "epoch": int,
    "step": int,
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "metrics": dict,
    "best": dict,
    "options": dict,
    "processes": int,
    "precision": str,
    "data": dict,
}
# Keys that older files lack, with the value that they imply. `update_freq` is the one in effect; 0 means as in `options`.
# `threads` is torch's number per process; 0 means unknown.
NEWER = {"sums": {}, "skips_in_a_row": 0, "bad_images": [], "update_freq": 0, "best_epochs": {}, "threads": 0}
FIGURES = ("sums", "best", "best_epochs")
BEST_CHECKPOINTS = {"test_acc1": "checkpoint-best.pth", "test_acc1_ema": "checkpoint-best-ema.pth"}


@dataclass
class Progress:
    """Where a run is: `done` updates into `epoch`, the sums over these updates, the best figures so far and their epochs."""

    epoch: int = 0
    done: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_epochs: dict[str, int] = field(default_factory=dict)
    began: float = 0.0

    @classmethod
    def after(cls, state: dict, steps: int) -> "Progress":
        """Continue after a checkpoint, inside its epoch or at the start of the next; `steps` updates per epoch."""
        best_epochs = dict(state["best_epochs"])
        if state["sums"]:
            done = state["step"] - state["epoch"] * steps
            return cls(state["epoch"], done, state["sums"], best_epochs=best_epochs)
        return cls(state["epoch"] + 1, best_epochs=best_epochs)

    def start_epoch(self) -> None:
        """Start the clock of the epoch, which includes the time that an earlier process spent on it."""
        self.began = time.monotonic() - self.sums.get("seconds", 0.0)

    def seconds(self) -> float:
        """Return the seconds spent on this epoch so far."""
        return time.monotonic() - self.began

    def improve(self, record: dict) -> list[str]:
        """Take over the figures of `record` that beat the best so far; return their names."""
        improved = [name for name in BEST_CHECKPOINTS if record.get(name, -1.0) > self.best.get(name, -1.0)]
        self.best |= {name: record[name] for name in improved}
        self.best_epochs |= dict.fromkeys(improved, self.epoch)
        return improved

    def end_epoch(self) -> None:
        """Move on to the next epoch."""
        self.epoch, self.done, self.sums = self.epoch + 1, 0, {}

    def state(self, steps: int, metrics: dict | None = None) -> dict:
        """Return the entries of a checkpoint inside an epoch or, with its `metrics`, at its end."""
        return {
            "epoch": self.epoch,
            "step": self.epoch * steps + self.done,
            "best": self.best,
            "best_epochs": self.best_epochs,
            "sums": {} if metrics else self.sums | {"seconds": self.seconds()},
            "metrics": metrics or {},
        }


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in `folder`: one every `freq` epochs and after the last, and those saved within epochs.

    `origin` describes the run and goes into each file: options, data, precision. The `keep` newest numbered files stay.
    """

    folder: RunFolder
    origin: dict
    epochs: int
    freq: int = 1
    keep: int = 1

    def save(self, state: dict, improved: Sequence[str]) -> None:
        """Write a state under the names of the figures that improved, and under its number if one is due."""
        state = {**state, **self.origin}
        for name in improved:
            self.folder.write(BEST_CHECKPOINTS[name], to_bytes(state))
        done = state["epoch"] + 1
        if state["sums"] or done % self.freq == 0 or done == self.epochs:
            save_numbered(self.folder, state, keep=self.keep)


@contextlib.contextmanager
def saving_first(save: Callable) -> Iterator[None]:
    """Save before an evaluation's error or request to stop ends the run: resumed, it begins with the evaluation."""
    try:
        yield
    except Stopped:
        save()
        raise
    except Exception:
        try:
            save(alone=True)
        except Exception as error:  # the evaluation's own error says why the run ends
            log.error("the epoch before the evaluation could not be saved either: %s", first_line(error))
        raise


def to_bytes(state: dict) -> memoryview:
    """Return the file that holds a training state of plain types and tensors."""
    buffer = io.BytesIO()  # torch.save to a file does not report a full disk
    torch.save({"format": CHECKPOINT_FORMAT, **state}, buffer)
    return buffer.getbuffer()


def begins_as_checkpoint(path: Path) -> bool:
    """Return whether a file, be it whole or damaged, was written as a checkpoint, or is empty. UserError if not readable."""
    try:
        with open(path, "rb", opener=regular) as file:
            start = file.read(1024)  # the pickle comes first in the archive, and "format" first in the pickle
    except ValueError:
        return False
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return not start or CHECKPOINT_FORMAT.encode() in start


def read_checkpoint(path: Path) -> dict:
    """Read a training state to the CPU. UserError if the file is damaged or no run wrote it."""
    return check_checkpoint(path, read_file(path))


def check_checkpoint(path: Path, state: dict) -> dict:
    """Return the training state that was read from `path`, with values for keys that it lacks. UserError if it is none."""
    if state.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project; weights to start from go to --initialize")
    state = NEWER | state
    for name, kind in (STATE | {name: type(value) for name, value in NEWER.items()}).items():
        if not isinstance(state.get(name), kind):
            raise UserError(f"{path} is not a valid checkpoint: `{name}` is missing or has the wrong type")
    for name in FIGURES:
        if not all(isinstance(value, int | float) for value in state[name].values()):
            raise UserError(f"{path} is not a valid checkpoint: `{name}` holds a value that is not a number")
    return state


def options_of(path: Path, state: dict) -> argparse.Namespace:
    """Return the options of the checkpoint's run, with the defaults of those that it does not know. UserError if damaged."""
    options = training_defaults()
    for name, default in options.items():
        value = state["options"].get(name, default)
        kind = float | int | None if isinstance(default, float | int) else type(default)  # recipes leave --lr open
        if not (default is None or isinstance(value, kind)):
            raise UserError(f"{path}: the options in this checkpoint are damaged: {name} is {value!r}")
        options[name] = value
    return argparse.Namespace(**options)


def position_of(state: dict) -> tuple[int, float]:
    """Return (epoch, updates done), which orders states; the updates are infinite at the end of an epoch."""
    return state["epoch"], state["step"] if state["sums"] else math.inf


def position_in_name(path: Path) -> tuple[int, float]:
    """Return the same for the state in checkpoint-<epoch>.pth or checkpoint-<epoch>-<step>.pth."""
    epoch, _, step = path.stem.removeprefix("checkpoint-").partition("-")
    return int(epoch), int(step) if step else math.inf


def longer(path: Path) -> str:
    """Say how to train longer than the run of a checkpoint, whose schedule ends with its last epoch."""
    return f"to train longer, start another run from its weights: --initialize {path} and another --output_dir"


def numbered_checkpoints(folder: Path) -> list[Path]:
    """List checkpoint-<epoch>.pth and checkpoint-<epoch>-<step>.pth of a folder, newest first; none if it does not exist.

    UserError if it cannot be listed: a run must not start anew because its checkpoints are out of reach.
    """
    try:
        names = os.listdir(folder)  # Path.glob finds nothing in a file, or without permission
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder} cannot be searched for checkpoints: {error.strerror}") from error
    files = (folder / name for name in names if re.fullmatch(r"checkpoint-\d+(-\d+)?\.pth", name))
    return sorted(files, key=position_in_name, reverse=True)


def newest_checkpoint(paths: list[Path]) -> tuple[Path, dict] | None:
    """Return the first of these files that can be read, and its state; warn of each damaged one before it.

    None if there is no file. UserError if there are files and none can be read, if memory or a limit is exhausted, or if the
    first one is not of the epoch in its name: a copy under a higher number would win over all that is saved later.
    """
    for path in paths:
        try:
            state = read_checkpoint(path)
        except UserError as error:
            if lacked_resources(error):  # the file may be whole
                raise
            log.warning("%s%s", error, "; trying the one before it" * (path != paths[-1]))
            continue
        if position_of(state) != position_in_name(path):
            named = _name_of(state)
            raise UserError(f"{path} holds what was saved as {named}: give it another name, or remove it")
        return path, state
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {paths[0].parent} can be read")
    return None


def checkpoint_of(location: Path, key: str) -> Path:
    """Return the file that `location` names or, in a folder, the best or else the newest checkpoint that can be read.

    With the key "model_ema", the best is that of the moving average if the run evaluated it. UserError if there is none.
    """
    if not os.path.isdir(location):  # Path.is_dir raises for a name that is too long
        return location
    metrics = ["test_acc1_ema"] * (key == "model_ema") + ["test_acc1"]
    for path in (location / BEST_CHECKPOINTS[metric] for metric in metrics):
        if os.path.exists(path):
            return path
    newest = newest_checkpoint(numbered_checkpoints(location))
    if newest is None:
        raise UserError(f"{location} has no checkpoint of main.py: wanted {path.name} or checkpoint-<epoch>.pth")
    log.info("%s has no %s: the newest checkpoint, %s, is taken", location, path.name, newest[0].name)
    return newest[0]


def save_numbered(folder: RunFolder, state: dict, *, keep: int) -> None:
    """Write a state under its number. Once it is safe, delete all numbered files up to it but the `keep` newest."""
    folder.write(_name_of(state), to_bytes(state))
    position = position_of(state)
    for path in [path for path in numbered_checkpoints(folder.path) if position_in_name(path) <= position][keep:]:
        folder.remove(path.name)


def _name_of(state: dict) -> str:
    epoch, step = position_of(state)
    return f"checkpoint-{epoch}.pth" if step == math.inf else f"checkpoint-{epoch}-{step}.pth"
