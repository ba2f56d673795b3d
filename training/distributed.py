"""The device, the process group, this process's rank, and the few collectives in use.

A single process needs no group; every function then behaves as in a world of one.
"""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.place import Place, check_address, read_place
from utils import UserError, first_line

PATIENCE = timedelta(hours=6)  # while one process downloads or decodes a data set and the others wait
_patient_group = None


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def node_leader() -> int:
    """Return the rank of the first process on this node."""
    return rank() - read_place().local_rank if dist.is_initialized() else 0


def pick_device(name: str) -> torch.device:
    """Return the device that `--device` names ("auto": cuda, else mps, else cpu); on cuda, this process's own GPU.

    UserError if there is no such device, or if this node has fewer GPUs than processes.
    """
    place = read_place()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not auto, cuda, cuda:N, mps or cpu") from error
    if device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {name} is not auto, cuda, cuda:N, mps or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU here; take --device cpu")
    if device.type != "cuda":
        return device
    gpus, processes = torch.cuda.device_count(), place.local_world_size
    if not gpus:
        raise UserError(f"--device {name}: torch sees no GPU here; take --device cpu, or a CUDA build of torch")
    if processes > gpus:
        raise UserError(
            f"{processes} processes on this node, but {gpus} GPUs: start at most {gpus}, or take --device cpu"
        )
    if device.index is not None and processes > 1:
        raise UserError(
            f"--device {name} names one GPU for {processes} processes: take --device cuda, each has its own"
        )
    index = place.local_rank if device.index is None else device.index
    if index >= gpus:
        raise UserError(f"--device {name}: the GPUs here are cuda:0 to cuda:{gpus - 1}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def set_determinism(wanted: bool) -> None:
    """Make a GPU compute the same weights from the same seed, or let it choose the fastest kernels."""
    torch.backends.cudnn.benchmark = not wanted
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


@contextlib.contextmanager
def process_group(device: torch.device, dist_url: str = "env://", timeout: float = 600):
    """Connect the processes that torchrun or torch.distributed.launch started; disconnect them afterwards.

    A process that fails, or does not answer for `timeout` seconds, ends the others with UserError. So does a launcher or
    a process that is missing or silent when they are to meet, after twice as long.
    """
    global _patient_group
    place, by_environment = read_place(), dist_url == "env://"
    if place.world_size == 1:
        yield
        return
    if by_environment:
        check_address()
    try:
        _patient_group = _in_time(lambda: _meet(place, device, dist_url, timeout), 2 * timeout)
    except TimeoutError as error:
        raise UserError(
            f"the processes did not meet within twice --dist_timeout {timeout:g} s: one of them is missing, or what "
            "listens where they meet does not answer (MASTER_ADDR, MASTER_PORT, or --dist_url)"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes could not connect to each other ({first_line(error)})") from error
    try:
        yield
    except RuntimeError as error:
        if re.search("[Tt]imed out|operation timeout", str(error)):
            reason = f"another process did not answer for --dist_timeout {timeout:g} s"
            raise UserError(f"{reason} ({first_line(error)})") from error
        if isinstance(error, dist.DistError) or re.search("Connection (closed|reset)|gloo", str(error)):
            raise UserError(f"another process failed, its message says why ({first_line(error)})") from error
        raise
    # Not in a `finally`: after a failure this would wait for work that never ends, and the reason would come too late.
    dist.destroy_process_group()
    _patient_group = None


def _in_time(work: Callable, seconds: float):
    """Return what `work` returns, or raise its error; TimeoutError if it takes longer than `seconds`.

    It is done in a thread. torch waits for the first answer of a store in C code, for ever and without running handlers
    of signals.
    """
    ended, outcome = threading.Event(), []

    def body() -> None:
        try:
            outcome.extend([work(), None])
        except BaseException as error:
            outcome.extend([None, error])
        ended.set()

    threading.Thread(target=body, daemon=True).start()  # daemon: the process must be able to end without it
    if not ended.wait(seconds):
        raise TimeoutError
    value, error = outcome
    if error:
        raise error
    return value


def _meet(place: Place, device: torch.device, dist_url: str, timeout: float) -> dist.ProcessGroup:
    """Make the process group; return another one, for those who wait for hours."""
    gpu = device if device.type == "cuda" else None
    if gpu:
        torch.cuda.set_device(gpu)  # each thread has its own current device
    has_store = dist_url == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if has_store or place.rank:  # without a launcher's store, the first process has it
        _wait_for_store(dist_url, timeout)
    store = _store_of_this_attempt(timeout) if has_store else None
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=None if store else dist_url,
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        device_id=gpu,
        timeout=timedelta(seconds=timeout),
    )
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _wait_for_store(dist_url: str, seconds: float) -> None:
    """Wait until something listens where the processes meet; UserError if it does not within `seconds`.

    torch would wait up to twice as long, and log the frames of its C++.
    """
    if dist_url == "env://":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    else:
        host, port = urlsplit(dist_url).hostname, urlsplit(dist_url).port
    end = time.monotonic() + seconds
    while host and port:  # or else it is a file, or torch says what is wrong with the URL
        try:
            socket.create_connection((host, port), max(end - time.monotonic(), 0.1)).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                reason = f"the launcher or the first process has ended, or is elsewhere ({first_line(error)})"
                raise UserError(
                    f"nothing listens at {host}:{port} for --dist_timeout {seconds:g} s: {reason}"
                ) from error
            time.sleep(0.1)


def _store_of_this_attempt(timeout: float) -> dist.Store:
    """Return the launcher's own store under a prefix for this restart.

    Without the prefix, restarted processes read the addresses of the old ones (pytorch issue 135712).
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))
    return dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


@contextlib.contextmanager
def main_first():
    """Run the body on rank 0 first and then on the others, so that one process downloads and all find the files.

    All leave together. If rank 0 fails, it says why, and the others exit silently.
    """
    if not is_main():
        if of_all_ranks(False, patiently=True)[0]:
            raise SystemExit(1)
        yield
        of_all_ranks(None, patiently=True)
        return
    failed = True
    try:
        yield
        failed = False
    finally:
        of_all_ranks(failed, patiently=True)
    of_all_ranks(None, patiently=True)


def of_all_ranks(value, *, patiently: bool = False) -> list:
    """Return each rank's value, in order of rank; plain values only. `patiently`: one rank may take hours."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=_patient_group if patiently else None)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is true on any rank; the host waits for the device."""
    return bool(all_sum(torch.tensor(float(flag), device=device))) if dist.is_initialized() else flag


def share_buffers(module: nn.Module) -> None:
    """Copy rank 0's buffers to every rank. DDP does so before each training step, but not after the last."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def all_sum(values: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
