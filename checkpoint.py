"""The training state of a run: what it holds, its files, and going on from one."""

import json
import logging
import re
from pathlib import Path

import torch
from torch import nn

from models import check_fit
from options import FREE_ON_RESUME, training_defaults
from utils import UserError, write_atomically
from weights import read_file

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "weight-selection checkpoint 1"
STATE = {"epoch": int, "step": int, "model": dict, "optimizer": dict, "scaler": dict, "metrics": dict, "best": dict,
    "options": dict, "processes": int, "precision": str, "data": dict}  # fmt: skip
BEST_CHECKPOINTS = {"test_acc1": "checkpoint-best.pth", "test_acc1_ema": "checkpoint-best-ema.pth"}


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a training state of plain types and tensors to `path`, whole or not at all."""
    write_atomically(path, lambda file: torch.save({"format": CHECKPOINT_FORMAT, **state}, file))


def read_checkpoint(path: Path) -> dict:
    """A training state as `save_checkpoint` wrote it, on the CPU; UserError for anything else or a damaged file."""
    state = read_file(path)
    if state.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project; weights to start from go to --initialize")
    lacking = [name for name, kind in STATE.items() if not isinstance(state.get(name), kind)]
    if lacking:
        raise UserError(f"{path} is not a whole checkpoint: {', '.join(lacking)} lacks or is of another kind")
    return dict(state)


def epoch_of(path: Path) -> int:
    """The number in checkpoint-<epoch>.pth."""
    return int(path.stem.removeprefix("checkpoint-"))


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The files checkpoint-<epoch>.pth of a folder, newest epoch first."""
    files = (path for path in folder.glob("checkpoint-*.pth") if re.fullmatch(r"checkpoint-\d+", path.stem))
    return sorted(files, key=epoch_of, reverse=True)


def newest_checkpoint(paths: list[Path]) -> tuple[Path, dict] | None:
    """The first readable of these files and its state; a damaged one is named in a warning and passed over.

    None when there is no file. Raises UserError when there are some and none can be read.
    """
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            log.warning("%s; trying the one before it", error)
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {paths[0].parent} can be read")
    return None


def find_checkpoint(
    resume: str, output_dir: Path | None, *, auto_resume: bool, training: bool
) -> tuple[Path, dict] | None:
    """What a run goes on from: the file `resume`, else the newest in `output_dir`, else None.

    Raises UserError where training would mix two runs in one folder.
    """
    folder = numbered_checkpoints(output_dir) if output_dir else []
    if resume:
        state = read_checkpoint(Path(resume))
        later = [path for path in folder if epoch_of(path) > state["epoch"]]
        if later and training:
            raise UserError(
                f"--resume {resume} is of epoch {state['epoch']}, but --output_dir has {later[0]}: name another folder"
            )
        return Path(resume), state
    if folder and not auto_resume and training:
        raise UserError(f"--auto_resume false, but --output_dir has {folder[0]} of another run: name another folder")
    return newest_checkpoint(folder) if auto_resume else None


def differing(then: dict, now: dict) -> list[str]:
    """What differs between two runs' options where it decides the weights, each as a phrase."""
    names = [name for name in now if name not in FREE_ON_RESUME and then.get(name) != now[name]]
    return [f"--{name} was {then.get(name)}, is {now[name]}" for name in names]


def check_same_settings(path: Path, saved: dict, options: dict, processes: int, precision: str) -> None:
    """UserError naming what differs between a checkpoint's settings and this run's, where it decides the weights.

    Another number of processes is none of it where `--update_freq` keeps the total batch: the same images make the
    same updates, shared out differently.
    """
    then, freely = training_defaults() | saved["options"], {"update_freq": None}  # older ones lack newer options
    differences = differing(then | freely, options | freely)
    if then["update_freq"] * saved["processes"] != options["update_freq"] * processes:
        was, now = f"{saved['processes']} x {then['update_freq']}", f"{processes} x {options['update_freq']}"
        differences.append(f"processes x --update_freq was {was}, is {now}")
    if saved["precision"] != precision:
        differences.append(f"the precision was {saved['precision']}, is {precision} (--device, --use_amp, --amp_dtype)")
    if differences:
        listed = ", ".join(differences)
        raise UserError(f"{path} is of a run with other settings: {listed}; take those, or another --output_dir")


