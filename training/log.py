"""Where a run's figures go: log.txt, the console, TensorBoard, Weights & Biases."""

import argparse
import contextlib
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from files import read_text
from options.training import plain
from training import distributed
from training.checkpoint import BEST_CHECKPOINTS
from training.folder import LOG, WANDB_ID, RunFolder, not_own
from utils import UserError, first_line

log = logging.getLogger(__name__)


class EpochLog:
    """log.txt: one JSON object per epoch, each epoch once."""

    def __init__(self, folder: RunFolder, first_epoch: int):
        """Open the log of a run that continues at `first_epoch`; drop later lines, which an interrupted run left.

        UserError if any line but the last, which a crash may have cut off, is not an epoch.
        """
        self.folder, file = folder, folder.path / LOG
        try:
            *lines, last = (read_text(file, errors="replace") if file.exists() else "").rstrip().split("\n")
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise not_own(file) from error
        if any(_epoch_in(line) < 0 for line in lines):
            raise not_own(file)
        kept = [line for line in (*lines, last) if first_epoch > _epoch_in(line) >= 0]
        folder.write(LOG, "".join(line + "\n" for line in kept).encode())

    def append(self, record: dict) -> None:
        """Add an epoch. Numbers that JSON cannot express (nan, inf) become null."""
        record = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self.folder.append(LOG, json.dumps(record) + "\n")


def _epoch_in(line: str) -> int:
    """Return the epoch of a line of log.txt, or -1 if the line is none."""
    try:
        epoch = json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return -1
    return epoch if isinstance(epoch, int) else -1


