"""Batches for training and evaluation: timm's transforms on files or on cached pixels, or augmentation on the device."""

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset

from images.augment import DeviceAugment
from images.cache import CachedImages, Shrink, cache_images, check_fits, free_memory
from images.crop import CroppedImages, RandomCrop
from images.images import Images
from images.order import TrainBatches, check_batches, shard
from images.settings import Augmentation, Loading, View
from images.transforms import TransformedImages, eval_crop, eval_transform, normalized, train_transform
from images.workers import Batch, WorkerBatches, ahead
from training import distributed
from utils import UserError


def make_train_loader(options: argparse.Namespace, images: Images, device: torch.device, update_freq: int):
    """Make this rank's augmented batches, in an order derived from the seed."""
    world = distributed.world_size()
    check_batches(len(images), options.batch_size, update_freq, world, options.epochs)
    order = TrainBatches(
        len(images),
        batch_size=options.batch_size,
        update_freq=update_freq,
        world_size=world,
        rank=distributed.rank(),
        seed=options.seed,
    )
    view, augmentation = View.from_options(options), Augmentation.from_options(options)
    return train_batches(images, order, view, augmentation, Loading.from_options(options, device=device))


def make_val_loader(options: argparse.Namespace, images: Images, device: torch.device):
    """Make the batches of this rank's share of the evaluation images, or of all of them with `--dist_eval false`."""
    share = (distributed.rank(), distributed.world_size()) if options.dist_eval else (0, 1)
    indices, batch_size = shard(len(images), *share), int(1.5 * options.batch_size)
    view, loading = View.from_options(options), Loading.from_options(options, device=device)
    return eval_batches(images, indices, batch_size, view, loading)


def train_batches(
    images: Images, order: TrainBatches, view: View, augmentation: Augmentation, loading: Loading
) -> "WorkerBatches | AugmentedBatches":
    """Make one rank's training batches (float [batch, channels, S, S], class numbers [batch]): each iteration yields the epoch that `order` is set to."""
    by_timm = augmentation.augment == "timm"
    # built before the cache: options that it refuses should not cost hours of decoding
    augment = train_transform(view, augmentation) if by_timm else DeviceAugment(view, augmentation, loading.device)
    if loading.cache != "none":
        square = loading.cache == "device"
        prepare = Shrink(loading.cache_size, square=square) if loading.cache_size else None
        images = cache_images(images, prepare=prepare, num_workers=loading.workers)
    if by_timm:
        transformed = TransformedImages(images, augment, augmentation.seed)
        return _from_workers(transformed, order, loading, persistent=True)
    if _device_crops(images, view, loading):
        device = loading.device if loading.cache == "device" else None
        pixels, shapes = resident_on(images, device, loading.pin_memory), images.shapes
    else:
        cropped = CroppedImages(images, RandomCrop(view, augmentation))
        pixels, shapes = _from_workers(cropped, order, loading, persistent=True), None
    return AugmentedBatches(order, pixels, augment, loading.device, shapes)


def _device_crops(images: Images | CachedImages, view: View, loading: Loading) -> bool:
    """Whether the device crops whole images; else workers do, with the same draws."""
    if loading.cache == "none":
        return False
    if loading.cache == "device" and not images.is_uniform:
        raise UserError(
            f"--cache device keeps images of one size, those of {images.name} have several: give --cache_size"
        )
    # Far larger images are not worth gathering whole: at 512 px for 224 px workers crop about twice as many per second.
    return loading.cache == "device" or (images.is_uniform and images.sizes.max() <= 2 * view.input_size)


def _from_workers(items: Dataset, batch_sampler, loading: Loading, persistent: bool = False) -> WorkerBatches:
    return WorkerBatches(
        items,
        batch_sampler,
        num_workers=loading.workers,
        pin_memory=loading.pin_memory,
        yielding=loading.device.type == "cpu",
        persistent=persistent,
    )


