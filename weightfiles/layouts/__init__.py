"""Read files that other libraries wrote under timm's names: recognize their layout by its keys."""

import re
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

import models
from weightfiles.layouts import mmpretrain, torchvision, transformers
from weightfiles.layouts.layout import Layout
from weightfiles.layouts.settings import unlike_settings
from weightfiles.lazy import Weights
from weightfiles.read import shapes_of, widened

LAYOUTS = (*transformers.LAYOUTS, *torchvision.LAYOUTS, *mmpretrain.LAYOUTS)
LIBRARIES = tuple(dict.fromkeys(layout.library for layout in LAYOUTS))
# timm's tensors that follow the image, the patches or the windows, and that its converters resample
RESAMPLED = re.compile(r"pos_embed|patch_embed\.proj\.weight|.*\.relative_position_bias_table")


class Converted(NamedTuple):
    """A file's tensors under timm's names; the library that wrote it; keys without a counterpart; what to say of it."""

    weights: Weights
    layout: str
    unused: list[str]
    remarks: list[str]


def recognize(keys: Collection[str]) -> Layout | None:
    """Find the layout that has most of the keys; None if no layout has more than half of them."""
    best = max(LAYOUTS, key=lambda layout: layout.count(keys))
    return best if best.count(keys) > len(keys) / 2 else None


def to_timm(weights: Weights, model: nn.Module) -> Converted | None:
    """Give tensors of another library under timm's names; each is read, and made of its parts, on request.

    `model` is timm's: a tensor takes its shape if only axes of size 1 differ, and is resampled by timm if only the image,
    the patches or the windows have other sizes. None for an unknown layout, and for one of another family of models. Raises
    ValueError for a key amid the others that the layout does not have, for tensors that timm joins but do not match, and for
    a setting beside the file by which its model computes something else.
    """
    layout = recognize(weights)
    if layout is None or layout.family != models.family_of(model):
        return None
    expected = shapes_of(model.state_dict())
    sources, unused = _sources(layout, weights)
    for name in [name for name in sources if name.endswith("_bias") and name not in expected]:
        # most sizes of DINOv3 have biases of q and v that are all zero, and timm has models without them
        if not any(weights[key].any() for key in sources[name]):
            unused += sources.pop(name)

    def make(name: str, tensors: list[Tensor]) -> Tensor:
        tensor, shape = layout.join(name, tensors), expected.get(name, ())
        same = [size for size in tensor.shape if size > 1] == [size for size in shape if size > 1]
        return tensor.reshape(shape) if same and name in expected else tensor

    shapes = {}
    for name, keys in sources.items():
        parts = [weights.shapes[key] for key in keys]
        try:
            shapes[name] = tuple(make(name, [torch.empty(part, device="meta") for part in parts]).shape)
        except (IndexError, RuntimeError, ValueError) as error:
            different = ", ".join(f"{key} {list(part)}" for key, part in zip(keys, parts, strict=True))
            raise ValueError(f"{different} do not fit together") from error
    remarks = unlike_settings(weights.settings, model)
    named = Weights(shapes, lambda name: make(name, [weights[key] for key in sources[name]]), weights.whole)
    resampled, resized = _resampled(named, model, expected)
    remarks += resized
    if note := layout.epsilon_note(model, weights.settings):
        remarks.append(note)
    return Converted(resampled, layout.library, unused, remarks)


def _sources(layout: Layout, weights: Weights) -> tuple[dict[str, list[str]], list[str]]:
    """List the keys that make each of timm's tensors, in their order, and the keys that make none.

    Keys that the layout does not have are a part of the model if they lie in one of its modules, and beside it otherwise.
    """
    places = {key: layout.places(key) for key in weights}
    modules = {key.partition(".")[0] for key, place in places.items() if place}
    parts, unused = {}, []
    for key, place in places.items():
        if place is None and key.partition(".")[0] in modules:
            raise ValueError(f"{key} has no counterpart in timm's model")
        if not place:
            unused.append(key)
        for name, position in place or []:
            other = parts.setdefault(name, {}).setdefault(position, key)
            if other != key:
                raise ValueError(f"{other} and {key} are the same tensor")
    return {name: [at[position] for position in sorted(at)] for name, at in parts.items()}, unused


def _resampled(weights: Weights, model: nn.Module, expected: dict[str, tuple[int, ...]]) -> tuple[Weights, list[str]]:
    """Let timm resample what follows another size of image, patches or windows, and say so. It reads these at once."""
    sized = [key for key in weights if RESAMPLED.fullmatch(key) and key in expected]
    if all(weights.shapes[key] == expected[key] for key in sized):
        return weights, []
    try:
        made = models.FAMILIES[models.family_of(model)].converter({key: widened(weights[key]) for key in sized}, model)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return weights, []  # they are another model's: their shapes say so
    resampled = {key: made[key] for key in sized if made[key].shape != weights.shapes[key]}
    remarks = []
    for kind in dict.fromkeys(key.rpartition(".")[2] for key in resampled):
        first, *others = (key for key in resampled if key.rpartition(".")[2] == kind)
        more = f" and of {len(others)} more" if others else ""
        remarks.append(f"timm made {list(made[first].shape)} of {first} {list(weights.shapes[first])}{more}")
    shapes = weights.shapes | shapes_of(resampled)
    return Weights(shapes, lambda key: resampled[key] if key in resampled else weights[key], weights.whole), remarks
