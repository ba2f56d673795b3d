"""The teacher's weights from files of other layouts, and files of another model."""

import numpy as np
import pytest
import torch
from conftest import convnext_as_released
from small_models import assert_same, random_tensors, selected

import models
from bench import fuzz_samples
from models import ModelSpec
from selection.rules import Choices
from utils import UserError
from weight_selection import select_weights
from weightfiles.reading import Part


def test_training_checkpoint_gives_its_weights_or_their_average(small_teacher, tmp_path):
    path, weights = small_teacher
    average = {key: value + 1 for key, value in weights.items()}
    file = tmp_path / "checkpoint-2.pth"
    torch.save({"model": weights, "model_ema": average, "epoch": 2, "optimizer": {"state": {}}}, file)
    plain, ema = selected(file), selected(file, part=Part("model_ema"))
    assert_same(plain, selected(path))
    assert torch.equal(ema["norm.weight"], plain["norm.weight"] + 1)


def test_vit_npz_of_the_original_release_is_read_as_by_timm(tmp_path):
    np.savez(tmp_path / "vit.npz", **fuzz_samples.arrays())
    torch.save(fuzz_samples.load_arrays(tmp_path / "vit.npz"), tmp_path / "timm.pth")
    ours, by_timm = (
        select_weights(*fuzz_samples.PAIR, pretrained_path=str(tmp_path / name))[0] for name in ("vit.npz", "timm.pth")
    )
    assert_same(ours, by_timm)


def test_original_convnext_layout_is_read(tmp_path):
    kwargs = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 5}
    weights = random_tensors(models.create("convnext_femto", kwargs), torch.float32)
    pair = ModelSpec("convnext_femto", kwargs), ModelSpec("convnext_femto", {**kwargs, "dims": (4, 8, 12, 16)})
    selected = []
    for name, content in (("convnext.pth", {"model": convnext_as_released(weights)}), ("timm.pth", weights)):
        torch.save(content, tmp_path / name)
        selected += select_weights(*pair, pretrained_path=str(tmp_path / name))[:1]
    assert_same(*selected)


def test_what_timm_resamples_of_a_half_file_is_in_float32(tmp_path):
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    weights = random_tensors(models.create("vit_tiny", kwargs), torch.float16)
    torch.save(weights, tmp_path / "half.pth")
    torch.save({key: tensor.float() for key, tensor in weights.items()}, tmp_path / "single.pth")
    teacher = ModelSpec("vit_tiny", kwargs | {"img_size": 64})
    student = ModelSpec("vit_tiny", kwargs | {"img_size": 64, "embed_dim": 16, "num_heads": 1})
    half, single = (
        select_weights(teacher, student, pretrained_path=str(tmp_path / name))[0] for name in ("half.pth", "single.pth")
    )
    assert half["pos_embed"].dtype == torch.float32 and torch.equal(half["pos_embed"], single["pos_embed"])
    assert half["norm.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("blocks.1.norm1.bias", None, "has no blocks.1.norm1.bias"),
        ("norm.bias", torch.zeros(47), r"has norm.bias \[47\], unlike the \[48\]"),
        ("blocks.7.norm1.bias", torch.zeros(48), "has blocks.7.norm1.bias, which is no tensor"),
        ("norm.bias", torch.full((48,), torch.nan), "norm.bias"),
        ("norm.bias", torch.zeros(48).to(torch.int8), "norm.bias has dtype int8, expected floating point"),
        ("norm.bias", torch.zeros(48).to(torch.complex64), "norm.bias has dtype complex64, expected floating point"),
    ],
)
def test_teacher_file_of_other_tensors_is_refused(key, value, message, small_teacher, tmp_path):
    weights = {**small_teacher[1], key: value}
    torch.save({key: value for key, value in weights.items() if value is not None}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=rf"bad\.pth.*{message}"):
        selected(tmp_path / "bad.pth")


def test_file_of_another_family_under_a_teachers_name_is_refused(small_teacher):
    with pytest.raises(
        UserError, match=r"teacher\.pth has no layout that convnext_tiny is known in: it is a ViT by timm's names"
    ):
        select_weights(ModelSpec("convnext_tiny"), ModelSpec("convnext_femto"), pretrained_path=small_teacher[0])


def test_file_of_another_patch_size_is_warned_of(small_teacher, tmp_path, caplog):
    torch.save({**small_teacher[1], "patch_embed.proj.weight": torch.randn(48, 3, 4, 4)}, tmp_path / "other.pth")
    selected(tmp_path / "other.pth")
    assert (
        "timm made [48, 3, 8, 8] of patch_embed.proj.weight [48, 3, 4, 4]: is it a file of this model?" in caplog.text
    )


def test_magnitudes_that_are_not_finite_are_refused(small_teacher, tmp_path):
    small_teacher[1]["norm.weight"][3] = torch.nan  # of an index that a score of nan might leave out
    torch.save(small_teacher[1], tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"norm\.weight of the teacher holds values that are not finite"):
        selected(tmp_path / "nan.pth", choices=Choices(element_selection="magnitude"))


def test_one_of_several_shards_is_named(small_teacher, tmp_path):
    weights = small_teacher[1]
    name = tmp_path / "pytorch_model-00001-of-00002.bin"
    torch.save({key: weights[key] for key in list(weights)[:5]}, name)
    with pytest.raises(UserError, match=r"-of-00002\.bin is one of 2 shards: give their \.index\.json, or the folder"):
        selected(name)