def eval_batches(
    images: Images, indices: Sequence[int], batch_size: int, view: View, loading: Loading
) -> "WorkerBatches | EvaluationBatches":
    """Make batches (float [batch, channels, S, S], class numbers [batch]) of the images at `indices`; the values do not depend on the cache."""
    if loading.cache == "none":
        transformed = TransformedImages(images, eval_transform(view))
        order = BatchSampler(indices, batch_size, drop_last=False)
        return _from_workers(transformed, order, loading)
    cached = cache_images(images, prepare=eval_crop(view), num_workers=loading.workers)
    if loading.cache == "ram":
        return EvaluationBatches(
            resident_on(cached, None, loading.pin_memory), indices, batch_size, view, loading.device
        )
    share = resident_on(
        cached, loading.device, loading.pin_memory, np.array(indices)
    )  # each card holds only its rank's share
    return EvaluationBatches(share, range(len(share)), batch_size, view, loading.device)


def resident_on(
    images: CachedImages, device: torch.device | None, pin: bool, indices: np.ndarray | None = None
) -> "Resident":
    """Put cached images of one size, all or those at `indices`, on `device`; None leaves them in the cache's memory.

    `pin`: batches go on to a GPU. Raises UserError if they do not fit.
    """
    pixels, labels = images.stacked(), images.targets()
    if indices is not None:
        pixels, labels = pixels[torch.from_numpy(indices)], labels[indices]
    if device is not None and device.type != "cpu":
        check_fits(images, len(pixels) * pixels[0].numel(), free_memory(device), f"on {device}")
        pixels = pixels.to(device)
    return Resident(pixels, labels, pin and device is None)


class Resident:
    """Images of one size in the memory of the host or of a device: uint8 [images, H, W, 3], and their class numbers.

    Features take the place of pixels in a linear probe: float32 [images, width].
    """

    def __init__(self, pixels: Tensor, labels: np.ndarray, pin: bool = False):
        self.pixels, self.labels, self.pin = pixels, torch.from_numpy(labels).to(pixels.device), pin

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Batch:
        """Gather (uint8 [batch, H, W, 3], class numbers [batch]) where the pixels are."""
        picked = torch.from_numpy(indices)
        if self.pixels.device.type == "cuda":
            picked = picked.pin_memory().to(self.pixels.device, non_blocking=True)
        picked = picked.to(self.pixels.device)
        batch = self.pixels.index_select(0, picked), self.labels.index_select(0, picked)
        return tuple(part.pin_memory() for part in batch) if self.pin else batch


class AugmentedBatches:
    """One rank's training batches, augmented on the training device: (float [batch, channels, S, S], class numbers [batch]).

    `pixels` are either `Resident`, and then `shapes` [images, 2] are the images' own heights and widths, which the crop
    needs; or batches of workers that crop, uint8 [batch, S, S, 3] in the order of `batch_sampler`, and `shapes` is None.
    """

    def __init__(
        self,
        batch_sampler: TrainBatches,
        pixels: "Resident | WorkerBatches",
        augment: DeviceAugment,
        device: torch.device,
        shapes: np.ndarray | None,
    ):
        self.batch_sampler, self.pixels, self.augment, self.device = batch_sampler, pixels, augment, device
        self.shapes = shapes

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        sampler, batches, orders = self.batch_sampler, self.pixels, iter(self.batch_sampler)
        if isinstance(batches, Resident):
            batches = (self.pixels.batch(np.array(order)[:, 1]) for order in sampler)
        first = sampler.first_step * sampler.update_freq
        for number, (images, targets) in enumerate(ahead(batches, self.device)):
            order = np.array(next(orders))  # [batch, 2]: epoch, index
            epoch, indices = int(order[0, 0]), order[:, 1]
            # the place in the epoch over all ranks: no two batches erase with the same noise
            chunk = (first + number) * sampler.world_size + sampler.rank
            shapes = None if self.shapes is None else self.shapes[indices]
            yield self.augment(images.permute(0, 3, 1, 2), epoch, indices, (epoch, chunk), shapes), targets


class EvaluationBatches:
    """One rank's share of evaluation images that are `Resident` in their final size: (float [batch, channels, S, S], classes)."""

    def __init__(self, pixels: "Resident", indices: Sequence[int], batch_size: int, view: View, device: torch.device):
        self.pixels, self.indices, self.batch_size, self.device = pixels, np.array(indices), batch_size, device
        self.mean, self.std = (torch.tensor(value, device=device).view(-1, 1, 1) for value in (view.mean, view.std))

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        starts = range(0, len(self.indices), self.batch_size)
        batches = (self.pixels.batch(self.indices[start : start + self.batch_size]) for start in starts)
        for images, targets in ahead(batches, self.device):
            yield normalized(images, self.mean, self.std), targets
