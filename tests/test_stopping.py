"""Signals, the folder's lock, the marker: a run that is asked to stop, in this process and in others."""

import fcntl
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_equal_weights, read_log, weights_of

import main as script
from training import folder as run_folder
from training import meters
from training import signals as stopping
from utils import STOPPED, Stopped, UserError, run_script

ROOT = Path(__file__).parents[1]


def send_at(monkeypatch, where, name, number, call=1):
    """Let this process get a signal at the `call`-th call of a function, before it does its work."""
    real, calls = getattr(where, name), iter(range(1, 10**6))

    def function(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, function)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_signal_saves_at_the_next_log_step_and_the_run_goes_on(number, tiny_run, tmp_path, monkeypatch, capfd):
    handlers = [signal.getsignal(each) for each in stopping.SIGNALS]
    options = ["--log_freq", "2"]
    script.main(tiny_run(*options, output_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="after 4 of the 5 updates of epoch 1"):
        send_at(patch, meters.Speed, "add", number, call=8)
        script.main(tiny_run(*options))
    assert handlers == [signal.getsignal(each) for each in stopping.SIGNALS]
    name = signal.Signals(number).name
    assert f"{name}: saving and ending at the next log step" in capfd.readouterr().err
    folder = tmp_path / "run"
    assert (folder / "checkpoint-1-9.pth").exists() and len(read_log(folder)) == 1
    assert (folder / run_folder.REQUEUE).read_text() == f"stopped by {name} after 4 of the 5 updates of epoch 1\n"
    script.main(tiny_run(*options))
    assert not (folder / run_folder.REQUEUE).exists()
    assert_equal_weights(weights_of(tmp_path / "whole"), weights_of(folder))


def test_signal_in_an_evaluation_loses_no_update(tiny_run, tmp_path, monkeypatch):
    script.main(tiny_run(output_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="during the evaluation"):
        send_at(patch, script, "evaluate", signal.SIGTERM, call=2)
        script.main(tiny_run())
    state = torch.load(tmp_path / "run" / "checkpoint-1-10.pth", weights_only=True)
    assert state["sums"] and len(read_log(tmp_path / "run")) == 1
    script.main(tiny_run())
    whole, run = read_log(tmp_path / "whole"), read_log(tmp_path / "run")
    assert [line["test_loss"] for line in run] == [line["test_loss"] for line in whole]
    assert [line["train_loss"] for line in run] == [line["train_loss"] for line in whole]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_before_training_ends_and_sigusr1_requeues(number, tiny_run, tmp_path, monkeypatch):
    send_at(monkeypatch, script, "load_data", number)
    with pytest.raises(Stopped, match="^before the first update$"):
        script.main(tiny_run())
    # nothing tells SIGTERM from the end of a job that failed
    assert (tmp_path / "run" / run_folder.REQUEUE).exists() == (number == signal.SIGUSR1)
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_other_rank_says_that_it_was_stopped_before_training(tiny_run, tmp_path, monkeypatch, caplog):
    send_at(monkeypatch, script, "load_data", signal.SIGTERM)
    monkeypatch.setattr(script.distributed, "is_main", lambda: False)
    monkeypatch.setattr(script.distributed, "rank", lambda: 3)
    with pytest.raises(Stopped):
        script.main(tiny_run())
    assert "rank 3 was stopped by SIGTERM before the first update" in caplog.text


def test_exit_code_of_a_stopped_run_is_its_own():
    def stopped():
        raise Stopped("SIGTERM")

    assert run_script(stopped) == STOPPED == 75


def test_signal_that_comes_twice_at_once_is_one_request(monkeypatch):
    with stopping.StopSignals() as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes on what all processes got
        assert stop.asked == "SIGTERM"


def test_lock_is_of_the_process_and_gone_with_it(tiny_run, tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1])\nimport time\nfrom training import folder\n"
    code += "with folder.opened(sys.argv[2]): print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, ROOT, tmp_path / "run"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"run is in use by another run \(process {holder.pid} on "):
            script.main(tiny_run())
        assert not (tmp_path / "run" / "config.json").exists()
    finally:
        holder.kill()
        holder.wait()
    assert script.main(tiny_run("--epochs", "1"))["epoch"] == 0


def test_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with run_folder.opened(tmp_path / "run") as folder:
        assert folder.is_dir()
    assert "cannot be locked" in caplog.text


def test_half_written_files_of_a_killed_run_are_deleted(tiny_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".checkpoint-0.pth.123.tmp").write_bytes(b"half of it")
    script.main(tiny_run("--epochs", "1"))
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="--output_dir .*file/run cannot be written to: Not a directory"),
        run_folder.opened(tmp_path / "file" / "run"),
    ):
        raise AssertionError("not reached")


