"""Train a small model, from selected weights or from random ones: options, data, model, optimizer, loop, in this order."""

from options import mixes, training_options, without_effect

if __name__ == "__main__":
    training_options()  # -h and usage errors answer before torch is imported

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from datasets import load_data
from engine import Precision, Progress, Trainer, evaluate, train_one_epoch
from images.batches import make_train_loader, make_val_loader
from images.images import Images, bad_of_all_ranks
from images.transforms import build_mixer
from models.build import build_model
from optim_factory import cosine_schedule, create_optimizer, parameter_groups
from options import pick, plain
from training import distributed
from training import folder as run_folder
from training.checkpoint import BEST_CHECKPOINTS, save_checkpoint, save_numbered
from training.log import EpochLog, Reporter, WeightsAndBiases, make_writers, summary
from training.signals import StopSignals
from training.start import (
    bring_best,
    check_same_data,
    check_same_optimizer,
    check_same_settings,
    check_unused,
    fetch_once,
    find_checkpoint,
    initialize,
    keep_total_batch,
    restore_weights,
)
from utils import Stopped, UserError, environment, revision, run_script, seed_all, start_logging

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> dict:
    """Train, or with `--eval true` evaluate; returns the last epoch's line of log.txt, or what was measured."""
    options = training_options(argv)
    device = distributed.pick_device(options.device)
    # the signals last: who waits to meet the others could not take them
    with distributed.process_group(device, options.dist_url, options.dist_timeout), StopSignals() as stop:
        start_logging(quiet=not distributed.is_main())
        for name in without_effect(options):
            log.warning("%s is accepted and has no effect", name)
        with contextlib.ExitStack() as stack:
            output_dir = Path(options.output_dir) if options.output_dir else None
            if output_dir and not options.eval:  # an evaluation writes nothing
                with distributed.main_first():
                    if distributed.is_main():
                        stack.enter_context(run_folder.opened(output_dir))
            try:
                return run(options, device, output_dir, stop)
            except Stopped as stopped:
                reason = f"stopped by {stop.asked or 'a signal to another process'} {stopped}"
                # SIGUSR1 is a batch system's, and asks for more even before there is anything to save; SIGTERM may be a
                # launcher's, where another process failed
                more = (stopped.agreed or stop.asked == "SIGUSR1") and output_dir and options.save_ckpt
                if distributed.is_main():
                    log.warning("%s%s", reason, "; the same command goes on from there" * bool(more))
                    if more:
                        run_folder.ask_for_more(output_dir, reason)
                elif not stopped.agreed:
                    log.error("rank %d was %s", distributed.rank(), reason)
                if stopped.agreed:  # a launcher ends all when one has ended, and the main one was still writing
                    distributed.of_all_ranks(None)
                raise


def run(options: argparse.Namespace, device: torch.device, output_dir: Path | None, stop: StopSignals) -> dict:
    """One run, from its options to its last checkpoint."""
    set_determinism(options.deterministic)
    precision = Precision.choose(device, options.use_amp, options.amp_dtype)
    given, processes = plain(options), distributed.world_size()
    file = fetch_once(options.resume) if options.resume else None
    how = {"file": file, "auto_resume": options.auto_resume, "training": not options.eval}
    found = find_checkpoint(options.resume, output_dir, **how)
    path, saved = found or (None, None)
    positions = distributed.of_all_ranks(path and (path.name, saved["step"]))
    if len(set(positions)) > 1:
        listed = ", ".join("none" if place is None else place[0] for place in positions)
        raise UserError(f"the processes found different checkpoints ({listed}): all nodes have to share --output_dir")
    if saved and not options.eval:
        options.update_freq = keep_total_batch(saved, given, processes)
        check_same_settings(
            path, saved, given, update_freq=options.update_freq, processes=processes, precision=precision.name
        )
    elif output_dir and not options.eval:
        check_unused(output_dir, given)

    train_images, val_images, num_classes = load_data(options)
    data = {
        "classes": (train_images or val_images).class_names or num_classes,
        "training images": train_images and len(train_images),
    }
    if saved:
        check_same_data(path, saved, data)
        if train_images and options.bad_images == "skip":
            train_images.mark_bad(saved["bad_images"])
    train_loader = make_train_loader(options, train_images, device) if train_images else None
    val_loader = make_val_loader(options, val_images, device) if val_images else None

    seed_all(options.seed)
    shape = pick(options, "input_size drop_path layer_scale_init_value head_init_scale model_kwargs")
    model = build_model(options.model, num_classes=num_classes, **shape)
    source = saved.get("initialization") if saved else initialize(model, options) if options.initialize else None
    model.to(device, memory_format=torch.channels_last if options.channels_last else torch.preserve_format)
    ema = make_ema(model, options) if options.model_ema else None
    if saved:
        restore_weights(path, saved, model, ema and ema.module)
    if options.compile:
        model.compile(mode=options.compile_mode)  # in place: the names of the weights stay
    if options.eval:
        if not (saved or source):
            log.warning(
                "--eval true, but no --resume, --initialize or checkpoint in --output_dir: the weights are random"
            )
        record = evaluate_all(options, model, ema, val_loader, precision)
        log.info("%d images: %s", len(val_images), summary(record, {}))
        return record

    steps = train_loader.batch_sampler.steps_per_epoch
    trainer = make_trainer(options, model, ema, precision, num_classes, steps)
    trainer.asked_to_stop = lambda: bool(stop.asked)
    progress = Progress(options.start_epoch)
    if saved:
        check_same_optimizer(path, trainer.optimizer, saved["optimizer"])
        trainer.load_state(saved)
        progress = progress_of(saved, steps)
        log.info("resumed from %s, after %d updates", path, saved["step"])
    if progress.epoch >= options.epochs:
        log.info("nothing is left to do: %s is of the last epoch", path)
        return saved["metrics"]
    origin = {"options": given, "update_freq": options.update_freq, "processes": processes, "initialization": source,
        "precision": precision.name, "data": data}  # fmt: skip
    if output_dir and distributed.is_main():
        about = {"environment": environment(device, processes), "revision": revision()}
        run_folder.write_config(output_dir, {"options": given, "initialization": source, **about})
        progress.best = bring_best(path, saved, output_dir) if saved else {}
    stop.defer()
    return train(options, output_dir, trainer, train_loader, val_loader, (train_images, val_images), progress, origin)


