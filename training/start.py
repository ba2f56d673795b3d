"""Going on from a checkpoint: what has to be the same, and what is taken from it."""

import argparse
import contextlib
import json
import logging
from pathlib import Path

import torch
from torch import nn

from models.families import family_of
from models.fit import check_fit, inherit
from options import FREE_ON_RESUME, training_defaults
from training import distributed
from training.checkpoint import (
    BEST_CHECKPOINTS,
    newest_checkpoint,
    numbered_checkpoints,
    position_in_name,
    position_of,
    read_checkpoint,
)
from utils import UserError, write_atomically
from weightfiles.hub import fetch
from weightfiles.initialization import read_initialization

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


def find_checkpoint(
    resume: str, output_dir: Path | None, *, file: Path | None, auto_resume: bool, training: bool
) -> tuple[Path, dict] | None:
    """What a run goes on from: the `file` that `--resume` names, else the newest in `output_dir`, else None.

    The newest too where it is of a run that was itself started by this `--resume`: the same command goes on. Raises
    UserError where training would mix two runs in one folder.
    """
    folder = numbered_checkpoints(output_dir) if output_dir else []
    if file and folder and auto_resume and training:
        with contextlib.suppress(UserError):  # with none that can be read, the file named is what there is
            newest = newest_checkpoint(folder)
            if newest[1]["options"].get("resume") == resume:
                return newest
    if file:
        state = read_checkpoint(file)
        later = [path for path in folder if position_in_name(path) > position_of(state)]
        if later and training:
            raise UserError(
                f"--resume {resume} is of epoch {state['epoch']}, but --output_dir has {later[0]}: name another folder"
            )
        return file, state
    if folder and not auto_resume and training:
        raise UserError(f"--auto_resume false, but --output_dir has {folder[0]} of another run: name another folder")
    return newest_checkpoint(folder) if auto_resume else None


def fetch_once(location: str) -> Path:
    """A file by its path, or the local copy of one at `https://…#sha256=…`, downloaded by one process."""
    if not location.startswith("https://"):
        return Path(location)
    with distributed.main_first():
        return fetch(location)


def initialize(model: nn.Module, options: argparse.Namespace) -> dict:
    """Copy the weights of `--initialize` into the model; returns where they come from. UserError if they do not fit."""
    location, family = str(fetch_once(options.initialize)), family_of(model)
    tensors, source = read_initialization(location, family, model_key=options.model_key, prefix=options.model_prefix)
    name = f"--initialize {source['path']}"
    if source["family"] not in (None, family):
        student = source["student"] if isinstance(source["student"], dict) else {}
        made_for = student.get("model", source["family"])
        raise UserError(f"{name} was made for {made_for}, but --model is {options.model}")
    other_head = inherit(model, tensors, f"{name} does not fit --model {options.model}")
    if other_head:
        log.info("%s: %s is for other classes; the head starts from random values", name, ", ".join(other_head))
    log.info("%s: %d tensors taken", name, len(tensors) - len(other_head))
    return source
