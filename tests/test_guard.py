"""No file from outside runs code, exhausts the machine, or loads as other values than it holds."""

import contextlib
import io
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from weight_files import assert_refused, repack, save

import weight_selection
from bench import fuzz_samples
from bench.mutations import HOSTILE, called, nested, push
from utils import UserError
from weightfiles.guard import check_pickle
from weightfiles.initialization import read_initialization, write_initialization
from weightfiles.lazy import open_weights
from weightfiles.read import read_file

TENSORS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}
MODEL = torch.nn.Linear(3, 2)
zipped_or_old = pytest.mark.parametrize("zipped", [True, False])


def with_pickle(path, code, zipped=True):
    """Write a torch.save file whose pickle is `code`, with correct checksums."""
    if zipped:
        repack(save(path, TENSORS), change=lambda name, content: code if name.endswith("data.pkl") else content)
    else:
        path.write_bytes(code)
    return path


def select(path, **options):
    return weight_selection.select_weights(*fuzz_samples.PAIR, pretrained_path=str(path), **options)


# ---- pickles ----

CODES = [*HOSTILE, b"K\1" + b"\x85" * 10**6]  # nested so deeply that hashing it crashes


@pytest.mark.parametrize("number", range(len(CODES)))
@zipped_or_old
def test_no_hostile_pickle_does_anything(number, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = CODES[number]
    # as a value; as a key, which would be hashed; called, which would print it
    for code in (push("a") + hostile + b"s.", hostile + b"Ns.", push("a") + hostile + b")Rs."):
        path = with_pickle(tmp_path / "x.pth", b"\x80\2}" + code, zipped)
        with contextlib.suppress(UserError):
            read_file(path)
        assert_refused(path, r"x\.pth (is refused|cannot be read|holds no tensors)", [open_weights])
    assert list(tmp_path.iterdir()) == [path]


def test_version_that_takes_forever_to_print_is_refused(tmp_path):
    path = save(tmp_path / "old.pth", TENSORS)
    code = b"\x80\2}K\1" + nested(list, 60) + b"s."
    path.write_bytes(path.read_bytes().replace(b"\x80\2M\xe9\3.", code, 1))
    assert_refused(path, r"old\.pth is refused")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("posix.mkdir", r"it holds a posix\.mkdir, .* reading it could run code; .* python -c "),
        ("builtins.bytearray", r"it holds a builtins\.bytearray, .* reading it could run code"),
        ("torch.Tensor", r"it holds more than plain tensors \(torch.Tensor\)"),
    ],
)
@zipped_or_old
def test_refusal_names_what_a_pickle_would_call(name, reason, zipped, tmp_path):
    code = b"\x80\2}" + push("a") + called(name, push(0x7F000000)) + b"s."
    assert_refused(with_pickle(tmp_path / "x.pth", code, zipped), rf"x\.pth is refused: {reason}")


def test_pickle_of_millions_of_objects_is_not_walked_through():
    with pytest.raises(pickle.UnpicklingError, match="objects without end"):
        check_pickle(io.BytesIO(b"\x80\2" + nested(tuple, 24) + b"."))
    one_by_one = b"\x80\2]" + b"K\1a" * 1000 + b"."
    for intact in (pickle.dumps([{"betas": (0.9, 0.999)}] + [1] * 150_000, protocol=2), one_by_one):
        assert check_pickle(io.BytesIO(intact)) == []


@pytest.mark.parametrize("name", ["x.pth", "old.pth"])
def test_strides_of_zero_that_make_much_of_little_are_refused(name, tmp_path):
    assert_refused(save(tmp_path / name, {"a": torch.ones(1).expand(10**6)}), "times as many bytes as the file")
    assert torch.equal(open_weights(save(tmp_path / name, {"a": torch.ones(1).expand(100)}))["a"], torch.ones(100))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (rb"\]q\0X.{4,40}?a\.", b"].", "it has values for 0 of 1 storages"),
        # the key is there, but not in the list: torch would leave its storage uninitialized
        (rb"\]q\0(X.{4,40}?)q.a\.", rb"\1].", "it is not a file of weights, or damaged"),
        (b"K\4Nt", b"J\xff\xff\xff\x7fNt", "it asks for more values than it has"),
    ],
)
def test_old_file_that_asks_for_other_than_it_has_is_refused(old, new, message, tmp_path):
    path = save(tmp_path / "old.pth", {"a": torch.arange(4.0)})
    content, times = re.subn(old, new, path.read_bytes(), flags=re.DOTALL)
    path.write_bytes(content)
    assert times == 1
    assert_refused(path, message)


# ---- archives, names, teachers, descriptions, checkpoints ----