def progress_of(saved: dict, steps: int) -> Progress:
    """Where a run of `steps` updates an epoch goes on from a checkpoint, within an epoch or at the start of one."""
    if saved["sums"]:
        return Progress(saved["epoch"], saved["step"] - saved["epoch"] * steps, saved["sums"])
    return Progress(saved["epoch"] + 1)


def train(
    options: argparse.Namespace,
    output_dir: Path | None,
    trainer: Trainer,
    train_loader,
    val_loader,
    images: tuple[Images, Images | None],
    progress: Progress,
    origin: dict,
) -> dict:
    """Every epoch that is left: train, evaluate, log, save; returns the last line of log.txt.

    `images` are those that the loaders load. `origin` is what each checkpoint says of the run: its options, data,
    precision.
    """
    is_main, steps = distributed.is_main(), train_loader.batch_sampler.steps_per_epoch
    n_parameters = sum(parameter.numel() for parameter in trainer.bare_model.parameters() if parameter.requires_grad)
    total_batch = options.batch_size * options.update_freq * distributed.world_size()
    log.info("%s: %.2f M parameters, %d updates an epoch of %d images, on %s",
        options.model, n_parameters / 1e6, steps, total_batch, trainer.precision.device)  # fmt: skip
    epoch_log = EpochLog(output_dir / "log.txt", progress.epoch) if output_dir and is_main else None

    def save(metrics: dict | None = None, improved: Sequence[str] = ()) -> None:
        """The state within an epoch; with `metrics`, its line of log.txt, the state at its end, as the best where it is."""
        progress.sums["seconds"] = time.monotonic() - began
        # of all ranks, which therefore all come here
        bad = {"bad_images": bad_of_all_ranks(images[0])} if options.bad_images == "skip" else {}
        if not (epoch_log and options.save_ckpt):
            return
        position = {"epoch": progress.epoch, "step": progress.epoch * steps + progress.done, "best": progress.best}
        figures = {"sums": {} if metrics else progress.sums, "metrics": metrics or {}}
        state = {**trainer.state(), **position, **figures, **bad, **origin}
        for name in improved:
            save_checkpoint(output_dir / BEST_CHECKPOINTS[name], state)
        if not metrics or (progress.epoch + 1) % options.save_ckpt_freq == 0 or progress.epoch + 1 == options.epochs:
            save_numbered(output_dir, state, keep=options.save_ckpt_num)

    with contextlib.ExitStack() as stack:
        writers = make_writers(options, output_dir, progress.epoch * steps + progress.done) if is_main else []
        for writer in writers:
            stack.callback(writer.close)
        bar = is_main and (sys.stderr.isatty() if options.progress is None else options.progress)
        reporter = Reporter(options.epochs, steps, bar=bar, writers=writers)
        stack.callback(reporter.close)
        while progress.epoch < options.epochs:
            began = time.monotonic() - progress.sums.get("seconds", 0.0)
            reporter.start_epoch(progress.epoch, progress.done)
            train_loader.batch_sampler.set_epoch(progress.epoch, progress.done)
            means = train_one_epoch(trainer, train_loader, progress, steps=steps, report=reporter.window, save=save)
            record = {f"train_{name}": value for name, value in means.items()}
            if val_loader:
                try:
                    record |= evaluate_all(
                        options, trainer.bare_model, trainer.ema, val_loader, trainer.precision, trainer.asked_to_stop
                    )
                except Stopped:
                    save()  # what comes back evaluates first
                    raise
            if options.bad_images == "skip":
                of_parts = zip(("train", "test"), images, strict=True)
                record |= {f"{part}_bad_images": len(bad_of_all_ranks(some)) for part, some in of_parts if some}
            record |= {"epoch": progress.epoch, "step": (progress.epoch + 1) * steps, "n_parameters": n_parameters}
            record["epoch_seconds"] = time.monotonic() - began
            improved = [name for name in BEST_CHECKPOINTS if record.get(name, -1.0) > progress.best.get(name, -1.0)]
            progress.best |= {name: record[name] for name in improved}
            reporter.end_epoch(record, progress.best)
            if epoch_log:
                # before the checkpoint: a crash between the two repeats the epoch and writes its line anew
                epoch_log.append(record)
            save(record, improved)
            progress.epoch, progress.done, progress.sums = progress.epoch + 1, 0, {}
        for writer in writers:
            if options.wandb_ckpt and isinstance(writer, WeightsAndBiases):
                writer.store(output_dir / BEST_CHECKPOINTS["test_acc1"])
    return record


