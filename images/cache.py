"""Images decoded once and kept as uint8 pixels, in memory that all processes of a node share."""

import functools
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from images.images import Images
from training.distributed import node_leader, of_all_ranks, rank
from training.signals import leave_to_parent
from utils import UserError, first_line

log = logging.getLogger(__name__)

CHUNK = 32  # images that a worker decodes before it hands them over: few, they may be large
SAMPLE = 64  # images, spread over the set, by which its size is judged before it is decoded
GIB = 2**30


class SharedMemory:
    """Bytes that other processes can map by a name, and that are gone with the last process that has them open."""

    def __init__(self, file):
        self._file = file
        self.bytes = np.zeros(0, dtype=np.uint8)

    @classmethod
    def new(cls) -> "SharedMemory":
        """Empty memory, to be written to as a file."""
        if hasattr(os, "memfd_create"):
            return cls(os.fdopen(os.memfd_create("images"), "w+b"))
        return cls(tempfile.NamedTemporaryFile())  # where there is only a disk, its cache is what is shared

    @classmethod
    def open(cls, name: str) -> "SharedMemory":
        return cls(open(name, "r+b")).mapped()

    def __reduce__(self):
        return SharedMemory.open, (self.name,)  # a worker that is not forked maps it, too

    @property
    def name(self) -> str:
        fd_name = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        return fd_name if isinstance(self._file.name, int) or self._file.name.startswith("/proc/") else self._file.name

    def write(self, data) -> None:
        self._file.write(data)

    def mapped(self) -> "SharedMemory":
        """The same with everything written in `bytes`, uint8."""
        self._file.flush()
        # nobody writes to it; torch would warn of memory that it could not write to
        mapping = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_WRITE)
        self.bytes = np.frombuffer(mapping, dtype=np.uint8)
        return self


class CachedImages:
    """Decoded images in one piece of memory; as of `images.Images`, `[i]` is (PIL image in RGB, class index).

    `sizes` int32 [images, 2]: the heights and widths that the pixels have. `shapes` [images, 2]: those that the images
    had, which differ where the cache was given a size. `labels` int64 [images]: those of the images that were decoded,
    which may stand for others that cannot be.
    """

    def __init__(self, images: Images, memory: SharedMemory, sizes: np.ndarray, shapes: np.ndarray, labels: np.ndarray):
        self.name, self.classes, self.class_names = images.name, images.classes, images.class_names
        self._memory, self.sizes, self.shapes, self._labels = memory, sizes, shapes, labels
        self._starts = np.concatenate([[0], np.cumsum(3 * sizes.astype(np.int64).prod(axis=1))])

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.read(index, lambda image: image)

    def read(self, index: int, decode: Callable) -> tuple:
        """(what `decode` makes of the PIL image, class index), as of `images.Images`."""
        pixels = self._memory.bytes[self._starts[index] : self._starts[index + 1]]
        return decode(Image.fromarray(pixels.reshape(*self.sizes[index], 3))), int(self._labels[index])

    def targets(self) -> np.ndarray:
        """All labels, int64 [images]."""
        return self._labels

    @property
    def is_uniform(self) -> bool:
        """Whether the pixels of all images have one size, so that they are one array."""
        return bool((self.sizes == self.sizes[0]).all())

    def stacked(self) -> Tensor:
        """All pixels of images of one size, uint8 [images, height, width, 3]; a view, not to be written to."""
        return torch.from_numpy(self._memory.bytes).view(len(self), *self.sizes[0].tolist(), 3)


class _Decoded(Dataset):
    """An image's pixels, uint8 [height, width, 3], as a cache keeps them, the (height, width) it came in, its label."""

    def __init__(self, images: Images, prepare: Callable[[Image.Image], Image.Image] | None):
        self.images, self.prepare = images, prepare

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, tuple[int, int], int]:
        image, label = self.images[index]
        shape = image.height, image.width
        return np.asarray(self.prepare(image) if self.prepare else image), shape, label


