"""No file from outside runs code, takes the machine along, or gives other values than it holds; and the fuzzer would see it."""

import io
import json
import os
import pickle
import time
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

import weight_selection
from bench import fuzz, fuzz_bytes, fuzz_mutations, fuzz_pickles, fuzz_reader, fuzz_samples
from bench.fuzz import Case
from training import checkpoint
from utils import UserError
from weightfiles.guard import check_pickle
from weightfiles.initialization import read_initialization, write_initialization
from weightfiles.lazy import open_weights
from weightfiles.read import read_weights

linux = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
TENSORS = {"norm.weight": torch.arange(6.0), "norm.bias": torch.ones(2, 3)}


# ---- mutants ----


@linux
def test_no_mutant_of_any_kind_gets_through(capsys):
    verdicts = fuzz.fuzz(fuzz.all_cases(270, seed=0))
    assert capsys.readouterr().out == ""
    outcomes = [verdict.outcome for verdict in verdicts]
    assert len(outcomes) == 270 and outcomes.count("loaded") > 30 and outcomes.count("refused") > 150
    assert outcomes.count("failed") == 0


@linux
def test_command_writes_its_counts_and_repeats_one_mutant(tmp_path, capsys):
    assert fuzz.main(["--mutants", "9", "--out", str(tmp_path / "fuzz.json")]) == 0
    result = json.loads((tmp_path / "fuzz.json").read_text())
    assert result["mutants"] == 9 and result["failed"] == 0 and set(result["kinds"]) == set(fuzz_mutations.MUTATIONS)
    assert fuzz.main(["--only", ".npz/3"]) == 0
    assert "number=3" in capsys.readouterr().out


def only_with(monkeypatch, reader):
    """The outcome of two untouched files with `reader` in the place of read_weights."""
    monkeypatch.setattr("weightfiles.read.read_weights", reader)
    monkeypatch.setattr(fuzz_mutations, "MUTATIONS", {".pth": [lambda chance, files: files]})
    return fuzz.fuzz([Case(".pth", 0, 0), Case(".pth", 1, 0)])


def other_bit(path, *_):
    tensors = read_weights(path)
    tensors["norm.weight"].view(torch.uint8)[0] ^= 1
    return tensors


def other_shape(path, *_):
    return {key: tensor[None] for key, tensor in read_weights(path).items()}


def one_tensor_less(path, *_):
    tensors = read_weights(path)
    tensors.pop("norm.bias")
    return tensors


def raises_key_error(path, *_):
    raise KeyError("norm.weight")


def names_no_file(path, *_):
    raise UserError("something is wrong")


def runs_code(path, *_):
    os.system(f"touch {fuzz_pickles.CANARY}")
    return read_weights(path)


def writes_a_file(path, *_):
    (path.parents[2] / "outside").write_text("x")
    return read_weights(path)


def takes_long(path, *_):
    start = os.times().user
    while os.times().user - start < 0.6:
        sum(range(10**5))
    return read_weights(path)


def hangs(path, *_):
    time.sleep(60)


def takes_memory(path, *_):
    np.ones(2**25)  # 256 MB
    return read_weights(path)


def crashes(path, *_):
    os.kill(os.getpid(), 9)


@linux
@pytest.mark.parametrize(
    ("reader", "said"),
    [
        (other_bit, "norm.weight has other values than the file"),
        (other_shape, "torch.float32 torch.Size"),
        (one_tensor_less, "keys differ: ['norm.bias']"),
        (raises_key_error, "KeyError('norm.weight')"),
        (names_no_file, "the line names no file"),
        (runs_code, "did more than read: os.system"),
        (writes_a_file, "did more than read: open to write"),
        (takes_long, "it took "),
        (takes_memory, "MB, then"),
        (hangs, "it hangs: no end after 1 s"),
        (crashes, "the process ended (status -9)"),
    ],
)
def test_judge_sees_a_reader_that(reader, said, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "SECONDS", 0.5 if reader is takes_long else 5.0)
    monkeypatch.setattr(fuzz, "HANGS", 1.0 if reader is hangs else 40.0)
    monkeypatch.setattr(fuzz, "MEMORY", 128 * fuzz.MB)
    verdicts = only_with(monkeypatch, reader)
    assert [verdict.outcome for verdict in verdicts] == ["failed"] * 2
    assert all(said in verdict.said for verdict in verdicts) and "--only '.pth/0'" in capsys.readouterr().out


@linux
def test_judge_passes_untouched_files(monkeypatch):
    assert [verdict.outcome for verdict in only_with(monkeypatch, read_weights)] == ["loaded"] * 2


