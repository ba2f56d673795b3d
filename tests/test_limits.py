"""What a machine does not have: more cores for workers, more memory for a batch."""

import errno
import os
import resource

import pytest
import torch
from conftest import error_of, settings

import main as script
from images.workers import WorkerBatches
from training import checkpoint
from utils import UserError, run_script


@pytest.mark.parametrize(
    ("given", "cores", "processes", "started"),
    [(3, 2, "", 2), (3, 4, "1", 3), (3, 8, "4", 2), (3, 2, "4", 1), (0, 2, "", 0)],
)
def test_workers_are_no_more_than_the_cores(given, cores, processes, started, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert settings("--num_workers", str(given))[2].workers == started


def test_workers_may_open_as_many_files_as_the_system_allows():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
    try:
        WorkerBatches([], [], num_workers=1, pin_memory=False)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("cause", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_checkpoint_is_not_passed_over_for_lack_of_resources(cause, tmp_path, monkeypatch):
    def read(path):
        try:
            raise cause
        except (OSError, MemoryError) as error:
            raise UserError(f"{path} cannot be read") from error

    monkeypatch.setattr(checkpoint, "read_checkpoint", read)
    with pytest.raises(UserError, match="checkpoint-1.pth cannot be read"):
        checkpoint.newest_checkpoint([tmp_path / "checkpoint-1.pth", tmp_path / "checkpoint-0.pth"])


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
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("Storage size calculation overflowed with sizes=[4000000000, 4000000000]"),
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


LIMITS = {
    OSError(errno.EMFILE, "Too many open files", "/data/a.jpg"): "too many open files: raise the limit (ulimit -n)",
    RuntimeError("received 0 items of ancdata"): "too many open files: raise the limit (ulimit -n)",
    BlockingIOError(
        errno.EAGAIN, "Resource temporarily unavailable"
    ): "no further process or thread can be started: raise",
    RuntimeError("can't start new thread"): "no further process or thread can be started: raise the limit (ulimit -u)",
}


@pytest.mark.parametrize(("error", "said"), LIMITS.items(), ids=lambda value: str(value)[:20])
def test_exhausted_limit_of_the_system_is_one_line(error, said, tiny_run, monkeypatch, capsys):
    failing(monkeypatch, error)
    assert run_script(lambda: script.main(tiny_run())) == 1
    assert f"error: {said}" in capsys.readouterr().err.splitlines()[-1]


RESNET = "--model resnet18 --batch_size 1 --mixup 0 --cutmix 0 --epochs 1 --warmup_epochs 0"


def resnet(tiny_run, *more):
    argv = tiny_run(RESNET, *more)
    start = argv.index("--model_kwargs")
    del argv[start : argv.index("--data_set")]  # the tiny ViT's
    return [*argv, "--model_kwargs", "layers=[1,1,1,1]", "--data_fraction", "0.2"]


@pytest.mark.parametrize("more", ["", "--update_freq 2", "--compile"])
def test_batch_of_one_that_batch_norm_refuses_is_named(more, tiny_run):
    wanted = (
        "--batch_size 1: batch norm in resnet18 has a single value per channel at --input_size 32; give --batch_size 2"
    )
    assert wanted in error_of(script, *resnet(tiny_run, more))


def test_linear_probe_takes_batches_of_one(tiny_run):
    assert script.main(resnet(tiny_run, "--linear_probe"))["epoch"] == 0


def test_rate_beyond_float32_is_named(tiny_run):
    message = error_of(script, *tiny_run("--opt adamwlegacy --lr 3e38 --warmup_epochs 0"))
    assert message.startswith("--lr 3e+38, --weight_decay 0.05: the update is beyond float32")


def test_policy_that_timm_cannot_apply_is_named(tiny_run):
    assert "timm cannot apply --aa 'augmix-b1-a0' (alpha <= 0)" in error_of(script, *tiny_run("--aa augmix-b1-a0"))
