"""What a batch holds: per-image transforms and their draws, the order of an epoch, each rank's share, mixup."""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision import transforms

from images.images import Images
from utils import Stream, UserError, derive_seed, seed_all


def mean_and_std(imagenet_default: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and standard deviations in [0, 1]: ImageNet's, or Inception's (0.5 everywhere)."""
    if imagenet_default:
        return timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    return timm.data.IMAGENET_INCEPTION_MEAN, timm.data.IMAGENET_INCEPTION_STD


def train_transform(
    input_size: int, mean: Sequence[float], std: Sequence[float], *, hflip: float, color_jitter: float | None, aa: str,
    train_interpolation: str, reprob: float, remode: str, recount: int
) -> transforms.Compose:  # fmt: skip
    """timm's training transform, PIL image to float [3, S, S]; up to 32 px a padded crop, not a resized one.

    `aa` is one of timm's policies; "" or "none" for none, and color_jitter counts. UserError for another.
    """
    erasing = {"re_prob": reprob, "re_mode": remode, "re_count": recount}
    options = {
        "hflip": hflip,
        "color_jitter": color_jitter,
        "interpolation": train_interpolation,
        "mean": mean,
        "std": std,
        **erasing,
    }
    policy = None if aa in ("", "none", None) else aa
    try:
        transform = timm.data.create_transform(input_size, is_training=True, auto_augment=policy, **options)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"timm refuses --aa {aa!r}, --train_interpolation {train_interpolation} ({error})") from error
    last = [type(step).__name__ for step in transform.transforms].index("Normalize")
    transform.transforms[last - 1 : last + 1] = [ToNormalizedTensor(mean, std)]
    if input_size <= 32:
        transform.transforms[:1] = [_resize(input_size), transforms.RandomCrop(input_size, padding=4)]
    _allow_zero_bits(transform)
    return transform


def eval_transform(
    input_size: int, mean: Sequence[float], std: Sequence[float], *, crop_pct: float | None = None
) -> transforms.Compose:
    """The evaluation transform, PIL image to float [3, S, S]: `eval_crop`, then normalization."""
    steps = eval_crop(input_size, crop_pct).transforms
    return transforms.Compose([*steps, ToNormalizedTensor(mean, std)])


def eval_crop(input_size: int, crop_pct: float | None = None) -> transforms.Compose:
    """The short side to input_size / crop_pct (224 / 256), centre crop; up to 32 and from 384 px the whole image."""
    if not 32 < input_size < 384:
        return transforms.Compose([_resize(input_size)])
    short_side = int(input_size / (crop_pct or 224 / 256))
    bicubic = transforms.Resize(short_side, interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([bicubic, transforms.CenterCrop(input_size)])


def _resize(size: int) -> transforms.Resize:
    """Bicubic to size x size without keeping the aspect; an image of that size passes untouched."""
    return transforms.Resize((size, size), interpolation=transforms.InterpolationMode.BICUBIC)


def normalized(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [..., H, W, 3] to float [..., 3, H, W], by mean and std [3, 1, 1]: the values of ToTensor and Normalize."""
    # their operations in their order, in one piece of memory
    planes = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.div_(255).sub_(mean).div_(std)


class ToNormalizedTensor:
    """ToTensor and Normalize in one, PIL image in RGB to float [3, H, W]: the same values in half of the time."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))

    def __call__(self, image: Image.Image) -> Tensor:
        return normalized(torch.from_numpy(np.array(image)), self.mean, self.std)


def _allow_zero_bits(part) -> None:
    """Wrap the posterize operations inside a transform that timm built, at any depth of lists and policies."""
    if isinstance(part, list | tuple):
        for inner in part:
            _allow_zero_bits(inner)
    elif getattr(part, "name", "").startswith("Posterize"):
        part.aug_fn = functools.partial(_posterize, part.aug_fn)
    else:
        for held in ("transforms", "ops", "policy"):
            _allow_zero_bits(getattr(part, held, ()))


def _posterize(posterize: Callable, image: Image.Image, bits: int, **options) -> Image.Image:
    # Pillow 13 refuses fewer than 1 bit, which timm asks for at the end of its scales; earlier ones gave black
    return posterize(image, bits, **options) if bits >= 1 else Image.new(image.mode, image.size)


@contextmanager
def _draws_from(seed: int) -> Iterator[None]:
    """The global CPU generators start from `seed` inside and are as before afterwards."""
    if get_worker_info() is not None:  # nothing else draws in a worker: save the 0.1 ms that keeping the state takes
        seed_all(seed)
        yield
        return
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        seed_all(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class TransformedImages(Dataset):
    """Images after their transform: (tensor [3, S, S] float, class index).

    Training asks for (epoch, index), and the draws depend on (seed, epoch, index) alone; evaluation for an index.
    """

    def __init__(self, images: Images, transform: Callable, seed: int = 0):
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        if not isinstance(key, tuple):
            image, target = self.images[key]
            return self.transform(image), target
        image, target = self.images[key[1]]
        with _draws_from(derive_seed(Stream.IMAGE, self.seed, *key)):
            return self.transform(image), target


class Mixer:
    """timm's Mixup with draws that depend on (seed, *key) alone; the global generators are left as they were."""

    def __init__(self, mixup: timm.data.Mixup, seed: int):
        self.mixup, self.seed = mixup, seed

    def __call__(self, images: Tensor, targets: Tensor, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(images [batch, 3, H, W], mixed in place; soft targets [batch, classes]), for key = (step, chunk)."""
        with _draws_from(derive_seed(Stream.MIX, self.seed, *key)):
            return self.mixup(images, targets)


def build_mixer(
    *, mixup: float, cutmix: float, cutmix_minmax: Sequence[float] | None, mixup_prob: float, mixup_switch_prob: float,
    mixup_mode: str, smoothing: float, num_classes: int, seed: int
) -> Mixer | None:  # fmt: skip
    """A Mixer by timm's arguments; None when mixup, cutmix and cutmix_minmax are all off."""
    if not (mixup > 0 or cutmix > 0 or cutmix_minmax):
        return None
    how = {"prob": mixup_prob, "switch_prob": mixup_switch_prob, "mode": mixup_mode, "label_smoothing": smoothing}
    return Mixer(timm.data.Mixup(mixup, cutmix, cutmix_minmax or None, num_classes=num_classes, **how), seed)