def test_second_reader_finds_what_was_written(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    samples = fuzz_samples.make_samples(made)
    assert not list(made.iterdir()) and samples.keys() == fuzz_mutations.MUTATIONS.keys()
    expected = samples["initialization .pth"].truth(made, False)
    for kind, name in ((".pth", "w.pth"), (".pth, old", "o.pth"), (".safetensors", "w.safetensors")):
        fuzz_bytes.put(samples[kind].files, tmp_path)
        found = samples[kind].truth(tmp_path / name, False)
        assert found.keys() >= expected.keys()
        read = read_weights(tmp_path / name)
        assert all(torch.equal(found[key], read[key]) for key in read)


# ---- what was found ----


def rewritten(path, change):
    """Write an archive anew, `change` applied to its pickle, with checksums that fit."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return path


def refused(path, message):
    for read in (read_weights, open_weights):
        with pytest.raises(UserError, match=message) as caught:
            read(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("thing", range(len(fuzz_pickles.RUN)))
@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_calls_anything(thing, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = b"\x80\2}" + fuzz_pickles.text("a") + fuzz_pickles.RUN[thing] + b"s."
    path = tmp_path / "x.pth"
    if zipped:
        torch.save(TENSORS, path)
        rewritten(path, lambda _: code)
    else:
        path.write_bytes(code)
    refused(path, r"x\.pth (is refused|cannot be read)")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [fuzz_pickles.nested_tuples(60), fuzz_pickles.nested_tuples(4, 100)])
def test_key_that_takes_for_ever_to_hash_is_refused(code, tmp_path):
    torch.save(TENSORS, tmp_path / "x.pth")
    refused(rewritten(tmp_path / "x.pth", lambda _: b"\x80\2}" + code + b"Ns."), r"x\.pth is refused")


@pytest.mark.parametrize("place", ["value", "called"])
@pytest.mark.parametrize("zipped", [True, False])
def test_lists_that_take_for_ever_to_print_are_refused(place, zipped, tmp_path):
    code = b"\x80\2}K\1" + fuzz_pickles.nested_lists(60) + (b"s." if place == "value" else b")Rs.")
    torch.save(TENSORS, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    if zipped:
        rewritten(tmp_path / "x.pth", lambda _: code)
    else:  # in the place of the format's version, which torch prints where it is another
        content = (tmp_path / "x.pth").read_bytes()
        (tmp_path / "x.pth").write_bytes(content.replace(b"\x80\2M\xe9\3.", code, 1))
    refused(tmp_path / "x.pth", r"x\.pth is refused")


def test_key_nested_deeply_is_refused(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pth")
    refused(rewritten(tmp_path / "x.pth", lambda _: b"\x80\2}K\1" + b"\x85" * 10**6 + b"Ns."), r"x\.pth is refused")


def test_pickle_of_millions_of_objects_is_not_walked_through():
    with pytest.raises(pickle.UnpicklingError, match="objects without end"):
        check_pickle(io.BytesIO(b"\x80\2" + fuzz_pickles.nested_tuples(24) + b"."))
    one_by_one = b"\x80\2]" + b"K\1a" * 1000 + b"."
    for intact in (pickle.dumps([{"betas": (0.9, 0.999)}] + [1] * 150_000, protocol=2), one_by_one):
        assert check_pickle(io.BytesIO(intact)) == []


@pytest.mark.parametrize("name", ["bytearray", "Tensor"])
def test_pickle_that_asks_for_memory_is_refused(name, tmp_path):
    call = b"c" + {"bytearray": b"builtins\n", "Tensor": b"torch\n"}[name] + name.encode() + b"\n" + b"J\0\0\0\x7f\x85R"
    torch.save(TENSORS, tmp_path / "x.pth")
    refused(rewritten(tmp_path / "x.pth", lambda _: b"\x80\2}X\1\0\0\0a" + call + b"s."), name)


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
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
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


def test_old_file_that_asks_for_more_values_than_it_has_is_refused(tmp_path):
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
    with pytest.raises(UserError, match=rf"x\.pth: \S+ is of {str(dtype).removeprefix('torch.')}, not of floating"):
        weight_selection.select_weights(*fuzz_samples.PAIR, pretrained_path=str(tmp_path / "x.pth"))


def test_kernel_that_would_take_minutes_to_resize_is_refused(tmp_path):
    tensors = {**fuzz_samples.MODELS[0].state_dict(), "patch_embed.proj.weight": torch.ones(24, 3, 65, 64)}
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"has patch_embed.proj.weight \[24, 3, 65, 64\], a kernel larger than 64 x 64"):
        weight_selection.select_weights(*fuzz_samples.PAIR, pretrained_path=str(tmp_path / "x.pth"))


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
    chance = np.random.default_rng(0)
    intact = {key: chance.normal(size=shape).astype(np.float32) for key, shape in fuzz_reader.NPZ.items()}

    def read(change=lambda content: content, include_head=False, **changed):
        path = tmp_path / "vit.npz"
        np.savez(path, **(intact | changed))
        with zipfile.ZipFile(path) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries:
                archive.writestr(name, change(content) if name == "cls.npy" else content)
        return weight_selection.select_weights(*fuzz_samples.PAIR, pretrained_path=str(path), include_head=include_head)

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


def test_header_of_an_array_that_the_parser_cannot_take_is_refused(arrays):
    header = b"-" * 9000 + b"1\n"
    with pytest.raises(UserError, match="the header of cls.npy is nested without end"):
        arrays(lambda _: b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header)
