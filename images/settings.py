"""Three groups of options as values: how the model sees an image, how training changes it, how it is loaded."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from images.workers import most_workers
from models.pixels import MeanAndStd, image_channels, mean_and_std
from options.parser import Settings


@dataclass(frozen=True)
class View(Settings):
    """How the model sees an image, in training and in evaluation."""

    input_size: int
    crop_pct: float | None  # evaluation: crop side / resized side
    imagenet_default_mean_and_std: bool  # or Inception's, 0.5 everywhere
    channels: int = 3  # not an option, but what --model_kwargs says; 1: grey

    @classmethod
    def from_options(cls, options: argparse.Namespace, **others) -> "View":
        """Take main.py's options. UserError if its model takes images of other channels than grey or colour."""
        return super().from_options(options, channels=image_channels(options.model_kwargs, "--model_kwargs"), **others)

    @property
    def colours(self) -> MeanAndStd:
        """Mean and std of red, green and blue: images are augmented in colour, and become grey before normalization."""
        return mean_and_std(self.imagenet_default_mean_and_std, 3)

    @property
    def mean(self) -> Sequence[float]:
        """Per channel that the model sees, of levels in [0, 1]."""
        return mean_and_std(self.imagenet_default_mean_and_std, self.channels)[0]

    @property
    def std(self) -> Sequence[float]:
        return mean_and_std(self.imagenet_default_mean_and_std, self.channels)[1]


@dataclass(frozen=True)
class Augmentation(Settings):
    """What training does to images."""

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


@dataclass(frozen=True)
class Loading(Settings):
    """How images get from the disk to the training device."""

    device: torch.device  # not the option, but the device that it picks
    num_workers: int
    pin_mem: bool
    cache: str  # "none", "ram" (shared by a node's processes) or "device"
    cache_size: int | None  # side in pixels of the cached images; None: as they are

    @property
    def workers(self) -> int:
        """Return `num_workers`, or fewer if this node has fewer cores."""
        return min(self.num_workers, most_workers())

    @property
    def pin_memory(self) -> bool:
        return self.pin_mem and self.device.type == "cuda"  # only copies to a card gain from it
