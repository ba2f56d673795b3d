"""What a machine does not have: more cores for workers, more memory for a batch."""

import os

import pytest
import torch
from conftest import error_of, settings

import main as script
from utils import run_script


@pytest.mark.parametrize(
    ("given", "cores", "processes", "started"),
    [(3, 2, "", 2), (3, 4, "1", 3), (3, 8, "4", 2), (3, 2, "4", 1), (0, 2, "", 0)],
)
def test_workers_are_no_more_than_the_cores(given, cores, processes, started, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert settings("--num_workers", str(given))[2].workers == started


def test_run_says_that_it_caps_the_workers(tiny_run, caplog, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr(script, "run", lambda *_: {})
    script.main(tiny_run("--num_workers 7"))
    assert "--num_workers 7 is capped at 1, the cores of this node per process" in caplog.text


EXHAUSTED = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
    MemoryError(),
]


def failing(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(script, "train_one_epoch", fail)
    monkeypatch.setattr(script, "evaluate", fail)


@pytest.mark.parametrize("error", EXHAUSTED, ids=lambda error: str(error)[:12])
def test_exhausted_memory_names_batch_and_image_size(error, tiny_run, monkeypatch):
    failing(monkeypatch, error)
    message = error_of(script, *tiny_run())
    assert message.startswith(
        "out of memory on cpu: vit_tiny with --batch_size 8 at --input_size 32; lower --batch_size and"
    )
    assert "\n" not in message and "More lines" not in message


def test_evaluation_without_memory_needs_no_update_freq(tiny_run, monkeypatch):
    failing(monkeypatch, EXHAUSTED[0])
    assert "; lower --batch_size (CUDA out of memory" in error_of(script, *tiny_run("--eval true", output_dir=""))


def test_other_errors_keep_their_traceback(tiny_run, monkeypatch):
    failing(monkeypatch, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        script.main(tiny_run())


def test_scripts_without_batches_say_it_in_a_line(monkeypatch, capsys):
    def fail():
        raise EXHAUSTED[0]

    assert run_script(fail) == 1
    assert capsys.readouterr().err.endswith("error: out of memory (CUDA out of memory. Tried to allocate 20.00 GiB)\n")
