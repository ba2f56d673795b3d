"""Runs in processes that are killed, stopped, asked to stop, or that fail: all end soon, and what is left goes on."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import assert_equal_weights, read_log, weights_of

import main as script
import weight_selection
from bench import survive
from images import workers
from training import folder as run_folder
from training.checkpoint import numbered_checkpoints, read_checkpoint
from utils import STOPPED, UserError
from weightfiles.initialization import read_initialization

ROOT = Path(__file__).parents[1]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.fixture
def job(tmp_path):
    """Starts runs of several processes, forked from this one, and sees to it that none is left."""
    jobs = []

    def start(argv, processes=2):
        jobs.append(survive.Job(list(map(str, argv)), processes, tmp_path / "said.txt"))
        return jobs[-1]

    yield start
    for each in jobs:
        each.send(signal.SIGKILL)


def test_killed_runs_end_as_if_they_had_not_been(tmp_path):
    variants = ["1 process, 2 workers", "2 processes, accumulating"]
    result = survive.main(["--runs", "2", "--variants", *variants, "--out", str(tmp_path / "survive.json")])
    assert json.loads((tmp_path / "survive.json").read_text()) == result
    assert all(result["runs"][name]["runs"] == 1 and result["runs"][name]["kills"] >= 1 for name in variants)


def test_bench_notices_processes_that_are_left(job, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(survive, "WORKERS_END_SECONDS", 0.5)
    monkeypatch.setattr(workers, "leave_to_parent", lambda *_: None)  # torch's own look is every 5 s
    monkeypatch.setattr(torch.utils.data._utils.worker, "MP_STATUS_CHECK_INTERVAL", 60.0)
    run = job(tiny_run("--epochs", "400", "--num_workers", "1"), processes=1)
    wait_for(lambda: (tmp_path / "run" / "log.txt").exists() and read_log(tmp_path / "run"))
    worker = next(pid for pid in survive.members(run.processes[0].pid) if pid != run.processes[0].pid)
    run.send(signal.SIGKILL)
    try:
        with pytest.raises(RuntimeError, match=rf"processes \[{worker}\] have outlived their run"):
            run.wait(60)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_bench_notices_other_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(survive, "same", lambda *_: False)
    with pytest.raises(RuntimeError, match="other weights or another log than without a kill"):
        survive.main(["--runs", "1", "--variants", "1 process"])


def test_signal_to_one_process_saves_and_ends_all(job, tiny_run, tmp_path):
    options = ["--log_freq", "1", "--batch_size", "4", "--epochs", "40"]
    whole = job(tiny_run(*options, output_dir=tmp_path / "whole"))
    run = job(tiny_run(*options))
    wait_for(lambda: (tmp_path / "run" / "log.txt").exists() and read_log(tmp_path / "run"))
    run.send(signal.SIGUSR1, [1])
    assert run.wait(60) == [STOPPED, STOPPED], run.said.read_text()
    said = (tmp_path / "run" / run_folder.REQUEUE).read_text()
    assert re.match("stopped by a signal to another process (after|during)", said), said
    assert job(tiny_run(*options)).wait(60) == [0, 0], run.said.read_text()
    assert whole.wait(60) == [0, 0]
    assert_equal_weights(*(weights_of(tmp_path / name, "checkpoint-39.pth") for name in ("run", "whole")))


def test_one_process_goes_on_twice_with_the_images_of_two(job, tiny_run, tmp_path):
    options = ["--batch_size", "4", "--epochs", "60", "--save_ckpt_steps", "2", "--log_freq", "1"]
    run = job(tiny_run(*options))
    wait_for(lambda: (tmp_path / "run" / "log.txt").exists() and read_log(tmp_path / "run"))
    run.send(signal.SIGTERM)
    assert run.wait(60) == [STOPPED, STOPPED], run.said.read_text()
    epochs = len(read_log(tmp_path / "run"))
    run = job(tiny_run(*options), processes=1)
    wait_for(lambda: len(read_log(tmp_path / "run")) > epochs)
    run.send(signal.SIGTERM)
    assert run.wait(60) == [STOPPED], run.said.read_text()
    assert (
        "the run continues on 1 processes instead of 2: --update_freq 2 instead of 1 keeps the 8 images"
        in run.said.read_text()
    )
    assert job(tiny_run(*options), processes=1).wait(60) == [0], run.said.read_text()
    assert job(tiny_run(*options)).wait(60) == [0, 0], run.said.read_text()
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == list(range(60))


def test_process_that_hangs_ends_the_others(job, tiny_run, tmp_path):
    run = job(tiny_run("--epochs", "400", "--batch_size", "4", "--dist_timeout", "4"))
    wait_for(lambda: (tmp_path / "run" / "log.txt").exists() and read_log(tmp_path / "run"))
    run.send(signal.SIGSTOP, [1])
    start = time.monotonic()
    wait_for(lambda: not run.processes[0].is_alive(), 60)
    assert run.processes[0].exitcode == 1 and time.monotonic() - start < 30
    assert "another process did not answer for --dist_timeout 4 s" in run.said.read_text()


def test_killed_process_ends_the_others(job, tiny_run, tmp_path):
    run = job(tiny_run("--epochs", "400", "--batch_size", "4"))
    wait_for(lambda: (tmp_path / "run" / "log.txt").exists() and read_log(tmp_path / "run"))
    run.send(signal.SIGKILL, [0])
    assert run.wait(60) == [-signal.SIGKILL, 1]
    assert "another process failed" in run.said.read_text()


def test_loss_that_is_not_finite_ends_all_and_saves_nothing(job, tiny_run, tmp_path):
    run = job(
        tiny_run(
            "--batch_size", "4", "--lr", "1e30", "--warmup_epochs", "0", "--log_freq", "3", "--save_ckpt_steps", "2"
        )
    )
    assert run.wait(60) == [1, 1]
    said = run.said.read_text()
    assert "loss was not finite" in said and "in the 2 updates up to step 1 of epoch 0, at lr" in said, said
    assert not list((tmp_path / "run").glob("checkpoint*")) and not read_log(tmp_path / "run")


# ---- launched by torchrun ----


def torchrun(argv, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, str(ROOT / "main.py"), *argv], env=environment, **pipes)


def ranks_of(folder):
    """The processes of a run's main.py, without their workers, by the folder in their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if (
            str(folder).encode() in words
            and str(ROOT / "main.py").encode() in words
            and b"torch.distributed.run" not in words
        ):
            found[int(path.parent.name)] = parent
    return [pid for pid, parent in found.items() if parent not in found]


