"""The benchmarks run, and what they print is made of what they ran."""

import importlib.util
import json
from pathlib import Path

import pytest


def bench(name):
    """The module bench/<name>.py, which is no package's."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", Path(__file__).parents[1] / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pairs_of_the_two_small_families_are_counted(tmp_path, capsys):
    pairs = bench("pairs")
    result = pairs.main(["--families", "swin", "mixer", "--out", str(tmp_path / "pairs.json")])
    assert json.loads((tmp_path / "pairs.json").read_text()) == result
    for family in ("swin", "mixer"):
        counted = result["families"][family]
        assert counted["planned"] == len(counted["pairs"])
        assert counted["planned"] + sum(counted["refused"].values()) == counted["models"] * (counted["models"] - 1)
    assert result["families"]["swin"]["planned"] >= 20 and result["families"]["mixer"]["planned"] >= 6
    assert "mixer_b16_224 -> mixer_s16_224" in result["families"]["mixer"]["pairs"]
    assert "refused: depth" in capsys.readouterr().out


def test_anything_but_a_refusal_ends_the_count(monkeypatch):
    pairs = bench("pairs")
    monkeypatch.setattr(pairs, "match", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="neither planned nor refused"):
        pairs.main(["--families", "mixer"])
