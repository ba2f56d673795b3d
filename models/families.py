"""The families of models to select from, a row each."""

from collections.abc import Callable
from dataclasses import dataclass

from timm.models import convnext, eva, mlp_mixer, resnet, swin_transformer, vision_transformer
from torch import nn


@dataclass(frozen=True)
class TimmFamily:
    """What the scripts need to know about a family of timm's models; selection/families/ knows its tensors."""

    kind: type[nn.Module]
    student: str  # defaults for a pair
    teacher: str
    converter: Callable | None  # timm's function that renames and reshapes the tensors of released files
    head: tuple[str, ...] = ("head.", "head_dist.")  # how the keys of the classification head begin


FAMILIES = {
    "vit": TimmFamily(
        kind=vision_transformer.VisionTransformer,
        student="vit_tiny",
        teacher="vit_small_patch16_224_in21k",
        converter=vision_transformer.checkpoint_filter_fn,
    ),
    "convnext": TimmFamily(
        kind=convnext.ConvNeXt,
        student="convnext_femto",
        teacher="convnext_tiny_in22k",
        converter=convnext.checkpoint_filter_fn,
    ),
    "eva": TimmFamily(
        kind=eva.Eva,
        student="vit_tiny_patch16_dinov3_qkvb",
        teacher="vit_small_patch16_dinov3_qkvb",
        converter=eva.checkpoint_filter_fn,
    ),
    "swin": TimmFamily(
        kind=swin_transformer.SwinTransformer,
        student="swin_tiny_patch4_window7_224",
        teacher="swin_base_patch4_window7_224",
        converter=swin_transformer.checkpoint_filter_fn,
    ),
    "mixer": TimmFamily(
        kind=mlp_mixer.MlpMixer,
        student="mixer_s16_224",
        teacher="mixer_b16_224",
        converter=mlp_mixer.checkpoint_filter_fn,
    ),
    "resnet": TimmFamily(
        kind=resnet.ResNet,
        student="resnet18",
        teacher="resnet34",
        converter=None,
        head=("fc.",),
    ),
}


def family_of(model: nn.Module) -> str | None:
    """Name the model's family in FAMILIES; None for a model of another kind."""
    return next((name for name, family in FAMILIES.items() if isinstance(model, family.kind)), None)


def head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Say how the keys of the classification head begin; in ConvNeXt the head includes the norm before the classifier.

    The published method inherits none of these (weight_selection.py at e9b6d0c leaves out keys holding "head").
    """
    family = family_of(model)
    if family:
        return FAMILIES[family].head
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return tuple(f"{name}." for name in names)
