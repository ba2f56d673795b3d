"""What a process takes from a launcher's variables, and what it refuses."""

import pytest
import torch

from training import distributed
from training.place import Place, check_address, lone_task, read_place
from utils import UserError

INTERACTIVE = "SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_STEP_ID=4294967290 SLURM_STEP_NUM_TASKS=1"  # salloc -n 4
PTY = (
    "SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4 SLURM_PTY_PORT=40000"  # srun -n 4 --pty bash
)
OLD_SALLOC, BATCH = "SLURM_NTASKS=4 SLURM_PROCID=0", "SLURM_NTASKS=4 SLURM_STEP_ID=4294967291"


@pytest.fixture
def variables(monkeypatch):
    """Return a function that sets variables from words like RANK=0."""

    def set_all(words):
        for word in words.split():
            monkeypatch.setenv(*word.split("=", 1))

    return set_all


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("", Place()),
        ("RANK= WORLD_SIZE= LOCAL_RANK= LOCAL_WORLD_SIZE= MASTER_PORT= SLURM_NTASKS= OMPI_COMM_WORLD_SIZE=", Place()),
        ("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_PORT=29500", Place(3, 4, 1, 2)),
        ("RANK=0 WORLD_SIZE=1", Place()),
        ("RANK=0", Place()),
        ("WORLD_SIZE=1", Place()),
        ("OMPI_COMM_WORLD_SIZE=1 PMI_SIZE=1 SLURM_STEP_ID=0 SLURM_NTASKS=1", Place()),
        (
            "OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=1 RANK=1 WORLD_SIZE=4",
            Place(1, 4),
        ),  # a job script connects them
        ("SLURM_STEP_ID=0 SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=1", Place()),  # srun -n 1 in a job of four tasks
        ("SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 RANK=8 WORLD_SIZE=16 LOCAL_RANK=0", Place(8, 16)),  # srun torchrun
        (INTERACTIVE, Place()),
        (PTY, Place()),
        (f"{PTY} PMI_SIZE=4 PMI_RANK=0", Place()),  # which srun may set in its shell
        (OLD_SALLOC, Place()),
        (BATCH, Place()),
    ],
)
def test_place_is_what_the_launcher_says(words, place, variables):
    variables(words)
    assert read_place() == place


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("RANK=x WORLD_SIZE=2", "the environment has RANK=x, expected a whole number of at least 0"),
        ("RANK=-1 WORLD_SIZE=2", "RANK=-1"),
        ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE=0, expected a whole number of at least 1"),
        ("RANK=0 WORLD_SIZE=2.0", r"WORLD_SIZE=2\.0"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=a", "LOCAL_RANK=a"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE=0"),
        ("RANK=0 WORLD_SIZE=1 MASTER_PORT=65536", "MASTER_PORT=65536, expected a whole number from 1 to 65535"),
        ("RANK=2 WORLD_SIZE=2", r"RANK is 2, but WORLD_SIZE is 2: unset it, or use torchrun"),
        ("RANK=2", "RANK is 2, but WORLD_SIZE is not set"),
        ("WORLD_SIZE=8", "WORLD_SIZE is 8, but RANK is not set: unset it, or use torchrun"),
        ("SLURM_NTASKS=four SLURM_STEP_ID=0", "SLURM_NTASKS=four"),
        ("SLURM_NTASKS=4 SLURM_STEP_ID=0", "srun started 4 processes that are not connected: use srun torchrun"),
        ("SLURM_NTASKS=8 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2", "srun started 2 processes"),
        (
            "OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=0",
            "mpirun started 4 processes that are not connected: use torchrun",
        ),
        ("PMI_SIZE=2 PMI_RANK=0", "mpirun started 2 processes"),
        (f"{INTERACTIVE} PMI_SIZE=2", "mpirun started 2 processes"),
        (f"{INTERACTIVE} OMPI_COMM_WORLD_SIZE=4", "mpirun started 4 processes"),
        (f"{PTY} OMPI_COMM_WORLD_SIZE=4", "mpirun started 4 processes"),
        ("SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 OMPI_COMM_WORLD_SIZE=8", "mpirun started 8 processes"),  # through srun
        ("SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4 PMI_SIZE=4", "srun started 4 processes"),
    ],
)
def test_variables_that_do_not_fit_are_named(words, message, variables):
    variables(words)
    with pytest.raises(UserError, match=message):
        read_place()


@pytest.mark.parametrize(
    "words",
    [
        "SLURM_NTASKS=4 SLURM_STEP_ID=0 SLURM_PROCID=2",
        PTY.replace("PROCID=0", "PROCID=1"),  # srun -n 4 --pty python main.py
        "OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=3",
        "PMI_SIZE=4 PMI_RANK=1",
    ],
)
def test_of_unconnected_processes_the_first_alone_says_so(words, variables):
    variables(words)
    with pytest.raises(SystemExit) as ended:
        read_place()
    assert ended.value.code == 1


@pytest.mark.parametrize("words", [INTERACTIVE, PTY, OLD_SALLOC, BATCH])
def test_single_process_of_several_tasks_says_so(words, variables):
    variables(words)
    assert (
        "training as one process, as in an interactive shell or a batch script, although SLURM has 4" in lone_task()[0]
    )
    variables("RANK=0 WORLD_SIZE=1 SLURM_NTASKS=unknown")
    assert lone_task() == []


def test_single_process_elsewhere_has_nothing_to_say(variables):
    assert lone_task() == []
    variables("SLURM_NTASKS=1 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1")
    assert lone_task() == []


@pytest.mark.parametrize(
    ("words", "missing"), [("", "MASTER_ADDR"), ("MASTER_ADDR=localhost MASTER_PORT=", "MASTER_PORT")]
)
def test_processes_without_an_address_are_told_what_is_missing(words, missing, variables):
    variables(f"RANK=0 WORLD_SIZE=2 {words}")
    with pytest.raises(UserError, match=f"{missing} is not set, by which 2 processes"):
        check_address()


def test_address_that_leads_nowhere_is_a_line(variables):
    variables("RANK=0 WORLD_SIZE=2")
    with (
        pytest.raises(UserError, match="the processes could not connect to each other"),
        distributed.process_group(torch.device("cpu"), "tcp://localhost", 5),
    ):
        raise AssertionError("the body must not run")


def test_world_of_one_trains_without_a_group(variables, train):
    variables("RANK=0 WORLD_SIZE=1")
    assert train("--epochs 1")["epoch"] == 0


def test_interactive_shell_trains_as_one_process_and_says_so(variables, train, caplog):
    variables(PTY)
    train("--epochs 1")
    assert caplog.messages[0].startswith("training as one process")
