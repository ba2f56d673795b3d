"""--gain: which weights are multiplied, and by how much."""

import math

import pytest
import torch
from conftest import write_smooth
from small_models import PAIRS, assert_same, layout, plan_of, selected, small_pair
from torch import nn

import models
import weight_selection
from options.selection import selection_options
from selection.rules import Choices
from weightfiles.initialization import read_description


@pytest.mark.parametrize("kind", PAIRS)
def test_gains_are_the_ratios_of_the_inputs_of_layers(kind):
    teacher, sizes, student, smaller = PAIRS[kind]
    pair = layout(teacher, include_head=True, **sizes), layout(student, include_head=True, **smaller)
    plan = plan_of(*pair, Choices(gain=1.0, heads="keep" if "norms in" in kind else None))
    gained = {key: step[1] for key, source in plan.sources.items() for step in source.steps if step[0] == "gain"}
    large, small = (
        dict(models.create(*each, device="meta").named_modules()) for each in (PAIRS[kind][:2], PAIRS[kind][2:])
    )
    expected = {}
    for name, layer in small.items():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            # the teacher's layers of the same names are taken; a depthwise filter has one input in both
            ratio = large[name].weight.shape[1] / layer.weight.shape[1]
            expected |= {f"{name}.weight": ratio} if ratio != 1 else {}
    assert gained == pytest.approx(expected) and gained


@pytest.mark.parametrize(("word", "power"), [("width", 0.5), ("1", 1), ("-0.5", -0.5), ("0", 0)])
def test_weights_of_layers_are_multiplied_and_nothing_else(word, power, small_teacher, tmp_path):
    words = small_pair(small_teacher[0], f"--gain={word}")
    file = weight_selection.main(["--output_dir", str(tmp_path / "x.pth"), *words])
    plain, gained = selected(small_teacher[0]), torch.load(file, weights_only=True)
    layers = "attn.qkv attn.proj mlp.fc1 mlp.fc2".split()
    matrices = [f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers]
    # 48 inputs become 24, 192 become 96; the image's channels stay 3
    expected = {key: plain[key] * 2**power if key in matrices else plain[key] for key in plain}
    assert_same(gained, expected)
    assert read_description(file)["choices"]["gain"] == power


def test_refit_starts_from_the_multiplied_weights(small_teacher, tmp_path):
    images = write_smooth(tmp_path / "images", [(32, 32)] * 16)
    words = f"--refit true --ridge inf --element_selection uniform --heads blend --data_path {images} --gain width"
    file = weight_selection.main(
        ["--output_dir", str(tmp_path / "x.pth"), *small_pair(small_teacher[0], *words.split())]
    )
    assert_same(torch.load(file, weights_only=True), selected(small_teacher[0], choices=Choices(gain=0.5)))


def test_gain_reads_half_precision_into_float32(small_teacher, tmp_path):
    halves = {key: value.half() for key, value in small_teacher[1].items()}
    torch.save(halves, tmp_path / "half.pth")
    tensors = selected(tmp_path / "half.pth", choices=Choices(gain=0.5))
    assert tensors["blocks.0.mlp.fc1.weight"].dtype == torch.float32
    assert tensors["blocks.0.mlp.fc1.bias"].dtype == torch.float16
    whole = halves["blocks.0.mlp.fc1.weight"][::2, ::2].float()
    assert torch.equal(tensors["blocks.0.mlp.fc1.weight"], whole * math.sqrt(2))


@pytest.mark.parametrize("text", ["wide", "nan", "inf", "11", ""])
def test_gain_is_width_or_a_number(text, capsys):
    with pytest.raises(SystemExit) as ended:
        selection_options(["--plan", f"--gain={text}"])
    assert ended.value.code == 2 and "--gain" in capsys.readouterr().err
