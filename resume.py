"""Going on from a checkpoint: what has to be the same, and what is taken from it."""

import json
import logging
from pathlib import Path

import torch
from torch import nn

from checkpoint import BEST_CHECKPOINTS, position_of, read_checkpoint
from models import check_fit
from options import FREE_ON_RESUME, training_defaults
from utils import UserError, write_atomically

log = logging.getLogger(__name__)


def differing(then: dict, now: dict) -> list[str]:
    """What differs between two runs' options where it decides the weights, each as a phrase."""
    names = [name for name in now if name not in FREE_ON_RESUME and then.get(name) != now[name]]
    return [f"--{name} was {then.get(name)}, is {now[name]}" for name in names]


def keep_total_batch(saved: dict, options: dict, processes: int) -> int:
    """The `--update_freq` by which another number of processes than the checkpoint's takes as many images an update.

    The one given, where there is none, where it does so, or where it is not the checkpoint's own either.
    """
    then, given = training_defaults() | saved["options"], options["update_freq"]
    total = (saved["update_freq"] or then["update_freq"]) * saved["processes"]
    replays = options["compile_mode"] != "default"  # CUDA graphs, which accumulate nothing
    if given * processes == total or given != then["update_freq"] or total % processes or replays:
        return given
    kept = total // processes
    images = total * options["batch_size"]
    log.warning("%d processes go on where %d were: --update_freq %d instead of %d keeps the %d images an update",
        processes, saved["processes"], kept, given, images)  # fmt: skip
    return kept


def check_same_settings(
    path: Path, saved: dict, options: dict, *, update_freq: int, processes: int, precision: str
) -> None:
    """UserError naming what differs between a checkpoint's settings and this run's, where it decides the weights.

    Another number of processes is none of it where `update_freq`, as it is in effect, keeps the total batch: the same
    images make the same updates, shared out differently.
    """
    then, freely = training_defaults() | saved["options"], {"update_freq": None}  # older ones lack newer options
    differences = differing(then | freely, options | freely)
    was_freq = saved["update_freq"] or then["update_freq"]
    if was_freq * saved["processes"] != update_freq * processes:
        was, now = f"{saved['processes']} x {was_freq}", f"{processes} x {update_freq}"
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
    """UserError unless an optimizer's saved state has as many parameters, of the same shapes where a fused kernel works.

    That does not look, while others may keep less than a value for each weight, as Adafactor does.
    """
    shapes = [list(parameter.shape) for group in optimizer.param_groups for parameter in group["params"]]
    try:
        fits = [len(group["params"]) for group in state["param_groups"]] == [
            len(g["params"]) for g in optimizer.param_groups
        ]
        fits &= all("lr_scale" in group for group in state["param_groups"])
        fused = any(group.get("fused") for group in optimizer.param_groups)
        for number, values in state["state"].items() if fused else ():
            tensors = [value for value in values.values() if isinstance(value, torch.Tensor) and value.dim()]
            fits &= all(list(value.shape) == shapes[number] for value in tensors)
    except (AttributeError, LookupError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"{path}: the optimizer's state does not fit this run's parameters; use another checkpoint")


def check_unused(folder: Path, options: dict) -> None:
    """UserError if a folder without checkpoints has the log of a run that a new one would overwrite.

    The log of a run of the same settings that ended before its first numbered checkpoint is no loss.
    """
    log_file = folder / "log.txt"
    if not log_file.exists() or not log_file.stat().st_size:
        return
    try:
        then = json.loads((folder / "config.json").read_text())["options"]
        epochs = len(log_file.read_text().splitlines())  # of the last of them the checkpoint may not have come to be
        lost = not then["save_ckpt"] or epochs > then["save_ckpt_freq"] or differing(then, options)
    except (OSError, ValueError, KeyError, TypeError):
        lost = True
    if lost:
        raise UserError(f"--output_dir {folder} has the log.txt of another run: name another folder")


def bring_best(path: Path, saved: dict, folder: Path) -> dict[str, float]:
    """The best figures that a run resumed from `path` still has the files of, in `folder`.

    From another folder the file is brought along, if it is of no later state than the one resumed from.
    """
    best = {}
    for metric, value in saved["best"].items():
        here, there = folder / BEST_CHECKPOINTS[metric], path.parent / BEST_CHECKPOINTS[metric]
        if not here.exists() and there.exists():
            try:
                if position_of(read_checkpoint(there)) <= position_of(saved):
                    write_atomically(here, there.read_bytes())
            except UserError as error:
                log.warning("%s; the best is counted anew", error)
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
