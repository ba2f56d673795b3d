"""The picture of a plan: its panels and strips in words and numbers, and the file."""

import sys

import numpy as np
import pytest
from PIL import Image

import models
import weight_selection
from models import ModelSpec
from selection import picture
from selection.picture import MOST_STRIPS, Strip, headline, panels
from selection.rules import Choices
from utils import UserError
from weight_selection import select_weights


def describe(family, **choices):
    """What a picture of a family's default pair is drawn from."""
    row = models.FAMILIES[family]
    return select_weights(ModelSpec(row.teacher), ModelSpec(row.student), choices=Choices(**choices), plan_only=True)[1]


def plan_of(groups, layers=("blocks",)):
    """A plan with these groups, each a size and the indices kept."""
    return {
        "layers": {name: {"teacher_size": 4, "indices": [0, 2]} for name in layers},
        "groups": {name: {"teacher_size": size, "indices": kept} for name, (size, kept) in groups.items()},
    }


def labels(strips):
    return [strip.label for strip in strips]


def test_each_kind_of_group_has_a_panel_with_what_is_kept():
    stream, mlp = panels(plan_of({"blocks.0.mlp": (4, [3]), "stream": (6, [0, 3, 4])})).items()
    assert stream == ("Residual stream: channels", [Strip("stream", 6, (0, 3, 4))])
    assert mlp == ("MLP: hidden units", [Strip("blocks 0", 4, (3,))])


def test_layers_that_keep_the_same_indices_share_a_strip():
    kept = {0: [0, 2], 1: [0, 2], 2: [1, 3], 3: [0, 2], 4: [0, 1], 5: [0, 1]}
    (heads,) = panels(plan_of({f"blocks.{layer}.attn.heads": (4, indices) for layer, indices in kept.items()})).values()
    assert labels(heads) == ["blocks 0, 1, 3", "blocks 2", "blocks 4\N{EN DASH}5"]


def test_each_stage_and_each_attention_has_strips_of_its_own():
    groups = {"stages.0": (4, [0, 2]), "stages.1": (4, [0, 2]), "stages.1.blocks.0.mlp": (4, [0, 2])}
    stream, mlp = panels(plan_of(groups, ("stages.0.blocks", "stages.1.blocks"))).values()
    assert (labels(stream), labels(mlp)) == (["stages.0", "stages.1"], ["stages.1.blocks 0"])
    parallel = {f"blocks.0.attns.{number}.attn": (4, [number]) for number in (0, 1)}
    (attention,) = panels(plan_of(parallel)).values()
    assert labels(attention) == ["blocks.0.attns 0", "blocks.0.attns 1"]


def test_groups_without_a_choice_are_left_out():
    assert panels(plan_of({"layer1.0.conv2.groups": (1, [0])}, ("layer1",))) == {}


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_evenly_spaced_indices_look_neither_kept_nor_dropped(stride):
    share = picture.columns(3072, range(0, 3072, stride))
    assert len(share) == 768 and share.mean() == pytest.approx(1 / stride)
    assert share.min() > 0 and share.max() < 1  # 4 indices a column hold 2, or 1 to 2, or 1


def test_columns_are_shares_of_the_indices_they_stand_for():
    assert picture.columns(5, [0, 2]).tolist() == [1, 0, 1, 0, 0]
    expected = [0.5] * 384 + [1]  # the last column stands for one index alone
    assert picture.columns(769, range(0, 769, 2)).tolist() == expected


def test_counts_say_the_stride_if_there_is_one():
    kept = {"all 4": (4, range(4)), "10 of 20, stride 2": (20, range(0, 20, 2)), "8 of 20": (20, range(8))}
    assert [Strip("", size, tuple(indices)).count() for size, indices in kept.values()] == list(kept)
    assert Strip("", 16, (3, 8, 13)).count() == "3 of 16"  # an accident


def test_headline_names_both_models_and_the_choices():
    title, words = headline(describe("vit", layer_selection="last", element_selection="random", heads="keep", seed=7))
    assert title == "vit_tiny_patch16_224 from vit_small_patch16_224.augreg_in21k"
    assert words == "layers: last · elements: random (seed 7) · heads: keep · classifier: left out"
    assert headline(describe("convnext"))[1] == "layers: first · elements: uniform · classifier: left out"


def drawn(description, path):
    pytest.importorskip("matplotlib")
    picture.draw(description, path)
    return path


@pytest.mark.parametrize("family", models.FAMILIES)
def test_picture_of_each_family_has_a_sane_size(family, tmp_path):
    with Image.open(drawn(describe(family), tmp_path / "new" / "plan.png")) as image:
        width, height = image.size
    assert width <= 16 * 150 and 400 < height <= 20 * 150


def test_picture_is_bounded_if_each_tensor_chooses_for_itself(tmp_path):
    description = describe("swin", element_selection="random_inconsistent")
    assert max(map(len, panels(description["plan"]).values())) == MOST_STRIPS
    with Image.open(drawn(description, tmp_path / "plan.png")) as image:
        assert image.height <= 25 * 150
        pixels = np.asarray(image.convert("L"))
    assert (pixels < 100).mean() > 0.1  # strips were drawn


def test_suffix_names_the_format(tmp_path):
    for suffix, start in {".pdf": b"%PDF", ".svg": b"<?xml"}.items():
        assert drawn(describe("convnext"), tmp_path / f"plan{suffix}").read_bytes().startswith(start)


def test_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="--plot needs matplotlib: pip install matplotlib"):
        picture.check_plot(tmp_path / "plan.png")


@pytest.mark.parametrize(
    ("name", "problem"),
    [("plan.txt", "ends in .png, .pdf or .svg"), ("folder.png", "is a folder"), ("file/plan.png", "is not a folder")],
)
def test_a_plot_that_cannot_be_written_is_refused_at_once(name, problem, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(weight_selection, "select_weights", None)
    with pytest.raises(UserError, match=f"--plot .*{problem}"):
        weight_selection.main(["--plan", "--plot", str(tmp_path / name)])


def test_refit_has_a_bar_for_each_block_before_and_after():
    shares = {"selected": {"explained_variance": {"blocks.0": 0.25}}, "explained_variance": {"blocks.0": 0.5}}
    (panel,) = picture._shares({"refit": shares}).values()
    assert panel == [picture.Share("blocks.0", 0.25, 0.5)] and panel[0].count() == "25% → 50%"
    assert picture._shares({}) == {}
