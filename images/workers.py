"""Batches from worker processes, and their copies to the training device ahead of use."""

import collections
import contextlib
import functools
import logging
import multiprocessing
import os
import resource
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from training.place import read_place
from training.signals import leave_to_parent
from utils import UserError

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
AHEAD = 2  # batches that a worker may make before they are asked for


class WorkerBatches:
    """Batches (images [batch, *shape], class numbers [batch] int64) of `items`, whose keys `batch_sampler` lists.

    A batch is valid until the next one is asked for: workers use its memory again. `persistent` workers stay from pass
    to pass. `yielding` ones leave the cores to a training that runs on them. UserError if /dev/shm has no room.
    """

    def __init__(
        self, items: Dataset, batch_sampler, *, num_workers: int, pin_memory: bool, yielding=False, persistent=False
    ):
        if num_workers:
            raise_file_limit()
        self.batch_sampler = batch_sampler
        self.gate = Gate(holds=yielding and num_workers > 0 and training_fills_cores())
        self.loader = DataLoader(
            BatchMaker(items, self.gate),
            batch_sampler=batch_sampler,
            collate_fn=_unchanged,  # the items come as a batch
            num_workers=num_workers,
            prefetch_factor=AHEAD if num_workers else None,
            persistent_workers=persistent and num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=functools.partial(_start_worker, os.getpid()),
            generator=torch.Generator(),  # otherwise every pass draws from the global one, as the model does
        )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        try:
            for images, targets in batches:
                self.gate.close()
                yield images, torch.from_numpy(targets)
                self.gate.open()
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            raise UserError(
                "no room for batches in the memory that processes share: give fewer --num_workers, a smaller "
                "--batch_size, or a container a larger /dev/shm"
            ) from error
        finally:
            self.gate.open()  # before the end of `batches`, which waits for the workers


class BatchMaker(Dataset):
    """Makes whole batches; in a worker always in the same few pieces of shared memory.

    New shared memory for each batch, as DataLoader takes it, costs a third of the speed: two workers made 970 images
    of 224 px per second in place of 1,480 (1.96 ms of CPU time per image in place of 1.44).
    """

    def __init__(self, items: Dataset, gate: "Gate"):
        self.items, self.gate, self.memory = items, gate, collections.deque()

    def __getitems__(self, keys: list) -> tuple[Tensor, np.ndarray]:
        pixels, targets = None, np.empty(len(keys), np.int64)
        for place, key in enumerate(keys):
            self.gate.wait()
            image, targets[place] = self.items[key]
            pixels = self._room((len(keys), *image.shape), image.dtype) if pixels is None else pixels
            pixels[place] = image
        return pixels, targets  # an array goes through the pipe; a tensor would need a piece of shared memory each time

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if get_worker_info() is None:
            return torch.empty(shape, dtype=dtype)
        # the oldest piece of those that can be in use: batches made ahead, and the one that training has
        room = self.memory.popleft() if len(self.memory) > AHEAD else None
        if room is None or len(room) < shape[0]:
            room = torch.empty(shape, dtype=dtype).share_memory_()
        self.memory.append(room)
        return room[: shape[0]]


class Gate:
    """Open while the run waits for a batch; while it is closed, the workers that it holds wait before the next image.

    For a training whose threads fill the cores: each time a worker takes a core, all other threads wait for the one
    that lost it. Without the gate, training on two cores ran at 0.954 (0.946..0.966) of the bare step, with it at 0.976
    (0.965..0.991); ViT-T, 30 rounds in turns. A low priority does not do it: workers would still take a share, and next
    to other programs would get nothing.
    """

    LONGEST = 1.0  # s; then a worker goes on in any case, so that it notices when it has to end

    def __init__(self, holds: bool):
        # a pipe and not an Event: a worker that is killed while it waits leaves no lock behind
        self.is_open, self.pipe = True, multiprocessing.Pipe(duplex=False) if holds else None
        if holds:
            self.pipe[1].send_bytes(b"open")

    def open(self) -> None:
        if self.pipe and not self.is_open:
            self.pipe[1].send_bytes(b"open")
        self.is_open = True

    def close(self) -> None:
        if self.pipe and self.is_open:
            self.pipe[0].recv_bytes()
        self.is_open = False

    def wait(self) -> None:
        """Wait, in a worker, until the gate is open or the run has ended."""
        if self.pipe:
            self.pipe[0].poll(self.LONGEST)

    def enter_worker(self) -> None:
        """Close a worker's copy of the writing end: the run alone keeps it, so its end opens the gate."""
        if self.pipe:
            self.pipe[1].close()


def training_fills_cores() -> bool:
    """Whether the training threads of this node's processes are at least as many as the cores."""
    return torch.get_num_threads() * read_place().local_world_size >= _cores()


def most_workers() -> int:
    """Return how many workers each training process can have so that this node has no more of them than cores."""
    return max(1, _cores() // read_place().local_world_size)


def raise_file_limit() -> None:
    """Raise this process's limit on open files as far as it may: each tensor of a worker arrives as an open file."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # a system may allow less than it says; the limit then stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def warn_of_cap(num_workers: int) -> None:
    """Log that fewer workers than `num_workers` will be started, if this is so."""
    if num_workers > most_workers():
        log.warning("--num_workers %d is capped at %d, the cores of this node per process", num_workers, most_workers())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _unchanged(batch: tuple[Tensor, np.ndarray]) -> tuple[Tensor, np.ndarray]:
    return batch


def _start_worker(run: int, _: int) -> None:
    leave_to_parent(run)
    get_worker_info().dataset.gate.enter_worker()


@functools.cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all passes: the allocator keeps freed memory for the stream that used it


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Move the batches to `device`; on cuda each is copied, from pinned memory, while the one before it is in use."""
    if device.type != "cuda":
        yield from (tuple(part.to(device) for part in batch) for batch in batches)
        return
    copying, ready = _copying_stream(device), None
    for batch in batches:
        with torch.cuda.stream(copying):
            following = tuple(part.to(device, non_blocking=True) for part in batch)
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_stream(copying)
        for part in following:
            part.record_stream(torch.cuda.current_stream(device))  # or its memory could be given away while in use
        ready = following
    if ready is not None:
        yield ready
