"""Every mutant of a file from outside loads the right values or ends in one line; and the fuzzer would see otherwise."""

import json
import os
import time

import numpy as np
import pytest
import torch

from bench import fuzz, hostile_pickles, mutations
from bench.fuzz import Case
from utils import UserError
from weightfiles.read import read_weights

linux = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")


# ---- mutants ----


@linux
def test_no_mutant_of_any_kind_gets_through(capsys):
    verdicts = fuzz.fuzz(fuzz.all_cases(270, seed=0))
    assert "--only" not in capsys.readouterr().out
    outcomes = [verdict.outcome for verdict in verdicts]
    assert len(outcomes) == 270 and outcomes.count("loaded") > 30 and outcomes.count("refused") > 150
    assert outcomes.count("failed") == 0


@linux
def test_command_writes_its_counts_and_repeats_one_mutant(tmp_path, capsys):
    assert fuzz.main(["--mutants", "9", "--out", str(tmp_path / "fuzz.json")]) == 0
    result = json.loads((tmp_path / "fuzz.json").read_text())
    assert result["mutants"] == 9 and result["failed"] == 0 and set(result["kinds"]) == set(mutations.MUTATIONS)
    assert fuzz.main(["--only", ".npz/3"]) == 0
    assert "number=3" in capsys.readouterr().out


def untouched(chance, content):
    return content


def only_with(monkeypatch, reader):
    """The outcome of two untouched files with `reader` in place of read_weights."""
    monkeypatch.setattr("weightfiles.read.read_weights", reader)
    monkeypatch.setattr(mutations, "MUTATIONS", {".pth": [(1, "", [untouched])]})
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
    os.system(f"touch {hostile_pickles.CANARY}")
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
        (takes_memory, " MB"),
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
def test_untouched_file_of_every_kind_loads(monkeypatch):
    untouched.repacks = True  # compare with the library in every case
    kinds = {kind: [(1, "", [untouched])] for kind in mutations.MUTATIONS}
    monkeypatch.setattr(mutations, "MUTATIONS", kinds)
    assert [verdict.outcome for verdict in fuzz.fuzz(fuzz.all_cases(9, seed=0))] == ["loaded"] * 9
