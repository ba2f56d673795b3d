"""Images decoded once and kept as uint8 pixels, in memory that all processes of a node share."""

import functools
import logging
import mmap
import os
import sys
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

CHUNK = 32  # images that a worker decodes before it hands them over; few, as they may be large
SAMPLE = 64  # images, spread over the set, that tell its size before hours of decoding
GIB = 2**30
# per version of Linux's control groups (2, then 1), by its name in /proc/self/cgroup: folder, limit, bytes in use
CGROUPS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


class SharedMemory:
    """The bytes of a complete `memory_file`, mapped into this process; a pickle of it has its name alone."""

    def __init__(self, file):
        file.flush()
        self._file = file
        # nobody writes to it, but torch warns of arrays that it could not write to
        self.bytes = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE), dtype=np.uint8)

    @property
    def name(self) -> str:
        """A path by which the node's other processes can open the file."""
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}" if sys.platform == "linux" else self._file.name

    @classmethod
    def open(cls, name: str) -> "SharedMemory":
        return cls(open(name, "r+b"))

    def __reduce__(self):
        return SharedMemory.open, (self.name,)  # forked workers inherit the mapping, spawned ones make their own


def memory_file():
    """Make an empty file that is gone once no process has it open: in memory on Linux, elsewhere on disk."""
    # not in /dev/shm, where containers have 64 MB
    return open(os.memfd_create("images"), "w+b") if sys.platform == "linux" else tempfile.NamedTemporaryFile()


