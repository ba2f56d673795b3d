"""The training state of a run: what it holds, and its files."""

import io
import logging
import math
import re
from pathlib import Path

import torch

from utils import UserError, write_atomically
from weightfiles.read import read_file

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "weight-selection checkpoint 1"
STATE = {"epoch": int, "step": int, "model": dict, "optimizer": dict, "scaler": dict, "metrics": dict, "best": dict,
    "options": dict, "processes": int, "precision": str, "data": dict}  # fmt: skip
# what older files lack, and what that means; update_freq is what is in effect, 0 for what the options say
NEWER = {"sums": {}, "skips_in_a_row": 0, "bad_images": [], "update_freq": 0}
FIGURES = ("sums", "best")
BEST_CHECKPOINTS = {"test_acc1": "checkpoint-best.pth", "test_acc1_ema": "checkpoint-best-ema.pth"}


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a training state of plain types and tensors to `path`, whole or not at all."""
    buffer = io.BytesIO()  # torch's own writing to a full disk does not say that it is full
    torch.save({"format": CHECKPOINT_FORMAT, **state}, buffer)
    write_atomically(path, buffer.getbuffer())


def read_checkpoint(path: Path) -> dict:
    """A training state as `save_checkpoint` wrote it, on the CPU; UserError for anything else or a damaged file."""
    state = read_file(path)
    if state.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project; weights to start from go to --initialize")
    state = NEWER | state
    kinds = STATE | {name: type(value) for name, value in NEWER.items()}
    lacking = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
    if lacking:
        raise UserError(f"{path} is not a whole checkpoint: {', '.join(lacking)} lacks or is of another kind")
    if not all(isinstance(value, int | float) for part in FIGURES for value in state[part].values()):
        raise UserError(f"{path} is not a whole checkpoint: {' or '.join(FIGURES)} holds something that is no number")
    return state


def position_of(state: dict) -> tuple[int, float]:
    """The epoch of a training state and the updates done by then, infinite at the end of the epoch: states in order."""
    return state["epoch"], state["step"] if state["sums"] else math.inf


def position_in_name(path: Path) -> tuple[int, float]:
    """The same of the state in checkpoint-<epoch>.pth or checkpoint-<epoch>-<step>.pth."""
    epoch, _, step = path.stem.removeprefix("checkpoint-").partition("-")
    return int(epoch), int(step) if step else math.inf


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The files checkpoint-<epoch>.pth and checkpoint-<epoch>-<step>.pth of a folder, newest first."""
    files = (path for path in folder.glob("checkpoint-*.pth") if re.fullmatch(r"checkpoint-\d+(-\d+)?", path.stem))
    return sorted(files, key=position_in_name, reverse=True)


def newest_checkpoint(paths: list[Path]) -> tuple[Path, dict] | None:
    """The first readable of these files and its state; a damaged one is named in a warning and passed over.

    None when there is no file. Raises UserError when there are some and none can be read.
    """
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            log.warning("%s%s", error, "; trying the one before it" * (path != paths[-1]))
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {paths[0].parent} can be read")
    return None


def save_numbered(folder: Path, state: dict, *, keep: int) -> None:
    """Write a state under its number; of the numbered files the `keep` newest stay, once this one is safe."""
    epoch, step = position_of(state)
    name = f"checkpoint-{epoch}.pth" if step == math.inf else f"checkpoint-{epoch}-{step}.pth"
    save_checkpoint(folder / name, state)
    for path in [path for path in numbered_checkpoints(folder) if position_in_name(path) <= (epoch, step)][keep:]:
        path.unlink(missing_ok=True)
