"""What transformers' config.json says of a model, and no tensor shows, is compared with what timm's model computes."""

import json
import re

import pytest
import torch
from small_models import assert_same
from test_layouts import TIMM_VIT, TRANSFORMERS, VIT, assert_close, images, loaded, of_transformers, read, saved

from options.parser import keyword
from utils import UserError


@pytest.fixture(autouse=True)
def _lines(caplog):
    caplog.set_level("INFO")


REFUSED_SETTINGS = [  # case, settings, what the line says, what it asks for (None: nothing can be given)
    ("ViT", {"hidden_act": "quick_gelu"}, "hidden_act=quick_gelu, but timm's VisionTransformer computes GELU", "act_layer=quick_gelu"),
    ("ViT", {"num_attention_heads": 2}, "num_attention_heads=2, but timm's VisionTransformer has 4", "num_heads=2"),
    ("ConvNeXt", {"hidden_act": "relu"}, "hidden_act=relu, but timm's ConvNeXt computes GELU", "act_layer=relu"),
    ("ResNet", {"hidden_act": "gelu_new"}, "hidden_act=gelu_new, but timm's ResNet computes ReLU", "act_layer=gelu_tanh"),
    ("Swin", {"num_heads": [2, 2, 4]}, "num_heads=[2, 2, 4], but timm's SwinTransformer has [2, 4, 4]", "num_heads=[2, 2, 4]"),
    ("DINOv3", {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}, "timm's Eva has 100", "rope_temperature=50.0"),
    ("DINOv3 gated", {"hidden_act": "gelu"}, "hidden_act=gelu, but timm's Eva computes SiLU", None),
    ("Swin", {"hidden_act": "gelu_new"}, "hidden_act=gelu_new, but timm's SwinTransformer computes GELU", None),
    ("ResNet bottleneck", {"downsample_in_bottleneck": True}, "strides in each stage's first 3x3 convolution", None),
    ("ResNet", {"downsample_in_first_stage": True}, "does not stride in its first stage", None),
]  # fmt: skip


@pytest.mark.parametrize(("case", "settings", "line", "argument"), REFUSED_SETTINGS)
@torch.no_grad()
def test_other_function_by_its_config_is_refused_or_said(case, settings, line, argument, tmp_path, caplog):
    class_name, config, name, kwargs = TRANSFORMERS[case]
    path, in_memory = saved(of_transformers(class_name, {**config, **settings}), tmp_path)
    if argument is None:
        assert read(path, name, kwargs)
        assert f"{line}; no argument of timm's constructor changes that" in caplog.text
        return
    with pytest.raises(UserError, match=re.escape(f"{line}: build it with {argument}; see --pretrained_kwargs")):
        read(path, name, kwargs)
    given = kwargs | dict([keyword(argument)])
    assert_same(read(path, name, given), read(in_memory, name, given))


@torch.no_grad()
def test_argument_that_is_asked_for_gives_the_same_outputs(tmp_path):
    settings = {"hidden_act": "gelu_new", "num_attention_heads": 2, "layer_norm_eps": 1e-6}
    library = of_transformers("ViTForImageClassification", {**VIT, **settings})
    kwargs = {**TIMM_VIT, "num_classes": 5, "act_layer": "gelu_tanh", "num_heads": 2}
    weights = read(saved(library, tmp_path)[0], "vit_tiny", kwargs)
    assert_close(loaded(weights, "vit_tiny", kwargs)(images()), library(images()).logits)


@pytest.mark.parametrize(
    ("case", "epsilon", "said"),
    [
        ("ViT", 1e-6, ""),
        (
            "ViT",
            1e-3,
            "computes blocks.0.norm1 and 4 other norms with epsilon 0.001 by its config.json, timm with 1e-06",
        ),
        ("ConvNeXt", 1e-3, "computes head.norm with epsilon 0.001 by its config.json, timm with 1e-06"),
        ("Swin", 1e-3, "computes layers.0.blocks.0.norm1 and 12 other norms with epsilon 0.001 by its config.json"),
    ],
)
def test_epsilon_of_the_config_counts(case, epsilon, said, tmp_path, caplog):
    class_name, config, name, kwargs = TRANSFORMERS[case]
    read(saved(of_transformers(class_name, {**config, "layer_norm_eps": epsilon}), tmp_path)[0], name, kwargs)
    assert said in caplog.text and ("with epsilon" in caplog.text) == bool(said)


def test_damaged_config_is_named_and_others_are_let_alone(tmp_path):
    path, _ = saved(of_transformers("ViTForImageClassification", VIT), tmp_path)
    for content in ("[]", "{}", json.dumps({"model_type": "vit", "hidden_act": None, "layer_norm_eps": "x"})):
        (tmp_path / "config.json").write_text(content)
        assert read(path, "vit_tiny", TIMM_VIT)
    for content in ("{", "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json does not describe the model of model\.safetensors: "):
            read(path, "vit_tiny", TIMM_VIT)
