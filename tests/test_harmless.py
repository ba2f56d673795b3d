"""Objects beside the weights in other people's checkpoints are read without their code; others are refused, with the way out."""

import argparse
import collections
import datetime
import pathlib
import shlex
import sys
import types
import uuid

import numpy as np
import pytest
import torch
from weight_files import assert_refused, repack

from bench.mutations import called, push
from training.checkpoint import read_checkpoint
from utils import UserError
from weightfiles.harmless import StandIn
from weightfiles.lazy import open_file
from weightfiles.read import read_file

TENSOR = torch.arange(6.0)
HARMLESS = {
    "options": argparse.Namespace(lr=0.1, path=pathlib.Path("a/b"), nested=argparse.Namespace(betas=(0.9, 0.99))),
    "simple": types.SimpleNamespace(a=[1]),
    "numbers": [np.float64(0.5), np.float32(1), np.int64(3), np.bool_(True), np.str_("a"), np.datetime64("2020")],
    "dtypes": [np.dtype("float32"), np.float32, type(np.dtype("int64")), torch.float32, torch.strided, int],
    "arrays": (np.arange(3), np.zeros((2, 2), bool), np.random.get_state()),
    "generators": [np.random.RandomState(0), np.random.default_rng(0)],
    "paths": [pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("a")],
    "dicts": collections.defaultdict(int, a=1),
    "counts": collections.Counter("aab"),
    "queue": collections.deque([1, 2], 3),
    "times": [datetime.datetime.now(datetime.UTC), datetime.date(2020, 1, 2), datetime.timedelta(1)],
    "torch": [torch.Size([1]), torch.device("cpu"), torch.__version__],
    "plain": [b"bytes", {1}, frozenset([2]), 1j, range(3), slice(1), uuid.UUID(int=0)],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", [*HARMLESS, "all"])
def test_harmless_objects_are_read_as_stand_ins(kind, zipped, tmp_path):
    objects = HARMLESS if kind == "all" else HARMLESS[kind]
    content = {"model": {"norm.weight": TENSOR}, "rest": objects, "epoch": 3}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert torch.equal(open_file(tmp_path / "x.pth")["model.norm.weight"], TENSOR)
    whole = read_file(tmp_path / "x.pth")
    assert whole["epoch"] == 3 and torch.equal(whole["model"]["norm.weight"], TENSOR)
    if kind == "options":
        assert type(whole["rest"]) is StandIn  # and nothing of an argparse.Namespace


NAMES = [
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "pathlib._local.PosixPath",
    "pathlib.WindowsPath",
]
NAMES += ["numpy.bool_", "numpy.bool", "yacs.config.CfgNode", "mmengine.logging.history_buffer.HistoryBuffer"]


def with_pickle(path, code):
    """Write a file with the tensor norm.weight, and with what the opcodes leave on the stack under "rest"."""
    torch.save({"norm.weight": TENSOR, "rest": None}, path)
    repack(path, change=lambda name, content: content.replace(b"N", code) if name.endswith("data.pkl") else content)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_names_of_other_versions_and_absent_libraries_are_known(name, tmp_path):
    path = with_pickle(tmp_path / "x.pth", called(name, push("a")))
    assert torch.equal(open_file(path)["norm.weight"], TENSOR)


def test_weights_in_a_kind_of_dict_are_found(tmp_path):
    """As easydict and yacs write themselves: a new object of the class, then its items, then its attributes."""
    torch.save({"model": {"norm.weight": TENSOR}}, tmp_path / "x.pth")
    code = b"ceasydict\nEasyDict\n)\x81"
    repack(
        tmp_path / "x.pth",
        change=lambda name, content: content.replace(b"}q", code + b"q") if name.endswith("pkl") else content,
    )
    assert torch.equal(open_file(tmp_path / "x.pth")["model.norm.weight"], TENSOR)


# what a file may try with a name on the list: set attributes of a class, a function, or a tensor; call for memory
SETS = b"}" + push("__setstate__") + push(1) + b"s"
HOSTILE = {
    "attribute of a stand-in's class": b"cargparse\nNamespace\n" + SETS + b"b",
    "attribute of numpy's function": b"cnumpy.core.multiarray\nscalar\n" + SETS + b"b",
    "items of a namespace": called("argparse.Namespace") + push("a") + push(1) + b"s",
    "items of a class": b"cargparse\nNamespace\n" + push("a") + push(1) + b"s",
    "another codec": called("_codecs.encode", push("a" * 9), push("zlib_codec")),
    "code of a codec": called("_codecs.encode", push("a"), called("argparse.Namespace")),
    "method of a path": called("pathlib.Path:home"),
    "number of numpy's that is none": called("numpy.load", push("x")),
    "attribute by a name": called("builtins.getattr", b"cargparse\nNamespace\n", push("mro")),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_names_on_the_list_give_no_way_to_other_code(kind, tmp_path):
    assert_refused(with_pickle(tmp_path / "x.pth", HOSTILE[kind]), r"x\.pth (is refused|cannot be read)")
    assert callable(StandIn.__setstate__) and not hasattr(argparse.Namespace, "__setstate__")


def test_memory_that_an_array_asks_for_is_not_given(tmp_path):
    """numpy.ndarray(10**15) would fail, and numpy.core.multiarray._reconstruct of it too; a stand-in is neither."""
    huge = push((10**15,))
    code = called("numpy.core.multiarray._reconstruct", b"cnumpy\nndarray\n", huge, push("b"))
    assert torch.equal(open_file(with_pickle(tmp_path / "x.pth", code))["norm.weight"], TENSOR)


def test_refusal_says_how_to_save_the_weights_of_a_trusted_file(tmp_path, monkeypatch):
    """The command is run as it is printed, where the classes can be imported."""
    module = types.ModuleType("own")
    exec("import torch\nclass Net(torch.nn.Linear): pass\nclass Other: pass", vars(module))
    monkeypatch.setitem(sys.modules, "own", module)
    monkeypatch.chdir(tmp_path)
    net = module.Net(2, 3)
    torch.save({"net": net, "state": net.state_dict(), "other": module.Other(), "n": [1], "best": 0.5}, "it's.pth")
    torch.save(net, "net.pth")
    nested = {"net.weight", "net.bias", "state.weight", "state.bias"}
    for name, keys in (("it's", nested), ("net", {"weight", "bias"})):
        with pytest.raises(UserError, match=r"is refused: it holds a own\.Net, which is .* could run code") as error:
            open_file(f"{name}.pth")
        python, option, code = shlex.split(str(error.value).partition("save its weights alone: ")[2])
        assert (python, option) == ("python", "-c")
        exec(code, {})
        weights = open_file(f"{name}-weights.pth")
        assert weights.keys() == keys
        assert all(torch.equal(weights[key], net.state_dict()[key.rpartition(".")[2]]) for key in keys)


def test_resuming_takes_no_stand_ins(tmp_path):
    torch.save({"model": {"norm.weight": TENSOR}, **HARMLESS}, tmp_path / "x.pth")
    with pytest.raises(
        UserError, match=r"is not a checkpoint of this project; weights to start from go to --initialize"
    ):
        read_checkpoint(tmp_path / "x.pth")
