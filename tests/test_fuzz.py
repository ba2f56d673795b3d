"""Every mutant of a file loads the right values or ends in one line, and the fuzzer notices if not."""

import json
import os
import sys
import time

import numpy as np
import pytest
import torch

from bench import fuzz, mutations
from utils import UserError
from weightfiles.lazy import open_weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits and units of memory")


def test_no_mutant_of_any_kind_gets_through(tmp_path, capsys):
    assert fuzz.main(["--mutants", "280", "--out", str(tmp_path / "fuzz.json")]) == 0
    assert "--only" not in capsys.readouterr().out
    result = json.loads((tmp_path / "fuzz.json").read_text())
    assert result["mutants"] == 280 and result["failed"] == 0 and len(result["kinds"]) == 7
    loaded, refused = (sum(kind[outcome] for kind in result["kinds"].values()) for outcome in ("loaded", "refused"))
    assert loaded > 30 and refused > 150


def test_one_mutant_is_repeated(capsys):
    assert fuzz.main(["--only", ".npz/3"]) == 0
    assert "case=('.npz', 3, 0)" in capsys.readouterr().out


def untouched(chance, content):
    return content


@pytest.mark.parametrize("fitting", [set(), {untouched}], ids=["intact", "library"])
def test_untouched_file_of_every_kind_loads(fitting, monkeypatch):
    monkeypatch.setattr(mutations, "MUTATIONS", {suffix: [untouched] for suffix in mutations.MUTATIONS})
    monkeypatch.setattr(mutations, "FITTING", fitting)  # compare with what was written, or with the library's reader
    assert [(each.said, each.outcome) for each in fuzz.fuzz(7, seed=0)] == [("", "loaded")] * 7


def changed(change):
    return lambda path: {k: change(v) if k == "norm.weight" else v for k, v in open_weights(path).items()}


def fail(error):
    raise error


def take_long(_):
    start = os.times().user
    while os.times().user - start < 0.6:
        sum(range(10**5))


OTHER = "not the tensors of the file: ['norm.weight']"
FAULTS = {  # a reader, and what is said of it
    "other value": (changed(lambda tensor: tensor + 1), OTHER),
    "other shape": (changed(lambda tensor: tensor[None]), OTHER),
    "other dtype": (changed(lambda tensor: tensor.double()), OTHER),
    "one tensor": (lambda path: {"norm.weight": open_weights(path)["norm.weight"]}, "not the tensors of the file"),
    "other error": (lambda path: fail(KeyError("norm.weight")), "KeyError('norm.weight')"),
    "no name": (lambda path: fail(UserError("something is wrong")), "the line names no file"),
    "runs code": (lambda path: os.system("true"), "did more than read: os.system"),
    "writes": (lambda path: (path.parents[2] / "outside").write_text("x"), "did more than read: open to write"),
    # by torch's own code, which Python does not see
    "leaves a file": (lambda path: torch.save({}, path.parents[1] / str(time.monotonic_ns())), "files appeared"),
    "takes long": (take_long, "it took "),
    "takes memory": (lambda path: np.ones(2**26) is None, " MB"),  # 512 MB
    "hangs": (lambda path: time.sleep(60), "it hangs: no end after 1 s"),
    "crashes": (lambda path: os.kill(os.getpid(), 9), "the process ended (status -9)"),
    "allocates much": (lambda path: np.empty(2**31), "MemoryError"),  # 16 GB
}


@pytest.mark.parametrize("fault", FAULTS)
def test_judge_sees_a_reader_that_does_wrong(fault, monkeypatch, capsys):
    reader, said = FAULTS[fault]
    limit = {"takes long": ("SECONDS", 0.5), "takes memory": ("MEMORY", 64 * fuzz.MB), "hangs": ("HANGS", 1.0)}
    monkeypatch.setattr(fuzz, *limit.get(fault, ("SECONDS", 5.0)))
    monkeypatch.setattr("weightfiles.lazy.open_weights", lambda path: reader(path) or open_weights(path))
    monkeypatch.setattr(mutations, "MUTATIONS", {".pth": [untouched]})
    (verdict,) = fuzz.fuzz(1, seed=0, only=".pth/0")
    assert verdict.outcome == "failed" and said in verdict.said
    assert "--only '.pth/0'" in capsys.readouterr().out
