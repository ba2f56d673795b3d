"""What neither names nor shapes show: rotations, norms, activations, pooling. If they differ, so does the function."""

import pytest
import safetensors.torch
import torch

import models
import weight_selection
from selection.families import FAMILIES
from selection.family import Layout, Refused
from selection.match import match
from selection.plan import choose
from selection.rules import Choices
from utils import UserError

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
DINOV3 = ("vit_tiny_patch16_dinov3_qkvb", {"embed_dim": 32, "depth": 1, "num_heads": 2})


def plan(name, teacher, student, *, include_head=False):
    """The plan of two models of the architecture `name` with these further arguments."""
    built = [models.create(name, kwargs, device="meta") for kwargs in (teacher, student)]
    family = FAMILIES[models.family_of(built[0])]
    layouts = [Layout.of(model, family, () if include_head else models.head_prefixes(model)) for model in built]
    return choose(match(family, *layouts, Choices()), Choices())


@pytest.mark.parametrize("other", [{"rope_rotate_half": False}, {"rope_type": "cat"}, {"use_rot_pos_emb": False}])
def test_other_rotations_are_refused(other):
    name, kwargs = DINOV3
    assert plan(name, kwargs, kwargs).groups
    with pytest.raises(
        Refused, match="rotary positions: the teacher's are RotaryEmbeddingDinoV3 of halves, the student's"
    ):
        plan(name, kwargs, {**kwargs, **other})


def test_other_norms_are_refused():
    with pytest.raises(Refused, match="norms: the teacher's are RMSNorm, the student's LayerNorm"):
        plan("vit_tiny", {**VIT, "norm_layer": "rmsnorm"}, VIT)


def test_position_embedding_that_the_student_lacks_is_refused():
    with pytest.raises(Refused, match=r"the teacher's pos_embed \[1, 5, 16\] has no counterpart"):
        plan("vit_tiny", VIT, {**VIT, "pos_embed": "none"})


def test_other_activation_is_noted():
    notes = plan("vit_tiny", {**VIT, "act_layer": "quick_gelu"}, VIT).notes
    assert notes == {"activation: the teacher's is QuickGELU, the student's GELU": 1}


@pytest.mark.parametrize("include_head", [True, False])
def test_other_pooling_is_noted_if_the_classifier_is_taken(include_head):
    notes = plan("vit_tiny", VIT, {**VIT, "global_pool": "avg", "fc_norm": False}, include_head=include_head).notes
    assert ("pooling: the teacher's is token, the student's avg" in notes) == include_head


def test_images_smaller_than_a_patch_are_refused():
    with pytest.raises(Refused, match="0x0 patches: they are smaller than a patch"):
        plan("vit_tiny", VIT, {**VIT, "img_size": 4})


# ---- the file and the folder ----


def words(kwargs):
    return [f"{key}={value}" for key, value in kwargs.items()]


def cut(tmp_path, weights, *more, teacher=VIT, student=VIT):
    safetensors.torch.save_file(weights, tmp_path / "t.safetensors")
    argv = ["--output_dir", str(tmp_path / "out.pth"), "--pretrained_path", str(tmp_path / "t.safetensors")]
    argv += ["--pretrained_model", "vit_tiny", "--pretrained_kwargs", *words(teacher)]
    argv += ["--student_model", "vit_tiny", "--student_kwargs", *words(student), *more]
    return weight_selection.main(argv)


@pytest.fixture
def weights():
    return models.create("vit_tiny", VIT).state_dict()


def test_file_of_another_patch_size_is_warned_of(weights, tmp_path, caplog):
    weights["patch_embed.proj.weight"] = torch.randn(16, 3, 4, 4)
    cut(tmp_path, weights)
    assert "timm made [16, 3, 8, 8] of patch_embed.proj.weight [16, 3, 4, 4]: is it a file of vit_tiny?" in caplog.text


def test_file_under_other_names_shows_one_of_them(weights, tmp_path):
    with pytest.raises(UserError, match=r"has none of the tensors, but such as backbone\.\S+, of vit_tiny"):
        cut(tmp_path, {f"backbone.{key}": value for key, value in weights.items()})


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_not_floating_point_are_refused(dtype, weights, tmp_path):
    weights["norm.weight"] = weights["norm.weight"].to(dtype)
    with pytest.raises(UserError, match=rf"norm\.weight has dtype {str(dtype)[6:]}, expected floating point"):
        cut(tmp_path, weights)


def test_magnitudes_that_are_not_finite_are_refused(weights, tmp_path):
    weights["norm.weight"][3] = torch.nan
    with pytest.raises(UserError, match=r"norm\.weight of the teacher holds values that are not finite"):
        cut(tmp_path, weights, "--element_selection", "magnitude", student={**VIT, "embed_dim": 8})


@pytest.mark.parametrize("name", ["x.bin", "x.PTH", "x.npz"])
def test_output_named_like_a_file_of_another_kind_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"wanted a folder, or a file ending in \.pth, \.pt, \.safetensors"):
        weight_selection.main(["--output_dir", str(tmp_path / name)])


def test_options_without_effect_are_warned_of(tmp_path, caplog, capsys):
    weight_selection.main(
        ["--plan", "--output_dir", str(tmp_path / "x"), "--model_type", "convnext", "--heads", "keep"]
    )
    assert "--heads keep has no effect: the family convnext has none" in caplog.text
    assert "--output_dir has no effect with --plan" in caplog.text
    assert '"heads": null' in capsys.readouterr().out
