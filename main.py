"""Train a small model, from selected weights or from random ones: one run, top to bottom."""

import signal
import sys

if __name__ == "__main__":  # a signal waits until there is a handler
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
try:
    from options.training import remarks, training_options
except ImportError as error:  # Python was told not to look beside this file
    sys.exit(f"main.py: error: {error}: unset PYTHONSAFEPATH, and start python without -P and -I")

if __name__ == "__main__":
    options = training_options()  # answer -h and usage errors before importing torch
    from requirements import require_packages  # here, because -h need not wait for it
    from training.signals import end_on_signals

    require_packages()
    end_on_signals(options)

import argparse
import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from datasets import counts, describe_data, load_data
from engine import EngineSettings, Trainer, evaluate, train_one_epoch
from images.batches import make_train_loader, make_val_loader
from images.features import FeatureBatches, on_features
from images.images import Images, bad_of_all_ranks, count_bad
from images.settings import Augmentation
from images.transforms import build_mixer
from images.workers import warn_of_cap
from models.build import build_model, constructor_arguments
from models.initial import check_scheme, initialize
from optim_factory import cosine_schedule, create_optimizer, parameter_groups
from options.training import computes_features_once, plain, settled
from training import distributed
from training.agreement import check_options
from training.checkpoint import BEST_CHECKPOINTS, Checkpoints, Progress, longer, saving_first
from training.compiler import check_compiler
from training.distill import Distillation, make_criterion
from training.evaluation import evaluation_options, reported
from training.folder import RunFolder, opened, write_config
from training.log import EpochLog, make_reporter, report_best
from training.meters import NotFinite
from training.ownership import way_on
from training.place import lone_task
from training.precision import Precision
from training.probe import make_probe
from training.signals import StopSignals
from training.sizes import errors_of_sizes_explained
from training.start import Start, find_start
from utils import UserError, environment, revision, run_script, seed_all, start_logging

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> dict:
    """Train, or evaluate with `--eval true`. Return the last epoch's line of log.txt, or what was measured."""
    options = training_options(argv)
    device = distributed.pick_device(options.device)
    distributed.set_determinism(options.deterministic)
    with distributed.process_group(device, options.dist_url, options.dist_timeout):
        if options.compile:
            check_compiler(device, options.compile_mode)
        start_logging(quiet=not distributed.is_main())
        check_options(vars(options))
        for remark in (*lone_task(), *remarks(options)):
            log.warning(remark)
        warn_of_cap(options.num_workers)
        with contextlib.ExitStack() as stack, errors_of_sizes_explained(options, device):
            output_dir, folder = Path(options.output_dir) if options.output_dir else None, None
            if output_dir and not options.eval:  # an evaluation writes nothing
                with distributed.main_first():
                    if distributed.is_main():
                        folder = stack.enter_context(opened(output_dir))
            # until here, a signal ends a process by the handlers that it was started with
            stop = stack.enter_context(StopSignals(folder if options.save_ckpt else None))
            try:
                start = find_start(options, output_dir)
                if options.eval:
                    options = evaluation_options(argv, options, start)
                check_scheme(options.init, options.model, constructor_arguments(options))
                return run(options, start, device, folder, stop)
            except NotFinite as error:
                raise UserError(f"{error}; {way_on(output_dir)}") from error


