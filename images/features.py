"""The batches of a linear probe on images that no augmentation changes: their features, computed once."""

import argparse
import logging
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from images.batches import Resident, eval_batches
from images.images import Images
from images.order import TrainBatches, shard
from images.settings import Loading, View
from images.workers import Batch, ahead
from training import distributed
from training.precision import Precision
from training.probe import LinearProbe

log = logging.getLogger(__name__)


class FeatureBatches:
    """Batches (features [batch, width], class numbers [batch]) on the training device, in the order of `batch_sampler`."""

    def __init__(self, features: Tensor, labels: Tensor, batch_sampler: TrainBatches | BatchSampler):
        self.resident, self.batch_sampler = Resident(features, labels.cpu().numpy()), batch_sampler

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        for keys in self.batch_sampler:
            yield self.resident.batch(np.array(keys).reshape(len(keys), -1)[:, -1])  # indices, or (epoch, index)


def on_features(
    options: argparse.Namespace,
    model: nn.Module,
    precision: Precision,
    train_images: Images,
    train_loader,
    val_loader,
) -> tuple[FeatureBatches, FeatureBatches | None]:
    """Return batches of features in place of the loaders' batches of images, for training and for evaluation.

    Training images are seen as in the evaluation, too. Each process computes the features of its share of them, and then
    has all; a resumed run computes them anew, and on a CPU gets the same.
    """
    start, probe = time.monotonic(), LinearProbe(model, on_features=True)
    count, rank, world = len(train_images), distributed.rank(), distributed.world_size()
    batch_size = int(1.5 * options.batch_size)  # the evaluation's
    view, loading = View.from_options(options), Loading.from_options(options, device=precision.device)
    share = eval_batches(train_images, shard(count, rank, world), batch_size, view, loading)
    features, labels = (_of_all_ranks(part, count) for part in _compute(probe, share, precision))
    log.info("features of %d training images: %.0f s", count, time.monotonic() - start)
    training = FeatureBatches(features, labels, train_loader.batch_sampler)
    if val_loader is None:
        return training, None
    features, labels = _compute(probe, val_loader, precision)
    return training, FeatureBatches(features, labels, BatchSampler(range(len(labels)), batch_size, drop_last=False))


@torch.no_grad()
def _compute(probe: LinearProbe, batches: Iterable[Batch], precision: Precision) -> tuple[Tensor, Tensor]:
    """Return the features of all batches, float32 [images, width], and their class numbers."""
    width, device = probe.classifier.in_features, precision.device
    features, labels = [torch.empty(0, width, device=device)], [torch.empty(0, dtype=torch.int64, device=device)]
    for images, targets in ahead(batches, device):
        with precision.autocast():
            features.append(probe.features(images).float())
        labels.append(targets.clone())  # a batch is valid until the next one
    return torch.cat(features), torch.cat(labels)


def _of_all_ranks(share: Tensor, count: int) -> Tensor:
    """Return the `count` rows of which each rank has every `world_size`-th, as `shard` deals them."""
    rows = share.new_zeros(count, *share.shape[1:])
    rows[distributed.rank() :: distributed.world_size()] = share
    return distributed.all_sum(rows)
