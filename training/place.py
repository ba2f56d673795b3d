"""What launchers tell a process by environment variables. An empty variable counts as unset.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; job scripts may set only some
of them. Processes that srun or mpirun start do not know each other.
"""

import math
import os
from typing import NamedTuple

from utils import UserError, is_first_process

NO_STEP_OF_SRUN = 0xFFFFFFFA  # SLURM's step ids from here on: interactive shells, batch scripts and the like
SEE = "(docs/cluster.md)"


class Place(NamedTuple):
    """This process among those of the run, and among those on its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def read_place() -> Place:
    """Return this process's place, which may be that of a single process.

    UserError if a variable is no number, if the variables contradict each other, or if this process is one of several that
    do not know each other; of those, only the first says so.
    """
    rank, world_size = _number("RANK"), _number("WORLD_SIZE", least=1)
    local_rank, local_world_size = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE", least=1)
    _number("MASTER_PORT", least=1, most=65535)  # for torch, whose own error is a traceback
    if rank is None and world_size not in (None, 1):
        raise UserError(f"WORLD_SIZE is {world_size}, but RANK is not set: unset it, or use torchrun {SEE}")
    if rank and rank >= (world_size or 1):
        wanted = f"is {world_size}" if world_size else "is not set"
        raise UserError(f"RANK is {rank}, but WORLD_SIZE {wanted}: unset it, or use torchrun {SEE}")
    if rank is None or world_size is None:
        _refuse_unconnected()
    return Place(rank or 0, world_size or 1, local_rank or 0, local_world_size or 1)


def check_address() -> None:
    """UserError unless MASTER_ADDR and MASTER_PORT say where the processes meet."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            wanted = f"{name} is not set, by which {os.environ['WORLD_SIZE']} processes (WORLD_SIZE) meet"
            raise UserError(f"{wanted}: use torchrun {SEE}, or unset WORLD_SIZE and RANK for a single process")


def lone_task() -> list[str]:
    """Return a remark if SLURM has several tasks and this is a single process, as in an interactive shell; else none."""
    if os.environ.get("RANK"):
        return []
    tasks = max(_number("SLURM_NTASKS") or 1, _number("SLURM_STEP_NUM_TASKS") or 1)
    if tasks == 1:
        return []
    shell = "as in an interactive shell or a batch script"
    return [f"training as one process, {shell}, although SLURM has {tasks} tasks: srun torchrun starts several {SEE}"]


def _refuse_unconnected() -> None:
    """End a process that srun or mpirun started beside others: each would train alone."""
    by_pmi = _number("PMI_SIZE") or 1
    if by_pmi == _number("SLURM_STEP_NUM_TASKS"):
        by_pmi = 1  # set by srun, also in a shell that it starts
    for launcher, processes, wanted in (
        ("mpirun", _number("OMPI_COMM_WORLD_SIZE") or 1, "torchrun"),
        ("srun", _tasks_of_srun(), "srun torchrun"),
        ("mpirun", by_pmi, "torchrun"),
    ):
        if processes > 1:
            if not is_first_process():
                raise SystemExit(1)
            raise UserError(f"{launcher} started {processes} processes that are not connected: use {wanted} {SEE}")


def _tasks_of_srun() -> int:
    """Return how many tasks srun started beside this one; 1 in a shell, whose variables are those of a task."""
    step = _number("SLURM_STEP_ID")
    shell = os.environ.get("SLURM_PTY_PORT") and not _number("SLURM_PROCID")  # the first task of `srun --pty bash`
    if step is None or step >= NO_STEP_OF_SRUN or shell:
        return 1
    return _number("SLURM_STEP_NUM_TASKS") or _number("SLURM_NTASKS") or 1


def _number(name: str, *, least: int = 0, most: float = math.inf) -> int | None:
    """Return a variable's number; None if it is unset or empty. UserError if it is none from `least` to `most`."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isdecimal() and least <= int(text) <= most):
        wanted = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
        raise UserError(f"the environment has {name}={text}, expected a whole number {wanted}")
    return int(text)
