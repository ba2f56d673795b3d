"""Runs whose processes are killed, stopped, asked to stop, or fail: all end soon and can be resumed."""

import json
import os
import re
import resource
import signal
import subprocess
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch
from conftest import assert_equal_weights, has_logged, pids, read_log, start, wait_for, weights_of
from small_models import SCRIPT_STUDENT, SCRIPT_TEACHER

import models
import weight_selection
from bench import survive
from images import workers
from training import folder as run_folder
from training.checkpoint import numbered_checkpoints, read_checkpoint
from utils import STOPPED, UserError
from weightfiles.initialization import read_initialization

TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2".split()


@pytest.fixture
def job(tiny_run, tmp_path):
    """Start runs of several processes, forked from this one; make sure that none survives."""
    jobs = []

    def begin(options, processes=2, to="run", logged=False):
        """With `logged`, wait for the end of its first epoch."""
        jobs.append(survive.Job(tiny_run(options, output_dir=tmp_path / to), processes, tmp_path / "said.txt"))
        if logged:
            wait_for(lambda: has_logged(tmp_path / to))
        return jobs[-1]

    yield begin
    for each in jobs:
        each.send(signal.SIGKILL)


def test_killed_runs_end_as_if_they_had_not_been(tmp_path):
    variants = ["1 process, 2 workers", "2 processes, accumulating"]
    result = survive.main(["--runs", "2", "--variants", *variants, "--out", str(tmp_path / "survive.json")])
    assert json.loads((tmp_path / "survive.json").read_text()) == result
    assert all(result["runs"][name]["runs"] == 1 and result["runs"][name]["kills"] >= 1 for name in variants)


def test_bench_notices_processes_that_are_left(job, monkeypatch):
    monkeypatch.setattr(survive, "WORKERS_END_SECONDS", 0.5)
    monkeypatch.setattr(workers, "leave_to_parent", lambda *_: None)  # torch checks every 5 s
    monkeypatch.setattr(torch.utils.data._utils.worker, "MP_STATUS_CHECK_INTERVAL", 60.0)
    run = job("--epochs 400 --num_workers 1", processes=1, logged=True)
    (worker,) = set(survive.members(run.processes[0].pid)) - {run.processes[0].pid}
    run.send(signal.SIGKILL)
    try:
        with pytest.raises(RuntimeError, match=rf"processes \[{worker}\] have outlived their run"):
            run.wait(60)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_bench_notices_other_weights(monkeypatch):
    monkeypatch.setattr(survive, "same", lambda *_: False)
    with pytest.raises(RuntimeError, match="other weights or another log than without a kill"):
        survive.main(["--runs", "1", "--variants", "1 process"])


def test_signal_to_one_process_saves_and_ends_all(job, tmp_path):
    options = "--log_freq 1 --batch_size 4 --epochs 40"
    whole, run = job(options, to="whole"), job(options, logged=True)
    run.send(signal.SIGUSR1, [1])
    assert run.wait(60) == [STOPPED, STOPPED], run.said.read_text()
    said = (tmp_path / "run" / run_folder.REQUEUE).read_text()
    assert re.match("stopped by a signal to another process (after|during)", said), said
    assert job(options).wait(60) == whole.wait(60) == [0, 0], run.said.read_text()
    assert_equal_weights(*(weights_of(tmp_path / name, "checkpoint-39.pth") for name in ("run", "whole")))


def test_one_process_goes_on_twice_with_the_images_of_two(job, tmp_path):
    options, folder = "--batch_size 4 --epochs 60 --save_ckpt_steps 2 --log_freq 1", tmp_path / "run"
    run = job(options, logged=True)
    run.send(signal.SIGTERM)
    assert run.wait(60) == [STOPPED, STOPPED], run.said.read_text()
    epochs = len(read_log(folder))
    run = job(options, processes=1)
    wait_for(lambda: len(read_log(folder)) > epochs)
    run.send(signal.SIGTERM)
    assert run.wait(60) == [STOPPED], run.said.read_text()
    said = "the run continues on 1 processes instead of 2: --update_freq 2 instead of 1 keeps the 8 images"
    assert said in run.said.read_text()
    assert job(options, processes=1).wait(60) == [0], run.said.read_text()
    assert job(options).wait(60) == [0, 0], run.said.read_text()
    assert [line["epoch"] for line in read_log(folder)] == list(range(60))


@pytest.mark.parametrize(
    ("number", "rank", "message"),
    [
        (signal.SIGSTOP, 1, "another process did not answer for --dist_timeout 4 s"),
        (signal.SIGKILL, 0, "another process failed"),
    ],
)
def test_process_that_hangs_or_is_killed_ends_the_other(number, rank, message, job):
    run = job("--epochs 400 --batch_size 4 --dist_timeout 4", logged=True)
    run.send(number, [rank])
    wait_for(lambda: not run.processes[1 - rank].is_alive(), 30)
    assert run.processes[1 - rank].exitcode == 1 and message in run.said.read_text()


def test_worker_that_dies_ends_the_run_in_one_line(job):
    run = job("--epochs 400 --num_workers 1", processes=1, logged=True)
    os.kill(pids("-P", run.processes[0].pid)[0], signal.SIGKILL)
    assert run.wait(60) == [1]
    said = run.said.read_text()
    assert "main.py: error: a worker that loads images has died" in said and "Traceback" not in said


