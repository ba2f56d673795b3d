"""Where a run starts: which checkpoint or initialization file it takes, and what has to agree with it."""

import argparse
import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn

from models.fit import check_fit
from options.training import training_defaults
from training import distributed
from training.agreement import check_same, in_short
from training.checkpoint import (
    BEST_CHECKPOINTS,
    Progress,
    checkpoint_of,
    longer,
    newest_checkpoint,
    numbered_checkpoints,
    position_in_name,
    position_of,
    read_checkpoint,
)
from training.folder import RunFolder
from training.inherited import load_initialization
from training.ownership import check_log, check_own, differing
from utils import UserError
from weightfiles.hub import fetch
from weightfiles.lazy import sha256_of

log = logging.getLogger(__name__)

SHARE = "all nodes must share --output_dir, or have the same file for --resume"


@dataclass
class Start:
    """Where a run starts: at a checkpoint (`path`, `state`), an initialization file (`path`) or random weights.

    `source` describes the initialization file that the weights came from, also when a checkpoint continues from there.
    """

    path: Path | None = None
    state: dict | None = None
    source: dict | None = None

    def check_settings(self, options: dict, precision: str) -> int:
        """Return the `--update_freq` in effect. UserError if the run would not continue the one in its folder."""
        update_freq = options["update_freq"]
        if self.state:
            update_freq = keep_total_batch(self.state, options, distributed.world_size())
            check_same_settings(self.path, self.state, options, update_freq=update_freq, precision=precision)
        if options["output_dir"]:
            folder = Path(options["output_dir"])
            check_own(folder, options, Progress.after(self.state, 0).epoch if self.state else 0)
            if not self.state:
                check_log(folder, options)
        return update_freq

    def check_data(self, data: dict) -> None:
        """UserError if the data differ between the ranks, or from the checkpoint's; a value of None is not compared.

        An evaluation may be of other images, if their classes are the same.
        """
        check_same(data, "all need copies of the same files")
        compared = data if data["training images"] else {"classes": data["classes"]}
        for name, value in compared.items() if self.state else ():
            then = self.state["data"].get(name)  # older checkpoints describe less
            if None not in (value, then) and then != value:
                was, now = in_short([then, value])
                raise UserError(f"{self.path} belongs to a run on other data: {name} ({was}, here {now})")

    def check_teacher(self, teacher: dict) -> None:
        """UserError if the teacher described differs between the ranks, or from that of the checkpoint's run."""
        check_same({f"the teacher's {name}": value for name, value in teacher.items()}, "all need the same file")
        then = self.state.get("teacher", {}) if self.state else teacher
        differing = [
            f"its {name} was {then.get(name)}, is {now}" for name, now in teacher.items() if then.get(name) != now
        ]
        if differing:
            raise UserError(f"{self.path} belongs to a run with another teacher: {', '.join(differing)}")

    def bad_images(self) -> list[int]:
        """Return the training images that the checkpoint's run could not read."""
        return self.state["bad_images"] if self.state else []

    def restore_weights(self, model: nn.Module, ema: ModelEmaV3 | None, options: argparse.Namespace) -> None:
        """Load the weights and their moving average. UserError naming the keys that do not fit."""
        if self.state:
            load_weights(self.path, self.state, model, ema and ema.module)
        elif self.path:
            self.source = load_initialization(self.path, model, options)
            check_same({"the sha256 of --initialize": self.source["sha256"]}, "all need the same file")
            if ema:
                ema.set(model)

    def restore_trainer(self, trainer, steps: int, first_epoch: int) -> Progress:
        """Load the state of optimizer and scaler; return the position to continue from, `steps` updates per epoch."""
        if not self.state:
            return Progress(first_epoch)
        check_same_optimizer(self.path, trainer.optimizer, self.state["optimizer"])
        trainer.load_state(self.state)
        log.info("resumed from %s, after %d updates", self.path, self.state["step"])
        then, now = self.state["threads"], torch.get_num_threads()
        if trainer.precision.device.type == "cpu" and then not in (now, 0):
            message = (
                "%d threads per process instead of %d (OMP_NUM_THREADS): the weights will differ in their last bits"
            )
            log.warning(message, now, then)
        return Progress.after(self.state, steps)

    def bring_best(self, folder: RunFolder) -> dict[str, float]:
        """Return the best figures of the checkpoint's run whose files are in `folder`, or can be copied there."""
        return bring_best(self.path, self.state, folder) if self.state else {}


def find_start(options: argparse.Namespace, output_dir: Path | None) -> Start:
    """Find where the run starts, and read the checkpoint if it is one. UserError if the processes find different ones."""
    # A run starts from the first of these that there is:
    #   1. the newest checkpoint in --output_dir; with --resume only if the run there began with this very file,
    #   2. the checkpoint of --resume,
    #   3. the weights of --initialize,
    #   4. random weights.
    resume, auto_resume, training = options.resume, options.auto_resume, not options.eval
    file = fetch_once(resume) if resume else None
    if file and options.eval:  # of a run's folder its best
        file = checkpoint_of(file, "model")
    checkpoint = find_checkpoint(resume, output_dir, file=file, auto_resume=auto_resume, training=training)
    path, state = checkpoint or (None, None)
    check_same({"the checkpoint": path and path.name, "its step": state and state["step"]}, SHARE)
    if state and distributed.world_size() > 1:
        check_same({"the sha256 of the checkpoint": sha256_of(path)}, SHARE)
    if state:
        return Start(path, state, state.get("initialization"))
    return Start(fetch_once(options.initialize)) if options.initialize else Start()