def evaluate_all(
    options: argparse.Namespace, model: torch.nn.Module, ema, val_loader, precision: Precision, asked_to_stop=None
) -> dict[str, float]:
    """test_loss, test_acc1 and test_acc5 of the model, and of its moving average where asked for."""
    settings = {"over_ranks": options.dist_eval, "asked_to_stop": asked_to_stop}
    settings |= pick(options, "channels_last log_freq")
    record = {f"test_{name}": value for name, value in evaluate(model, val_loader, precision, **settings).items()}
    if ema is not None and options.model_ema_eval:
        average = evaluate(ema.module, val_loader, precision, **settings)
        record |= {f"test_{name}_ema": value for name, value in average.items()}
    return record


def set_determinism(wanted: bool) -> None:
    """The same weights from the same seed on a GPU too, or the fastest kernels."""
    torch.backends.cudnn.benchmark = not wanted
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def make_ema(model: nn.Module, options: argparse.Namespace) -> ModelEmaV3:
    return ModelEmaV3(model, decay=options.model_ema_decay, device="cpu" if options.model_ema_force_cpu else None)


def make_trainer(
    options, model: nn.Module, ema, precision: Precision, num_classes: int, steps_per_epoch: int
) -> Trainer:
    """Loss, optimizer, schedules and the model as it is called."""
    if mixes(options):
        criterion = SoftTargetCrossEntropy()  # the mixer smooths the labels
    elif options.smoothing > 0:
        criterion = LabelSmoothingCrossEntropy(options.smoothing)
    else:
        criterion = nn.CrossEntropyLoss()
    groups = parameter_groups(model, options.weight_decay, options.layer_decay)
    optimizer = create_optimizer(
        groups, options.opt, lr=options.lr, momentum=options.momentum, eps=options.opt_eps, betas=options.opt_betas
    )
    steps = options.epochs * steps_per_epoch
    warmup = options.warmup_steps if options.warmup_steps > 0 else options.warmup_epochs * steps_per_epoch
    if warmup > steps:
        raise UserError(
            f"--warmup_steps {warmup} is longer than the run: {options.epochs} epochs of {steps_per_epoch} updates"
        )
    decay_end = options.weight_decay if options.weight_decay_end is None else options.weight_decay_end
    if torch.distributed.is_initialized():
        devices = [precision.device.index] if precision.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    mixing_options = pick(options, "mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode smoothing seed")
    return Trainer(
        model=model,
        criterion=criterion,
        optimizer=optimizer,
        precision=precision,
        lr=cosine_schedule(options.lr, options.min_lr, steps=steps, warmup_steps=warmup),
        weight_decay=cosine_schedule(options.weight_decay, decay_end, steps=steps),
        mixer=build_mixer(num_classes=num_classes, **mixing_options),
        ema=ema,
        compiles=options.compile,
        save_freq=options.save_ckpt_steps if options.save_ckpt else None,
        **pick(options, "update_freq clip_grad seed log_freq channels_last"),
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