class CachedImages:
    """Decoded images in one piece of memory; like `Images`, `[i]` is (PIL image in RGB, class index).

    `sizes` int32 [images, 2] are the heights and widths of the pixels. `shapes` [images, 2] are those of the original
    images, which differ if the cache was given a size. `labels` int64 [images] belong to the decoded images, some of
    which may stand in for images that could not be read.
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
        """Return (what `decode` makes of the PIL image, class index), as `Images.read` does."""
        pixels = self._memory.bytes[self._starts[index] : self._starts[index + 1]]
        return decode(Image.fromarray(pixels.reshape(*self.sizes[index], 3))), int(self._labels[index])

    def targets(self) -> np.ndarray:
        """Return all labels, int64 [images]."""
        return self._labels

    @property
    def is_uniform(self) -> bool:
        """Whether the pixels of all images have the same size, so that they form one array."""
        return bool((self.sizes == self.sizes[0]).all())

    def stacked(self) -> Tensor:
        """View the pixels of a uniform set as uint8 [images, height, width, 3]; do not write to them."""
        return torch.from_numpy(self._memory.bytes).view(len(self), *self.sizes[0].tolist(), 3)


class Shrink:
    """Resize an image to a short side of `size` pixels if it is longer; with `square` always, and both sides."""

    def __init__(self, size: int, square: bool):
        self.size, self.square = size, square

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.square:
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        short = min(image.size)
        if short <= self.size:
            return image
        return image.resize([round(side * self.size / short) for side in image.size], Image.Resampling.BICUBIC)


class _Decoded(Dataset):
    """`[i]` is (pixels to cache, uint8 [height, width, 3]; the (height, width) of the original image; its label)."""

    def __init__(self, images: Images, prepare: Callable[[Image.Image], Image.Image] | None):
        self.images, self.prepare = images, prepare

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, tuple[int, int], int]:
        image, label = self.images[index]
        shape = image.height, image.width
        return np.asarray(self.prepare(image) if self.prepare else image), shape, label


def _concatenated(decoded: list) -> tuple[bytes, np.ndarray, np.ndarray, np.ndarray]:
    """Make (concatenated pixels, sizes, shapes, labels) of a chunk, as `CachedImages` has them."""
    pixels, shapes, labels = zip(*decoded, strict=True)
    sizes = np.array([image.shape[:2] for image in pixels], dtype=np.int32)
    return b"".join(image.tobytes() for image in pixels), sizes, np.array(shapes, np.int32), np.array(labels)


def cache_images(
    images: Images, *, prepare: Callable[[Image.Image], Image.Image] | None = None, num_workers: int = 0
) -> CachedImages:
    """Decode and `prepare` all images in one process per node; the node's other processes share its memory.

    Raises UserError with the sizes needed and free if the set does not fit. If one process fails it says why, and the
    others end without a message.
    """
    parts, problem = None, None
    if node_leader() == rank():
        try:
            parts = _decode_all(images, prepare, num_workers)
        except UserError as error:
            problem = error
    # before anybody raises: the others would wait for this process for ever
    results = of_all_ranks((parts and (parts[0].name, *parts[1:]), problem is not None), patiently=True)
    if problem:
        raise problem
    if any(failed for _, failed in results):
        raise SystemExit(1)
    if parts is None:
        name, *arrays = results[node_leader()][0]
        try:
            parts = (SharedMemory.open(name), *arrays)
        except OSError as error:
            raise UserError(f"--cache: the processes of this node cannot share memory ({first_line(error)})") from error
    of_all_ranks(None)  # the leader must live until all have opened its memory
    return CachedImages(images, *parts)


def _decode_all(images: Images, prepare, num_workers: int) -> tuple[SharedMemory, *tuple[np.ndarray, ...]]:
    """Decode the set; return (concatenated pixels, sizes, shapes, labels), as `CachedImages` has them."""
    start, free = time.monotonic(), free_memory(torch.device("cpu"))
    decoded = _Decoded(images, prepare)
    sample = np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).astype(int)
    check_fits(images, len(images) * np.mean([decoded[int(index)][0].size for index in sample]), free, "of memory")
    chunks = DataLoader(
        decoded,
        CHUNK,
        num_workers=num_workers,
        collate_fn=_concatenated,
        generator=torch.Generator(),  # without one, a DataLoader draws from the generator that the model draws from
        worker_init_fn=functools.partial(leave_to_parent, os.getpid()),
    )
    file, arrays, num_bytes, num_images = memory_file(), [], 0, 0
    for pixels, *rest in chunks:
        arrays.append(rest)
        num_bytes, num_images = num_bytes + len(pixels), num_images + len(rest[0])
        if num_bytes > free:  # the sample promised less
            check_fits(images, num_bytes / num_images * len(images), free, "of memory")
        file.write(pixels)
    log.info("%d images decoded: %.2f GiB, %.0f s", len(images), num_bytes / GIB, time.monotonic() - start)
    return SharedMemory(file), *map(np.concatenate, zip(*arrays, strict=True))


def check_fits(images: Images, needed: float, free: int, place: str) -> None:
    """Raise UserError if the images need more bytes than are free; `place` is "of memory" or "on cuda:0"."""
    if needed > free:
        raise UserError(
            f"--cache: the {len(images)} images of --data_set {images.name} take about {needed / GIB:.3g} GiB {place}, and "
            f"{free / GIB:.3g} GiB are free: give a smaller --cache_size, or --cache none"
        )


def free_memory(device: torch.device) -> int:
    """Count the bytes that are free on a device; on the host, within the limits of this process's container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux: all there is
    return min([free, *_free_in_cgroups()])


def _free_in_cgroups() -> list[int]:
    """List the bytes left below each memory limit that a container or a batch system has set for this process."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()  # like "0::/path" or "4:memory:/path"
    except OSError:
        return []
    free = []
    for _, controller, path in (line.split(":", 2) for line in lines):
        if controller in CGROUPS:
            root, limit, usage = CGROUPS[controller]
            group = Path(root, path.lstrip("/"))
            for folder in (group, *group.parents):  # a limit holds for all groups below it
                try:
                    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    # files in the page cache count as in use, but the system drops them when it needs room
                    droppable = int(statistics.get("total_inactive_file", statistics["inactive_file"]))
                    free.append(int((folder / limit).read_text()) - int((folder / usage).read_text()) + droppable)
                except (OSError, KeyError, ValueError):
                    continue  # no limit ("max"), or a group that cannot be seen from inside a container
    return free
