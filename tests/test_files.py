"""Initialization files and checkpoints are found, checked, and written whole or not at all."""

import contextlib
import errno
import json
import os
import stat

import pytest
import safetensors.torch
import torch
from torch import nn
from weight_files import assert_refused, flip

from files import write_atomically
from training.checkpoint import NEWER, STATE, numbered_checkpoints, read_checkpoint, save_numbered, to_bytes
from training.folder import opened
from training.start import find_checkpoint
from utils import UserError
from weightfiles.initialization import find_initialization, read_initialization, write_initialization

TENSORS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}
MODEL = nn.Linear(3, 2)


# ---- initialization files ----


def test_folder_means_the_file_made_for_the_family(tmp_path):
    write_initialization(tmp_path / "vit.pth", TENSORS, {"family": "vit"})
    write_initialization(tmp_path / "convnext.pth", TENSORS, {"family": "convnext"})
    assert find_initialization(str(tmp_path), "convnext") == tmp_path / "convnext.pth"
    assert find_initialization(str(tmp_path / "vit.pth"), "convnext") == tmp_path / "vit.pth"


def test_folder_without_or_with_several_fitting_files_is_refused(tmp_path):
    def refused(message):
        with pytest.raises(UserError, match=message):
            find_initialization(str(tmp_path), "vit")

    refused("no file made for the family vit .no weights at all.; name the file")
    torch.save(TENSORS, tmp_path / "foreign.pth")
    refused("no file made for the family vit .foreign.pth.")
    for name in ("a.pth", "b.safetensors"):
        write_initialization(tmp_path / name, TENSORS, {"family": "vit"})
    refused("several files made for the family vit .a.pth, b.safetensors.")


