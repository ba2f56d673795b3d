"""Signals, the folder's lock, the marker of a requested stop: in this process and in others."""

import fcntl
import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import assert_equal_weights, has_logged, pids, read_log, start, wait_for, weights_of

import main as script
from training import folder as run_folder
from training import meters
from training import signals as stopping
from utils import STOPPED, Stopped, UserError

ROOT = Path(__file__).parents[1]


def send_at(monkeypatch, where, name, number, call=1):
    """Send this process a signal at the `call`-th call of a function, before the call's work."""
    real, calls = getattr(where, name), iter(range(1, 10**6))

    def function(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, function)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_signal_saves_at_the_next_log_step_and_the_run_goes_on(number, train, tmp_path, monkeypatch, capfd):
    handlers = [signal.getsignal(each) for each in stopping.SIGNALS]
    train("--log_freq 2", to="whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="after 4 of the 5 updates of epoch 1"):
        send_at(patch, meters.Speed, "add", number, call=8)
        train("--log_freq 2")
    assert handlers == [signal.getsignal(each) for each in stopping.SIGNALS]
    name, folder = signal.Signals(number).name, tmp_path / "run"
    assert f"{name}: saving and ending at the next log step" in capfd.readouterr().err
    assert (folder / "checkpoint-1-9.pth").exists() and len(read_log(folder)) == 1
    assert (folder / run_folder.REQUEUE).read_text() == f"stopped by {name} after 4 of the 5 updates of epoch 1\n"
    train("--log_freq 2")
    assert not (folder / run_folder.REQUEUE).exists()
    assert_equal_weights(weights_of(tmp_path / "whole"), weights_of(folder))


def test_signal_in_an_evaluation_loses_no_update(train, tmp_path, monkeypatch):
    train(to="whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="during the evaluation"):
        send_at(patch, script, "evaluate", signal.SIGTERM, call=2)
        train()
    state = torch.load(tmp_path / "run" / "checkpoint-1-10.pth", weights_only=True)
    assert state["sums"] and len(read_log(tmp_path / "run")) == 1
    train()
    whole, run = (read_log(tmp_path / name) for name in ("whole", "run"))
    assert all(a[name] == b[name] for a, b in zip(whole, run, strict=True) for name in ("test_loss", "train_loss"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_before_training_ends_and_sigusr1_requeues(number, train, tmp_path, monkeypatch):
    send_at(monkeypatch, script, "load_data", number)
    with pytest.raises(Stopped, match="^before the first update$"):
        train()
    # a launcher that ends a failed job sends the same SIGTERM
    assert (tmp_path / "run" / run_folder.REQUEUE).exists() == (number == signal.SIGUSR1)
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_other_rank_says_that_it_was_stopped_before_training(monkeypatch, caplog):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Stopped), stopping.StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert "rank 3 was stopped by SIGTERM before the first update" in caplog.text


def in_first_seconds(tmp_path, number, words, name="main.py", module="torch", then="sleep(60)", **environment):
    """Send a script a signal when it imports a module, in whose place it finds another; return exit code and stderr."""
    (tmp_path / "stand_ins").mkdir()
    stand_in = f"import os; from time import sleep; os.kill(os.getpid(), {number:d}); {then}"
    (tmp_path / "stand_ins" / f"{module}.py").write_text(stand_in)
    command = [sys.executable, str(ROOT / name), *map(str, words)]
    environment |= {"PYTHONPATH": str(tmp_path / "stand_ins")}
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background may ignore it
    environment = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, preexec_fn=heed)
    return done.returncode, done.stderr


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_signal_during_the_imports_ends_and_sigusr1_requeues(number, tiny_run, tmp_path):
    code, said = in_first_seconds(tmp_path, number, tiny_run())
    marked = number == signal.SIGUSR1
    reason = f"stopped by {signal.Signals(number).name} before the first update"
    assert (code, said) == (STOPPED, reason + "; the same command continues from there" * marked + "\n")
    assert (tmp_path / "run").exists() == marked
    assert not marked or (tmp_path / "run" / run_folder.REQUEUE).read_text() == reason + "\n"


def test_signal_before_the_options_are_read_is_kept(tiny_run, tmp_path):
    then = f"exec(open({textwrap.__file__!r}).read())"
    code, _ = in_first_seconds(tmp_path, signal.SIGUSR1, tiny_run(), module="textwrap", then=then)
    assert code == STOPPED and (tmp_path / "run" / run_folder.REQUEUE).exists()


@pytest.mark.parametrize(
    ("more", "rank", "said"),
    [
        ("--save_ckpt false", 0, "stopped by SIGUSR1 before the first update\n"),
        ("--eval true", 0, "stopped by SIGUSR1 before the first update\n"),
        ("", 1, "rank 1 was stopped by SIGUSR1 before the first update\n"),
    ],
)
def test_signal_during_the_imports_marks_only_what_goes_on(more, rank, said, tiny_run, tmp_path):
    place = {"RANK": str(rank), "WORLD_SIZE": "2"}
    assert in_first_seconds(tmp_path, signal.SIGUSR1, tiny_run(more), **place) == (STOPPED, said)
    assert not (tmp_path / "run").exists()


def test_folder_of_another_run_is_not_marked_during_the_imports(tiny_run, tmp_path):
    with run_folder.opened(tmp_path / "run"):
        code, said = in_first_seconds(tmp_path, signal.SIGUSR1, tiny_run())
    assert code == 1 and re.fullmatch(r"main\.py: error: --output_dir .* is in use by another run .*\n", said)
    assert not (tmp_path / "run" / run_folder.REQUEUE).exists()


def test_ctrl_c_during_the_imports_of_a_script_is_no_traceback(tmp_path):
    words = ["--pretrained_path", "none.pth", "--output_dir", tmp_path]
    code, said = in_first_seconds(tmp_path, signal.SIGINT, words, "weight_selection.py")
    assert (code, said) == (-signal.SIGINT, "")


def test_stop_of_a_run_that_saves_nothing_asks_for_no_more(train, tmp_path, monkeypatch):
    send_at(monkeypatch, meters.Speed, "add", signal.SIGTERM)
    with pytest.raises(Stopped, match="after 1 of the 5 updates of epoch 0"):
        train("--save_ckpt false --log_freq 1")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.json", "log.txt"}


def test_two_signals_without_a_terminal_are_one_request(monkeypatch):
    monkeypatch.setattr(os, "write", Mock(side_effect=BrokenPipeError))
    with stopping.StopSignals() as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes on what all processes got
        assert stop.asked == "SIGTERM"


def python(lines, *more):
    """Run these lines in a new process; return when it is ready."""
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from training import folder, signals\n{lines}"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, more)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_lock_is_of_the_process_and_gone_with_it(train, tmp_path):
    lines = "with folder.opened(folder.Path(sys.argv[1])): print('ready', flush=True); time.sleep(60)"
    holder = python(lines, tmp_path / "run")
    try:
        with pytest.raises(UserError, match=rf"run is in use by another run \(process {holder.pid} on "):
            train()
        assert not (tmp_path / "run" / "config.json").exists()
    finally:
        holder.kill()
        holder.communicate()
    assert train("--epochs 1")["epoch"] == 0


def test_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(37, "No locks available")))
    with run_folder.opened(tmp_path / "run") as folder:
        assert folder.path.is_dir()
    assert "cannot be locked" in caplog.text


