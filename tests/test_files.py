"""Files that are not what they should be, and files that have to survive."""

import contextlib
import errno
import json
import os
import pickle
import random
import stat

import pytest
import safetensors.torch
import torch

from training.checkpoint import NEWER, STATE, numbered_checkpoints, read_checkpoint, save_checkpoint, save_numbered
from training.start import find_checkpoint
from utils import UserError, write_atomically
from weightfiles import hub
from weightfiles.initialization import find_initialization, read_initialization, write_initialization
from weightfiles.read import read_weights

TENSORS = {"norm.weight": torch.arange(6.0), "norm.bias": torch.ones(2, 3)}


class Evil:
    """A pickle of it makes a file when it is loaded without care."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


# ---- what is no file of weights ----


@pytest.mark.parametrize("name", ["page.pth", "page.bin", "page.safetensors"])
def test_web_page_is_refused(name, tmp_path):
    (tmp_path / name).write_text("<!DOCTYPE html><html><body>404 not found</body></html>")
    with pytest.raises(UserError, match=rf"{name} (is refused: it is a web page|cannot be read as weights)"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_truncated_file_is_refused(name, kept, tmp_path):
    path = tmp_path / name
    write_initialization(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=name):
        read_weights(path)


def test_flipped_bit_in_a_zip_is_found(tmp_path):
    torch.save(TENSORS, tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    place = content.index(TENSORS["norm.weight"].numpy().tobytes()) + 5
    content[place] ^= 1
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match="does not match its checksum"):
        read_weights(tmp_path / "w.pth")


def test_flipped_bit_that_makes_a_part_a_folder_is_found(tmp_path):
    torch.save(TENSORS, tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    content[content.rindex(b"w/data/1") - 8] ^= (
        0x10  # in the directory, four bytes of attributes and four of place ahead
    )
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"its part w/data/1 is marked as a folder"):
        read_weights(tmp_path / "w.pth")


def test_bytes_that_make_the_reader_crash_end_in_one_line(tmp_path):
    torch.save(TENSORS, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    legacy, generator = (tmp_path / "legacy.pth").read_bytes(), random.Random(0)
    mutants = [generator.randbytes(generator.randint(1, 60)) for _ in range(150)]
    for _ in range(150):
        damaged = bytearray(legacy)
        for _ in range(3):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        mutants.append(bytes(damaged))
    refused = 0
    for content in mutants:
        (tmp_path / "x.pth").write_bytes(content)
        try:
            read_weights(tmp_path / "x.pth")
        except UserError as error:
            refused += 1
            assert "x.pth" in str(error) and "\n" not in str(error)
    assert refused > 200  # a changed value inside a tensor of the old format cannot be seen


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_would_run_code_is_refused_and_not_run(zipped, tmp_path):
    victim = tmp_path / "made-by-the-pickle"
    if zipped:
        torch.save({"weights": Evil(victim)}, tmp_path / "evil.pth")
    else:
        (tmp_path / "evil.pth").write_bytes(pickle.dumps({"weights": Evil(victim)}, protocol=2))
    with pytest.raises(UserError, match=r"evil\.pth is refused: it is a pickle that would run code"):
        read_weights(tmp_path / "evil.pth")
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({}, "it is empty"),
        ({"epoch": 3}, "epoch is a int"),
        (torch.ones(2), "holds a Tensor"),
    ],
)
def test_other_content_is_named(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "x.pth")


def test_absent_key_and_absent_prefix_are_named(tmp_path):
    torch.save({"model": TENSORS}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="no weights under --model_key model_ema; its keys: model"):
        read_weights(tmp_path / "x.pth", "model_ema")
    with pytest.raises(UserError, match="not every key begins with --model_prefix encoder"):
        read_weights(tmp_path / "x.pth", prefix="encoder.")


def test_prefix_is_taken_off(tmp_path):
    torch.save({f"encoder.{key}": value for key, value in TENSORS.items()}, tmp_path / "x.pth")
    assert read_weights(tmp_path / "x.pth", prefix="encoder.").keys() == TENSORS.keys()


@pytest.mark.parametrize("content", [bytes(5000), b"\x80", b"version https://git-lfs.github.com/spec/v1\n"])
def test_damaged_file_is_not_answered_with_advice_to_run_it(content, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth (is refused|cannot be read as weights): ") as caught:
        read_weights(tmp_path / "x.pth")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
    ],
)
def test_tensors_without_plain_values_are_named(tensor, tmp_path):
    torch.save({"norm.weight": tensor}, tmp_path / "x.pth")
    with pytest.raises(
        UserError, match=r"x\.pth is refused: it holds more than plain tensors \(torch\._utils\._rebuild_"
    ):
        read_weights(tmp_path / "x.pth")


def test_folder_in_the_place_of_a_file_is_named(tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        read_weights(tmp_path)


# ---- initialization files ----


def test_folder_means_the_file_made_for_the_family(tmp_path):
    write_initialization(tmp_path / "vit.pth", TENSORS, {"family": "vit"})
    write_initialization(tmp_path / "convnext.pth", TENSORS, {"family": "convnext"})
    assert find_initialization(str(tmp_path), "convnext") == tmp_path / "convnext.pth"
    assert find_initialization(str(tmp_path / "vit.pth"), "convnext") == tmp_path / "vit.pth"


def test_folder_without_or_with_several_fitting_files_is_refused(tmp_path):
    with pytest.raises(UserError, match="no file made for the family vit .no weights at all.; name the file"):
        find_initialization(str(tmp_path), "vit")
    torch.save(TENSORS, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="no file made for the family vit .foreign.pth."):
        find_initialization(str(tmp_path), "vit")
    for name in ("a.pth", "b.safetensors"):
        write_initialization(tmp_path / name, TENSORS, {"family": "vit"})
    with pytest.raises(UserError, match="several files made for the family vit .a.pth, b.safetensors."):
        find_initialization(str(tmp_path), "vit")


def test_file_that_differs_from_its_description_is_refused(tmp_path):
    path = tmp_path / "vit.safetensors"
    write_initialization(path, TENSORS, {"family": "vit"})
    assert read_initialization(str(path), "vit")[1]["family"] == "vit"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # a bit of a tensor: safetensors itself does not notice
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is not the file that vit\.json describes"):
        read_initialization(str(path), "vit")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value, tmp_path):
    torch.save({"norm.weight": torch.tensor([1.0, value])}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth: norm\.weight holds values that are not finite"):
        read_initialization(str(tmp_path / "x.pth"), "vit")


def test_url_is_fetched_once_and_checked(tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / "w.pth")
    sha256 = __import__("hashlib").sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    calls = []
    real = torch.hub.download_url_to_file

    def from_disk(url, *args, **kwargs):  # the only stand-in: torch's downloader reads file: as it reads https:
        calls.append(url)
        return real((tmp_path / "w.pth").as_uri(), *args, **kwargs)

    monkeypatch.setattr(torch.hub, "download_url_to_file", from_disk)
    for _ in range(2):
        path = hub.fetch(f"https://example.org/w.pth#sha256={sha256}")
        assert torch.equal(read_weights(path)["norm.weight"], TENSORS["norm.weight"])
    assert calls == ["https://example.org/w.pth"]
    with pytest.raises(UserError, match="could not be downloaded: invalid hash value"):
        hub.fetch(f"https://example.org/w.pth#sha256={'0' * 64}")


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


def state_of(epoch):
    return {name: kind() for name, kind in STATE.items()} | NEWER | {"epoch": epoch, "model": TENSORS}


def test_newest_readable_checkpoint_is_found(tmp_path, caplog):
    for epoch in (8, 9, 10):
        save_numbered(tmp_path, state_of(epoch), keep=5)
    newest = tmp_path / "checkpoint-10.pth"
    assert find_checkpoint("", tmp_path, file=None, auto_resume=True, training=True)[0] == newest
    newest.write_bytes(newest.read_bytes()[:-200])
    path, state = find_checkpoint("", tmp_path, file=None, auto_resume=True, training=True)
    assert (path.name, state["epoch"]) == ("checkpoint-9.pth", 9)
    assert "checkpoint-10.pth" in caplog.text and "trying the one before it" in caplog.text
    for path in numbered_checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 checkpoints"):
        find_checkpoint("", tmp_path, file=None, auto_resume=True, training=True)
    good = tmp_path / "elsewhere.pth"
    save_checkpoint(good, state_of(10))
    caplog.clear()
    assert find_checkpoint(str(good), tmp_path, file=good, auto_resume=True, training=True)[0] == good
    assert caplog.text.count("trying the one before it") == 2 and caplog.text.count("WARNING") == 3


def test_oldest_checkpoints_go_and_the_best_stays(tmp_path):
    save_checkpoint(tmp_path / "checkpoint-best.pth", state_of(2))
    for epoch in range(12):
        save_numbered(tmp_path, state_of(epoch), keep=2)
    within = {"sums": {"loss": 1.0}}
    for step in (1230, 1240):
        save_numbered(tmp_path, state_of(12) | {"step": step} | within, keep=3)
    names = ["checkpoint-12-1240.pth", "checkpoint-12-1230.pth", "checkpoint-11.pth"]
    assert [path.name for path in numbered_checkpoints(tmp_path)] == names
    save_numbered(tmp_path, state_of(12) | {"step": 1300}, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-12.pth", "checkpoint-best.pth"}


def test_files_of_later_states_outlive_those_of_an_earlier_one(tmp_path):
    save_checkpoint(tmp_path / "checkpoint-7.pth", state_of(7))
    save_numbered(tmp_path, state_of(3), keep=1)
    assert [path.name for path in numbered_checkpoints(tmp_path)] == ["checkpoint-7.pth", "checkpoint-3.pth"]


def test_second_run_in_the_folder_of_another_is_refused(tmp_path):
    for epoch in (3, 4):
        save_checkpoint(tmp_path / f"checkpoint-{epoch}.pth", state_of(epoch))
    file = tmp_path / "checkpoint-3.pth"
    named = (str(file), tmp_path)
    with pytest.raises(UserError, match=r"--auto_resume false, but --output_dir has .*checkpoint-4"):
        find_checkpoint("", tmp_path, file=None, auto_resume=False, training=True)
    with pytest.raises(
        UserError, match=r"--resume .*checkpoint-3.pth is of epoch 3, but --output_dir has .*checkpoint-4"
    ):
        find_checkpoint(*named, file=file, auto_resume=True, training=True)
    assert find_checkpoint(*named, file=file, auto_resume=True, training=False)[1]["epoch"] == 3
    assert find_checkpoint("", tmp_path / "elsewhere", file=None, auto_resume=True, training=True) is None


@pytest.mark.parametrize(("name", "value"), [("optimizer", None), ("epoch", "0"), ("model", [1])])
def test_checkpoint_that_lacks_a_part_names_it(name, value, tmp_path):
    save_checkpoint(tmp_path / "checkpoint-3.pth", state_of(3) | {name: value})
    with pytest.raises(
        UserError, match=f"checkpoint-3.pth is not a valid checkpoint: `{name}` is missing or has the wrong type"
    ):
        read_checkpoint(tmp_path / "checkpoint-3.pth")


def test_checkpoint_without_newer_parts_is_read(tmp_path):
    state = {name: value for name, value in state_of(3).items() if name not in NEWER}
    save_checkpoint(tmp_path / "checkpoint-3.pth", state)
    assert read_checkpoint(tmp_path / "checkpoint-3.pth")["sums"] == {}
    save_checkpoint(tmp_path / "checkpoint-3.pth", state | {"best": {"test_acc1": [1.0]}})
    with pytest.raises(UserError, match="`best` holds a value that is not a number"):
        read_checkpoint(tmp_path / "checkpoint-3.pth")


def test_weights_are_no_checkpoint(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth is not a checkpoint of this project"):
        read_checkpoint(tmp_path / "x.pth")


def test_safetensors_and_json_hold_plain_values(tmp_path):
    sha256 = write_initialization(tmp_path / "w.safetensors", TENSORS, {"family": "vit"})
    assert json.loads((tmp_path / "w.json").read_text()) == {
        "format": "weight-selection initialization 1",
        "sha256": sha256,
        "family": "vit",
    }
    assert safetensors.torch.load_file(tmp_path / "w.safetensors").keys() == TENSORS.keys()
