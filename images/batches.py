"""The ways of images to the training device: transformed in workers, or augmented there from uint8 pixels."""

import argparse
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset

from images.augment import DeviceAugment
from images.cache import CachedImages, Shrink, cache_images, check_fits, free_memory
from images.images import Images
from images.order import TrainBatches, check_batches, shard
from images.transforms import TransformedImages, eval_crop, eval_transform, mean_and_std, normalized, train_transform
from images.workers import Batch, WorkerBatches, ahead
from options import pick
from training import distributed
from utils import UserError


def train_batches(
    images: Images, order: TrainBatches, *, augment: str, cache: str, cache_size: int | None, input_size: int,
    mean: Sequence[float], std: Sequence[float], augmentation: dict, seed: int, device: torch.device, workers: dict
):  # fmt: skip
    """One rank's augmented batches (float [batch, 3, S, S], class numbers [batch]), again and again, in `order`.

    `augment` "timm": each image in a worker; "device": batches on `device`. `cache`, `cache_size`: where images are kept
    decoded, and how large. `augmentation` are the options that both ways share, `workers` those of WorkerBatches.
    """
    # what is wrong with the options is said before hours of decoding
    shared = {"input_size": input_size, "mean": mean, "std": std, **augmentation}
    transform = train_transform(**shared) if augment == "timm" else None
    on_device = DeviceAugment(**shared, seed=seed, device=device, crop=False) if augment == "device" else None
    if cache != "none":
        prepare = Shrink(cache_size, square=cache == "device") if cache_size else None
        images = cache_images(images, prepare=prepare, num_workers=workers["num_workers"])
    if augment == "timm":
        transformed = TransformedImages(images, transform, seed)
        return WorkerBatches(transformed, order, (3, input_size, input_size), persistent=True, **workers)
    uniform = isinstance(images, CachedImages) and images.is_uniform
    if cache == "device" and not uniform:
        raise UserError(
            f"--cache device keeps images of one size, those of {images.name} have several: give --cache_size"
        )
    if not uniform or (cache == "ram" and images.sizes.max() > 2 * input_size):  # less to copy if workers crop them
        cropped, shape = CroppedImages(images, on_device), (input_size, input_size, 3)
        pixels = WorkerBatches(cropped, order, shape, torch.uint8, persistent=True, **workers)
        return AugmentedBatches(order, pixels, on_device, device)
    on_device.crop, on_device.shapes = True, images.shapes if (images.shapes != images.sizes).any() else None
    resident = resident_on(images, device if cache == "device" else None, workers["pin_memory"])
    return AugmentedBatches(order, resident, on_device, device)


def eval_batches(
    images: Images, indices: Sequence[int], batch_size: int, *, cache: str, input_size: int, crop_pct: float | None,
    mean: Sequence[float], std: Sequence[float], device: torch.device, workers: dict
):  # fmt: skip
    """Batches (float [batch, 3, S, S], class numbers [batch]) of the images at `indices`; the same by every way."""
    if cache == "none":
        transform = eval_transform(input_size, mean, std, crop_pct=crop_pct)
        transformed = TransformedImages(images, transform)
        order = BatchSampler(indices, batch_size, drop_last=False)
        return WorkerBatches(transformed, order, (3, input_size, input_size), **workers)
    crop = eval_crop(input_size, crop_pct)
    cached = cache_images(images, prepare=crop, num_workers=workers["num_workers"])
    if cache == "ram":
        return EvaluationBatches(
            resident_on(cached, None, workers["pin_memory"]), indices, batch_size, mean, std, device
        )
    share = resident_on(cached, device, workers["pin_memory"], np.array(indices))  # a card needs its own alone
    return EvaluationBatches(share, range(len(share)), batch_size, mean, std, device)


def resident_on(
    images: CachedImages, device: torch.device | None, pin: bool, indices: np.ndarray | None = None
) -> "Resident":
    """Cached images of one size, all or those at `indices`, on `device` or (None) in the cache's memory.

    `pin`: what is in memory is for a GPU. Raises UserError for what does not fit.
    """
    pixels, labels = images.stacked(), images.targets()
    if indices is not None:
        pixels, labels = pixels[torch.from_numpy(indices)], labels[indices]
    if device is not None and device.type != "cpu":
        check_fits(images, len(pixels) * pixels[0].numel(), free_memory(device), f"on {device}")
        pixels = pixels.to(device)
    return Resident(pixels, labels, pin and device is None)