class Reporter:
    """Shows how a run goes: a bar on a terminal or else log lines, and scalars to each writer."""

    def __init__(self, epochs: int, steps_per_epoch: int, *, bar: bool, writers: Sequence):
        self.epochs, self.steps, self.with_bar, self.writers = epochs, steps_per_epoch, bar, writers
        self.epoch, self.done_before, self.start, self.bar = 0, 0, 0.0, None

    def start_epoch(self, epoch: int, done: int) -> None:
        """Start an epoch of which an earlier process made `done` updates."""
        self.epoch, self.done_before, self.start = epoch, done, time.monotonic()
        if self.with_bar:
            from tqdm import tqdm

            name = f"epoch {epoch}/{self.epochs - 1}"
            look = {"file": sys.stderr, "dynamic_ncols": True, "leave": False}
            with self._drawing():
                self.bar = tqdm(total=self.steps, initial=done, desc=name, unit="step", **look)

    def window(self, step: int, lr: float, means: dict[str, float], images_per_second: float) -> None:
        """Report at a log step; `means` are over the updates since the last call."""
        done = step + 1 - self.epoch * self.steps
        seconds_each = (time.monotonic() - self.start) / (done - self.done_before)
        left = seconds_each * ((self.epochs - self.epoch) * self.steps - done)
        ending = f"lr {lr:.2e}, {images_per_second:.0f} img/s, {timedelta(seconds=int(left))} left"
        if self.bar is not None:
            with self._drawing():
                self.bar.set_postfix_str(f"loss {means['loss']:.3f}, {ending}")
                self.bar.update(done - self.bar.n)
        else:
            losses = summary({f"train_{name}": value for name, value in means.items()}, {}).removeprefix("train ")
            log.info("epoch %d [%d/%d] %s, %s", self.epoch, done, self.steps, losses, ending)
        scalars = {f"train/{name}": value for name, value in means.items()}
        self._write(scalars | {"train/lr": lr, "train/images_per_second": images_per_second}, step)

    def end_epoch(self, record: dict, best: dict) -> None:
        """Report an epoch and its evaluation; `record` is its line in log.txt."""
        self._remove_bar()
        log.info("epoch %d: %s", self.epoch, summary(record, best))
        measured = {name.replace("_", "/", 1): value for name, value in record.items() if name.startswith("test_")}
        self._write(measured, record["step"])

    def store(self, checkpoint: Path) -> None:
        """Hand a checkpoint to the writers that keep files."""
        for writer in self.writers:
            if isinstance(writer, WeightsAndBiases):
                writer.store(checkpoint)

    def close(self) -> None:
        """Remove the bar from the terminal and close the writers."""
        with contextlib.ExitStack() as stack:  # closes all, whichever of them fails
            for writer in self.writers:
                stack.callback(writer.close)
            self._remove_bar()

    def _remove_bar(self) -> None:
        if self.bar is not None:
            with self._drawing():
                self.bar.close()

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Do without a bar from now on if nobody reads stderr any more: the training does not depend on it."""
        try:
            yield
        except OSError:
            self.with_bar, self.bar = False, None

    def _write(self, scalars: dict[str, float], step: int) -> None:
        for writer in self.writers:
            writer.write(scalars, step)


def make_reporter(options: argparse.Namespace, folder: RunFolder | None, steps: int, first_step: int) -> Reporter:
    """Build the reporter of a run that continues after `first_step` updates; only the main process has a bar and writers."""
    writers, is_main = [], distributed.is_main()
    if options.log_dir and is_main:
        writers.append(TensorBoard(options.log_dir, first_step))
    if options.enable_wandb and is_main:
        writers.append(WeightsAndBiases(options.project, plain(options), folder))
    bar = is_main and (sys.stderr.isatty() if options.progress is None else options.progress)
    return Reporter(options.epochs, steps, bar=bar, writers=writers)


def summary(record: dict, best: dict) -> str:
    """Describe an epoch in one line: the figures that `record` has, and the best accuracy so far."""
    shown = [
        ("train loss {train_loss:.4f}", record),
        ("of the task {train_task_loss:.4f}, of distillation {train_distillation_loss:.4f}", record),
        ("test loss {test_loss:.4f}, acc1 {test_acc1:.2f} %, acc5 {test_acc5:.2f} %", record),
        ("EMA acc1 {test_acc1_ema:.2f} %", record),
        ("best acc1 {test_acc1:.2f} %", best),
        ("{train_images_per_second:.0f} img/s, {epoch_seconds:.0f} s", record),
    ]
    return ", ".join(text.format(**values) for text, values in shown if re.findall(r"{(\w+)", text)[0] in values)


def report_best(best: dict[str, float], epochs: dict[str, int], folder: Path | None) -> None:
    """Log the best accuracies of a finished run, and where their checkpoints are: in `folder`; None if none were kept."""
    for metric, name in reversed(BEST_CHECKPOINTS.items()):  # last the one that every run has
        if metric in best:
            average = "EMA " * metric.endswith("_ema")
            epoch = f" at epoch {epochs[metric]}" if metric in epochs else ""  # older checkpoints do not say
            where = f"{folder / name}" if folder else "no checkpoint kept"
            log.info("best %s%.1f %%%s, %s", average, best[metric], epoch, where)


class TensorBoard:
    """Scalars to a folder that TensorBoard reads; points from `first_step` on, of an interrupted run, are hidden.

    This writes events itself, because tensorboardX's SummaryWriter writes them in a thread. A full disk ends that thread,
    and once its queue of ten events is full the run waits forever (seen on a tmpfs of 64 kB). Its points also reach the
    disk after the checkpoint of their log step, so a kill in between would lose them.
    """

    def __init__(self, log_dir: str, first_step: int):
        try:
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        except ImportError as error:
            raise UserError("--log_dir needs the package tensorboardX: pip install tensorboardX") from error
        self.log_dir, self._event, self._scalar = log_dir, Event, summary.scalar
        try:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(os.path.join(log_dir, "events"))
            if first_step:
                self._events.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
            self._events.flush()
        except OSError as error:
            raise UserError(f"--log_dir {log_dir} cannot be written to: {error.strerror}") from error

    def write(self, values: dict[str, float], step: int) -> None:
        if self._events is None:
            return
        try:
            for name, value in values.items():
                summary = self._scalar(name, value)
                self._events.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
            self._events.flush()
        except OSError as error:
            message = "--log_dir %s: %s; nothing more is written there, the training continues"
            log.warning(message, self.log_dir, first_line(error))
            self._events = None

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


class WeightsAndBiases:
    """Scalars to Weights & Biases; a run resumed from the same folder continues under the same id.

    Once the run has begun, no failure of wandb, such as the death of its helper process, ends the training.
    """

    def __init__(self, project: str, config: dict, folder: RunFolder | None):
        try:
            import wandb
        except ImportError as error:
            raise UserError("--enable_wandb needs the package wandb: pip install wandb") from error
        file = folder and folder.path / WANDB_ID
        self.wandb = wandb
        try:
            run_id = read_text(file).strip() if file and file.exists() else None
            self.run = wandb.init(project=project, config=config, dir=folder and folder.path, id=run_id, resume="allow")
        except (wandb.Error, OSError, ValueError) as error:
            message = f"--enable_wandb: {first_line(error)}; WANDB_MODE=offline logs without an account"
            raise UserError(message) from error
        if folder and not run_id:
            folder.write(WANDB_ID, f"{self.run.id}\n".encode())

    def write(self, values: dict[str, float], step: int) -> None:
        self._try(lambda: self.run.log(values, step=step))

    def store(self, checkpoint: Path) -> None:
        """Store a checkpoint as an artifact of the run; warn if there is none."""
        if not checkpoint.exists():
            log.warning("--wandb_ckpt: there is no %s to store", checkpoint)
            return

        def add() -> None:
            artifact = self.wandb.Artifact(f"{self.run.id}-best", type="model")
            artifact.add_file(str(checkpoint))
            self.run.log_artifact(artifact)

        self._try(add)

    def close(self) -> None:
        self._try(lambda: self.run.finish())

    def _try(self, action: Callable[[], object]) -> None:
        """Do something with the run; if that fails, warn and do nothing with it from then on."""
        if self.run is None:
            return
        try:
            action()
        except Exception as error:  # wandb raises errors of its own and of its connection to the helper
            log.warning("--enable_wandb: %s; nothing more is written there, the training continues", first_line(error))
            self.run = None
