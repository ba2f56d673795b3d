"""Train a small model, from selected weights or from random ones: options, data, model, optimizer, loop, in this order."""

from options import mixes, training_options, without_effect

if __name__ == "__main__":
    training_options()  # -h and usage errors answer before torch is imported

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import datasets
import distributed
import feed
import loader
from checkpoint import (
    BEST_CHECKPOINTS,
    bring_best,
    check_same_data,
    check_same_optimizer,
    check_same_settings,
    check_unused,
    find_checkpoint,
    restore_weights,
    save_epoch,
)
from engine import Precision, Trainer, evaluate, train_one_epoch
from metrics import EpochLog, Reporter, TensorBoard, WeightsAndBiases, summary
from models import build_model, family_of, inherit
from optim_factory import cosine_schedule, create_optimizer, parameter_groups
from utils import UserError, environment, revision, run_script, seed_all, start_logging, write_atomically
from weights import fetch, read_initialization

log = logging.getLogger(__name__)

RUN_FORMAT = "weight-selection run 1"


def main(argv: list[str] | None = None) -> dict:
    """Train, or with `--eval true` evaluate; returns the last epoch's line of log.txt, or what was measured."""
    options = training_options(argv)
    device = distributed.pick_device(options.device)
    with distributed.process_group(device, options.dist_url):
        start_logging(quiet=not distributed.is_main())
        for name in without_effect(options):
            log.warning("%s is accepted and has no effect", name)
        return run(options, device)


def run(options: argparse.Namespace, device: torch.device) -> dict:
    """One run, from its options to its last checkpoint."""
    set_determinism(options.deterministic)
    # an evaluation writes nothing
    output_dir = (
        Path(options.output_dir) if options.eval and options.output_dir else make_output_dir(options.output_dir)
    )
    precision = Precision.choose(device, options.use_amp, options.amp_dtype)
    resume = str(fetch_once(options.resume)) if options.resume.startswith("https://") else options.resume
    found = find_checkpoint(resume, output_dir, auto_resume=options.auto_resume, training=not options.eval)
    path, saved = found or (None, None)
    epochs_found = distributed.of_all_ranks(saved and saved["epoch"])
    if len(set(epochs_found)) > 1:
        listed = ", ".join("none" if epoch is None else f"epoch {epoch}" for epoch in epochs_found)
        raise UserError(f"the processes found different checkpoints ({listed}): all nodes have to share --output_dir")
    if saved and not options.eval:
        check_same_settings(path, saved, plain(options), distributed.world_size(), precision.name)
    elif output_dir and not options.eval:
        check_unused(output_dir, plain(options))

    train_images, val_images, num_classes = load_data(options)
    data = {
        "classes": (train_images or val_images).class_names or num_classes,
        "training images": train_images and len(train_images),
    }
    if saved:
        check_same_data(path, saved, data)
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

    trainer = make_trainer(options, model, ema, precision, num_classes, train_loader.batch_sampler.steps_per_epoch)
    first_epoch, best = options.start_epoch, {}
    if saved:
        check_same_optimizer(path, trainer.optimizer, saved["optimizer"])
        trainer.optimizer.load_state_dict(saved["optimizer"])
        precision.scaler.load_state_dict(saved["scaler"])
        first_epoch = saved["epoch"] + 1
        log.info("resumed after epoch %d from %s", saved["epoch"], path)
    if first_epoch >= options.epochs:
        log.info("nothing is left to do: %s is of the last epoch", path)
        return saved["metrics"]
    if output_dir and distributed.is_main():
        write_config(output_dir, options, source, device)
        best = bring_best(path, saved, output_dir) if saved else {}
    origin = {"options": plain(options), "processes": distributed.world_size(), "initialization": source,
        "precision": precision.name, "data": data}  # fmt: skip
    return train(options, output_dir, trainer, train_loader, val_loader, first_epoch, best, origin)


# ---- set-up ----