def test_loss_that_is_not_finite_ends_all_and_saves_nothing(job, tmp_path):
    run = job("--batch_size 4 --lr 1e30 --warmup_epochs 0 --log_freq 3 --save_ckpt_steps 2")
    assert run.wait(60) == [1, 1]
    said = run.said.read_text()
    assert "loss was not finite" in said and "in the 2 updates up to step 1 of epoch 0, at lr" in said, said
    assert not list((tmp_path / "run").glob("checkpoint*")) and not read_log(tmp_path / "run")


def test_restarted_processes_go_on_where_the_killed_ones_were(job, tiny_run, tmp_path):
    options = "--batch_size 4 --epochs 30 --save_ckpt_steps 2 --log_freq 5"
    run = start(tiny_run(options), *TORCHRUN, "--max-restarts=1")
    wait_for(lambda: len(list((tmp_path / "run").glob("checkpoint-*.pth"))) >= 2)
    _, killed = pids("-P", run.pid)
    os.kill(killed, signal.SIGKILL)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert "resumed from" in said and [line["epoch"] for line in read_log(tmp_path / "run")] == list(range(30))
    assert job(options, to="whole").wait(60) == [0, 0]
    assert_equal_weights(*(weights_of(tmp_path / name, "checkpoint-29.pth") for name in ("run", "whole")))


def test_launcher_passes_the_signal_on_and_leaves_nobody_behind(tiny_run, tmp_path):
    argv = tiny_run("--batch_size 4 --epochs 400 --num_workers 1")
    run = start(argv, *TORCHRUN, "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1")
    wait_for(lambda: has_logged(tmp_path / "run"))
    # a batch system signals all processes, and the launcher passes on its own signal
    for pid in (run.pid, *pids("-P", run.pid)):
        os.kill(pid, signal.SIGUSR1)
    _, said = run.communicate(timeout=90)
    assert run.returncode != 0 and re.search("stopped by SIGUSR1 (after|during)", said), said
    assert (tmp_path / "run" / run_folder.REQUEUE).exists()
    assert read_checkpoint(numbered_checkpoints(tmp_path / "run")[0])["sums"]
    wait_for(lambda: not pids("-f", tmp_path / "run"), 20)  # their workers, too


@contextmanager
def largest_file(size):
    """Limit the size of files written inside to `size` bytes; expect a UserError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(UserError, match=r"could not be written .*File too large") as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield error
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_limit_of_file_size_ends_the_run_and_loses_nothing(train, tmp_path):
    folder, often = tmp_path / "run", "--save_ckpt_steps 3 --save_ckpt_num 9"
    train(to="whole")
    with largest_file(50_000) as error:
        train()
    assert "checkpoint-best.pth could not" in str(error.value)
    assert not list(folder.glob("checkpoint*")) and not list(folder.glob(".*.tmp"))
    train(often)
    (folder / "checkpoint-1.pth").unlink()
    with largest_file(50_000):
        train(often)
    assert all(read_checkpoint(path) for path in numbered_checkpoints(folder))
    train()
    assert_equal_weights(weights_of(tmp_path / "whole"), weights_of(folder))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_limit_of_file_size_keeps_an_initialization(suffix, small_teacher, tmp_path):
    sizes = ([f"{key}={value}" for key, value in each.items()] for each in (SCRIPT_TEACHER, SCRIPT_STUDENT))
    teacher, student = (" ".join(each) for each in sizes)
    options = f"--pretrained_model vit_tiny --pretrained_path {small_teacher[0]} --pretrained_kwargs {teacher} "
    file = tmp_path / f"student.{suffix}"
    options += f"--student_model vit_tiny --student_kwargs {student} --output_dir {file}"
    weight_selection.main(options.split())
    before = {path: path.read_bytes() for path in (file, file.with_suffix(".json"))}
    # the description could be written, the weights cannot
    assert len(before[file.with_suffix(".json")]) < 20_000 < len(before[file])
    with largest_file(20_000):
        weight_selection.main([*options.split(), "--element_selection", "consecutive"])
    assert all(path.read_bytes() == content for path, content in before.items()) and not list(tmp_path.glob(".*.tmp"))
    model = models.create("vit_tiny", SCRIPT_STUDENT, device="meta")
    assert read_initialization(str(file), model, "vit_tiny")[1]["choices"]["element_selection"] == "uniform"
    assert safetensors.torch.load_file(file) if suffix == "safetensors" else torch.load(file, weights_only=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_disk_ends_the_run_and_what_was_there_still_loads(small_disk, train):
    with pytest.raises(UserError, match="could not be written .*No space left on device"):
        train("--epochs 9 --warmup_epochs 0", to=small_disk / "run")
    left = numbered_checkpoints(small_disk / "run")
    assert left and all(read_checkpoint(path) for path in left)
    assert not list((small_disk / "run").glob(".*.tmp"))


def test_full_disk_under_tensorboard_does_not_end_the_run(small_disk, train, tmp_path, caplog):
    (small_disk / "filler").write_bytes(bytes(2**20 - 40_000))
    train("--epochs 60 --log_freq 1 --disable_eval true --log_dir", small_disk / "tb")
    assert len(read_log(tmp_path / "run")) == 60
    (said,) = [record.getMessage() for record in caplog.records if "--log_dir" in record.getMessage()]
    assert "No space left on device; nothing more is written there, the training continues" in said