class Shrink:
    """Gives an image a short side of `size` pixels, if it is longer; with `square`, both sides and always."""

    def __init__(self, size: int, square: bool):
        self.size, self.square = size, square

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.square:
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        short = min(image.size)
        if short <= self.size:
            return image
        return image.resize([round(side * self.size / short) for side in image.size], Image.Resampling.BICUBIC)


def _joined(decoded: list) -> tuple[bytes, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    pixels, shapes, labels = zip(*decoded, strict=True)
    sizes = np.array([image.shape[:2] for image in pixels], dtype=np.int32)
    return b"".join(image.tobytes() for image in pixels), (sizes, np.array(shapes, np.int32), np.array(labels))


def cache_images(
    images: Images, *, prepare: Callable[[Image.Image], Image.Image] | None = None, num_workers: int = 0
) -> CachedImages:
    """All images of the set, decoded and `prepare`d by one process of each node; its other processes share the memory.

    Raises UserError naming what is needed beside what is free for a set that does not fit; where one process fails,
    which says why, the others end without a word.
    """
    made, problem = None, None
    if node_leader() == rank():
        try:
            made = _decode_all(images, prepare, num_workers)
        except UserError as error:
            problem = error
    found = of_all_ranks((made and (made[0].name, *made[1:]), problem is not None), patiently=True)
    if problem:
        raise problem
    if any(failed for _, failed in found):
        raise SystemExit(1)
    if made is None:
        name, *rest = found[node_leader()][0]
        try:
            made = (SharedMemory.open(name), *rest)
        except OSError as error:
            raise UserError(f"--cache: the processes of this node cannot share memory ({first_line(error)})") from error
    of_all_ranks(None)  # the leader's memory has a name until all have opened it
    return CachedImages(images, *made)


def _decode_all(images: Images, prepare, num_workers: int) -> tuple[SharedMemory, *tuple[np.ndarray, ...]]:
    """The pixels of all images one behind the other, the sizes that they have, those that the images had, the labels."""
    start, facts, decoded_images, written = time.monotonic(), [], 0, 0
    memory, free = SharedMemory.new(), free_memory(torch.device("cpu"))
    decoded = _Decoded(images, prepare)
    sample = np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).astype(int)
    check_fits(images, len(images) * np.mean([decoded[int(index)][0].size for index in sample]), free, "of memory")
    chunks = DataLoader(
        decoded, CHUNK, num_workers=num_workers, collate_fn=_joined, generator=torch.Generator(),
        worker_init_fn=functools.partial(leave_to_parent, os.getpid())
    )  # fmt: skip
    for pixels, chunk in chunks:
        facts.append(chunk)
        written += len(pixels)
        decoded_images += len(chunk[0])
        if written > free:  # the sample was too small for this set
            check_fits(images, written / decoded_images * len(images), free, "of memory")
        memory.write(pixels)
    log.info("%d images decoded: %.2f GiB, %.0f s", len(images), written / GIB, time.monotonic() - start)
    return memory.mapped(), *map(np.concatenate, zip(*facts, strict=True))


def check_fits(images: Images, needed: float, free: int, what: str) -> None:
    """UserError if the bytes that the images need are more than are free."""
    if needed > free:
        raise UserError(
            f"--cache: the {len(images)} images of --data_set {images.name} take about {needed / GIB:.3g} GiB {what}, and "
            f"{free / GIB:.3g} GiB are free: give a smaller --cache_size, or --cache none"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that a device can still give; of the host, those that the container this process is in may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # where the system does not tell, all there is
    return min([free, *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """What the memory limits of this process's control groups, of version 1 or 2, leave; [] where there are none."""
    left = []
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return left
    for _, kinds, path in lines:
        if kinds not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup/memory" if kinds else "/sys/fs/cgroup")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if root in (folder, *folder.parents):
                try:
                    limit, used = (int((folder / name).read_text()) for name in names)
                    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    left.append(limit - used + int(statistics.get("inactive_file", 0)))  # files that may be forgotten
                except (OSError, ValueError):  # no limit here ("max"), or a group that is not seen from here
                    continue
    return left
