"""How a file that does not have timm's names comes under them: by the layouts of other libraries, or by timm's converters."""

import math
from collections.abc import Callable, Mapping

from torch import Tensor, nn

import models
from utils import UserError
from weightfiles.layouts import RESAMPLED, Converted, to_timm
from weightfiles.lazy import Weights
from weightfiles.read import widened

LARGEST_PATCH = 64  # pixels on a side


def by_timm(weights: Weights, model: nn.Module) -> Converted | None:
    """Let timm convert a file of a model's first release, or of another image or patch size; None if it cannot.

    Reads all tensors.
    """
    family = models.family_of(model)
    if family is None or models.FAMILIES[family].converter is None:
        return None
    tensors, convert = dict(weights), models.FAMILIES[family].converter
    try:  # with a copy, because some take keys out of what they are given
        made = convert(dict(tensors), model)
        if computed := _computed(made, tensors):  # in float32, whatever the file's precision
            wide = convert({key: widened(tensor) for key, tensor in tensors.items()}, model)
            made |= {key: wide[key] for key in computed}
        converted = Weights.in_memory(made, "timm converts its layout")
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None  # what timm's converters make of other layouts
    # renamed tensors keep their place in memory; a position embedding may be renamed and resized at once
    used = {tensor.data_ptr() for tensor in dict(converted).values()}
    others = [key for key in tensors if key not in converted and "pos" not in key]
    unused = [key for key in others if tensors[key].data_ptr() not in used]
    remarks = []
    for key in ("patch_embed.proj.weight", "pos_embed"):
        old, new = weights.shapes.get(key, ()), converted.shapes.get(key, ())
        # right for another image size, wrong for another model's file
        if len(old) == len(new) and old != new:
            remarks.append(f"timm made {list(new)} of {key} {list(old)}: is it a file of this model?")
    layout = "timm" if converted.shapes.keys() <= weights.shapes.keys() else "original"
    return Converted(converted, layout, unused, remarks)


def _computed(made: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """List which of the tensors that timm resamples it has made anew, in less than float32."""
    own = {tensor.data_ptr() for tensor in tensors.values()}
    resampled = [key for key in made if RESAMPLED.fullmatch(key) and made[key].data_ptr() not in own]
    return [key for key in resampled if made[key].dtype != widened(made[key]).dtype]


Converter = Callable[[Weights, nn.Module], Converted | None]
# The first that knows a file's layout counts. Their ValueErrors say what is wrong with a file of a known layout.
LAYOUTS: tuple[Converter, ...] = (to_timm,)
CONVERSIONS: tuple[Converter, ...] = (*LAYOUTS, by_timm)


def check_kernels(shapes: Mapping[str, tuple[int, ...]], option: str) -> None:
    """Refuse a patch kernel far larger than any model's: the time of timm's resizing grows with the square of its area."""
    for key, shape in shapes.items():
        sides = shape[:2] if key.endswith("/kernel") else shape[2:] if key.endswith(".weight") else ()
        if len(shape) == 4 and math.prod(sides) > LARGEST_PATCH**2:
            raise UserError(f"{option} has {key} {list(shape)}, a kernel larger than {LARGEST_PATCH} x {LARGEST_PATCH}")
