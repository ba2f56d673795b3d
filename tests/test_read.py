"""A teacher's file opens at once and is read tensor by tensor; damage shows when its tensor is read."""

import json
import os
import sys
import unittest
import zipfile

import numpy as np
import pytest
import torch
from weight_files import TENSORS, assert_equal, assert_refused, flip, repack, save

from utils import UserError
from weightfiles.folder import find_file
from weightfiles.lazy import open_weights
from weightfiles.read import read_file

BUFFER = torch.arange(100.0, 120.0)
# what torch.save keeps and safetensors does not: strides, parts of a buffer, storages that two share or that are empty
VIEWS = {
    "transposed": TENSORS["head.weight"].T,
    "part": BUFFER[3:9].reshape(2, 3)[:, 1:],
    "other": BUFFER[::4],
    "empty": torch.empty(0, 4),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


# ---- one answer from every kind of file ----


NAMES = ["w.safetensors", "w.safetensors.index.json", "w.pth", "w.pt", "w.bin", "nested.pth", "old.pth"]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_gives_the_same_tensors(name, prefix, tmp_path):
    path = save(tmp_path / name, {prefix + key: tensor for key, tensor in TENSORS.items()})
    weights = open_weights(path, "state_dict.module|module|state_dict")
    assert_equal(weights, TENSORS)
    assert len(weights) == 5 and "step" in weights and "module.step" not in weights
    assert weights.whole == ("a file of torch's old format is read whole" if name == "old.pth" else "")
    with pytest.raises(KeyError):
        weights["module.step"]


@pytest.mark.parametrize(
    ("name", "suffix"), [("w.safetensors", ".pth"), ("w.pth", ".safetensors"), ("old.pth", ".safetensors")]
)
def test_format_is_told_by_the_bytes_not_by_the_suffix(name, suffix, tmp_path):
    path = save(tmp_path / name)
    swapped = path.rename(tmp_path / f"swapped{suffix}")
    assert_equal(open_weights(swapped), TENSORS)
    assert read_file(swapped).keys() == TENSORS.keys()


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("sharded", [True, False])
def test_folder_of_a_library_means_its_file(sharded, suffix, tmp_path):
    path = tmp_path / {".bin": "pytorch_model.bin", ".safetensors": "model.safetensors"}[suffix]
    if sharded:
        keys = list(TENSORS)
        for number, part in enumerate((keys[:2], keys[2:])):
            save(tmp_path / f"part-{number}{suffix}", {key: TENSORS[key] for key in part})
        path = path.with_name(f"{path.name}.index.json")
        path.write_text(json.dumps({"weight_map": {key: f"part-{keys.index(key) // 2 > 0:d}{suffix}" for key in keys}}))
    else:
        save(path)
    assert find_file(tmp_path) == path
    assert_equal(open_weights(find_file(tmp_path)), TENSORS)


def test_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(
        UserError, match="is a folder without model.safetensors, model.safetensors.index.json, pytorch_model"
    ):
        find_file(tmp_path)


@pytest.mark.parametrize("name", ["w.pth", "nested.pth", "old.pth"])
def test_views_are_read_as_they_were_saved(name, tmp_path):
    weights = open_weights(save(tmp_path / name, VIEWS))
    assert_equal(weights, VIEWS)
    assert weights["transposed"].stride() == (1, 8)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_writing_to_a_tensor_does_not_reach_the_file(name, tmp_path):
    path = save(tmp_path / name)
    before = path.read_bytes()
    open_weights(path)["head.weight"].zero_()
    assert path.read_bytes() == before and torch.equal(open_weights(path)["head.weight"], TENSORS["head.weight"])


def test_model_key_chooses_the_part(tmp_path):
    torch.save({"model": TENSORS, "ema": {"norm.weight": torch.ones(2)}}, tmp_path / "x.pth")
    assert open_weights(tmp_path / "x.pth", "ema").shapes == {"norm.weight": (2,)}
    for path in (tmp_path / "x.pth", save(tmp_path / "w.safetensors"), save(tmp_path / "w.safetensors.index.json")):
        with pytest.raises(UserError, match="no weights under model_ema .--model_key, --teacher_key.; its keys: "):
            open_weights(path, "model_ema")


def test_compressed_archive_is_read_whole(tmp_path):
    path = save(tmp_path / "w.pth")
    repack(path, zipfile.ZIP_DEFLATED)
    weights = open_weights(path)
    assert weights.whole == "a compressed archive is read whole"
    assert_equal(weights, TENSORS)


def test_archive_of_the_other_byte_order_is_read(tmp_path):
    path = save(tmp_path / "w.pth", {"norm.weight": TENSORS["norm.weight"]})
    other = b"big" if sys.byteorder == "little" else b"little"
    repack(path, change=lambda name, content: other if name.endswith("/byteorder") else content)
    expected = torch.from_numpy(TENSORS["norm.weight"].numpy().byteswap())
    assert torch.equal(open_weights(path)["norm.weight"], expected)


def test_part_that_no_tensor_uses_does_not_matter(tmp_path):
    path = save(tmp_path / "w.pth")
    repack(path, more=[("w/data/77", bytes(24))])
    assert_equal(open_weights(path), TENSORS)


# ---- no more than is asked for ----


def private_memory():
    """The bytes of this process's memory that are not mapped from a file."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["w.safetensors", "w.safetensors.index.json", "w.pth"])
def test_a_large_tensor_takes_no_private_memory(name, tmp_path):
    size = 64 * 2**20
    path = save(tmp_path / name, {"large": torch.zeros(size // 4), "small": torch.ones(3)})
    open_weights(path)["small"]
    before = private_memory()
    large = open_weights(path)["large"]
    assert large[:: 2**16].sum() == 0
    assert private_memory() - before < size / 8  # a copy would take all of it


def test_shapes_are_known_without_reading_a_value(tmp_path):
    path = save(tmp_path / "w.pth")
    for tensor in (TENSORS["norm.weight"], TENSORS["head.weight"]):
        flip(path, tensor)
    weights = open_weights(path)
    assert weights.shapes["head.weight"] == (5, 8) and "head.weight" in weights and list(weights) == list(TENSORS)


@pytest.mark.parametrize("name", ["w.pth", "nested.pth", "w.bin"])
def test_flipped_bit_is_found_only_where_it_is_read(name, tmp_path):
    path = save(tmp_path / name)
    flip(path, TENSORS["head.weight"])
    weights = open_weights(path)
    for key in TENSORS.keys() - {"head.weight"}:
        assert torch.equal(weights[key], TENSORS[key])
    assert_refused(
        path, rf"{name} cannot be read as weights: (state_dict\.)?head\.weight: its values do not match", [open_weights]
    )
    assert_refused(path, r"its part \w+/data/\d does not match its checksum", [read_file])


def test_flipped_bit_beside_the_part_that_is_shown_is_found(tmp_path):
    path = save(tmp_path / "w.pth", VIEWS)
    flip(path, BUFFER)  # in the second value of the buffer, which neither view shows
    with pytest.raises(UserError, match="part: its values do not match their checksum"):
        open_weights(path)["part"]


@pytest.mark.parametrize("word", [b"norm.bias", sys.byteorder.encode()], ids=["pickle", "byteorder"])
def test_damage_outside_the_values_is_found_at_once(word, tmp_path):
    path = save(tmp_path / "w.pth")
    path.write_bytes(path.read_bytes().replace(word, word[:-1] + b"t", 1))
    with pytest.raises(UserError, match=r"w\.pth cannot be read as weights: Bad CRC-32"):
        open_weights(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "old.pth"])
@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_truncated_file_is_refused_at_once(name, kept, tmp_path):
    path = save(tmp_path / name)
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(path, name)
    with pytest.raises(UserError, match=name):
        open_weights(path)  # and no tensor is asked for


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w.safetensors", "its size is not what its header says, as after half a download"),
        ("w.pth", "its end is missing, as after half a download"),
    ],
)
def test_half_a_download_is_called_one(name, message, tmp_path):
    path = save(tmp_path / name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_refused(path, rf"{name} cannot be read as weights: {message}")


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_archives_of_others_are_called_what_they_are(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    assert_refused(
        (tmp_path / "x.npz").rename(tmp_path / "x.pth"), r"it is an archive of numpy's arrays, .* end in \.npz"
    )
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 3), torch.ones(2)), tmp_path / "y.pth")
    assert_refused(tmp_path / "y.pth", "it is a program of TorchScript; save the state dict of its module instead")


def test_two_tensors_of_the_same_name_are_refused(tmp_path):
    torch.save({"a": {"b": torch.ones(2)}, "a.b": torch.zeros(2)}, tmp_path / "x.pth")
    assert_refused(tmp_path / "x.pth", r"it has two tensors a\.b", [open_weights])


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3}, {1: torch.ones(2)}, {"model": [torch.ones(2)]}])
def test_file_without_named_tensors_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    assert_refused(tmp_path / "x.pth", r"x\.pth holds no tensors under names", [open_weights])


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_file_replaced_after_opening_does_not_matter(name, tmp_path):
    weights = open_weights(save(tmp_path / name))
    os.replace(save(tmp_path / f"other-{name}", {"norm.weight": torch.ones(1)}), tmp_path / name)
    assert_equal(weights, TENSORS)


# ---- what is no file of weights ----


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 346284714\n" % 0
REBUILT = r"x\.pth is refused: it holds more than plain tensors \(torch\._utils\._rebuild_"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({"norm.weight": torch.eye(2).to_sparse()}, REBUILT),
        ({"norm.weight": torch.empty(2, device="meta")}, REBUILT),
        (
            {"code": unittest.TestCase},
            r"x\.pth is refused: it holds a unittest\.case\.TestCase, which is neither a tensor",
        ),
        (b"<!DOCTYPE html><html>404 not found</html>", r"x\.pth is refused: it is a web page"),
        (LFS, r"x\.pth is a pointer of Git LFS, not the file of 346,284,714 bytes"),
        (b"\x80", r"x\.pth is refused"),
        (bytes(5000), r"x\.pth is refused"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_both_readers_refuse_in_the_same_words(content, message, zipped, tmp_path):
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert len(set(assert_refused(path, message))) == 1


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.safetensors.index.json"])
def test_folder_and_absent_file_are_named(name, tmp_path):
    readers = [open_weights, read_file][: 1 if name.endswith("json") else 2]
    assert_refused(tmp_path / name, f"{name} does not exist", readers)
    (tmp_path / name).mkdir()
    assert_refused(tmp_path / name, f"{name} is not a file", readers)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "cannot be read as an index of weights: Expecting value"),
        (b"\xff\xfe\x00", "cannot be read as an index of weights: "),
        ("[" * 100_000, "cannot be read as an index of weights: "),
        ("[1]", "has no weight_map"),
        ({"metadata": {}}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": {"a": 3}}, "a is in 3, which is not the name of a file"),
        ({"weight_map": {"a": "../w.safetensors"}}, r"a is in '\.\./w\.safetensors', which is not the name"),
        ({"weight_map": {"a": "/w.safetensors"}}, r"a is in '/w\.safetensors', which is not the name"),
        ({"weight_map": {"a": ".."}}, r"a is in '\.\.', which is not the name"),
        ({"weight_map": {"a": ""}}, "a is in '', which is not the name"),
        ({"weight_map": {"a": "gone.safetensors"}}, r"a is in gone\.safetensors, which does not exist"),
        ({"weight_map": {"a": "b" * 5000}}, "which does not exist|…"),
        ({"weight_map": {"a": "w.safetensors"}}, r"a is in w\.safetensors, which has no such tensor"),
        ({"weight_map": {"a": "text.safetensors"}}, r"text\.safetensors is refused: it is not a file of weights"),
    ],
)
def test_bad_index_is_refused(content, message, tmp_path):
    save(tmp_path / "w.safetensors")
    (tmp_path / "text.safetensors").write_text("no header")
    path = tmp_path / "x.safetensors.index.json"
    text = content if isinstance(content, bytes | str) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        open_weights(path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_index_decides_which_tensors_of_its_files_count(tmp_path):
    save(tmp_path / "w.safetensors")
    (tmp_path / "x.safetensors.index.json").write_text('{"weight_map": {"step": "w.safetensors"}}')
    assert_equal(open_weights(tmp_path / "x.safetensors.index.json"), {"step": TENSORS["step"]})
