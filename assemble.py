"""From options to what a run is made of: data and its batches, model, optimizer, writers."""

import argparse
import json
import logging
import os
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
from engine import Precision, Trainer
from images import Images
from metrics import TensorBoard, WeightsAndBiases
from models import family_of, inherit
from optim_factory import cosine_schedule, create_optimizer, parameter_groups
from options import mixes
from utils import UserError
from weights import fetch, read_initialization

log = logging.getLogger(__name__)


def set_determinism(wanted: bool) -> None:
    """The same weights from the same seed on a GPU too, or the fastest kernels."""
    torch.backends.cudnn.benchmark = not wanted
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def load_data(options: argparse.Namespace) -> tuple[Images | None, Images | None, int]:
    """The images to train on and to evaluate on (None where not needed) and their number of classes."""

    def load(train: bool) -> Images:
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


def make_train_loader(options: argparse.Namespace, images: Images, device: torch.device):
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


def make_val_loader(options: argparse.Namespace, images: Images, device: torch.device):
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
        save_freq=options.save_ckpt_steps if options.save_ckpt else None,
        **pick(options, "update_freq clip_grad seed log_freq channels_last"),
    )


def plain(options: argparse.Namespace) -> dict:
    """The options as JSON would give them back."""
    return json.loads(json.dumps(vars(options), default=str))


def make_writers(options: argparse.Namespace, output_dir: Path | None, first_step: int) -> list:
    writers = [TensorBoard(options.log_dir, first_step)] if options.log_dir else []
    if options.enable_wandb:
        writers.append(WeightsAndBiases(options.project, plain(options), output_dir))
    return writers