def find_checkpoint(
    resume: str, output_dir: Path | None, *, file: Path | None, auto_resume: bool, training: bool
) -> tuple[Path, dict] | None:
    """Return the checkpoint to continue from: `file`, which `--resume` names, or the newest in `output_dir`, or None.

    The newest in `output_dir` wins if its run was itself started with this `--resume`, so that the same command
    continues it. UserError if training would mix two runs in one folder.
    """
    folder = numbered_checkpoints(output_dir) if output_dir else []
    if file and folder and auto_resume and training:
        with contextlib.suppress(UserError):  # if none of them can be read, take the file
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
    """Return a file's path, or the local copy of `https://…#sha256=…`, which one process downloads."""
    if not location.startswith("https://"):
        return Path(location)
    with distributed.main_first():
        return fetch(location)


# ---- what has to agree with the checkpoint, or with the run that was in the folder ----


def keep_total_batch(saved: dict, options: dict, processes: int) -> int:
    """Return the `--update_freq` that keeps the checkpoint's total batch on this many processes.

    Return the given one unchanged if it keeps the total batch, if the user asked for another one than the
    checkpoint's, if no whole number keeps the total, or if CUDA graphs forbid accumulation.
    """
    then, given = training_defaults() | saved["options"], options["update_freq"]
    total = (saved["update_freq"] or then["update_freq"]) * saved["processes"]
    replays = options["compile_mode"] != "default"  # CUDA graphs, which cannot accumulate gradients
    if given * processes == total or given != then["update_freq"] or total % processes or replays:
        return given
    kept = total // processes
    message = (
        "the run continues on %d processes instead of %d: --update_freq %d instead of %d keeps the %d images per update"
    )
    log.warning(message, processes, saved["processes"], kept, given, total * options["batch_size"])
    return kept


def check_same_settings(path: Path, saved: dict, options: dict, *, update_freq: int, precision: str) -> None:
    """UserError naming the settings that decide the weights and differ between a checkpoint and this run.

    The number of processes may differ if `update_freq`, the one in effect, keeps the total batch: the same images
    then make the same updates, only shared out differently.
    """
    then, ignored = training_defaults() | saved["options"], {"update_freq": None}  # older files lack newer options
    differences = differing(then | ignored, options | ignored)
    processes, then_freq = distributed.world_size(), saved["update_freq"] or then["update_freq"]
    if then_freq * saved["processes"] != update_freq * processes:
        was, now = f"{saved['processes']} x {then_freq}", f"{processes} x {update_freq}"
        differences.append(f"processes x --update_freq was {was}, is {now}")
    if saved["precision"] != precision:
        differences.append(f"the precision was {saved['precision']}, is {precision} (--device, --use_amp, --amp_dtype)")
    if differences:
        listed = ", ".join(differences)
        way_out = "use those, or another --output_dir"
        if options["epochs"] > then["epochs"]:
            way_out += f"; {longer(path)}"
        raise UserError(f"{path} belongs to a run with other settings: {listed}; {way_out}")


def check_same_optimizer(path: Path, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """UserError unless an optimizer's saved state has as many parameters and, for a fused kernel, the same shapes.

    A fused kernel does not check shapes itself. Other optimizers, such as Adafactor, may keep less than one value per
    weight, so their shapes say nothing.
    """
    groups, saved_groups = optimizer.param_groups, state.get("param_groups")
    shapes = [list(parameter.shape) for group in groups for parameter in group["params"]]
    fused = any(group.get("fused") for group in groups)
    try:
        fits = [len(group["params"]) for group in saved_groups] == [len(group["params"]) for group in groups]
        fits &= all("lr_scale" in group for group in saved_groups)
        for number, values in state["state"].items() if fused else ():
            tensors = [value for value in values.values() if isinstance(value, torch.Tensor) and value.dim()]
            fits &= all(list(value.shape) == shapes[number] for value in tensors)
    except (AttributeError, LookupError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"{path}: the optimizer's state does not fit this run's parameters; use another checkpoint")


# ---- loading ----


def bring_best(path: Path, saved: dict, folder: RunFolder) -> dict[str, float]:
    """Return the best figures of a run resumed from `path` whose files are in `folder`.

    Copy a file from the folder of `path`, unless it is of a later state than the checkpoint.
    """
    best = {}
    for metric, value in saved["best"].items():
        target, source = folder.path / BEST_CHECKPOINTS[metric], path.parent / BEST_CHECKPOINTS[metric]
        if not target.exists() and source.exists():
            try:
                if position_of(read_checkpoint(source)) <= position_of(saved):
                    folder.write(target.name, source.read_bytes())
            except UserError as error:
                log.warning("%s; the best starts anew", error)
        if target.exists():
            best[metric] = value
    return best


def load_weights(path: Path, saved: dict, model: nn.Module, ema: nn.Module | None) -> None:
    """Load the weights of a checkpoint and their moving average. UserError naming the keys that do not fit."""
    for module, key in ((model, "model"), (ema, "model_ema")):
        if module is not None:
            if key not in saved:
                raise UserError(f"{path} has no moving average of the weights: leave out --model_ema")
            check_fit(saved[key], module, f"{path} does not fit --model")
            module.load_state_dict(saved[key])