class Resident:
    """Images of one size in memory, of the host or of a device: uint8 [images, H, W, 3], and their class numbers."""

    def __init__(self, pixels: Tensor, labels: np.ndarray, pin: bool = False):
        self.pixels, self.labels, self.pin = pixels, torch.from_numpy(labels).to(pixels.device), pin

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Batch:
        """(uint8 [batch, H, W, 3], class numbers [batch]) where the pixels are."""
        picked = torch.from_numpy(indices)
        if self.pixels.device.type == "cuda":
            picked = picked.pin_memory().to(self.pixels.device, non_blocking=True)
        picked = picked.to(self.pixels.device)
        batch = self.pixels.index_select(0, picked), self.labels.index_select(0, picked)
        return tuple(part.pin_memory() for part in batch) if self.pin else batch


class AugmentedBatches:
    """One rank's training batches, augmented where training happens: (float [batch, 3, S, S], class numbers [batch]).

    `pixels` are `Resident`, or WorkerBatches of uint8 [batch, H, W, 3] in the order of `batch_sampler`. The
    draws depend on the images alone; the noise of erased boxes on (epoch, chunk).
    """

    def __init__(self, batch_sampler: TrainBatches, pixels, augment: Callable, device: torch.device):
        self.batch_sampler, self.pixels, self.augment, self.device = batch_sampler, pixels, augment, device

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        sampler, batches, orders = self.batch_sampler, self.pixels, iter(self.batch_sampler)
        if isinstance(batches, Resident):
            batches = (self.pixels.batch(np.array(order)[:, 1]) for order in iter(sampler))
        first = sampler.first_step * sampler.update_freq
        for number, (images, targets) in enumerate(ahead(batches, self.device)):
            order = np.array(next(orders))  # [batch, 2]: epoch, index
            chunk = (first + number) * sampler.world_size + sampler.rank
            epoch = int(order[0, 0])
            yield self.augment(images.permute(0, 3, 1, 2), epoch, order[:, 1], (epoch, chunk)), targets


class EvaluationBatches:
    """One rank's share of evaluation images that are `Resident`, in their final size: (float [batch, 3, S, S], classes)."""

    def __init__(
        self, pixels: Resident, indices: Sequence[int], batch_size: int, mean: Sequence[float], std: Sequence[float],
        device: torch.device
    ):  # fmt: skip
        self.pixels, self.indices, self.batch_size, self.device = pixels, np.array(indices), batch_size, device
        self.mean, self.std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (mean, std))

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        starts = range(0, len(self.indices), self.batch_size)
        batches = (self.pixels.batch(self.indices[start : start + self.batch_size]) for start in starts)
        for images, targets in ahead(batches, self.device):
            yield normalized(images, self.mean, self.std), targets


class CroppedImages(Dataset):
    """Images cropped and resized in a worker, uint8 [S, S, 3], by the draws of `augment`, which does the rest."""

    def __init__(self, images: Images, augment: DeviceAugment):
        self.images, self.augment = images, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        pixels, target = self.images.read(key[1], lambda image: self.augment.cropped(image, *key))
        return torch.from_numpy(np.array(pixels)), target


def make_train_loader(options: argparse.Namespace, images: Images, device: torch.device, update_freq: int):
    """Augmented batches of this rank, in an order derived from the seed."""
    world = distributed.world_size()
    check_batches(len(images), options.batch_size, update_freq, world)
    order = TrainBatches(
        len(images),
        world_size=world,
        rank=distributed.rank(),
        update_freq=update_freq,
        **pick(options, "batch_size seed"),
    )
    return train_batches(
        images,
        order,
        augmentation=pick(options, "hflip color_jitter aa train_interpolation reprob remode recount"),
        **pick(options, "augment cache_size seed"),
        **data_way(options, device),
    )


def make_val_loader(options: argparse.Namespace, images: Images, device: torch.device):
    """Batches of this rank's share of the evaluation images, or of all of them with `--dist_eval false`."""
    share = (distributed.rank(), distributed.world_size()) if options.dist_eval else (0, 1)
    indices, batch_size = shard(len(images), *share), int(1.5 * options.batch_size)
    return eval_batches(images, indices, batch_size, crop_pct=options.crop_pct, **data_way(options, device))


def data_way(options: argparse.Namespace, device: torch.device) -> dict:
    """What training and evaluation batches have in common."""
    mean, std = mean_and_std(options.imagenet_default_mean_and_std)
    workers = {
        "num_workers": options.num_workers,
        "pin_memory": options.pin_mem and device.type == "cuda",
        "yielding": device.type == "cpu",
    }
    return {"mean": mean, "std": std, "device": device, "workers": workers, **pick(options, "cache input_size")}
