"""Read files that other libraries wrote under timm's names: recognize their layout by its keys."""

from typing import NamedTuple

import torch
from torch import nn

from weightfiles.layouts import mmpretrain, torchvision, transformers
from weightfiles.layouts.layout import Layout
from weightfiles.lazy import Weights
from weightfiles.read import shapes_of

LAYOUTS = (*transformers.LAYOUTS, *torchvision.LAYOUTS, *mmpretrain.LAYOUTS)


class Converted(NamedTuple):
    """A file's tensors under timm's names, the layout that they are in, and the file's keys that timm has no place for."""

    weights: Weights
    layout: Layout
    left_out: tuple[str, ...]


def to_timm(weights: Weights, model: nn.Module) -> Converted | None:
    """Give tensors of another library under timm's names; each is read, and made of its parts, on request.

    `model` is timm's: a tensor takes its shape if only axes of size 1 differ. Keys that the layout does not have keep
    their names. None if most keys are of no known layout. Raises ValueError if tensors that timm joins do not match.
    """
    layout, places = _recognize(weights)
    if layout is None:
        return None
    expected = shapes_of(model.state_dict())
    sources, left_out = _sources(weights, places)
    for name in [name for name in sources if name.endswith("_bias") and name not in expected]:
        # most sizes of DINOv3 have biases of q and v that are all zero, and timm has models without them
        if not any(weights[key].any() for key in sources[name]):
            left_out += sources.pop(name)

    def make(name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
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
    read = Weights(shapes, lambda name: make(name, [weights[key] for key in sources[name]]), weights.whole)
    return Converted(read, layout, tuple(left_out))


def _recognize(weights: Weights) -> tuple[Layout | None, dict[str, list[tuple[str, int]] | None]]:
    """Find the layout that has most of the keys, and their places in it; None if no layout has more than half."""
    best, known, places = None, len(weights) // 2, {}
    for layout in LAYOUTS:
        found = {key: layout.places(key) for key in weights}
        count = sum(place is not None for place in found.values())
        if count > known:
            best, known, places = layout, count, found
    return best, places


def _sources(
    weights: Weights, places: dict[str, list[tuple[str, int]] | None]
) -> tuple[dict[str, list[str]], list[str]]:
    """List the keys that make each of timm's tensors, in their order, and the keys that make none."""
    parts, left_out = {}, []
    for key in weights:
        targets = [(key, 0)] if places[key] is None else places[key]
        for name, position in targets:
            at = parts.setdefault(name, {})
            if position in at:  # two tensors for one place: the second keeps its name and will be refused
                parts[key] = {0: key}
            else:
                at[position] = key
        if not targets:
            left_out.append(key)
    return {name: [at[position] for position in sorted(at)] for name, at in parts.items()}, left_out
