"""Weights for other images or patches start a run as a selection would resample them."""

import json

import pytest
import torch
from conftest import weights_of
from small_models import CONVNEXT, EVA, EVA02, MIXER, PAIRS, RESNET, SWIN, SWIN_T, VIT, VIT_T, random_tensors

import models
import weight_selection
from models import ModelSpec
from selection.resize import resized
from utils import UserError
from weight_selection import select_weights

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}  # as in conftest
OTHER = {
    "image": (VIT_T, VIT, {"img_size": 24}, "pos_embed resampled from 4x4 patches to 6x6"),
    "patch": (VIT_T, VIT, {"patch_size": 8, "img_size": 32}, "resampled from patches of 4x4 to 8x8"),
    "both, distilled": ("deit_tiny_distilled_patch16_224", VIT, {"patch_size": 8}, "from 4x4 patches to 2x2"),
    "registers without rows": (VIT_T, {**VIT, "reg_tokens": 2, "no_embed_class": True}, {"img_size": 32}, "to 8x8"),
    "channels": (VIT_T, VIT, {"in_chans": 1}, "adapted from 3 to 1 image channels"),
    "rotary": (EVA02, EVA, {"img_size": 32}, "pos_embed resampled from 4x4 patches to 8x8"),
    "windows": (SWIN_T, SWIN, {"window_size": 2, "img_size": 16}, "resampled from windows of 4x4 to 2x2"),
    "convnext": ("convnext_atto", CONVNEXT, {"in_chans": 1}, "adapted from 3 to 1 image channels"),
    "resnet": ("resnet26d", {**RESNET, "stem_width": 8}, {"in_chans": 1}, "adapted from 3 to 1 image channels"),
    "mixer": ("small_mixer", MIXER, {"img_size": 32, "patch_size": 8}, "resampled from patches of 4x4 to 8x8"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_weights_are_resampled_as_by_a_selection(kind, tmp_path):
    name, kwargs, changed, note = OTHER[kind]
    tensors = random_tensors(models.create(name, kwargs), torch.float32)
    torch.save(tensors, tmp_path / "x.pth")
    pair = ModelSpec(name, kwargs), ModelSpec(name, {**kwargs, **changed})
    expected, _ = select_weights(*pair, pretrained_path=str(tmp_path / "x.pth"), include_head=True)
    result, notes = resized(tensors, models.create(name, {**kwargs, **changed}, device="meta"), None)
    assert result.keys() == expected.keys() and any(note in each for each in notes)
    assert all(torch.equal(result[key], expected[key]) for key in expected)
    assert resized(tensors, models.create(name, kwargs, device="meta"), None) == (tensors, [])


@pytest.mark.parametrize("kind", PAIRS)
def test_weights_of_the_models_own_size_stay_as_they_are(kind):
    *_, name, kwargs = PAIRS[kind]
    model = models.create(name, kwargs, device="meta")
    tensors = random_tensors(model, torch.float32)
    result, notes = resized(tensors, model, None)
    assert notes == [] and all(result[key] is tensors[key] for key in tensors)


def test_grid_that_is_not_square_is_known_from_the_image_size():
    narrow, wide = ({**VIT, "img_size": size} for size in ((8, 32), (16, 16)))  # both of 16 patches
    tensors, model = (
        random_tensors(models.create(VIT_T, narrow), torch.float32),
        models.create(VIT_T, wide, device="meta"),
    )
    assert resized(tensors, model, None)[1] == []
    assert resized(tensors, model, [8, 32])[1] == ["pos_embed resampled from 2x8 patches to 4x4"]
    larger = models.create(VIT_T, {**VIT, "img_size": 32}, device="meta")
    tensors = random_tensors(models.create(VIT_T, {**VIT, "img_size": (8, 16)}), torch.float32)
    assert resized(tensors, larger, None)[0]["pos_embed"] is tensors["pos_embed"]  # 8 patches are no square


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("patch_embed.proj.weight", (24, 3, 0, 0)),
        ("patch_embed.proj.weight", (24, 0, 4, 4)),
        ("patch_embed.proj.weight", (24, 3, 3000, 3000)),
        ("patch_embed.proj.weight", (24,)),
        ("pos_embed", (1, 0, 24)),
        ("pos_embed", (1, 1, 24)),
        ("pos_embed", (1, 65, 12)),
        ("pos_embed", (65,)),
        ("pos_embed", ()),
        ("cls_token", (1, 1, 1)),
    ],
)
def test_tensors_that_no_model_has_stay_as_they_are(key, shape):
    tensors = random_tensors(models.create(VIT_T, VIT), torch.float32) | {key: torch.zeros(()).expand(shape)}
    model = models.create(VIT_T, VIT, device="meta")
    for image_size in (None, 16, -16, 0, [16], [8, 32], "16", [[]]):
        result, _ = resized(tensors, model, image_size)
        assert result[key] is tensors[key]


@pytest.fixture
def described(tmp_path):
    """Return a function: a file of `select_weights` for the tiny ViT with these arguments."""

    def write(**kwargs):
        spec = ModelSpec("vit_tiny", {**TINY, "img_size": 32, **kwargs})
        torch.save(random_tensors(models.create(spec.name, spec.kwargs), torch.float32), tmp_path / "teacher.pth")
        argv = ["--output_dir", str(tmp_path / "init.pth"), "--pretrained_path", str(tmp_path / "teacher.pth")]
        for role in ("pretrained", "student"):
            argv += [f"--{role}_model", spec.name, f"--{role}_kwargs", *(f"{k}={v}" for k, v in spec.kwargs.items())]
        return weight_selection.main(argv)

    return write


@pytest.mark.parametrize("more", ["--input_size 48", "--input_size 64 --model_kwargs patch_size=16"])
def test_run_starts_from_weights_of_other_images_and_says_so(more, described, train, tmp_path, caplog):
    file = described()
    train("--epochs 1 --warmup_epochs 0 --lr 0 --min_lr 0 --initialize", file, more)
    options = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    kwargs = {**options["model_kwargs"], "img_size": options["input_size"]}
    pair = ModelSpec("vit_tiny", {**TINY, "img_size": 32}), ModelSpec("vit_tiny", kwargs)
    expected, description = select_weights(*pair, pretrained_path=str(file))
    trained = weights_of(tmp_path / "run", "checkpoint-0.pth")
    assert all(torch.equal(trained[key], tensor) for key, tensor in expected.items())
    for note in description["plan"]["notes"]:
        assert f"--initialize {file}: {note}" in caplog.text


def test_checkpoint_of_small_images_starts_a_run_on_large_ones(train, tmp_path, caplog):
    train("--epochs 1", to="a")
    train("--epochs 1 --input_size 64 --initialize", tmp_path / "a" / "checkpoint-0.pth", to="b")
    assert "checkpoint-0.pth: pos_embed resampled from 4x4 patches to 8x8" in caplog.text


def test_other_differences_are_still_named(described, train):
    file = described(embed_dim=16, img_size=64)
    with pytest.raises(
        UserError, match=r"has cls_token \[1, 1, 16\], unlike the \[1, 1, 32\] of vit_tiny; see --model_k"
    ):
        train("--initialize", file)