def test_file_and_description_are_plain_and_belong_together(tmp_path):
    path = tmp_path / "vit.safetensors"
    sha256 = write_initialization(path, TENSORS, {"choices": "first"})
    assert json.loads((tmp_path / "vit.json").read_text()) == {
        "format": "weight-selection initialization 1",
        "sha256": sha256,
        "choices": "first",
    }
    assert safetensors.torch.load_file(path).keys() == TENSORS.keys()
    assert read_initialization(str(path), MODEL, "linear")[1]["choices"] == "first"
    flip(path, TENSORS["weight"])  # safetensors itself does not notice
    assert_refused(
        path,
        r"is not the file that vit\.json describes",
        [lambda path: read_initialization(str(path), MODEL, "linear")],
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value, tmp_path):
    torch.save(TENSORS | {"bias": torch.tensor([1.0, value])}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth: bias holds values that are not finite"):
        read_initialization(str(tmp_path / "x.pth"), MODEL, "linear")


# ---- writing ----


@pytest.mark.parametrize(
    ("step", "error", "raised"),
    [("fsync", OSError(28, "No space left on device"), UserError), ("replace", KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_write_that_fails_leaves_the_old_file_and_no_other(step, error, raised, tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    path.write_text("old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(raised, match=r"(x\.pth could not be written .*No space left.*untouched)?"):
        write_atomically(path, b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("number", "raised"), [(errno.EINVAL, None), (errno.EIO, "may not be safe yet")])
def test_folder_that_cannot_be_synced_is_named(number, raised, tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=raised) if raised else contextlib.nullcontext():
        write_atomically(tmp_path / "x.pth", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


# ---- checkpoints ----


@pytest.fixture
def folder(tmp_path):
    """The test's folder as a run's."""
    with opened(tmp_path) as folder:
        yield folder


def state_of(epoch):
    return {name: kind() for name, kind in STATE.items()} | NEWER | {"epoch": epoch, "model": TENSORS}


def find(folder, resume="", **options):
    options = {"file": resume or None, "auto_resume": True, "training": True} | options
    return find_checkpoint(str(resume), folder, **options)


def test_newest_readable_checkpoint_is_found(folder, tmp_path, caplog):
    for epoch in (8, 9, 10):
        save_numbered(folder, state_of(epoch), keep=5)
    newest = tmp_path / "checkpoint-10.pth"
    assert find(tmp_path)[0] == newest
    newest.write_bytes(newest.read_bytes()[:-200])
    path, state = find(tmp_path)
    assert (path.name, state["epoch"]) == ("checkpoint-9.pth", 9)
    assert "checkpoint-10.pth" in caplog.text and "trying the one before it" in caplog.text
    for path in numbered_checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 checkpoints"):
        find(tmp_path)
    good = tmp_path / "elsewhere.pth"
    good.write_bytes(to_bytes(state_of(10)))
    caplog.clear()
    assert find(tmp_path, good)[0] == good
    assert caplog.text.count("trying the one before it") == 2 and caplog.text.count("WARNING") == 3


def test_oldest_checkpoints_go_and_the_best_stays(folder, tmp_path):
    (tmp_path / "checkpoint-best.pth").write_bytes(to_bytes(state_of(2)))
    for epoch in range(12):
        save_numbered(folder, state_of(epoch), keep=2)
    within = {"sums": {"loss": 1.0}}
    for step in (1230, 1240):
        save_numbered(folder, state_of(12) | {"step": step} | within, keep=3)
    names = ["checkpoint-12-1240.pth", "checkpoint-12-1230.pth", "checkpoint-11.pth"]
    assert [path.name for path in numbered_checkpoints(tmp_path)] == names
    save_numbered(folder, state_of(12) | {"step": 1300}, keep=1)
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"checkpoint-12.pth", "checkpoint-best.pth"}


def test_files_of_later_states_outlive_those_of_an_earlier_one(folder, tmp_path):
    (tmp_path / "checkpoint-7.pth").write_bytes(to_bytes(state_of(7)))
    save_numbered(folder, state_of(3), keep=1)
    assert [path.name for path in numbered_checkpoints(tmp_path)] == ["checkpoint-7.pth", "checkpoint-3.pth"]


def test_second_run_in_the_folder_of_another_is_refused(tmp_path):
    for epoch in (3, 4):
        (tmp_path / f"checkpoint-{epoch}.pth").write_bytes(to_bytes(state_of(epoch)))
    file = tmp_path / "checkpoint-3.pth"
    with pytest.raises(UserError, match=r"--auto_resume false, but --output_dir has .*checkpoint-4"):
        find(tmp_path, auto_resume=False)
    with pytest.raises(UserError, match=r"--resume .*checkpoint-3.pth is of epoch 3, but --output_dir has .*nt-4"):
        find(tmp_path, file)
    assert find(tmp_path, file, training=False)[1]["epoch"] == 3
    assert find(tmp_path / "elsewhere") is None


MISSING = "checkpoint-3.pth is not a valid checkpoint: `{}` is missing or has the wrong type"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (state_of(3) | {"optimizer": None}, MISSING.format("optimizer")),
        (state_of(3) | {"epoch": "0"}, MISSING.format("epoch")),
        (state_of(3) | {"model": [1]}, MISSING.format("model")),
        (state_of(3) | {"best": {"test_acc1": [1.0]}}, "`best` holds a value that is not a number"),
        (state_of(3) | {"model": {"a": torch.ones(1).expand(10**6)}}, "times as many bytes as the file"),
        (TENSORS | {"format": "other"}, "checkpoint-3.pth is not a checkpoint of this project"),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(content, message, tmp_path):
    (tmp_path / "checkpoint-3.pth").write_bytes(to_bytes(content))
    assert_refused(tmp_path / "checkpoint-3.pth", message, [read_checkpoint])


def test_checkpoint_without_newer_parts_is_read(tmp_path):
    (tmp_path / "checkpoint-3.pth").write_bytes(to_bytes({k: v for k, v in state_of(3).items() if k not in NEWER}))
    assert read_checkpoint(tmp_path / "checkpoint-3.pth")["sums"] == {}
