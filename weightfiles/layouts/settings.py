"""What transformers' config.json says of a model and no tensor shows, beside what timm's model computes."""

import inspect
from collections.abc import Iterator, Mapping

import torch
from timm.layers import create_act_layer
from torch import nn

import models
from options.parser import keyword_text
from utils import escaped

LONGEST = 60  # characters shown of a value

# transformers' names of activations -> timm's
ACTIVATIONS = {name: name for name in "gelu quick_gelu silu relu relu6 leaky_relu mish tanh sigmoid".split()}
ACTIVATIONS |= {"gelu_python": "gelu", "swish": "silu"}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"), "gelu_tanh")


def unlike_settings(settings: Mapping, model: nn.Module) -> list[str]:
    """List what the library's model computes otherwise than `model`, by its config.json, if no argument changes timm's.

    Raises ValueError, with the argument, if one does.
    """
    notes = []
    for setting, ours, argument, value in _differences(settings, model):
        given = escaped(str(settings.get(setting)))[:LONGEST]
        line = f"its config.json has {setting}={given}, but timm's {type(model).__name__} {ours}"
        if value is not None and argument in inspect.signature(type(model).__init__).parameters:
            raise ValueError(f"{line}: build it with {keyword_text(argument, value)}")
        notes.append(f"{line}; no argument of timm's constructor changes that")
    return notes


def _differences(settings: Mapping, model: nn.Module) -> Iterator[tuple[str, str, str, object]]:
    """Yield (setting, what timm's model does instead, the argument for it, its value or None) for each that differs."""
    modules = dict(model.named_modules())
    name = settings.get("hidden_act")
    if name is not None and not settings.get("use_swiglu_ffn"):  # whose gates are SiLU, whatever it says
        own = {type(each): each for key, each in modules.items() if key.rpartition(".")[2] in ("act", "act1", "act2")}
        differing = [kind.__name__ for kind, each in own.items() if not _same(each, ACTIVATIONS.get(str(name)))]
        if differing:
            yield "hidden_act", f"computes {differing[0]}", "act_layer", ACTIVATIONS.get(str(name))
    for setting in ("num_attention_heads", "num_heads"):
        heads, given = _heads(model, modules), settings.get(setting)
        if given is not None and heads and given not in (heads, heads[0] if len({*heads}) == 1 else None):
            shown = heads[0] if len({*heads}) == 1 else heads
            yield setting, f"has {shown}", "num_heads", given
    nested = settings.get("rope_parameters")
    theta = nested.get("rope_theta") if isinstance(nested, dict) else settings.get("rope_theta")
    ours = getattr(modules.get("rope"), "temperature", None)
    if None not in (theta, ours) and theta != ours:
        yield "rope_theta", f"has {ours:g}", "rope_temperature", theta
    if models.family_of(model) == "resnet":
        if settings.get("downsample_in_bottleneck") and settings.get("layer_type", "bottleneck") == "bottleneck":
            yield "downsample_in_bottleneck", "strides in each stage's first 3x3 convolution", "", None
        if settings.get("downsample_in_first_stage"):
            yield "downsample_in_first_stage", "does not stride in its first stage", "", None


def _same(activation: nn.Module, name: str | None) -> bool:
    """Tell whether a module computes timm's activation of this name; None is none of timm's."""
    values = torch.linspace(-4, 4, 33)
    return name is not None and torch.allclose(activation(values.clone()), create_act_layer(name)(values), atol=1e-6)


def _heads(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[int]:
    """List the heads of attention: of each stage, or of each block if there are no stages."""
    if hasattr(model, "layers") and models.family_of(model) == "swin":
        return [stage.blocks[0].attn.num_heads for stage in model.layers]
    attention = [each for name, each in modules.items() if name.endswith(".attn")]
    return [each.num_heads for each in attention if isinstance(getattr(each, "num_heads", None), int)]
