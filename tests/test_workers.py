"""Batches from workers: independent of the number of workers, in reused memory, at low priority."""

import functools
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from conftest import generators, noise, settings
from torch.utils.data import BatchSampler, get_worker_info

from images import workers
from images.order import TrainBatches, shard
from images.transforms import TransformedImages, eval_transform, train_transform
from training import signals as stopping
from utils import UserError

VIEW, RECIPE, _ = settings("--input_size", "32")
ALONE = {"num_workers": 0, "pin_memory": False}
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def training_batches(num_workers, **options):
    items = TransformedImages(noise(24), train_transform(VIEW, RECIPE), seed=0)
    order = TrainBatches(24, batch_size=4, update_freq=1, world_size=1, rank=0, seed=0)
    return workers.WorkerBatches(items, order, **{**ALONE, "num_workers": num_workers, "persistent": True, **options})


def evaluation_batches(indices, num_workers):
    items = TransformedImages(noise(11), eval_transform(VIEW))
    return workers.WorkerBatches(items, BatchSampler(indices, 2, False), **{**ALONE, "num_workers": num_workers})


def copied(batches):
    return [tuple(part.clone() for part in batch) for batch in batches]


class Numbers(torch.utils.data.Dataset):
    """Item n is n, as a tensor [1] and as a label."""

    def __getitem__(self, index):
        return torch.tensor([float(index)]), index


def numbers(count, batch_size=1, num_workers=0, **options):
    keys = BatchSampler(range(count), batch_size, False)
    return workers.WorkerBatches(Numbers(), keys, **{**ALONE, "num_workers": num_workers, **options})


def test_batches_are_equal_whatever_the_number_of_workers():
    passes = []
    for count, yielding in ((0, False), (1, True), (2, False), (3, True)):
        batches, result = training_batches(count, yielding=yielding), []
        for epoch in range(2):
            batches.batch_sampler.set_epoch(epoch)
            result += copied(batches)
        passes.append([torch.cat(column) for column in zip(*result, strict=True)])
    for images, labels in passes[1:]:
        assert torch.equal(images, passes[0][0]) and torch.equal(labels, passes[0][1])
    assert (images.shape, labels.dtype) == ((48, 3, 32, 32), torch.int64)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_keeps_the_order_of_its_indices(num_workers):
    batches = evaluation_batches(shard(11, 1, 2), num_workers)
    images = torch.cat([images for images, _ in copied(batches)])
    assert [len(labels) for _, labels in batches] == [2, 2, 1]
    assert torch.equal(images, torch.stack([batches.loader.dataset.items[index][0] for index in (1, 3, 5, 7, 9)]))
    assert not list(evaluation_batches(shard(2, 3, 4), num_workers))  # a share without images


def test_a_pass_that_was_left_early_does_not_leak_into_the_next():
    batches = numbers(40, num_workers=2, persistent=True)
    passes = iter(batches)
    assert [int(next(passes)[1]) for _ in range(5)] == list(range(5))
    assert [int(images[0, 0]) for images, _ in batches] == list(range(40))


def test_passes_leave_the_global_generators_as_they_were():
    before = generators()
    list(training_batches(0)), list(evaluation_batches(range(11), 0))
    assert generators() == before


def test_a_batch_holds_until_the_next_is_asked_for():
    for count in (0, 1, 3):
        for number, (images, targets) in enumerate(numbers(31, 2, num_workers=count)):  # the last is of one image
            time.sleep(0.002)  # time for workers that are ahead to write into it
            assert images.flatten().tolist() == targets.tolist() == [2 * number, 2 * number + 1][: len(targets)]
        assert len(targets) == 1