def test_half_written_files_of_a_killed_run_are_deleted(tmp_path):
    (tmp_path / ".checkpoint-0.pth.123.tmp").write_bytes(b"half of it")
    with run_folder.opened(tmp_path):
        assert not list(tmp_path.glob(".*.tmp"))


def test_process_exits_with_75_and_its_workers_with_it(tiny_run, tmp_path):
    run = start(tiny_run("--epochs 400 --log_freq 1 --save_ckpt_freq 1000 --num_workers 1"))
    wait_for(lambda: has_logged(tmp_path / "run"))
    children = pids("-P", run.pid)
    assert children
    for pid in (run.pid, *children):  # as from a terminal: the whole group gets it
        os.kill(pid, signal.SIGINT)
    _, said = run.communicate(timeout=30)
    assert run.returncode == STOPPED == 75, said
    assert "Traceback" not in said and re.search("stopped by SIGINT (after|during)", said), said
    assert list((tmp_path / "run").glob("checkpoint-*-*.pth")) and (tmp_path / "run" / run_folder.REQUEUE).exists()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 10)


def test_second_signal_ends_at_once():
    lines = "signals.SAME_REQUEST = 0.2\nwith signals.StopSignals() as stop:\n    stop.defer()\n"
    run = python(lines + "    print('ready', flush=True)\n    while True: time.sleep(0.1)")
    run.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=10)
    assert run.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("born_after", [0.0, 0.5])  # the worker starts before its run is killed, or after
def test_worker_does_not_outlive_a_killed_run(born_after):
    reading, writing = os.pipe()
    fork = multiprocessing.get_context("fork")

    def as_worker(run):  # prints its pid and stays alive, like a worker with images to load
        time.sleep(born_after)
        stopping.leave_to_parent(run)
        os.write(writing, f"{os.getpid()}\n".encode())
        time.sleep(60)

    def as_run():
        os.close(reading)
        fork.Process(target=as_worker, args=(os.getpid(),)).start()
        time.sleep(60)

    run = fork.Process(target=as_run)
    run.start()
    os.close(writing)
    with open(reading) as said:
        if born_after:
            time.sleep(0.2)
        else:
            os.kill(int(said.readline()), signal.SIGTERM)  # the worker's pid, not the run's
        run.kill()
        run.join()
        start = time.monotonic()
        said.read()  # until the worker ends
        assert time.monotonic() - start < born_after + 5