def test_restarted_processes_go_on_where_the_killed_ones_were(tiny_run, tmp_path):
    options = ["--batch_size", "4", "--epochs", "30", "--save_ckpt_steps", "2", "--log_freq", "5"]
    run = torchrun(tiny_run(*options), "--max-restarts=1")
    wait_for(lambda: len(list((tmp_path / "run").glob("checkpoint-*.pth"))) >= 2)
    killed = ranks_of(tmp_path / "run")
    assert len(killed) == 2
    os.kill(killed[1], signal.SIGKILL)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert "resumed from" in said and [line["epoch"] for line in read_log(tmp_path / "run")] == list(range(30))
    whole = survive.Job(tiny_run(*options, output_dir=tmp_path / "whole"), 2, tmp_path / "said.txt")
    assert whole.wait(60) == [0, 0]
    assert_equal_weights(*(weights_of(tmp_path / name, "checkpoint-29.pth") for name in ("run", "whole")))


def test_launcher_passes_the_signal_on_and_leaves_nobody_behind(tiny_run, tmp_path):
    run = torchrun(
        tiny_run("--batch_size", "4", "--epochs", "400", "--num_workers", "1"),
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",
    )
    wait_for(lambda: (tmp_path / "run" / "log.txt").exists() and read_log(tmp_path / "run"))
    ranks = ranks_of(tmp_path / "run")
    for pid in (run.pid, *ranks):  # a batch system signals them all, and the launcher passes its own on
        os.kill(pid, signal.SIGUSR1)
    _, said = run.communicate(timeout=90)
    assert run.returncode != 0 and re.search("stopped by SIGUSR1 (after|during)", said), said
    assert (tmp_path / "run" / run_folder.REQUEUE).exists()
    assert read_checkpoint(numbered_checkpoints(tmp_path / "run")[0])["sums"]
    wait_for(lambda: not ranks_of(tmp_path / "run"), 20)


# ---- disks that are full ----