def test_workers_use_their_memory_again():
    class Addresses(Numbers):
        def __getitem__(self, index):
            memory = get_worker_info().dataset.memory
            return torch.zeros(1), memory[-1].data_ptr() if memory else 0  # where the batch before this one is

    batches = workers.WorkerBatches(Addresses(), BatchSampler(range(30), 3, False), **{**ALONE, "num_workers": 1})
    addresses = {int(address) for _, several in batches for address in several}
    assert len(addresses - {0}) == workers.AHEAD + 1


def test_too_little_shared_memory_is_one_line(monkeypatch):
    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match=r"^no room for batches .* --num_workers, .* /dev/shm$"):
        list(numbers(4, num_workers=1))


def test_batches_of_a_spawned_worker_are_the_same(monkeypatch):
    spawning = functools.partial(workers.DataLoader, multiprocessing_context="spawn")
    monkeypatch.setattr(workers, "DataLoader", spawning)
    assert [int(images[0, 0]) for images, _ in numbers(7, num_workers=1, yielding=True)] == list(range(7))


def test_training_workers_persist_and_evaluation_workers_do_not():
    def pids(batches):
        before = set(multiprocessing.active_children())
        passes = iter(batches)
        next(passes)
        return {child.pid for child in set(multiprocessing.active_children()) - before}

    training, evaluation = numbers(3, num_workers=1, persistent=True), numbers(3, num_workers=1)
    assert [bool(pids(batches)) for batches in (training, training, evaluation, evaluation)] == [1, 0, 1, 1]


def test_workers_leave_signals_to_the_run():
    class Handler(torch.utils.data.Dataset):
        def __getitem__(self, index):
            ignored = [signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGINT, signal.SIGUSR1)]
            return torch.zeros(1), int(all(ignored) and signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))

    with stopping.StopSignals():
        batches = workers.WorkerBatches(Handler(), BatchSampler([0], 1, False), **{**ALONE, "num_workers": 1})
        assert [int(targets) for _, targets in batches] == [1]


class Clock(torch.utils.data.Dataset):
    """Item n is the time of its start; making it takes 5 ms."""

    def __getitem__(self, index):
        begun = time.monotonic()
        time.sleep(0.005)
        return torch.tensor([begun], dtype=torch.float64), index


@pytest.mark.parametrize("threads", [1, 2])
def test_yielding_workers_wait_while_training_fills_the_cores(monkeypatch, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    options = {**ALONE, "num_workers": 1, "yielding": True}
    batches = workers.WorkerBatches(Clock(), BatchSampler(range(16), 4, False), **options)
    trained, made = [], []
    for times, _ in batches:
        made += times.flatten().tolist()
        start = time.monotonic()
        time.sleep(0.1)
        trained.append((start, time.monotonic()))
    while_training = sum(start < when < end for when in made for start, end in trained)
    assert len(made) == 16
    assert (while_training == 0) == (threads == 2)


def test_a_closed_gate_opens_when_the_run_ends_or_a_pass_is_left():
    gate = workers.Gate(holds=True)
    gate.close(), gate.close()
    start = time.monotonic()
    threading.Timer(0.05, gate.open).start()
    gate.wait()
    assert 0.04 < time.monotonic() - start < gate.LONGEST
    gate.close()
    gate.enter_worker()  # all workers have ended
    gate.wait()
    assert time.monotonic() - start < gate.LONGEST


def test_leaving_a_pass_lets_its_workers_end_at_once(monkeypatch):
    monkeypatch.setattr(workers, "training_fills_cores", lambda: True)
    passes = iter(numbers(300, 100, num_workers=1, yielding=True))
    next(passes)
    start = time.monotonic()
    passes.close()
    assert time.monotonic() - start < 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_reach_the_card_before_their_memory_is_reused(num_workers):
    batches = numbers(64, 4, num_workers=num_workers, pin_memory=True)
    sums = [(images.sum(), labels.sum()) for images, labels in workers.ahead(batches, torch.device("cuda", 0))]
    assert [(int(images), int(labels)) for images, labels in sums] == [(16 * n + 6, 16 * n + 6) for n in range(16)]
