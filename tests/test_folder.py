"""A run writes only into the folder that it locked, overwrites only its own files, and is not ended by what it does not need."""

import errno
import io
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import wandb
from conftest import error_of, read_log
from small_models import SCRIPT_STUDENT

import files
import main as script
import models
import utils
from files import Lock
from images import images as images_module
from training.checkpoint import numbered_checkpoints, read_checkpoint
from utils import UserError
from weightfiles import initialization

TENSORS = {"norm.weight": torch.arange(6.0)}


def during_evaluation(monkeypatch, action, call=2):
    """Do something in the `call`-th evaluation of a run."""
    real, calls = script.evaluate, iter(range(1, 100))

    def evaluate(*args):
        if next(calls) == call:
            action()
        return real(*args)

    monkeypatch.setattr(script, "evaluate", evaluate)


def raising(error):
    return Mock(side_effect=error)


# ---- the folder that was locked ----


def made_anew(run):
    shutil.rmtree(run)
    run.mkdir()
    (run / ".lock").write_text("process 1 on another host\n")


def renamed(run):
    run.rename(run.with_name("elsewhere"))
    run.mkdir()


@pytest.mark.parametrize("change", [made_anew, renamed, shutil.rmtree, lambda run: (run / ".lock").unlink()])
def test_run_whose_folder_is_no_longer_its_own_stops(change, train, tmp_path, monkeypatch):
    run, left = tmp_path / "run", {}

    def action():
        change(run)
        left.update({path: path.read_bytes() for path in run.glob("*")})

    during_evaluation(monkeypatch, action)
    with pytest.raises(UserError, match="is no longer the folder of this run: .* was removed or replaced"):
        train()
    assert {path: path.read_bytes() for path in run.glob("*")} == left


# ---- what is its own ----

FOREIGN = {
    "config.json": [b'{"model_type": "somebody else"}', b"[" * 100_000, b"\xff\xfe{"],
    "log.txt": [b"a log\nof another kind\n"],
    "requeue": [b"mine"],
    ".lock": [b"mine"],
    "checkpoint-best.pth": [b"other weights"],
    "checkpoint-best-ema.pth": [b"other weights"],
}


@pytest.mark.parametrize(("name", "content"), [(name, each) for name in FOREIGN for each in FOREIGN[name]])
def test_file_that_no_run_wrote_is_named_and_stays(name, content, tiny_run, tmp_path):
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / name
    file.write_bytes(content)
    message = error_of(script, *tiny_run())
    assert name in message and ("name another folder" in message), message
    assert file.read_bytes() == content


NOT_REGULAR = {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir}


