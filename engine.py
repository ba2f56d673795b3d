"""One training epoch and one exact evaluation, the same code for any device and any precision."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from images.workers import ahead
from optim_factory import set_schedules
from options.parser import Settings
from training.checkpoint import Progress
from training.distill import Distillation, WithDistiller
from training.distributed import any_rank, of_all_ranks, rank, share_buffers, world_size
from training.meters import DeviceSums, Speed, count_in_top, stop_if_not_finite
from training.precision import Precision
from training.probe import LinearProbe
from utils import Stopped, Stream, derive_seed

log = logging.getLogger(__name__)

TERMS = ("task_loss", "distillation_loss")  # add up to the loss if there is a teacher
MEANS = ("loss", "grad_norm", *TERMS)  # over updates and ranks


@dataclass(frozen=True)
class EngineSettings(Settings):
    """The options that the epoch and the evaluation read."""

    update_freq: int  # the one in effect: a run that is resumed on other processes may change it
    clip_grad: float | None  # the largest gradient norm; None for any
    seed: int
    channels_last: bool
    compile: bool
    dist_eval: bool
    log_freq: int  # updates, and batches of the evaluation
    save_ckpt: bool
    save_ckpt_steps: int | None

    @property
    def save_freq(self) -> int | None:
        """Updates between saves within an epoch."""
        return self.save_ckpt_steps if self.save_ckpt else None

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


@dataclass
class Trainer:
    """The model, in DDP if there are several processes, and everything that updates it.

    `lr` and `weight_decay` hold a value per optimizer step of the whole run. `mixer` mixes (images, targets, key); if it
    is None, targets stay class numbers.
    """

    model: nn.Module
    criterion: nn.Module | Distillation
    optimizer: torch.optim.Optimizer
    precision: Precision
    lr: np.ndarray
    weight_decay: np.ndarray
    settings: EngineSettings
    mixer: Callable | None = None
    ema: ModelEmaV3 | None = None
    asked_to_stop: Callable[[], bool] = lambda: False  # for this rank; all stop if one is asked
    compiles: bool = field(init=False)  # the next update compiles; its time is reported, not counted into the speed
    skips_in_a_row: Tensor = field(init=False)  # [], the latest updates that were not applied

    def __post_init__(self):
        self.compiles = self.settings.compile
        self.skips_in_a_row = torch.zeros((), device=self.precision.device)

    @property
    def bare_model(self) -> nn.Module:
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        return model.model if isinstance(model, WithDistiller | LinearProbe) else model

    def state(self) -> dict:
        """Return what a checkpoint holds of the training itself: weights, their average, optimizer and scaler."""
        state = {"model": self.bare_model.state_dict()}
        if self.ema is not None:
            state["model_ema"] = self.ema.module.state_dict()
        if isinstance(self.criterion, Distillation):
            state |= self.criterion.state()
        scaler = {"scaler": self.precision.scaler.state_dict(), "skips_in_a_row": int(self.skips_in_a_row)}
        return state | {"optimizer": self.optimizer.state_dict()} | scaler

    def is_finite(self) -> Tensor:
        """Return, without a wait, whether the weights, their average and the optimizer's state are finite; bool []."""
        averaged = () if self.ema is None else self.ema.module.state_dict().values()
        values = [*self.model.state_dict().values(), *averaged]
        values += [value for state in self.optimizer.state.values() for value in state.values()]
        floats = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
        return torch.nn.utils.get_total_norm(floats, math.inf).isfinite()

    def load_state(self, state: dict) -> None:
        """Load what `state` returned, except the weights, which were loaded before the model was compiled."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.scaler.load_state_dict(state["scaler"])
        self.skips_in_a_row += state["skips_in_a_row"]
        if isinstance(self.criterion, Distillation):
            self.criterion.load_state(state)


def train_one_epoch(
    trainer: Trainer, batches, progress: Progress, *, steps: int, report: Callable, save: Callable = lambda: None
) -> dict[str, float]:
    """Train for the rest of an epoch of `steps` updates; return the epoch's means over all ranks.

    `batches` yields `(steps - progress.done) * update_freq` batches of (images [batch, 3, H, W], class numbers [batch]).
    The host waits for the device only at log steps: every `log_freq` updates, every `save_freq`, and at the end. There
    it updates `progress` and calls `report(step, lr, means, images_per_second)`. NotFinite on all ranks if a loss or
    gradient was not finite, so that its update was not applied, or if weights are not after it. `save()` is called every `save_freq` updates, and before all
    ranks raise Stopped because one of them was asked to stop.
    """
    trainer.model.train()
    settings, source = trainer.settings, ahead(batches, trainer.precision.device)
    window = Window(trainer)
    speed, compile_seconds, first_step = Speed(world_size()), {}, progress.epoch * steps
    for done in range(progress.done + 1, steps + 1):
        step = first_step + done - 1
        lr = float(trainer.lr[step])
        set_schedules(trainer.optimizer, lr, trainer.weight_decay[step])
        losses, correct, images = _accumulate_gradients(trainer, source, step)
        grad_norm = _update(trainer, step)
        window.add(trainer, losses, correct, grad_norm)
        speed.add(images)
        if trainer.compiles:
            trainer.compiles = False
            grad_norm.item()  # wait until the device is done
            compile_seconds = {"compile_seconds": speed.restart()}
            log.info("compiled: %.0f s for the first update", compile_seconds["compile_seconds"])
        save_is_due = settings.save_freq and done % settings.save_freq == 0
        if done % settings.log_freq == 0 or done == steps or save_is_due:
            updates = done - progress.done
            where = f"in the {updates} updates up to step {step} of epoch {progress.epoch}, at lr {lr:.3g}"
            figures, stop = window.read(trainer, where)
            figures["images"] = float(updates * images * world_size())
            progress.sums |= {name: progress.sums.get(name, 0.0) + value for name, value in figures.items()}
            progress.done = done
            report(step, lr, _means(figures, updates, trainer.mixer is None), speed.read())
            if save_is_due or stop:
                save()
            if stop:
                raise Stopped(f"after {done} of the {steps} updates of epoch {progress.epoch}", agreed=True)
    means = _means(progress.sums, steps, trainer.mixer is None)
    schedules = _schedule_means(trainer, slice(first_step, first_step + steps))
    return means | schedules | {"images_per_second": speed.overall()} | compile_seconds


class Window:
    """What is summed on the device between two log steps."""

    def __init__(self, trainer: Trainer):
        device, terms = trainer.precision.device, TERMS if isinstance(trainer.criterion, Distillation) else ()
        self.sums = DeviceSums(
            ("loss", "correct", "grad_norm", "bad_loss", "bad_grad", *terms, "bad_weights", "stop"), device
        )
        self.longest = torch.zeros((), device=device)  # most updates in a row that were not applied

    def add(self, trainer: Trainer, losses: Tensor, correct: Tensor, grad_norm: Tensor) -> None:
        """Add one update, without a wait; `losses` are the terms of the loss, or [] the loss itself."""
        loss, terms = losses.sum(), losses.unbind() if losses.dim() else ()
        bad_grad = ~grad_norm.isfinite()
        trainer.skips_in_a_row = (trainer.skips_in_a_row + 1) * bad_grad
        self.longest = torch.maximum(self.longest, trainer.skips_in_a_row)
        finite_norm = torch.where(bad_grad, 0.0, grad_norm)
        self.sums.add(loss, correct, finite_norm, ~loss.isfinite(), bad_grad, *terms)

    def read(self, trainer: Trainer, where: str) -> tuple[dict[str, float], bool]:
        """Return the sums, and whether a rank was asked to stop. NotFinite on all ranks if an update was not finite."""
        self.sums.values[-2] += ~trainer.is_finite().to(self.sums.values.device)
        self.sums.values[-1] += trainer.asked_to_stop()
        sums = self.sums.read()
        stop_if_not_finite(sums, self.longest, trainer.precision.scales_loss, where)
        figures = {name: sums[name] / world_size() for name in MEANS if name in sums}
        return figures | {"correct": sums["correct"]}, bool(sums["stop"])


def _accumulate_gradients(trainer: Trainer, source: Iterator, step: int) -> tuple[Tensor, Tensor, int]:
    """Make the backward passes of one update; return loss, correct predictions [], images used by this rank.

    The loss is a mean over the passes: [], or, with distillation, [2] for its two terms.

    DDP averages the gradients over the ranks once, in the last pass.
    """
    precision, settings = trainer.precision, trainer.settings
    losses, correct, images_seen = [], [], 0
    for micro_step in range(settings.update_freq):
        images, targets = next(source)
        images = images.contiguous(memory_format=settings.layout)
        chunk = micro_step * world_size() + rank()
        labels = targets
        if trainer.mixer is not None:
            images, targets = trainer.mixer(images, targets, (step, chunk))
        torch.manual_seed(derive_seed(Stream.MODEL, settings.seed, step, chunk))
        last = micro_step == settings.update_freq - 1
        with contextlib.nullcontext() if last else _no_sync(trainer.model):
            with precision.autocast():
                logits, terms = _forward(trainer, images, targets)
                loss = terms.sum()
            # A non-finite loss can have finite gradients. Make them non-finite too: the scaler looks at nothing else.
            poison = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
            precision.scaler.scale(loss * poison / settings.update_freq).backward()
        losses.append(terms.detach())
        correct.append((logits.detach().argmax(1) == labels).sum())
        images_seen += len(images)
    return torch.stack(losses).mean(0), torch.stack(correct).sum(), images_seen


def _forward(trainer: Trainer, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits [batch, classes] and the loss [], or, with distillation, its two terms [2]."""
    if isinstance(trainer.criterion, Distillation):
        return trainer.criterion(trainer.model, images, targets)
    logits = trainer.model(images)
    return logits, trainer.criterion(logits, targets)