@contextmanager
def largest_file(size):
    """Files written inside can have so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_limit_of_file_size_ends_the_run_and_loses_nothing(tiny_run, tmp_path):
    script.main(tiny_run(output_dir=tmp_path / "whole"))
    with (
        pytest.raises(UserError, match=r"checkpoint-best\.pth could not be written .*File too large"),
        largest_file(50_000),
    ):
        script.main(tiny_run())
    assert not list((tmp_path / "run").glob("checkpoint*")) and not list((tmp_path / "run").glob(".*.tmp"))
    script.main(tiny_run("--save_ckpt_steps", "3", "--save_ckpt_num", "9"))
    (tmp_path / "run" / "checkpoint-1.pth").unlink()
    with pytest.raises(UserError, match=r"could not be written .*File too large"), largest_file(50_000):
        script.main(tiny_run("--save_ckpt_steps", "3", "--save_ckpt_num", "9"))
    assert all(read_checkpoint(path) for path in numbered_checkpoints(tmp_path / "run"))
    script.main(tiny_run())
    assert_equal_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "run"))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_limit_of_file_size_keeps_an_initialization(suffix, tmp_path):
    model = models_of_a_pair(tmp_path)
    file = tmp_path / f"student.{suffix}"
    weight_selection.main([*model, "--output_dir", str(file)])
    before = {path: path.read_bytes() for path in (file, file.with_suffix(".json"))}
    assert (
        len(before[file.with_suffix(".json")]) < 20_000 < len(before[file])
    )  # the description could be written, the weights cannot
    with pytest.raises(UserError, match=r"could not be written .*File too large"), largest_file(20_000):
        weight_selection.main([*model, "--output_dir", str(file), "--element_selection", "consecutive"])
    assert all(path.read_bytes() == content for path, content in before.items()) and not list(tmp_path.glob(".*.tmp"))
    assert read_initialization(str(file), "vit")[1]["choices"]["element_selection"] == "uniform"
    assert safetensors.torch.load_file(file) if suffix == "safetensors" else torch.load(file, weights_only=True)


def models_of_a_pair(folder):
    """Options of a selection between two tiny models, the teacher's file made."""
    teacher = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32}
    torch.save(
        script.build_model("vit_tiny", num_classes=3, input_size=32, model_kwargs=teacher).state_dict(),
        folder / "t.pth",
    )
    kwargs = {**teacher, "embed_dim": 32, "num_heads": 2}
    models = "--model_type vit --pretrained_model vit_tiny --student_model vit_tiny --pretrained_path".split()
    teacher, student = ([f"{key}={value}" for key, value in each.items()] for each in (teacher, kwargs))
    return [*models, str(folder / "t.pth"), "--pretrained_kwargs", *teacher, "--student_kwargs", *student]


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


def test_full_disk_ends_the_run_and_what_was_there_still_loads(small_disk, tiny_run, tmp_path):
    with pytest.raises(UserError, match="could not be written .*No space left on device"):
        script.main(tiny_run("--epochs", "9", "--warmup_epochs", "0", output_dir=small_disk / "run"))
    left = numbered_checkpoints(small_disk / "run")
    assert left and all(read_checkpoint(path) for path in left)
    assert not list((small_disk / "run").glob(".*.tmp"))


def test_worker_that_dies_ends_the_run_in_one_line(job, tiny_run, tmp_path):
    run = job(tiny_run("--epochs", "400", "--num_workers", "1"), processes=1)
    wait_for(lambda: (tmp_path / "run" / "log.txt").exists() and read_log(tmp_path / "run"))
    main = run.processes[0].pid
    workers = subprocess.run(["pgrep", "-P", str(main)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[0]), signal.SIGKILL)
    assert run.wait(60) == [1]
    said = run.said.read_text()
    assert "main.py: error: a worker that loads images has died" in said and "Traceback" not in said


def test_full_disk_under_tensorboard_does_not_end_the_run(small_disk, tiny_run, tmp_path, caplog):
    (small_disk / "filler").write_bytes(bytes(2**20 - 40_000))
    script.main(tiny_run("--epochs", "60", "--log_freq", "1", "--disable_eval", "true", "--log_dir", small_disk / "tb"))
    assert len(read_log(tmp_path / "run")) == 60
    said = [record.getMessage() for record in caplog.records if "--log_dir" in record.getMessage()]
    assert (
        len(said) == 1 and "No space left on device; nothing more is written there, the training continues" in said[0]
    )