def set_determinism(wanted: bool) -> None:
    """The same weights from the same seed on a GPU too, or the fastest kernels."""
    torch.backends.cudnn.benchmark = not wanted
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def make_output_dir(name: str) -> Path | None:
    """The run's folder, made and found writable; None when nothing is to be kept."""
    if not name:
        return None
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test.{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)  # a rank on another node may have the same number and be done with it
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written to: {error.strerror}") from error
    return folder


def load_data(options: argparse.Namespace) -> tuple[datasets.Images | None, datasets.Images | None, int]:
    """The images to train on and to evaluate on (None where not needed) and their number of classes."""

    def load(train: bool) -> datasets.Images:
        images = datasets.load_images(
            options.data_set,
            options.data_path,
            train,
            eval_data_path=options.eval_data_path,
            download=distributed.is_main(),
            split=options.train_split if train else options.val_split,
            input_key=options.input_key,
            target_key=options.target_key,
        )
        return images.skipping_bad() if options.bad_images == "skip" else images

    with distributed.main_first():
        train_images = None if options.eval else load(True)
        val_images = None if options.disable_eval else load(False)
    if train_images and val_images:
        datasets.check_same_classes(train_images, val_images)
    num_classes = (train_images or val_images).classes
    if options.nb_classes not in (None, num_classes):
        raise UserError(f"--nb_classes {options.nb_classes}, but --data_set {options.data_set} has {num_classes}")
    if train_images and options.data_fraction < 1:
        train_images = datasets.fraction(train_images, options.data_fraction, options.seed)
    return train_images, val_images, num_classes


def make_train_loader(options: argparse.Namespace, images: datasets.Images, device: torch.device):
    """Augmented batches of this rank, in an order derived from the seed."""
    world = distributed.world_size()
    loader.check_batches(len(images), options.batch_size, options.update_freq, world)
    order = loader.TrainBatches(
        len(images), world_size=world, rank=distributed.rank(), **pick(options, "batch_size update_freq seed")
    )
    return feed.train_batches(
        images,
        order,
        augmentation=pick(options, "hflip color_jitter aa train_interpolation reprob remode recount"),
        **pick(options, "augment cache_size seed"),
        **data_way(options, device),
    )


def make_val_loader(options: argparse.Namespace, images: datasets.Images, device: torch.device):
    """Batches of this rank's share of the evaluation images, or of all of them with `--dist_eval false`."""
    share = (distributed.rank(), distributed.world_size()) if options.dist_eval else (0, 1)
    indices, batch_size = loader.shard(len(images), *share), int(1.5 * options.batch_size)
    return feed.eval_batches(images, indices, batch_size, crop_pct=options.crop_pct, **data_way(options, device))


def data_way(options: argparse.Namespace, device: torch.device) -> dict:
    """What training and evaluation batches have in common."""
    mean, std = loader.mean_and_std(options.imagenet_default_mean_and_std)
    workers = {
        "num_workers": options.num_workers,
        "pin_memory": options.pin_mem and device.type == "cuda",
        "yielding": device.type == "cpu",
    }
    return {"mean": mean, "std": std, "device": device, "workers": workers, **pick(options, "cache input_size")}


def pick(options: argparse.Namespace, names: str) -> dict:
    """The named options, for a function whose parameters are called like them."""
    return {name: getattr(options, name) for name in names.split()}


def fetch_once(url: str) -> Path:
    """The local copy of a file at `https://…#sha256=…`, downloaded by one process."""
    with distributed.main_first():
        return fetch(url)


def initialize(model: nn.Module, options: argparse.Namespace) -> dict:
    """Copy the weights of `--initialize` into the model; returns where they come from. UserError if they do not fit."""
    location, family = options.initialize, family_of(model)
    if location.startswith("https://"):
        location = str(fetch_once(location))
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
        mixer=loader.build_mixer(num_classes=num_classes, **mixing_options),
        ema=ema,
        compiles=options.compile,
        **pick(options, "update_freq clip_grad seed log_freq channels_last"),
    )


def plain(options: argparse.Namespace) -> dict:
    """The options as JSON would give them back."""
    return json.loads(json.dumps(vars(options), default=str))