def test_archive_that_unpacks_to_many_times_its_size_is_refused(tmp_path):
    repack(save(tmp_path / "x.pth", {"a": torch.zeros(2**20)}), zipfile.ZIP_DEFLATED)
    assert_refused(tmp_path / "x.pth", "it would unpack to .* times its size")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x/data/0", "its part x/data/0 is there 2 times"),
        ("x/DATA/0", "its part x/data/0 is there 2 times"),
        ("y/byteorder", "it holds more than one folder"),
    ],
)
def test_archive_with_a_part_too_many_is_refused(name, message, tmp_path):
    with zipfile.ZipFile(save(tmp_path / "x.pth", TENSORS), "a") as archive:
        archive.writestr(name, b"big")
    assert_refused(tmp_path / "x.pth", message)


def test_names_from_a_file_reach_no_terminal_as_they_are(tmp_path):
    safetensors.torch.save_file({"a\n\x1b[2Jb" + "c" * 5000: torch.ones(2).int()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError) as caught:
        read_initialization(str(tmp_path / "x.safetensors"), MODEL, "linear")
    assert str(caught.value).isprintable() and r"a\n\x1b[NJb" in str(caught.value) and len(str(caught.value)) < 1100


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn, torch.bool])
def test_teacher_of_other_than_floating_point_is_refused(dtype, tmp_path):
    tensors = {key: value.to(dtype) for key, value in fuzz_samples.MODELS[0].state_dict().items()}
    dtype = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"x\.pth: \S+ has dtype {dtype}, expected floating"):
        select(save(tmp_path / "x.pth", tensors))


def test_kernel_that_takes_minutes_to_resize_is_refused(tmp_path):
    tensors = {**fuzz_samples.MODELS[0].state_dict(), "patch_embed.proj.weight": torch.ones(24, 3, 65, 64)}
    with pytest.raises(UserError, match=r"has patch_embed.proj.weight \[24, 3, 65, 64\], a kernel larger than 64 x 64"):
        select(save(tmp_path / "x.pth", tensors))


def lists(depth):
    return [] if depth == 0 else [lists(depth - 1)]


@pytest.mark.parametrize("student", [{"kwargs": lists(400)}, {"kwargs": 10**1000}])
def test_description_that_no_checkpoint_could_keep_is_refused(student, tmp_path):
    write_initialization(tmp_path / "x.pth", TENSORS, {"student": student})
    with pytest.raises(UserError, match=r"x\.json holds what weight_selection\.py does not write"):
        read_initialization(str(tmp_path / "x.pth"), MODEL, "linear")


def test_pipe_in_the_place_of_the_description_is_passed_over(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    assert read_initialization(str(save(tmp_path / "x.pth", TENSORS)), MODEL, "linear")[1]["family"] is None


# ---- arrays ----


@pytest.fixture
def refused(tmp_path):
    """Check the error for a `.npz` with changed arrays, or with changed bytes of `cls`."""

    def check(message, change=lambda content: content, include_head=False, **changed):
        np.savez(tmp_path / "vit.npz", **(fuzz_samples.arrays() | changed))
        repack(tmp_path / "vit.npz", change=lambda name, content: change(content) if name == "cls.npy" else content)
        with pytest.raises(UserError) as caught:
            select(tmp_path / "vit.npz", include_head=include_head)
        line = str(caught.value)
        assert message in line and ("vit.npz" in line or include_head) and line.isprintable()

    return check


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((1, 1, 1), np.float32), "float32 [1, 1, 1] stands for [1, 1, 24]"),  # copying would spread it
        (np.ones((1, 1, 24), np.int32), "int32 [1, 1, 24] stands for"),  # and convert this
        (np.array([[[None] * 24]]), "bytes for 192"),
    ],
)
def test_array_that_is_not_the_tensors_is_refused(array, message, refused):
    refused(message, cls=array)


DEEP = b"-" * 9000 + b"1\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"(1, 1, 24), }       ", b"(100000000000,), }  ", "cls.npy has 96 bytes for 400000000000"),
        (b"\x93NUMPY\1", b"\x93NUMPY\7", "is of the format (7, 0)"),
        (b"{'descr': '<f4',", b"-" * 16, "vit.npz cannot be read as the weights of"),
        (b"\1\0v\0", b"\1\0" + len(DEEP).to_bytes(2, "little") + DEEP, "the header of cls.npy is nested without end"),
    ],
)
def test_array_that_declares_other_than_it_has_is_refused(old, new, message, refused):
    refused(message, lambda content: content.replace(old, new, 1))


def test_array_of_large_patches_is_refused(refused):
    kernel = {"embedding/kernel": np.ones((65, 64, 3, 24), np.float32)}
    refused("has embedding/kernel [65, 64, 3, 24], a kernel larger than", **kernel)


def test_head_of_other_classes_is_not_made_up(refused):
    head = {"head/kernel": np.ones((24, 3), np.float32), "head/bias": np.ones(3, np.float32)}
    refused("has no classifier to take", include_head=True, **head)
