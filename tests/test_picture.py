import sys

import numpy as np
import pytest
from PIL import Image

import weight_selection
from models.families import DEFAULT_STUDENT
from selection import picture
from selection.rules import Choices
from selection.strips import MOST_NOTES, MOST_ROWS, Row, columns, count_words, headline, note_lines, panels
from utils import UserError
from weight_selection import DEFAULT_TEACHER, initialize


def describe(family, **choices):
    """What a picture of a family's default pair is drawn from."""
    _, description = initialize(
        DEFAULT_TEACHER[family], DEFAULT_STUDENT[family], choices=Choices(**choices), plan_only=True
    )
    return description


def plan_of(groups, layers=None):
    """A plan with these groups, each a size and the slots kept."""
    layers = layers or {"blocks": {"teacher_size": 4, "indices": [0, 2]}}
    return {
        "layers": layers,
        "groups": {name: {"teacher_size": size, "indices": kept} for name, (size, kept) in groups.items()},
    }


def labels(panel):
    return [row.label for row in panel.rows]


def row_of(size, kept):
    shares = np.zeros(size)
    shares[kept] = 1
    return Row("", "", len(kept), shares)


def test_kept_slots_are_dark_at_their_places():
    (stream, mlp) = panels(plan_of({"stream": (6, [0, 3, 4]), "blocks.0.mlp": (4, [3])}))
    assert stream.rows[0].shares.tolist() == [1, 0, 0, 1, 1, 0]
    assert mlp.rows[0].shares.tolist() == [0, 0, 0, 1]
    assert [row.kept for panel in (stream, mlp) for row in panel.rows] == [3, 1]


def test_layers_that_keep_the_same_slots_are_one_row():
    kept = {0: [0, 2], 1: [0, 2], 2: [1, 3], 3: [0, 2]}
    (heads,) = panels(plan_of({f"blocks.{layer}.attn.heads": (4, slots) for layer, slots in kept.items()}))
    assert labels(heads) == ["blocks 0–1, 3", "blocks 2"]  # noqa: RUF001


def test_stages_have_rows_of_their_own():
    layers = {f"stages.{stage}.blocks": {"teacher_size": 2, "indices": [0]} for stage in (0, 1)}
    groups = {"stages.0": (4, [0, 2]), "stages.1": (4, [0, 2]), "stages.1.blocks.0.mlp": (4, [0, 2])}
    stream, mlp = panels(plan_of(groups, layers))
    assert (labels(stream), labels(mlp)) == (["stages.0", "stages.1"], ["stages.1.blocks 0"])


def test_each_attention_of_a_layer_has_a_row():
    (attention,) = panels(plan_of({f"blocks.0.attns.{number}.attn": (4, [0]) for number in (0, 1)}))
    assert labels(attention) == ["blocks (attns.0) 0", "blocks (attns.1) 0"]


def test_groups_without_a_choice_are_left_out():
    assert panels(plan_of({"layer1.0.conv2.groups": (1, [0])}, {"layer1": {"teacher_size": 1, "indices": [0]}})) == []


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_evenly_spaced_slots_look_neither_kept_nor_dropped_altogether(stride):
    shares = row_of(3072, range(0, 3072, stride)).shares
    assert columns(shares, 12) == pytest.approx(1 / stride)  # 12 slots hold 6, 4 or 3 of them
    assert columns(shares, 1).tolist() == shares.tolist()


def test_the_last_column_is_the_mean_of_what_is_left():
    assert columns(np.array([1.0, 0, 1, 1, 1]), 2).tolist() == [0.5, 1, 1]


def test_counts_say_the_stride_where_there_is_one():
    kept = {"all 4": (4, range(4)), "10 of 20, stride 2": (20, range(0, 20, 2)), "8 of 20": (20, range(8))}
    assert [count_words(row_of(*slots)) for slots in kept.values()] == list(kept)
    assert count_words(row_of(16, [3, 8, 13])) == "3 of 16"  # an accident


@pytest.mark.parametrize("family", ["vit", "convnext", "swin"])
def test_tensors_that_choose_for_themselves_are_bounded_in_number(family):
    found = panels(describe(family, element_selection="random_inconsistent")["plan"])
    stream = found[0]
    assert sum(len(panel.rows) for panel in found) <= MOST_ROWS
    assert stream.total > len(stream.rows)
    mean = stream.rows[0]  # random slots, so that about as many tensors keep each of them
    assert "mean of" in mean.label and mean.shares.mean() == pytest.approx(mean.kept / len(mean.shares))


def test_headline_names_both_models_and_the_choices():
    title, words = headline(describe("vit", layer_selection="last", element_selection="random", heads="keep", seed=7))
    assert title == "vit_tiny_patch16_224 from vit_small_patch16_224.augreg_in21k"
    assert words == "layers: the last · slots: at random, seed 7 · heads: whole ones · classifier: left out"
    assert "heads" not in headline(describe("convnext"))[1]


def test_notes_are_bounded_in_number():
    assert note_lines({"folded": 12, "resampled": 1}) == ["folded (12 tensors)", "resampled"]
    many = note_lines({f"note {number}": 1 for number in range(MOST_NOTES + 5)})
    assert many[MOST_NOTES:] == ["… and 5 more"]


@pytest.mark.parametrize("family", DEFAULT_TEACHER)
def test_picture_of_each_family_has_a_sane_size(family, tmp_path):
    pytest.importorskip("matplotlib")
    picture.draw(describe(family), tmp_path / "new" / "plan.png")
    with Image.open(tmp_path / "new" / "plan.png") as image:
        width, height = image.size
    assert width <= 16 * 150 and 400 < height <= 20 * 150


def test_picture_of_tensors_that_choose_for_themselves_has_a_sane_size(tmp_path):
    pytest.importorskip("matplotlib")
    picture.draw(describe("swin", element_selection="random_inconsistent"), tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as image:
        assert image.height <= 20 * 150


@pytest.mark.parametrize(("suffix", "start"), [(".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_suffix_names_the_format(suffix, start, tmp_path):
    pytest.importorskip("matplotlib")
    picture.draw(describe("convnext"), tmp_path / f"plan{suffix}")
    assert (tmp_path / f"plan{suffix}").read_bytes().startswith(start)


def test_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="--plot needs matplotlib: pip install matplotlib"):
        picture.check_plot(tmp_path / "plan.png")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("plan.txt", "ends in .png, .pdf or .svg"),
        ("folder.png", "is a folder"),
        ("file/plan.png", "file is not a folder"),
    ],
)
def test_a_name_that_no_picture_can_have_is_refused_before_the_work(name, problem, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(weight_selection, "initialize", None)
    with pytest.raises(UserError, match=f"--plot .*{problem}"):
        weight_selection.main(["--plan", "--plot", str(tmp_path / name)])
