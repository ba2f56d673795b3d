"""timm's models by name, the paper's short names first."""

from models.build import VARIANTS, build_model, create, takes_image_size, timm_arguments
from models.families import DEFAULT_STUDENT, FAMILIES, family_of, head_prefixes
from models.fit import check_fit, inherit

__all__ = [
    "DEFAULT_STUDENT",
    "FAMILIES",
    "VARIANTS",
    "build_model",
    "check_fit",
    "create",
    "family_of",
    "head_prefixes",
    "inherit",
    "takes_image_size",
    "timm_arguments",
]
