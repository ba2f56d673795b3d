"""Three groups of options as values: how the model sees an image, how training changes it, how it is loaded."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import timm.data
import torch


@dataclass(frozen=True)
class View:
    """How the model sees an image, in training and in evaluation."""

    input_size: int
    mean: Sequence[float]  # per channel, of levels in [0, 1]
    std: Sequence[float]
    crop_pct: float | None = None  # evaluation: crop side / resized side

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "View":
        """The view that main.py's options ask for: with ImageNet's mean and std, or Inception's (0.5 everywhere)."""
        mean, std = timm.data.IMAGENET_INCEPTION_MEAN, timm.data.IMAGENET_INCEPTION_STD
        if options.imagenet_default_mean_and_std:
            mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
        return cls(options.input_size, mean, std, options.crop_pct)


@dataclass(frozen=True)
class Augmentation:
    """What training does to images; the fields are the options of the same names."""

    augment: str  # "timm": image by image in workers; "device": in batches where training happens
    seed: int
    # one image
    hflip: float
    color_jitter: float | None
    aa: str  # one of timm's policies; "" or "none" for none, and then color_jitter counts
    train_interpolation: str
    reprob: float
    remode: str
    recount: int
    # the images of a batch with each other
    mixup: float
    cutmix: float
    cutmix_minmax: Sequence[float] | None
    mixup_prob: float
    mixup_switch_prob: float
    mixup_mode: str
    smoothing: float

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "Augmentation":
        """The augmentation that main.py's options ask for."""
        return cls(
            augment=options.augment,
            seed=options.seed,
            hflip=options.hflip,
            color_jitter=options.color_jitter,
            aa=options.aa,
            train_interpolation=options.train_interpolation,
            reprob=options.reprob,
            remode=options.remode,
            recount=options.recount,
            mixup=options.mixup,
            cutmix=options.cutmix,
            cutmix_minmax=options.cutmix_minmax,
            mixup_prob=options.mixup_prob,
            mixup_switch_prob=options.mixup_switch_prob,
            mixup_mode=options.mixup_mode,
            smoothing=options.smoothing,
        )


@dataclass(frozen=True)
class Loading:
    """How images get from the disk to the training device."""

    device: torch.device
    num_workers: int
    pin_memory: bool
    cache: str  # "none", "ram" (shared by a node's processes) or "device"
    cache_size: int | None  # side in pixels of the cached images; None: as they are

    @classmethod
    def from_options(cls, options: argparse.Namespace, device: torch.device) -> "Loading":
        """The loading that main.py's options ask for, of a process that trains on `device`."""
        pin_memory = options.pin_mem and device.type == "cuda"  # only copies to a card gain from it
        return cls(device, options.num_workers, pin_memory, options.cache, options.cache_size)