def write_config(output_dir: Path, options: argparse.Namespace, source: dict | None, device: torch.device) -> None:
    content = {
        "format": RUN_FORMAT,
        "options": plain(options),
        "initialization": source,
        "environment": environment(device, distributed.world_size()),
        "revision": revision(),
    }
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(output_dir / "config.json", text.encode())


def make_writers(options: argparse.Namespace, output_dir: Path | None, first_step: int) -> list:
    writers = [TensorBoard(options.log_dir, first_step)] if options.log_dir else []
    if options.enable_wandb:
        writers.append(WeightsAndBiases(options.project, plain(options), output_dir))
    return writers


# ---- the loop ----


def train(
    options: argparse.Namespace,
    output_dir: Path | None,
    trainer: Trainer,
    train_loader,
    val_loader,
    first_epoch: int,
    best: dict[str, float],
    origin: dict,
) -> dict:
    """Every epoch: train, evaluate, log, save; returns the last line of log.txt.

    `best` holds the best figures so far, `origin` what each checkpoint says of the run: its options, data, precision.
    """
    is_main, steps = distributed.is_main(), train_loader.batch_sampler.steps_per_epoch
    n_parameters = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    total_batch = options.batch_size * options.update_freq * distributed.world_size()
    size = f"{options.model}: {n_parameters / 1e6:.2f}M parameters"
    log.info("%s, %d updates of %d images an epoch, on %s", size, steps, total_batch, trainer.precision.device)
    epoch_log = EpochLog(output_dir / "log.txt", first_epoch) if output_dir and is_main else None
    bar = is_main and (sys.stderr.isatty() if options.progress is None else options.progress)
    with contextlib.ExitStack() as stack:
        writers = make_writers(options, output_dir, first_epoch * steps) if is_main else []
        for writer in writers:
            stack.callback(writer.close)
        reporter = Reporter(options.epochs, steps, bar=bar, writers=writers)
        stack.callback(reporter.close)
        for epoch in range(first_epoch, options.epochs):
            start = time.monotonic()
            reporter.start_epoch(epoch)
            train_loader.batch_sampler.set_epoch(epoch)
            means = train_one_epoch(
                trainer, train_loader, epoch=epoch, first_step=epoch * steps, steps=steps, report=reporter.window
            )
            record = {f"train_{name}": value for name, value in means.items()}
            if val_loader:
                record |= evaluate_all(options, trainer.bare_model, trainer.ema, val_loader, trainer.precision)
            record |= {"epoch": epoch, "step": (epoch + 1) * steps, "n_parameters": n_parameters}
            record["epoch_seconds"] = time.monotonic() - start
            improved = [name for name in BEST_CHECKPOINTS if record.get(name, -1.0) > best.get(name, -1.0)]
            best |= {name: record[name] for name in improved}
            reporter.end_epoch(record, best)
            if epoch_log:
                # before the checkpoint: a crash between the two repeats the epoch and writes its line anew
                epoch_log.append(record)
            if epoch_log and options.save_ckpt:
                position = {"epoch": epoch, "step": record["step"], "metrics": record, "best": best}
                due = (epoch + 1) % options.save_ckpt_freq == 0 or epoch + 1 == options.epochs
                state = {**trainer.state(), **position, **origin}
                save_epoch(output_dir, state, improved=improved, due=due, keep=options.save_ckpt_num)
        for writer in writers:
            if options.wandb_ckpt and isinstance(writer, WeightsAndBiases):
                writer.store(output_dir / BEST_CHECKPOINTS["test_acc1"])
    return record


def evaluate_all(
    options: argparse.Namespace, model: nn.Module, ema, val_loader, precision: Precision
) -> dict[str, float]:
    """test_loss, test_acc1 and test_acc5 of the model, and of its moving average where asked for."""
    settings = {"channels_last": options.channels_last, "over_ranks": options.dist_eval}
    record = {f"test_{name}": value for name, value in evaluate(model, val_loader, precision, **settings).items()}
    if ema is not None and options.model_ema_eval:
        average = evaluate(ema.module, val_loader, precision, **settings)
        record |= {f"test_{name}_ema": value for name, value in average.items()}
    return record


if __name__ == "__main__":
    sys.exit(run_script(main))