def check_same_data(path: Path, saved: dict, data: dict) -> None:
    """UserError if the classes, or the number of training images where both are known, are not the checkpoint's."""
    for name, value in data.items():
        then = saved["data"].get(name)
        if None not in (value, then) and then != value:
            raise UserError(f"{path} is of a run on other data: its {name} were {then}, not {value}"[:400])


def check_same_optimizer(path: Path, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """UserError unless an optimizer's saved state has a shape for each parameter: fused kernels do not look."""
    shapes = [list(parameter.shape) for group in optimizer.param_groups for parameter in group["params"]]
    try:
        fits = [len(group["params"]) for group in state["param_groups"]] == [
            len(g["params"]) for g in optimizer.param_groups
        ]
        fits &= all("lr_scale" in group for group in state["param_groups"])
        for number, values in state["state"].items():
            tensors = [value for value in values.values() if isinstance(value, torch.Tensor) and value.dim()]
            fits &= all(list(value.shape) == shapes[number] for value in tensors)
    except (AttributeError, LookupError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"{path}: the optimizer's state does not fit this run's parameters; use another checkpoint")


def check_unused(folder: Path, options: dict) -> None:
    """UserError if a folder without checkpoints has the log of a run that a new one would overwrite.

    The log of a run of the same settings that ended before its first checkpoint is no loss.
    """
    log_file = folder / "log.txt"
    if not log_file.exists() or not log_file.stat().st_size:
        return
    try:
        then = json.loads((folder / "config.json").read_text())["options"]
        lost = not then["save_ckpt"] or differing(then, options)
    except (OSError, ValueError, KeyError, TypeError):
        lost = True
    if lost:
        raise UserError(f"--output_dir {folder} has the log.txt of another run: name another folder")


def bring_best(path: Path, saved: dict, folder: Path) -> dict[str, float]:
    """The best figures that a run resumed from `path` still has the files of, in `folder`.

    From another folder the file is brought along, if it is not of an epoch after the one resumed from.
    """
    best = {}
    for metric, value in saved["best"].items():
        here, there = folder / BEST_CHECKPOINTS[metric], path.parent / BEST_CHECKPOINTS[metric]
        if not here.exists() and there.exists() and read_checkpoint(there)["epoch"] <= saved["epoch"]:
            content = there.read_bytes()
            write_atomically(here, content)
        if here.exists():
            best[metric] = value
    return best


def restore_weights(path: Path, saved: dict, model: nn.Module, ema: nn.Module | None) -> None:
    """Load the weights of a checkpoint, and of its moving average; UserError naming the keys that do not fit."""
    for module, key in ((model, "model"), (ema, "model_ema")):
        if module is not None:
            if key not in saved:
                raise UserError(f"{path} has no moving average of the weights: leave out --model_ema")
            check_fit(saved[key], module, f"{path} does not fit --model")
            module.load_state_dict(saved[key])


def save_epoch(folder: Path, state: dict, *, improved: list[str], due: bool, keep: int) -> None:
    """Write an epoch's state as the best of its kinds where it improved, and under its number when that is `due`.

    Of the numbered files the `keep` newest stay; the rest goes only after the new one is safe.
    """
    for metric in improved:
        save_checkpoint(folder / BEST_CHECKPOINTS[metric], state)
    if due:
        save_checkpoint(folder / f"checkpoint-{state['epoch']}.pth", state)
        for path in [path for path in numbered_checkpoints(folder) if epoch_of(path) <= state["epoch"]][keep:]:
            path.unlink(missing_ok=True)