def run(
    options: argparse.Namespace, start: Start, device: torch.device, folder: RunFolder | None, stop: StopSignals
) -> dict:
    """Make one run, from where it starts to its last checkpoint; only the main process has its folder."""
    precision = Precision.choose(device, options.use_amp, options.amp_dtype)
    given = plain(options)
    update_freq = options.update_freq if options.eval else start.check_settings(given, precision.name)
    total_batch = options.batch_size * update_freq * distributed.world_size()
    options = settled(options, total_batch)
    in_effect = {"lr": options.lr, "images_per_update": total_batch, "precision": precision.name}
    train_images, val_images, num_classes = load_data(options)
    about_data = describe_data(train_images, val_images)
    start.check_data(about_data)
    if train_images and options.bad_images == "skip":
        train_images.mark_bad(start.bad_images())
    train_loader = make_train_loader(options, train_images, device, update_freq) if train_images else None
    val_loader = make_val_loader(options, val_images, device) if val_images else None

    model = make_model(options, num_classes, precision)
    ema_device = "cpu" if options.model_ema_force_cpu else None
    ema = ModelEmaV3(model, decay=options.model_ema_decay, device=ema_device) if options.model_ema else None
    start.restore_weights(model, ema, options)
    if options.compile:
        model.compile(mode=options.compile_mode)  # in place, so that the weights keep their names
    if options.eval:
        return reported(evaluate_all(options, model, ema, val_loader, precision), len(val_images))

    steps = train_loader.batch_sampler.steps_per_epoch
    criterion = make_criterion(options, about_data["classes"], model)
    teacher = {"teacher": criterion.teacher.source} if isinstance(criterion, Distillation) else {}
    start.check_teacher(teacher.get("teacher", {}))
    trainer = make_trainer(options, model, ema, criterion, precision, num_classes, steps, update_freq)
    trainer.asked_to_stop = lambda: bool(stop.asked)
    progress = start.restore_trainer(trainer, steps, options.start_epoch)
    if progress.epoch >= options.epochs:
        log.info("nothing is left to do: %s is of the last epoch; %s", start.path, longer(start.path))
        report_best(start.state["best"], progress.best_epochs, start.path.parent)
        return start.state["metrics"]
    about = {"options": given, "initialization": start.source} | teacher
    machine = environment(device, distributed.world_size())
    if folder:
        in_effect |= counts(num_classes, about_data)
        write_config(folder, about | {"in_effect": in_effect, "environment": machine, "revision": revision()})
        progress.best = start.bring_best(folder)
    if computes_features_once(options):
        train_loader, val_loader = on_features(options, model, precision, train_images, train_loader, val_loader)
    stop.defer()
    origin = about | {"data": about_data, "update_freq": update_freq, "precision": precision.name}
    origin |= {name: machine[name] for name in ("processes", "threads")}
    return train(options, folder, trainer, train_loader, val_loader, (train_images, val_images), progress, origin)


def train(
    options: argparse.Namespace,
    folder: RunFolder | None,
    trainer: Trainer,
    train_loader,
    val_loader,
    images: tuple[Images, Images | None],
    progress: Progress,
    origin: dict,
) -> dict:
    """Train the epochs that are left; return the last line of log.txt.

    `images` are those that the loaders load. `origin` is what each checkpoint says of the run: options, data, precision.
    """
    steps = train_loader.batch_sampler.steps_per_epoch
    epoch_log = EpochLog(folder, progress.epoch) if folder else None
    freq, keep = options.save_ckpt_freq, options.save_ckpt_num
    checkpoints = Checkpoints(folder, origin, options.epochs, freq, keep) if folder and options.save_ckpt else None

    def save(metrics: dict | None = None, improved: Sequence[str] = (), *, alone: bool = False) -> None:
        """Save inside an epoch or, with its `metrics`, at its end; `alone` after an error that other ranks may not have."""
        state = progress.state(steps, metrics)
        if options.bad_images == "skip":
            state["bad_images"] = images[0].bad_images() if alone else bad_of_all_ranks(images[0])
        if checkpoints:
            checkpoints.save(trainer.state() | state, improved)

    first_step = progress.epoch * steps + progress.done
    with contextlib.closing(make_reporter(options, folder, steps, first_step)) as reporter:
        while progress.epoch < options.epochs:
            progress.start_epoch()
            reporter.start_epoch(progress.epoch, progress.done)
            record = train_and_evaluate(options, trainer, train_loader, val_loader, progress, reporter.window, save)
            if options.bad_images == "skip":
                record |= count_bad(images)
            improved = progress.improve(record)
            reporter.end_epoch(record, progress.best)
            if epoch_log:
                epoch_log.append(record)  # first: a crash before the checkpoint repeats the epoch and rewrites its line
            save(record, improved)
            progress.end_epoch()
        if options.wandb_ckpt:
            reporter.store(Path(options.output_dir, BEST_CHECKPOINTS["test_acc1"]))
    report_best(progress.best, progress.best_epochs, checkpoints and folder.path)
    return record


