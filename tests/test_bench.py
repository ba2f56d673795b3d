"""The benchmarks run, and their printed figures follow from what they measured."""

import json
import multiprocessing
import re
from argparse import Namespace

import pytest
import torch
from conftest import write_images

from bench import pairs, refit, selection, throughput

SMALL = "--models vit_tiny --input_size 48 --device cpu --seconds 0.01".split()


def test_pairs_of_the_two_small_families_are_counted(tmp_path, capsys):
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
    monkeypatch.setattr(pairs, "match", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="neither planned nor refused"):
        pairs.main(["--families", "mixer"])


def test_throughput_prints_a_table_with_every_way(tmp_path, capsys):
    options = "--batch_sizes 4 --num_workers 1 --rounds 2 --teacher vit_small"
    result = throughput.main([*SMALL, *options.split(), "--ways", *throughput.WAYS, "--out", str(tmp_path / "cpu")])
    assert json.loads((tmp_path / "cpu.json").read_text()) == result
    rates = result["results"][0]["images_per_second"]
    ways, habits = list(throughput.WAYS), "the original's habits"
    assert set(rates) == {
        "a: bare step",
        *(f"b: data alone, {way}" for way in [*ways, habits]),
        *(f"b: the host's part alone, batch 64, device, cache {cache}" for cache in ("ram", "device")),
        *(f"c: training, {way}" for way in ways),
        f"d: {habits}",
        "t: bare step, teacher vit_small",
    }
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())
    printed = capsys.readouterr().out
    ratios = [c / a for c, a in zip(rates["c: training, timm"], rates["a: bare step"], strict=True)]
    row = next(line for line in printed.splitlines() if line.startswith("| c: training, timm |"))
    shown = f"{sum(ratios) / 2:.3f} ({min(ratios):.3f}..{max(ratios):.3f})"
    assert re.split(r" *\| *", row)[3] == shown
    assert not multiprocessing.active_children()


def test_way_that_the_images_rule_out_is_left_out_with_a_reason(tmp_path, capsys):
    write_images(tmp_path, "train", {"small": 6}, size=40)
    write_images(tmp_path, "train", {"large": 6}, size=60)
    options = "--batch_sizes 2 4 --num_workers 1 --rounds 1"
    argv = [*SMALL, *options.split(), "--data", str(tmp_path), "--ways", *list(throughput.WAYS)[3:]]
    both = throughput.main(argv)["results"]
    for each in both:
        ((way, reason),) = each["left_out"].items()
        assert way == "device, cache device" and "--cache_size" in reason
        assert {"c: training, device, cache ram", "d: the original's habits"} <= set(each["images_per_second"])
        assert not any("host's part" in name for name in each["images_per_second"])
    assert capsys.readouterr().out.count("Left out, device, cache device: ") == 2
    sized = throughput.main([*argv, "--cache_size", "40", "--batch_sizes", "2"])["results"][0]
    assert not sized["left_out"] and "c: training, device, cache device" in sized["images_per_second"]


def test_compiling_is_not_timed_and_skips_the_originals_habits(monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **kwargs: compiled.append((model, kwargs)))
    options = "--batch_sizes 2 --num_workers 0 --rounds 1 --compile --compile_mode reduce-overhead"
    result = throughput.main([*SMALL, *options.split(), "--ways", "device, cache ram"])
    assert result["results"][0]["compile_seconds"] > 0
    assert [kwargs for _, kwargs in compiled] == [{"mode": "reduce-overhead"}]
    assert "which count nowhere" in capsys.readouterr().out


def test_ratio_is_the_median_of_rounds_despite_a_disturbed_one():
    rates = {"c": [9.0] * 40 + [9.5] * 20 + [10.0] * 40, "a": [10.0] * 99 + [1.0]}
    # of 100 rounds, 40 to 60 heads in 95 % of all throws: the 41st and the 60th in order
    assert throughput.ratio(rates, "c", "a") == "0.950 (0.950..0.950)"
    rates["c"] = [8 + number / 50 for number in range(100)]
    rates["a"] = [10.0] * 100
    assert throughput.ratio(rates, "c", "a") == "0.899 (0.880..0.918)"
    assert throughput.ratio(rates, "c", "d") == ""


def flops(model, input_size, classes):
    options = Namespace(device="cpu", input_size=input_size, compile=False)
    return throughput.Bench(model, 2, Namespace(classes=classes), options).flops


def test_flops_of_a_convnext_count_each_group_once():
    # 0.78 G multiply-adds forward (Liu et al. and timm's table), 2 operations each, thrice
    assert flops("convnext_femto", 224, 1000) == pytest.approx(6 * 0.785e9, rel=0.02)


@pytest.mark.parametrize("input_size", [32, 224])
def test_flops_of_a_vit_are_those_of_its_matrices(input_size):
    # 2 operations a multiply-add, forward and twice backward, but no gradient of the image
    patches, width, hidden, layers = (input_size // 16) ** 2, 192, 768, 12
    tokens = patches + 1
    attention = 2 * tokens * tokens * width
    layer = tokens * (4 * width * width + 2 * width * hidden) + attention
    embedding = patches * 3 * 16 * 16 * width
    forward = embedding + layers * layer + 10 * width
    assert flops("vit_tiny", input_size, 10) == pytest.approx(2 * (3 * forward - embedding), rel=0.001)


def test_rate_is_not_misled_by_batches_that_were_ready(monkeypatch):
    clock, done = [0.0], []

    def steps(count):  # the first four take almost no time, the others a tenth of a second
        clock[0] += sum(1e-6 if len(done) + number < 4 else 0.1 for number in range(count))
        done.extend(range(count))

    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    rate = throughput.rate(steps, 16, 0.5)
    assert clock[0] < 1.0 and rate == pytest.approx(16 * len(done) / clock[0])


def test_refit_is_measured_with_its_disk(tmp_path, monkeypatch, capsys):
    small = selection.Pair("ConvNeXt-F → A", "convnext_femto", {}, "femto.safetensors", "convnext_atto")
    monkeypatch.setitem(refit.PAIRS, "convnext_t", small)
    measured = refit.measure("convnext_t", 16, tmp_path)
    streams = {"femto": 48 * 56 * 56, "atto": 40 * 56 * 56}  # values behind the first block, the largest
    images, held_out = 3 * 224 * 224, 3
    values = 16 * (images + streams["femto"] + streams["atto"]) + held_out * streams["atto"]
    assert measured["disk_mib"] == pytest.approx(4 * values / 2**20)
    assert measured["seconds"] > 0 and len(list((tmp_path / "images").iterdir())) == 16
    text = refit.report([measured])
    assert f"| ConvNeXt-F → A | 16 | {measured['seconds']:.0f} |" in text
