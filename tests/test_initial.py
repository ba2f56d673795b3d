"""--init: the classic initial values and mimetic ones."""

import math

import pytest
import torch

import main
import models
from models.initial import initialize
from options.training import training_options
from utils import UserError

VIT = ("vit_tiny", {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3})


def drawn(scheme, name=VIT[0], kwargs=VIT[1]):
    torch.manual_seed(0)
    model = models.create(name, kwargs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    initialize(model, scheme)
    after = model.state_dict()
    return model, after, {key for key in before if not torch.equal(before[key], after[key])}


def test_timms_values_stay():
    assert drawn("timm")[2] == set()


@pytest.mark.parametrize("name, kwargs", [VIT, ("convnext_femto", {"dims": (24, 48, 96, 192)})])
def test_xavier_values_are_within_the_bound_of_each_layer(name, kwargs):
    model, weights, changed = drawn("xavier", name, kwargs)
    matrices = {f"{key}.weight": layer for key, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    matrices |= {f"{key}.weight": layer for key, layer in model.named_modules() if isinstance(layer, torch.nn.Conv2d)}
    assert matrices.keys() <= changed and not any("norm" in key for key in changed)
    for key, layer in matrices.items():
        weight = weights[key]
        outputs = len(weight) / (3 if "qkv" in key else getattr(layer, "groups", 1))
        bound = math.sqrt(6 / (weight[0].numel() + outputs * weight[0, 0].numel()))
        assert weight.abs().max() <= bound and weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.2)
        assert layer.bias is None or not layer.bias.any()


def test_kaiming_values_have_the_variance_of_their_inputs():
    _, weights, _ = drawn("kaiming")
    for key, inputs in (("blocks.0.mlp.fc2.weight", 384), ("patch_embed.proj.weight", 192)):
        assert weights[key].std() == pytest.approx(math.sqrt(2 / inputs), rel=0.05)


def test_mimetic_products_are_near_the_identity_and_its_negative():
    _, weights, changed = drawn("mimetic")
    assert {key.partition(".attn.")[0] for key in changed} == {"blocks.0", "blocks.1"}
    query, key, value = weights["blocks.1.attn.qkv.weight"].chunk(3)
    eye = torch.eye(96)
    for head in range(3):
        rows = slice(32 * head, 32 * head + 32)
        product = query[rows].T @ key[rows]
        # the 32 largest of 96 singular values: their part of 0.7 I, and no other than that in the mean
        assert torch.linalg.matrix_rank(product) == 32
        assert 0.3 < product.diagonal().mean() < 0.7 and (product - product.diagonal().diag()).mean().abs() < 0.02
    outputs = weights["blocks.1.attn.proj.weight"] @ value
    noise = (outputs + 0.4 * eye) / 0.4
    assert noise.mean().abs() < 0.01 and noise.std() == pytest.approx(1 / math.sqrt(96), rel=0.05)
    assert not weights["blocks.1.attn.qkv.bias"].any()


def test_mimetic_is_refused_for_other_families():
    with pytest.raises(UserError, match="--init mimetic is for ViTs, not for a ConvNeXt"):
        drawn("mimetic", "convnext_femto", {"dims": (24, 48, 96, 192)})
    with pytest.raises(UserError, match="--init mimetic needs one attention in each block"):
        drawn("mimetic", "vit_small_patch16_18x2_224", {"embed_dim": 64, "depth": 2, "num_heads": 2})


def test_mimetic_is_refused_before_the_images_are_read(tmp_path):
    missing = f"--device cpu --model convnext_femto --init mimetic --data_set image_folder --data_path {tmp_path}/none"
    with pytest.raises(UserError, match="--init mimetic is for ViTs, not for a ConvNeXt"):
        main.main(missing.split())


def test_init_beside_initialize_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as ended:
        training_options("--init xavier --initialize x.pth".split())
    assert (
        ended.value.code == 2 and "--init xavier is for random init, not with --initialize" in capsys.readouterr().err
    )


def test_run_starts_from_the_scheme_and_resumes(train, tmp_path):
    first = train("--init mimetic --epochs 1")
    assert first["epoch"] == 0
    with pytest.raises(UserError, match="--init was mimetic, is timm"):
        train("--epochs 2")
