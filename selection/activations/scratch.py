"""Values of many images in files without names, so that memory does not grow with the number of images."""

import hashlib
import itertools
import logging
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils import UserError

log = logging.getLogger(__name__)

BATCH = 32  # images


class Scratch:
    """Float32 values for each image, of any shape up to `values` numbers, in a file that vanishes with the process."""

    def __init__(self, folder: Path, images: range, values: int) -> None:
        """Reserve the space for these images in `folder`. UserError if the disk does not have it."""
        size = 4 * len(images) * values
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                _reserve(file.fileno(), size)
                self._values = np.memmap(file, np.float32, "r+", shape=(len(images), values))
        except OSError as error:
            needed = f"{size / 2**20:,.0f} MiB are needed for images and activations"
            raise UserError(f"{folder}: {needed}: {error.strerror}; see --calibration_images") from error
        self._first = images.start
        self.mebibytes = size / 2**20

    def read(self, images: slice, shape: tuple[int, ...]) -> Tensor:
        """Copy the values of these images, [images, *shape]."""
        return torch.from_numpy(np.array(self._values[self._rows(images), : math.prod(shape)])).reshape(-1, *shape)

    def write(self, images: slice, values: Tensor) -> None:
        """Replace the values of these images by [images, …]."""
        flat = values.reshape(len(values), -1)
        self._values[self._rows(images), : flat.shape[1]] = flat.numpy()

    def _rows(self, images: slice) -> slice:
        return slice(images.start - self._first, images.stop - self._first)


def _reserve(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:  # macOS: a disk that is full then ends the process
        os.ftruncate(file, size)


@dataclass(frozen=True)
class Batch:
    """Some of the images: those at `images`, all of them held out of the regressions or none."""

    number: int
    images: slice
    held_out: bool

    def __len__(self) -> int:
        return self.images.stop - self.images.start


class Calibration:
    """The images of a refit, normalized [3, H, W], in a file; the last fifth is held out of the regressions."""

    def __init__(self, batches: Iterable[Tensor], count: int, folder: Path, about: dict | None = None) -> None:
        """Keep `count` images, which come in `batches` of [batch, 3, H, W], in a file in `folder`.

        `about` says for the `.json` where they come from and how they were normalized.
        """
        self.folder, self.count, self.fitting = folder, count, count - count // 5
        digest, start = hashlib.sha256(), 0
        for batch in batches:
            if start == 0:
                self.shape = tuple(batch.shape[1:])
                self._scratch = Scratch(folder, range(count), math.prod(self.shape))
                log.info("%d images take %.0f MiB in %s", count, self._scratch.mebibytes, folder.resolve())
            self._scratch.write(slice(start, start + len(batch)), batch)
            digest.update(batch.numpy().tobytes())
            start += len(batch)
        counts = {"images": count, "held_out": count - self.fitting, "images_sha256": digest.hexdigest()}
        self.about = (about or {}) | counts

    def read(self, images: slice) -> Tensor:
        """Return these images, [images, 3, H, W]."""
        return self._scratch.read(images, self.shape)

    def batches(self) -> list[Batch]:
        """List all images, first those for the regressions."""
        bounds = [*range(0, self.fitting, BATCH), *range(self.fitting, self.count, BATCH), self.count]
        pairs = itertools.pairwise(bounds)
        return [Batch(number, slice(*ends), ends[0] >= self.fitting) for number, ends in enumerate(pairs)]
