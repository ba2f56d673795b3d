"""timm's models by our names. This file only hands on what the others define."""

from models.build import VARIANTS, ModelSpec, build_model, create, takes_image_size, timm_arguments
from models.families import FAMILIES, family_of, head_prefixes
from models.fit import check_fit, inherit

__all__ = [
    "FAMILIES",
    "VARIANTS",
    "ModelSpec",
    "build_model",
    "check_fit",
    "create",
    "family_of",
    "head_prefixes",
    "inherit",
    "takes_image_size",
    "timm_arguments",
]
