"""Batches from worker processes, made in memory that they share with training, and copied to its device ahead of use."""

import functools
import itertools
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from training.signals import leave_to_parent
from utils import UserError

Batch = tuple[Tensor, Tensor]
AHEAD = 2  # batches that a worker may have made before they are asked for


class WorkerBatches:
    """Batches (images [batch, *shape], class numbers [batch] int64) of `items`, whose keys `batch_sampler` lists.

    A batch holds until the next one is asked for: its memory is used again. (New memory for each batch, as a DataLoader
    takes it, costs a worker more time than filling it.) `persistent` workers stay from pass to pass; `yielding` ones
    leave the cores to a training that runs on them as well. UserError where there is no room for the batches.
    """

    def __init__(
        self, items: Dataset, batch_sampler, shape: Sequence[int], dtype: torch.dtype = torch.float32, *,
        num_workers: int, pin_memory: bool, yielding: bool = False, persistent: bool = False
    ):  # fmt: skip
        self.items, self.batch_sampler, self.shape, self.dtype = items, batch_sampler, tuple(shape), dtype
        self.num_workers, self.pin_memory, self.yielding = num_workers, pin_memory, yielding
        self.persistent = persistent and num_workers > 0
        self._kept = None

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        loader = self._kept or self._start()
        if self.persistent:
            self._kept = loader
        gate, batches = loader.dataset.gate, iter(loader)  # whose end waits for workers, so the gate opens before it
        try:
            for filled in batches:
                gate.close()
                yield tuple(filled)
                gate.open()
        finally:
            gate.open()

    def _start(self) -> DataLoader:
        count = self.num_workers * AHEAD + 1  # those in the making, and the one in use
        if not self.persistent:
            count = min(count, max(1, len(self)))
        slots = Slots((count, self.batch_sampler.batch_size, *self.shape), self.dtype, shared=self.num_workers > 0)
        gate = Gate(holds=self.yielding and self.num_workers > 0 and training_fills_cores())
        return DataLoader(
            BatchMaker(self.items, slots, gate),
            batch_sampler=IntoSlots(self.batch_sampler, count),
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            prefetch_factor=AHEAD if self.num_workers else None,
            persistent_workers=self.persistent,
            pin_memory=self.pin_memory,
            worker_init_fn=functools.partial(_start_worker, os.getpid()),
            generator=torch.Generator(),  # without its own, every pass draws from the one that the model draws from
        )


class Slots:
    """Memory for `shape[0]` batches. Between processes their number alone is passed on, where each finds the same."""

    numbers, known = itertools.count(), WeakValueDictionary()

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, shared: bool):
        self.number, size = next(self.numbers), torch.Size(shape).numel() * dtype.itemsize
        try:
            storage = torch.UntypedStorage._new_shared(size) if shared else torch.UntypedStorage(size)
        except RuntimeError as error:
            raise UserError(
                f"no room for {shape[0]} batches of {size / shape[0] / 1e6:.0f} MB in the memory that processes share: give "
                "fewer --num_workers, a smaller --batch_size, or a container a larger /dev/shm"
            ) from error
        self.pixels = torch.empty(0, dtype=dtype).set_(storage, 0, shape)
        self.known[self.number] = self


class Filled:
    """A batch in one of the slots: what a worker sends."""

    def __init__(self, slots: Slots, slot: int, targets: np.ndarray):
        self.slots, self.slot, self.targets = slots.number, slot, targets

    def __iter__(self) -> Iterator[Tensor]:
        yield Slots.known[self.slots].pixels[self.slot, : len(self.targets)]
        yield torch.from_numpy(self.targets)

    def pin_memory(self) -> Batch:
        """A copy in pinned memory, for DataLoader's thread that makes these."""
        return tuple(part.pin_memory() for part in self)


class BatchMaker(Dataset):
    """Makes whole batches, each in the slot that it is told."""

    def __init__(self, items: Dataset, slots: Slots, gate: "Gate"):
        self.items, self.slots, self.gate = items, slots, gate

    def __getitems__(self, task: tuple[int, list]) -> Filled:
        slot, keys = task
        targets = np.empty(len(keys), np.int64)
        for place, key in enumerate(keys):
            self.gate.wait()
            image, targets[place] = self.items[key]
            self.slots.pixels[slot, place] = image
        return Filled(self.slots, slot, targets)


class IntoSlots:
    """The lists of `batch_sampler`, each with the slot that is free by then: they are used one after the other."""

    def __init__(self, batch_sampler: Iterable[list], count: int):
        self.batch_sampler, self.count = batch_sampler, count

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[int, list]]:
        return zip(itertools.cycle(range(self.count)), self.batch_sampler)


class Gate:
    """Open while the run waits for a batch; while it is closed, workers that it holds wait before the next image.

    For a training that keeps the cores busy: what a worker takes from one of them then, the others wait for. (A low
    priority would not do: it leaves a part of that, and next to other programs nothing for the workers.)
    """

    LONGEST = 1.0  # s; a worker goes on after this in any case, and so finds out when it has to end

    def __init__(self, holds: bool):
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
        """In a worker, until the gate is open, or there is no run any more."""
        if self.pipe:
            self.pipe[0].poll(self.LONGEST)

    def enter_worker(self) -> None:
        """Leave the writing to the run alone, so that its end opens the gate."""
        if self.pipe:
            self.pipe[1].close()


def training_fills_cores() -> bool:
    """Whether the threads of this node's processes are as many as the cores that this one may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) >= cores


def _unchanged(batch: Filled) -> Filled:
    return batch


def _start_worker(run: int, _: int) -> None:
    leave_to_parent(run)
    get_worker_info().dataset.gate.enter_worker()


@functools.cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all: memory that was freed is kept for the stream it was used on


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`; on cuda each is copied, from pinned memory, while the one before it is in use."""
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