def train_and_evaluate(
    options: argparse.Namespace,
    trainer: Trainer,
    train_loader,
    val_loader,
    progress: Progress,
    report: Callable,
    save: Callable,
) -> dict:
    """Train what is left of one epoch and evaluate; return its line of log.txt."""
    sampler, model = train_loader.batch_sampler, trainer.bare_model
    steps = sampler.steps_per_epoch
    sampler.set_epoch(progress.epoch, progress.done)
    means = train_one_epoch(trainer, train_loader, progress, steps=steps, report=report, save=save)
    record = {f"train_{name}": value for name, value in means.items()}
    if val_loader:
        with saving_first(save):
            measured = evaluate_all(options, model, trainer.ema, val_loader, trainer.precision, trainer.asked_to_stop)
        if not all(map(math.isfinite, measured.values())):  # weights may be finite and yet too large to compute with
            raise NotFinite(f"the test loss was not finite after epoch {progress.epoch}")
        record |= measured
    record |= {"epoch": progress.epoch, "step": (progress.epoch + 1) * steps, "n_parameters": count_parameters(model)}
    return record | {"epoch_seconds": progress.seconds()}


def evaluate_all(
    options: argparse.Namespace, model: nn.Module, ema, val_loader, precision: Precision, asked_to_stop=None
) -> dict[str, float]:
    """Measure test_loss, test_acc1 and test_acc5 of the model, and of its moving average with --model_ema_eval."""
    settings, record = EngineSettings.from_options(options), {}
    models = {"": model} | ({"_ema": ema.module} if ema is not None and options.model_ema_eval else {})
    for suffix, each in models.items():
        # features have passed all layers but the classifier
        evaluated = each.get_classifier() if isinstance(val_loader, FeatureBatches) else each
        figures = evaluate(evaluated, val_loader, precision, settings, asked_to_stop)
        record |= {f"test_{name}{suffix}": value for name, value in figures.items()}
    return record


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# ---- what a run is made of ----


def make_model(options: argparse.Namespace, num_classes: int, precision: Precision) -> nn.Module:
    """Build the model with its random initial values."""
    seed_all(options.seed)
    arguments = constructor_arguments(options)
    model = build_model(options.model, num_classes=num_classes, input_size=options.input_size, model_kwargs=arguments)
    initialize(model, options.init)
    return precision.place(model, torch.channels_last if options.channels_last else torch.preserve_format)


def make_trainer(
    options: argparse.Namespace,
    model: nn.Module,
    ema: ModelEmaV3 | None,
    criterion: nn.Module | Distillation,
    precision: Precision,
    num_classes: int,
    steps_per_epoch: int,
    update_freq: int,
) -> Trainer:
    """Put together optimizer, schedules and the model, in DDP if there are several processes."""
    student = make_probe(model, options) if options.linear_probe else model
    groups = parameter_groups(model, options)
    if isinstance(criterion, Distillation):
        student = criterion.student
        without_layers = argparse.Namespace(**vars(options) | {"layer_decay": 1.0})
        groups += parameter_groups(criterion.distiller or nn.Identity(), without_layers)
    optimizer = create_optimizer(groups, options)
    steps = options.epochs * steps_per_epoch
    warmup = options.warmup_steps if options.warmup_steps > 0 else round(options.warmup_epochs * steps_per_epoch)
    if warmup > steps:
        raise UserError(
            f"--warmup_steps {warmup} is longer than the run, {options.epochs} epochs of {steps_per_epoch} updates: "
            f"give at most {steps}"
        )
    decay_end = options.weight_decay if options.weight_decay_end is None else options.weight_decay_end
    total_batch = options.batch_size * update_freq * distributed.world_size()
    size = f"{count_parameters(model) / 1e6:.2f} M parameters, {steps_per_epoch} updates per epoch"
    log.info("%s: %s, %d images per update, on %s", options.model, size, total_batch, precision.device)
    if torch.distributed.is_initialized():
        devices = [precision.device.index] if precision.device.type == "cuda" else None
        student = DistributedDataParallel(student, device_ids=devices, gradient_as_bucket_view=True)
    return Trainer(
        model=student,
        criterion=criterion,
        optimizer=optimizer,
        precision=precision,
        lr=cosine_schedule(options.lr, options.min_lr, steps=steps, warmup_steps=warmup),
        weight_decay=cosine_schedule(options.weight_decay, decay_end, steps=steps),
        settings=EngineSettings.from_options(options, update_freq=update_freq),
        mixer=build_mixer(Augmentation.from_options(options), num_classes),
        ema=ema,
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
