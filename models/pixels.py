"""What a model expects images to be: 3 channels or, in grey, 1, and the mean and std by which they are normalized."""

from collections.abc import Mapping

import torch
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch import Tensor

from utils import UserError

MeanAndStd = tuple[tuple[float, ...], tuple[float, ...]]  # per channel, of levels in [0, 1]

LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # red, green and blue in Pillow's mode L


def image_channels(kwargs: Mapping, option: str) -> int:
    """Return how many channels images have for a model that is built with `kwargs`: 3, or 1 for grey images.

    Raises UserError, which names `option`, for any other count: images have no other channels.
    """
    channels = kwargs.get("in_chans", 3)
    if channels not in (1, 3):
        raise UserError(f"{option} in_chans={channels}: images have 3 channels or, in grey, 1")
    return channels


def mean_and_std(imagenet: bool, channels: int) -> MeanAndStd:
    """Return ImageNet's mean and std, or Inception's, which are 0.5 everywhere."""
    if imagenet:
        return for_channels((IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), channels)
    return for_channels((IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD), channels)


def for_channels(colours: MeanAndStd, channels: int) -> MeanAndStd:
    """Return the mean and std for this many channels: those of grey images are the means of the three colours'."""
    return colours if channels == 3 else tuple((sum(each) / len(each),) for each in colours)


class Renormalize:
    """Turn images that are normalized for one model into images for another.

    Colours become grey by their luma. Grey becomes a colour image of three equal channels.
    """

    def __init__(self, given: MeanAndStd, wanted: MeanAndStd, device: torch.device | str = "cpu") -> None:
        (given_mean, given_std), (mean, std) = (
            torch.tensor(each, dtype=torch.float64)[..., None, None] for each in (given, wanted)
        )
        self._to_grey = len(mean) < len(given_mean)
        luma = torch.tensor(LUMA, dtype=torch.float64)[:, None, None] if self._to_grey else 1.0
        shift = given_mean * luma
        shift = (shift.sum(0, keepdim=True) if self._to_grey else shift) - mean
        self._scale, self._shift = ((each / std).float().to(device) for each in (given_std * luma, shift))
        self._changes = (given_mean.tolist(), given_std.tolist()) != (mean.tolist(), std.tolist())

    def __call__(self, images: Tensor) -> Tensor:
        """Return images [batch, channels wanted, H, W] for images [batch, channels given, H, W]."""
        if not self._changes:
            return images
        images = images * self._scale
        return (images.sum(1, keepdim=True) if self._to_grey else images) + self._shift
