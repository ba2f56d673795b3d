"""The families of models to select from: timm's classes, the default students, what is the head."""

from timm.models import ConvNeXt, Eva, MlpMixer, ResNet, SwinTransformer, VisionTransformer
from torch import nn

FAMILIES = {
    "vit": VisionTransformer,
    "convnext": ConvNeXt,
    "eva": Eva,
    "swin": SwinTransformer,
    "mixer": MlpMixer,
    "resnet": ResNet,
}
DEFAULT_STUDENT = {
    "vit": "vit_tiny",
    "convnext": "convnext_femto",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "swin": "swin_tiny_patch4_window7_224",
    "mixer": "mixer_s16_224",
    "resnet": "resnet18",
}


def family_of(model: nn.Module) -> str | None:
    """The name in FAMILIES of the model's family, or None for a model of another kind."""
    return next((family for family, kind in FAMILIES.items() if isinstance(model, kind)), None)


def head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the keys of the classification head begin with; ConvNeXt's includes the norm before the classifier.

    The published method inherits none of these (weight_selection.py at e9b6d0c leaves out keys holding "head").
    """
    if family_of(model):
        return ("fc.",) if isinstance(model, ResNet) else ("head.", "head_dist.")
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return tuple(f"{name}." for name in names)
