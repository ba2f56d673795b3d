"""No file from outside runs code, takes the machine along, or gives other values than it holds."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from weight_files import repack

import weight_selection
from bench import fuzz_samples, hostile_pickles
from training import checkpoint
from utils import UserError
from weightfiles.guard import check_pickle
from weightfiles.initialization import read_initialization, write_initialization
from weightfiles.lazy import open_weights
from weightfiles.read import read_weights

TENSORS = {"norm.weight": torch.arange(6.0), "norm.bias": torch.ones(2, 3)}


# ---- what was found ----


def with_pickle(path, code):
    """Write an archive of torch.save whose pickle is `code`, with checksums that fit."""
    torch.save(TENSORS, path)
    repack(path, change=lambda name, content: code if name.endswith("data.pkl") else content)
    return path


def select(path, **options):
    return weight_selection.select_weights(*fuzz_samples.PAIR, pretrained_path=str(path), **options)


def refused(path, message):
    for read in (read_weights, open_weights):
        with pytest.raises(UserError, match=message) as caught:
            read(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("thing", range(len(hostile_pickles.RUN_CODE)))
@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_calls_anything(thing, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = b"\x80\2}" + hostile_pickles.text("a") + hostile_pickles.RUN_CODE[thing] + b"s."
    path = tmp_path / "x.pth"
    if zipped:
        with_pickle(path, code)
    else:
        path.write_bytes(code)
    refused(path, r"x\.pth (is refused|cannot be read)")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "key", [hostile_pickles.nested_tuples(60), hostile_pickles.nested_tuples(4, 100), b"K\1" + b"\x85" * 10**6]
)
def test_key_that_takes_forever_to_hash_is_refused(key, tmp_path):
    refused(with_pickle(tmp_path / "x.pth", b"\x80\2}" + key + b"Ns."), r"x\.pth is refused")


@pytest.mark.parametrize("end", [b"s.", b")Rs."])
@pytest.mark.parametrize("zipped", [True, False])
def test_lists_that_take_forever_to_print_are_refused(end, zipped, tmp_path):
    code = b"\x80\2}K\1" + hostile_pickles.nested_lists(60) + end
    path = tmp_path / "x.pth"
    if zipped:
        with_pickle(path, code)
    else:  # in place of the format's version: torch prints a version that it does not know
        torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(b"\x80\2M\xe9\3.", code, 1))
    refused(path, r"x\.pth is refused")


def test_pickle_of_millions_of_objects_is_not_walked_through():
    with pytest.raises(pickle.UnpicklingError, match="objects without end"):
        check_pickle(io.BytesIO(b"\x80\2" + hostile_pickles.nested_tuples(24) + b"."))
    one_by_one = b"\x80\2]" + b"K\1a" * 1000 + b"."
    for intact in (pickle.dumps([{"betas": (0.9, 0.999)}] + [1] * 150_000, protocol=2), one_by_one):
        assert check_pickle(io.BytesIO(intact)) == []


@pytest.mark.parametrize(("module", "name"), [("builtins", "bytearray"), ("torch", "Tensor")])
def test_pickle_that_asks_for_memory_is_refused(module, name, tmp_path):
    call = hostile_pickles.called(module, name, hostile_pickles.whole(0x7F000000))
    refused(with_pickle(tmp_path / "x.pth", b"\x80\2}X\1\0\0\0a" + call + b"s."), name)


def test_list_that_holds_itself_is_refused(tmp_path):
    endless = []
    endless.append(endless)
    torch.save({"model": TENSORS, "endless": endless}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", r"x\.pth is refused")


@pytest.mark.parametrize("zipped", [True, False])
def test_strides_of_zero_that_make_much_of_little_are_refused(zipped, tmp_path):
    torch.save({"a": torch.ones(1).expand(10**6)}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "x.pth", "times as many bytes as the file")
    torch.save({"a": torch.ones(1).expand(100)}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert torch.equal(open_weights(tmp_path / "x.pth")["a"], torch.ones(100))


def test_archive_that_unpacks_to_many_times_its_size_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "x.pth")
    repack(tmp_path / "x.pth", zipfile.ZIP_DEFLATED)
    refused(tmp_path / "x.pth", "it would unpack to .* times its size")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["x/data/0", "x/DATA/0"])
def test_archive_with_a_name_twice_is_refused(name, tmp_path):
    torch.save(TENSORS, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth", "a") as archive:
        archive.writestr(name, bytes(24))
    refused(tmp_path / "x.pth", "its part x/data/0 is there 2 times")


def test_archive_with_two_folders_is_refused(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth", "a") as archive:
        archive.writestr("y/byteorder", b"big")
    refused(tmp_path / "x.pth", "it holds more than one folder")


@pytest.mark.parametrize("listed", [b"\x80\2].", b"\x80\2)."])
def test_old_file_that_leaves_storages_without_values_is_refused(listed, tmp_path):
    torch.save(TENSORS, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(content[: content.rindex(b"\x80\2]")] + listed)
    refused(tmp_path / "x.pth", "has values for 0 of 2 storages|not a file of weights, or damaged")


def test_old_file_that_asks_for_too_many_values_is_refused(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(content.replace(b"K\4Nt", b"J\xff\xff\xff\x7fNt"))
    refused(tmp_path / "x.pth", "it asks for more values than it has")


def test_names_from_a_file_reach_no_terminal_as_they_are(tmp_path):
    name = "a\n\x1b[2Jb" + "c" * 5000
    safetensors.torch.save_file({name: torch.ones(2).int()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError) as caught:
        read_initialization(str(tmp_path / "x.safetensors"), "vit")
    assert str(caught.value).isprintable() and r"a\n\x1b[2Jb" in str(caught.value) and len(str(caught.value)) < 1100


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn, torch.bool])
def test_teacher_of_other_than_floating_point_is_refused(dtype, tmp_path):
    tensors = {key: value.to(dtype) for key, value in fuzz_samples.MODELS[0].state_dict().items()}
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(
        UserError, match=rf"x\.pth: \S+ has dtype {str(dtype).removeprefix('torch.')}, expected floating"
    ):
        select(tmp_path / "x.pth")


def test_kernel_that_takes_minutes_to_resize_is_refused(tmp_path):
    tensors = {**fuzz_samples.MODELS[0].state_dict(), "patch_embed.proj.weight": torch.ones(24, 3, 65, 64)}
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"has patch_embed.proj.weight \[24, 3, 65, 64\], a kernel larger than 64 x 64"):
        select(tmp_path / "x.pth")


def nested(depth):
    return [] if depth == 0 else [nested(depth - 1)]


@pytest.mark.parametrize("student", [{"kwargs": nested(400)}, {"kwargs": 10**1000}])
def test_description_that_no_checkpoint_could_keep_is_refused(student, tmp_path):
    write_initialization(tmp_path / "x.pth", TENSORS, {"student": student})
    with pytest.raises(UserError, match=r"x\.json holds what weight_selection\.py does not write"):
        read_initialization(str(tmp_path / "x.pth"), "vit")


def test_pipe_in_the_place_of_the_description_is_passed_over(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pth")
    os.mkfifo(tmp_path / "x.json")
    assert read_initialization(str(tmp_path / "x.pth"), "vit")[1]["family"] is None


def test_name_of_a_shard_that_no_file_system_takes_is_refused(tmp_path):
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b" * 5000}}))
    with pytest.raises(UserError, match="which does not exist|…"):
        open_weights(tmp_path / "x.safetensors.index.json")


def test_checkpoint_with_a_tensor_of_no_bytes_is_refused(tmp_path):
    state = {name: kind() for name, kind in checkpoint.STATE.items()}
    checkpoint.save_checkpoint(tmp_path / "c.pth", state | {"model": {"a": torch.ones(1).expand(10**6)}})
    with pytest.raises(UserError, match="times as many bytes as the file"):
        checkpoint.read_checkpoint(tmp_path / "c.pth")


# ---- arrays ----


@pytest.fixture
def arrays(tmp_path):
    """Write a `.npz` with some of its arrays changed, and read it as a teacher."""

    def read(change=lambda content: content, include_head=False, **changed):
        path = tmp_path / "vit.npz"
        np.savez(path, **(fuzz_samples.arrays() | changed))
        repack(path, change=lambda name, content: change(content) if name == "cls.npy" else content)
        return select(path, include_head=include_head)

    return read


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((1, 1, 1), np.float32), "float32 [1, 1, 1] stands for [1, 1, 24]"),  # copying would spread it
        (np.ones((1, 1, 24), np.int32), "int32 [1, 1, 24] stands for"),  # and convert this
        (np.array([[[None] * 24]]), "bytes for 192"),
    ],
)
def test_array_that_is_not_the_tensors_is_refused(array, message, arrays):
    with pytest.raises(UserError) as caught:
        arrays(cls=array)
    assert "vit.npz cannot be read as the weights of" in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"(1, 1, 24), }       ", b"(100000000000,), }  ", "cls.npy has 96 bytes for 400000000000"),
        (b"\x93NUMPY\1", b"\x93NUMPY\7", "is of the format (7, 0)"),
        (b"{'descr': '<f4',", b"-" * 16, "vit.npz cannot be read as the weights of"),
    ],
)
def test_array_that_declares_other_than_it_has_is_refused(old, new, message, arrays):
    with pytest.raises(UserError) as caught:
        arrays(lambda content: content.replace(old, new, 1))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_array_of_large_patches_is_refused(arrays):
    with pytest.raises(UserError, match=r"vit.npz has embedding/kernel \[65, 64, 3, 24\], a kernel larger than"):
        arrays(**{"embedding/kernel": np.ones((65, 64, 3, 24), np.float32)})


def test_head_of_other_classes_is_not_made_up(arrays):
    with pytest.raises(UserError, match="has no classifier to take"):
        arrays(include_head=True, **{"head/kernel": np.ones((24, 3), np.float32), "head/bias": np.ones(3, np.float32)})


def test_array_header_that_the_parser_cannot_take_is_refused(arrays):
    header = b"-" * 9000 + b"1\n"
    with pytest.raises(UserError, match="the header of cls.npy is nested without end"):
        arrays(lambda _: b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header)