def test_stop_of_a_run_that_saves_nothing_asks_for_no_more(tiny_run, tmp_path, monkeypatch):
    send_at(monkeypatch, meters.Speed, "add", signal.SIGTERM)
    with pytest.raises(Stopped, match="after 1 of the 5 updates of epoch 0"):
        script.main(tiny_run("--save_ckpt", "false", "--log_freq", "1"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.json", "log.txt"}


# ---- processes ----


def start(argv, *launcher, **environment):
    command = [sys.executable, *launcher, str(ROOT / "main.py"), *map(str, argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


LONG = ["--epochs", "400", "--log_freq", "1", "--save_ckpt_freq", "1000", "--num_workers", "1"]


def test_process_exits_with_75_and_its_workers_with_it(tiny_run, tmp_path):
    run = start(tiny_run(*LONG))
    wait_for(lambda: (tmp_path / "run" / "log.txt").exists() and read_log(tmp_path / "run"))
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    assert children
    for pid in (run.pid, *map(int, children)):  # as from a terminal: the whole group gets it
        os.kill(pid, signal.SIGINT)
    _, said = run.communicate(timeout=30)
    assert run.returncode == STOPPED, said
    assert "Traceback" not in said and re.search("stopped by SIGINT (after|during)", said), said
    assert list((tmp_path / "run").glob("checkpoint-*-*.pth")) and (tmp_path / "run" / run_folder.REQUEUE).exists()
    wait_for(lambda: not any(Path("/proc", pid).exists() for pid in children), 10)


def test_second_signal_ends_at_once():
    waits = (
        "import sys; sys.path.insert(0, sys.argv[1])\nimport time\nfrom training import signals\nsignals.SAME_REQUEST = 0.2\n"
        "with signals.StopSignals() as stop:\n    stop.defer()\n    print('ready', flush=True)\n    while True: time.sleep(0.1)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", waits, ROOT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=10)
    assert run.returncode == 128 + signal.SIGTERM


def test_one_whose_terminal_is_gone_is_asked_all_the_same(monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    with stopping.StopSignals() as stop:
        stop.defer()
        monkeypatch.setattr(os, "write", gone)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked == "SIGINT"


def a_worker(run, started, born_after):
    """What a worker does once it is forked: it says its pid, and lives on as if it had images to load."""
    time.sleep(born_after)
    stopping.leave_to_parent(run)
    os.write(started, f"{os.getpid()}\n".encode())
    time.sleep(60)


@pytest.mark.parametrize("born_after", [0.0, 0.5])  # before its run is killed, after
def test_worker_does_not_outlive_a_killed_run(born_after):
    reading, writing = os.pipe()
    fork = multiprocessing.get_context("fork")

    def as_run():
        os.close(reading)
        fork.Process(target=a_worker, args=(os.getpid(), writing, born_after)).start()
        time.sleep(60)

    run = fork.Process(target=as_run)
    run.start()
    os.close(writing)
    with open(reading) as said:
        if born_after:
            time.sleep(0.2)
        else:
            os.kill(int(said.readline()), signal.SIGTERM)  # not the run's own
        run.kill()
        run.join()
        start = time.monotonic()
        said.read()  # to the end, which is the worker's
        assert time.monotonic() - start < born_after + 5
