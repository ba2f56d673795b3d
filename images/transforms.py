"""The transforms of timm and torchvision, image by image, and mixup: with draws that depend on indices alone."""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision import transforms

from images.image_ops import gray
from images.images import Images
from images.settings import Augmentation, View
from utils import Stream, UserError, derive_seed, first_line, seed_all

CROP_PCT = 224 / 256  # by default, of sizes for which a crop is made


def train_transform(view: View, augmentation: Augmentation) -> transforms.Compose:
    """Build timm's training transform, PIL image to float [channels, S, S]; UserError for a policy that timm does not know.

    Up to 32 px the crop is taken from the padded image, not resized from a part of it: CIFAR's usual recipe.
    """
    aa, interpolation, (mean, std) = augmentation.aa, augmentation.train_interpolation, view.colours
    try:
        transform = timm.data.create_transform(
            view.input_size,
            is_training=True,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter,
            auto_augment=None if aa in ("", "none", None) else aa,
            interpolation=interpolation,
            mean=mean,  # the colour of what comes in from outside; the normalization is replaced below
            std=std,
            re_prob=augmentation.reprob,
            re_mode=augmentation.remode,
            re_count=augmentation.recount,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"timm refuses --aa {aa!r}, --train_interpolation {interpolation} ({error})") from error
    last = [type(step).__name__ for step in transform.transforms].index("Normalize")
    transform.transforms[last - 1 : last + 1] = [ToNormalizedTensor(view.mean, view.std)]
    if view.input_size <= 32:
        transform.transforms[:1] = [_resize(view.input_size), transforms.RandomCrop(view.input_size, padding=4)]
    _allow_zero_bits(transform)
    _try(transform, aa)
    return transform


def _try(transform: Callable, aa: str) -> None:
    """UserError for a policy that timm builds and cannot apply, as with numbers out of range."""
    try:
        with _draws_from(0):
            for _ in range(4):  # a policy draws which operations it applies
                transform(Image.new("RGB", (64, 64)))
    except (ArithmeticError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"timm cannot apply --aa {aa!r} ({first_line(error)})") from error


def eval_transform(view: View) -> transforms.Compose:
    """Build the evaluation transform, PIL image to float [channels, S, S]: `eval_crop`, then normalization."""
    return transforms.Compose([*eval_crop(view).transforms, ToNormalizedTensor(view.mean, view.std)])


def evaluation_batches(images: Images, indices: Sequence[int], view: View, size: int) -> Iterator[Tensor]:
    """Yield these images, as the evaluation sees them, in batches [size, channels, S, S]; the last may be smaller."""
    transform = eval_transform(view)
    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without Python's lock
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            yield torch.stack(list(pool.map(lambda index: transform(images[index][0]), batch)))


def eval_crop(view: View) -> transforms.Compose:
    """Resize the short side to input_size / crop_pct (224 / 256 by default), then crop the centre.

    Up to 32 px and from 384 px the whole image is resized instead.
    """
    if _sees_all(view):
        return transforms.Compose([_resize(view.input_size)])
    short_side = int(view.input_size / (view.crop_pct or CROP_PCT))
    bicubic = transforms.Resize(short_side, interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([bicubic, transforms.CenterCrop(view.input_size)])


def eval_config(view: View) -> dict:
    """Describe `eval_transform` in the words of a timm config: `timm.data.create_transform` makes the same pixels of it."""
    crop = {"crop_mode": "squash", "crop_pct": 1.0} if _sees_all(view) else {"crop_pct": view.crop_pct or CROP_PCT}
    normalization = {"mean": list(view.mean), "std": list(view.std)}
    size = [len(view.mean), view.input_size, view.input_size]
    return {"input_size": size, "interpolation": "bicubic", "crop_mode": "center"} | crop | normalization


def _sees_all(view: View) -> bool:
    return not 32 < view.input_size < 384


def _resize(size: int) -> transforms.Resize:
    """Resize bicubically to size x size, whatever the aspect; an image of that size passes untouched."""
    return transforms.Resize((size, size), interpolation=transforms.InterpolationMode.BICUBIC)


def normalized(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalize uint8 [..., H, W, 3] to float [..., 3, H, W], by mean and std [3, 1, 1], as ToTensor and Normalize do.

    With mean and std [1, 1, 1], the image becomes grey before, as by Pillow's mode L: float [..., 1, H, W].
    """
    # the same operations in the same order, so equal to the bit; in place, for speed
    planes = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    if len(mean) == 1:
        planes = gray(planes)
    return planes.div_(255).sub_(mean).div_(std)


class ToNormalizedTensor:
    """ToTensor and Normalize in one, PIL image in RGB to float [channels, H, W]: the same values in half the time.

    The channels are those of mean and std: 3, or 1 for a grey image.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = (torch.tensor(value).view(-1, 1, 1) for value in (mean, std))

    def __call__(self, image: Image.Image) -> Tensor:
        return normalized(torch.from_numpy(np.array(image)), self.mean, self.std)


def _allow_zero_bits(part) -> None:
    """Wrap the posterize operations in a transform that timm built, at any depth of lists and policies."""
    if isinstance(part, list | tuple):
        for inner in part:
            _allow_zero_bits(inner)
    elif getattr(part, "name", "").startswith("Posterize"):
        part.aug_fn = functools.partial(_posterize, part.aug_fn)
    else:
        for held in ("transforms", "ops", "policy"):
            _allow_zero_bits(getattr(part, held, ()))


def _posterize(posterize: Callable, image: Image.Image, bits: int, **options) -> Image.Image:
    # timm's largest magnitudes ask for 0 bits or fewer: Pillow 13 refuses that, earlier versions made the image black
    return posterize(image, bits, **options) if bits >= 1 else Image.new(image.mode, image.size)


@contextmanager
def _draws_from(seed: int) -> Iterator[None]:
    """Seed the global CPU generators inside the context; afterwards they are as they were before."""
    if get_worker_info() is not None:  # nothing else draws in a worker: do not spend 0.1 ms on keeping the state
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
    """Transformed images: (tensor [channels, S, S] float, class index).

    The key is (epoch, index) in training, where draws depend on (seed, epoch, index) alone, and an index in evaluation.
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
    """timm's Mixup, with draws that depend on (seed, *key) alone and leave the global generators as they were."""

    def __init__(self, mixup: timm.data.Mixup, seed: int):
        self.mixup, self.seed = mixup, seed

    def __call__(self, images: Tensor, targets: Tensor, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Mix images [batch, channels, H, W] in place; returns them and soft targets [batch, classes]. key = (step, chunk)."""
        with _draws_from(derive_seed(Stream.MIX, self.seed, *key)):
            return self.mixup(images, targets)


def build_mixer(augmentation: Augmentation, num_classes: int) -> Mixer | None:
    """Build the Mixer that the options ask for; None if mixup, cutmix and cutmix_minmax are all off."""
    if not (augmentation.mixup > 0 or augmentation.cutmix > 0 or augmentation.cutmix_minmax):
        return None
    mixup = timm.data.Mixup(
        augmentation.mixup,
        augmentation.cutmix,
        augmentation.cutmix_minmax or None,
        prob=augmentation.mixup_prob,
        switch_prob=augmentation.mixup_switch_prob,
        mode=augmentation.mixup_mode,
        label_smoothing=augmentation.smoothing,
        num_classes=num_classes,
    )
    return Mixer(mixup, augmentation.seed)