def _no_sync(model: nn.Module):
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def _update(trainer: Trainer, step: int) -> Tensor:
    """Clip, apply and clear the gradients; return their norm [] before clipping."""
    scaler, optimizer = trainer.precision.scaler, trainer.optimizer
    scaler.unscale_(optimizer)
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if trainer.settings.clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, trainer.settings.clip_grad, norm)
    # Some optimizers (kron) draw from the global generator, which the forward pass has seeded for this rank alone.
    torch.manual_seed(derive_seed(Stream.OPTIMIZER, trainer.settings.seed, step))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if trainer.ema is not None:
        trainer.ema.update(trainer.bare_model)
    return norm


def _means(sums: dict[str, float], steps: int, hard_targets: bool) -> dict[str, float]:
    """Turn sums over `steps` updates and all ranks into means."""
    means = {name: sums[name] / steps for name in MEANS if name in sums}
    return means | ({"class_acc": sums["correct"] / sums["images"]} if hard_targets else {})


def _schedule_means(trainer: Trainer, steps: slice) -> dict[str, float]:
    """Return the means over the steps of the groups' highest and lowest learning rate, and of the weight decay."""
    scales = [group["lr_scale"] for group in trainer.optimizer.param_groups]
    lr = float(trainer.lr[steps].mean())
    weight_decay = float(trainer.weight_decay[steps].mean())
    return {"lr": lr * max(scales), "min_lr": lr * min(scales), "weight_decay": weight_decay}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches,
    precision: Precision,
    settings: EngineSettings,
    asked_to_stop: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """Measure cross-entropy and top-1 and top-5 accuracy in percent over every image in the ranks' `batches` together.

    It adds sums and counts, never means, so the ranks' shares and the last batch may have any size. With `--dist_eval
    false`, each rank has all images and measures alone. With `asked_to_stop`, the ranks check every `log_freq` batches
    whether one of them was asked, and then all raise Stopped.
    """
    if settings.dist_eval:
        share_buffers(model)  # batch norm's statistics differ between ranks, which must measure one model
    model.eval()
    sums = DeviceSums(("loss", "acc1", "acc5", "images"), precision.device)
    # A rank with one batch more than the others would ask alone and wait forever.
    last_look = min(of_all_ranks(len(batches))) if asked_to_stop else 0
    for number, (images, targets) in enumerate(ahead(batches, precision.device)):
        if number < last_look and number % settings.log_freq == 0 and any_rank(asked_to_stop(), precision.device):
            raise Stopped("during the evaluation", agreed=True)
        images = images.contiguous(memory_format=settings.layout)
        with precision.autocast():
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        sums.add(loss, *count_in_top(logits, targets, (1, 5)), torch.full_like(loss, len(images)))
    total = sums.read(over_ranks=settings.dist_eval)
    count = total["images"]
    return {"loss": total["loss"] / count, "acc1": 100 * total["acc1"] / count, "acc5": 100 * total["acc5"] / count}
