"""The process group: up and down, who this process is, and the few collectives in use.

One process needs no group; every function then answers for a world of one.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch import Tensor

from utils import UserError


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def pick_device(name: str) -> torch.device:
    """The device that `--device` names ("auto": cuda, else mps, else cpu); on cuda, this process's own GPU.

    Raises UserError when there is no such device, or fewer GPUs than processes on this node.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not auto, cuda, cuda:N, mps or cpu") from error
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU here; take --device cpu")
    if device.type != "cuda":
        return device
    gpus = torch.cuda.device_count()
    index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
    if not gpus:
        raise UserError(f"--device {name}: torch sees no GPU here; take --device cpu, or a CUDA build of torch")
    if index >= gpus:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", index + 1))
        raise UserError(
            f"{processes} processes on this node, but {gpus} GPUs: start at most {gpus}, or take --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextlib.contextmanager
def process_group(device: torch.device, dist_url: str = "env://"):
    """Inside, the processes that torchrun or torch.distributed.launch started can talk; afterwards they part."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=dist_url,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def main_first():
    """The body runs on rank 0 first and on the others after it, so that one process downloads and all find the files."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def of_all_ranks(value) -> list:
    """This value of each rank, in their order; plain values only."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