@pytest.mark.parametrize("kind", NOT_REGULAR)
@pytest.mark.parametrize("name", [*FOREIGN, "checkpoint-3.pth"])
def test_what_is_no_file_is_not_waited_for_in_the_folder(name, kind, tiny_run, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    NOT_REGULAR[kind](tmp_path / "run" / name)
    signal.alarm(60)  # kills the tests if this one waits for ever
    assert name in error_of(script, *tiny_run()) + caplog.text  # damaged checkpoints are named in warnings
    signal.alarm(0)


@pytest.mark.parametrize("option", ["--resume", "--initialize"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_waited_for_in_an_option(option, kind, tiny_run, tmp_path):
    NOT_REGULAR[kind](tmp_path / "file.pth")
    signal.alarm(60)
    assert error_of(script, *tiny_run(option, tmp_path / "file.pth")).endswith("file.pth is not a file")
    signal.alarm(0)


def test_log_that_becomes_a_pipe_ends_the_run(tiny_run, tmp_path, monkeypatch):
    def action():
        (tmp_path / "run" / "log.txt").unlink()
        os.mkfifo(tmp_path / "run" / "log.txt")

    during_evaluation(monkeypatch, action)
    signal.alarm(60)
    assert "log.txt could not be written: it is not a regular file" in error_of(script, *tiny_run())
    signal.alarm(0)


def test_checkpoint_of_another_project_is_not_removed(train, tiny_run, tmp_path):
    train("--epochs 1")
    torch.save({"state_dict": {}}, tmp_path / "run" / "checkpoint-00.pth")
    torch.save({"state_dict": {}}, tmp_path / "run" / "checkpoint-7.pth")
    (tmp_path / "run" / ".notes.tmp").write_text("mine")
    assert "checkpoint-7.pth that no run of this project wrote" in error_of(script, *tiny_run("--epochs 1"))
    (tmp_path / "run" / "checkpoint-7.pth").unlink()
    assert "checkpoint-00.pth that no run of this project wrote" in error_of(script, *tiny_run("--epochs 1"))
    assert (tmp_path / "run" / ".notes.tmp").read_text() == "mine"


def test_lone_best_checkpoint_of_another_run_is_kept(train, tiny_run, tmp_path):
    train("--epochs 1 --seed 5", to="old")
    for name in ("new", "same"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "old" / "checkpoint-best.pth", tmp_path / name)
    said = error_of(script, *tiny_run("--epochs 1 --seed 6", output_dir=tmp_path / "new"))
    assert "has the checkpoint-best.pth of another run" in said
    train("--epochs 1 --seed 5", to="same")  # a crash may have come between this file and the numbered one


def test_copy_under_a_higher_number_does_not_win(train, tiny_run, tmp_path):
    train("--epochs 1")
    shutil.copy(tmp_path / "run" / "checkpoint-0.pth", tmp_path / "run" / "checkpoint-9.pth")
    assert "checkpoint-9.pth holds what was saved as checkpoint-0.pth" in error_of(script, *tiny_run("--epochs 1"))


def test_evaluation_of_a_file_as_folder_is_refused(tiny_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for name, reason in (("file", "Not a directory"), ("x" * 300, "File name too long")):
        message = error_of(script, *tiny_run("--eval true", output_dir=tmp_path / name))
        assert f"cannot be searched for checkpoints: {reason}" in message


# ---- updates that are not finite ----


def test_weights_are_finite_in_whatever_is_saved(train, tiny_run, tmp_path):
    blown_up = "--lr 1e38 --save_ckpt_steps 1 --log_freq 5"
    message = error_of(script, *tiny_run(blown_up))
    saved = numbered_checkpoints(tmp_path / "run")
    assert all(value.isfinite().all() for path in saved for value in read_checkpoint(path)["model"].values())
    assert f"the same command goes on from {saved[0]}; a lower --lr or --clip_grad 1 needs another" in message
    assert "belongs to a run with other settings: --lr" in error_of(script, *tiny_run(blown_up, "--lr 1e-3"))
    for path in saved:
        path.unlink()
    assert train("--lr 1e-3")["epoch"] == 1


def test_last_update_that_blows_up_is_an_error(tiny_run, tmp_path):
    options = (
        "--epochs 1 --warmup_epochs 0 --batch_size 40 --lr 3e38 --min_lr 3e38 --weight_decay 100"  # a single update
    )
    message = error_of(script, *tiny_run(options))
    assert "weights or the optimizer's state were not finite after the 1 updates up to step 0" in message
    assert "try a lower --lr or --clip_grad 1, in the same --output_dir" in message
    assert not list((tmp_path / "run").glob("checkpoint*")) and not read_log(tmp_path / "run")


# ---- what fails beside the training ----


def test_error_in_the_evaluation_loses_no_update(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        during_evaluation(patch, lambda: 1 / 0)
        train("--bad_images skip")
    state = read_checkpoint(tmp_path / "run" / "checkpoint-1-10.pth")
    assert state["sums"] and len(read_log(tmp_path / "run")) == 1
    monkeypatch.setattr("engine._update", raising(AssertionError("an update is made again")))
    assert train("--bad_images skip")["epoch"] == 1


def test_evaluation_error_is_told_if_the_epoch_cannot_be_saved(train, monkeypatch, caplog):
    during_evaluation(monkeypatch, lambda: 1 / 0, call=1)
    monkeypatch.setattr(script.Trainer, "state", raising(RuntimeError("the device is gone")))
    with pytest.raises(ZeroDivisionError):
        train()
    assert "the epoch before the evaluation could not be saved either: the device is gone" in caplog.text


def test_death_of_the_wandb_helper_does_not_end_the_training(train, tmp_path, monkeypatch, caplog):
    run = Mock(id="abc", log=raising(ConnectionResetError("Connection lost")))
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    train("--enable_wandb true --wandb_ckpt true")
    assert len(read_log(tmp_path / "run")) == 2
    assert caplog.text.count("Connection lost; nothing more is written there, the training continues") == 1
    assert not run.finish.called and not run.log_artifact.called


def test_reader_of_the_progress_bar_may_go(train, tmp_path, monkeypatch):
    gone = io.StringIO()
    gone.write = raising(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", gone)
        train("--progress true --log_freq 1")
    assert gone.write.called and len(read_log(tmp_path / "run")) == 2


def test_old_checkpoint_that_cannot_be_removed_stays(train, tmp_path, monkeypatch, caplog):
    real = Path.unlink

    def unlink(path, **options):
        if path.name == "checkpoint-0.pth":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        real(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    train("--epochs 3 --save_ckpt_num 1")
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-?.pth"))[-1] == "checkpoint-2.pth"
    assert caplog.text.count("checkpoint-0.pth stays: it could not be removed") == 1


def test_file_system_that_turns_read_only_is_one_line(tmp_path, monkeypatch):
    error = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(os, "fsync", raising(error))
    monkeypatch.setattr(Path, "unlink", raising(error))
    with pytest.raises(UserError, match="x could not be written .*Read-only file system"):
        files.write_atomically(tmp_path / "x", b"new")


def test_path_without_permission_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main.py"])
    error = PermissionError(errno.EACCES, "Permission denied", "/closed/train")
    monkeypatch.setattr(utils, "_discard_stdout", lambda: None)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "reconfigure", lambda **_: None, raising=False)
    assert utils.run_script(raising(error)) == 1
    assert capsys.readouterr().err == "main.py: error: /closed/train: Permission denied\n"


def test_name_that_is_too_long_is_refused_before_the_work(tmp_path):
    for path in (tmp_path / ("x" * 300) / "vit.pth", tmp_path / ("x" * 250 + ".pth")):
        with pytest.raises(UserError, match="cannot be made: File name too long"):
            files.check_creatable(path, f"--output_dir {path} cannot be made")


# ---- initialization files ----


def test_writers_of_one_initialization_wait_for_each_other(tmp_path, monkeypatch):
    path, ready = tmp_path / "vit.pth", multiprocessing.get_context("fork").Event()

    def hold():
        lock = Lock(tmp_path / ".vit.lock")
        ready.set()
        multiprocessing.Event().wait(60)
        lock.close()

    other = multiprocessing.get_context("fork").Process(target=hold)
    other.start()
    assert ready.wait(60)
    monkeypatch.setattr(initialization, "WAIT_SECONDS", 0.0)
    with pytest.raises(UserError, match=rf"vit\.pth is being written by another process \(process {other.pid} on"):
        initialization.write_initialization(path, TENSORS, {"family": "vit"})
    other.kill()
    other.join()
    initialization.write_initialization(path, TENSORS, {"family": "vit"})
    assert sorted(each.name for each in tmp_path.iterdir()) == ["vit.json", "vit.pth"]


def test_file_that_appeared_during_the_work_is_not_overwritten(tmp_path):
    (tmp_path / "vit.json").write_text("mine")
    with pytest.raises(UserError, match=r"vit\.json is there and would be lost"):
        initialization.write_initialization(tmp_path / "vit.pth", TENSORS, {"family": "vit"})
    assert [path.name for path in tmp_path.iterdir()] == ["vit.json"]


def test_description_of_millions_of_values_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "vit.pth"
    initialization.write_initialization(path, TENSORS, {"family": "vit", "choices": {"a": [0] * 100_000}})
    model = models.create("vit_tiny", SCRIPT_STUDENT)
    with pytest.raises(UserError, match=r"vit\.json holds what weight_selection\.py does not write"):
        initialization.read_initialization(str(path), model, "vit_tiny")
    monkeypatch.setattr(initialization, "LARGEST", 1000)
    with pytest.raises(UserError, match=r"vit\.json is larger than any description"):
        initialization.read_initialization(str(path), model, "vit_tiny")


# ---- images on a disk that fails for a moment ----


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, None])
def test_error_of_the_network_marks_no_image_as_bad(error, image_folder, monkeypatch):
    images = script.load_data(script.training_options(f"--data_set image_folder --data_path {image_folder}".split()))[0]
    images = images.skipping_bad()
    failure = OSError(error, os.strerror(error)) if error else TimeoutError("timed out")
    monkeypatch.setattr(images_module.time, "sleep", sleep := Mock())
    outcomes = [failure, failure, "decoded"]

    def decode(_):
        outcome = outcomes.pop(0)
        if outcome is failure:
            raise failure
        return outcome

    assert images.read(0, decode)[0] == "decoded" and sleep.call_count == 2
    with pytest.raises(images_module.BadImage, match="tried 4 times, the disk or the network may be at fault"):
        images.read(0, raising(failure))
    assert images.bad_images() == []


def test_text_files_may_begin_with_a_byte_order_mark(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train("--epochs 1")
    for name in ("log.txt", "config.json"):
        file = tmp_path / "run" / name
        file.write_text("\ufeff" + file.read_text(), encoding="utf-8")
    train("--epochs 1")
    assert "nothing is left to do" in caplog.text
    assert json.loads(files.read_text(tmp_path / "run" / "config.json"))["format"]
