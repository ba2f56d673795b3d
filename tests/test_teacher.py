"""The teacher's weights from every kind of file, and files of another model."""

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import convnext_as_released
from small_models import SCRIPT_TEACHER, assert_same, random_values, save_teacher, selected

import models
from models import ModelSpec
from utils import UserError
from weight_selection import select_weights


@pytest.fixture
def small_teacher(tmp_path):
    """A file with the weights of a small ViT, and these weights."""
    return save_teacher(tmp_path)


@pytest.mark.parametrize("name", ["t.safetensors", "t.pth", "t.pt", "t.bin", "old.pth", "ddp.pth", "nested.pth"])
def test_same_weights_from_every_kind_of_file(name, small_teacher, tmp_path):
    path, weights = small_teacher
    file = tmp_path / name
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(weights, file)
    else:
        content = {
            "ddp.pth": {f"module.{key}": value for key, value in weights.items()},
            "nested.pth": {"state_dict": weights, "epoch": 3},
        }
        torch.save(content.get(name, weights), file, _use_new_zipfile_serialization=name != "old.pth")
    assert_same(selected(file), selected(path))


def test_training_checkpoint_gives_its_weights_or_their_average(small_teacher, tmp_path):
    path, weights = small_teacher
    average = {key: value + 1 for key, value in weights.items()}
    torch.save(
        {"model": weights, "model_ema": average, "epoch": 2, "optimizer": {"state": {}}}, tmp_path / "checkpoint-2.pth"
    )
    plain = selected(tmp_path / "checkpoint-2.pth")
    ema = selected(tmp_path / "checkpoint-2.pth", model_key="model_ema")
    assert torch.equal(plain["norm.weight"], selected(path)["norm.weight"])
    assert torch.equal(ema["norm.weight"], plain["norm.weight"] + 1)


def vit_npz(weights):
    """A ViT's tensors as the arrays of its original release."""
    w, dim, heads = (
        {key: value.numpy() for key, value in weights.items()},
        SCRIPT_TEACHER["embed_dim"],
        SCRIPT_TEACHER["num_heads"],
    )
    arrays = {"cls": w["cls_token"], "Transformer/posembed_input/pos_embedding": w["pos_embed"]}
    arrays |= {"embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0)}
    arrays |= {"embedding/bias": w["patch_embed.proj.bias"]}
    arrays |= {"head/kernel": w["head.weight"].T, "head/bias": w["head.bias"]}

    def norm(released, ours):
        return {f"{released}/scale": w[f"{ours}.weight"], f"{released}/bias": w[f"{ours}.bias"]}

    arrays |= norm("Transformer/encoder_norm", "norm")
    for i in range(SCRIPT_TEACHER["depth"]):
        to, of = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        # the original release numbers its norms and MLPs so; timm tells by the keys
        arrays |= norm(f"{to}LayerNorm_0", f"{of}norm1") | norm(f"{to}LayerNorm_2", f"{of}norm2")
        attention = f"{to}MultiHeadDotProductAttention_1/"
        for number, name in enumerate(("query", "key", "value")):
            kernel, bias = (np.split(w[f"{of}attn.qkv.{part}"], 3)[number] for part in ("weight", "bias"))
            arrays[f"{attention}{name}/kernel"] = kernel.T.reshape(dim, heads, -1)
            arrays[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}out/kernel"] = w[f"{of}attn.proj.weight"].T.reshape(heads, -1, dim)
        arrays[f"{attention}out/bias"] = w[f"{of}attn.proj.bias"]
        for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            arrays[f"{to}MlpBlock_3/{theirs}/kernel"] = w[f"{of}mlp.{ours}.weight"].T
            arrays[f"{to}MlpBlock_3/{theirs}/bias"] = w[f"{of}mlp.{ours}.bias"]
    return arrays


def test_vit_npz_of_the_original_release_is_read(small_teacher, tmp_path):
    path, weights = small_teacher
    np.savez(tmp_path / "vit.npz", **vit_npz(weights))
    assert_same(selected(tmp_path / "vit.npz"), selected(path))


def test_original_convnext_layout_is_read(tmp_path):
    kwargs = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 5}
    weights = random_values(models.create("convnext_femto", kwargs))
    torch.save({"model": convnext_as_released(weights)}, tmp_path / "convnext.pth")
    torch.save(weights, tmp_path / "timm.pth")
    student = {"depths": (1, 1, 1, 1), "dims": (4, 8, 12, 16)}
    pair = ModelSpec("convnext_femto", kwargs), ModelSpec("convnext_femto", student)
    released, by_timm = (
        select_weights(*pair, pretrained_path=str(tmp_path / name))[0] for name in ("convnext.pth", "timm.pth")
    )
    assert_same(released, by_timm)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("blocks.1.norm1.bias", None),
        ("norm.bias", torch.zeros(47)),
        ("blocks.7.norm1.bias", torch.zeros(48)),
        ("norm.bias", torch.full((48,), torch.nan)),
    ],
    ids=["missing", "other shape", "extra", "not finite"],
)
def test_teacher_file_of_another_model_is_refused(key, value, small_teacher, tmp_path):
    weights = dict(small_teacher[1])
    if value is None:
        del weights[key]
    else:
        weights[key] = value
    torch.save(weights, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=rf"bad\.pth.*{key}"):
        selected(tmp_path / "bad.pth")


def test_file_of_another_family_under_a_teachers_name_is_refused(small_teacher, tmp_path):
    with pytest.raises(UserError, match=r"teacher\.pth has no layout that convnext_tiny is known in"):
        select_weights(ModelSpec("convnext_tiny"), ModelSpec("convnext_femto"), pretrained_path=small_teacher[0])
