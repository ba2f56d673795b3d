"""Bring a model's weights to another size of images, patches or windows, or to other channels, as a selection does."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

import models
from selection.axes import TensorPair
from selection.families import FAMILIES
from selection.family import Family, Layout
from selection.positions import TOKENS, size_steps
from selection.tensors import carry_out
from weightfiles.conversions import LARGEST_PATCH
from weightfiles.read import shapes_of

CHANGED = {"~", "rgb"}  # words of axes that follow the images' size and channels
KERNEL, TABLE = "patch_embed.proj.weight", ".relative_position_bias_table"


def follow_images(model: nn.Module) -> frozenset[str]:
    """Return the names of the model's tensors that `resized` can bring to another size."""
    name = models.family_of(model)
    return frozenset(_words(FAMILIES[name], shapes_of(model.state_dict())) if name else ())


def _words(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Return the words of the axes of each tensor that has an axis that follows the images."""
    table = family.axes(shapes)
    # one row of the table may be for a kernel and for its bias, which has the first axis alone
    words = {key: (family.words(table, key) or ())[: len(shape)] for key, shape in shapes.items()}
    return {key: each for key, each in words.items() if CHANGED & set(each)}


def resized(
    tensors: Mapping[str, Tensor], model: nn.Module, image_size: object, left_out: Collection[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Resample what follows the images in the weights of a model like `model`; return all, and what was changed.

    `image_size` is what the weights' own model was built with, if that is known; else its images count as square. What
    differs in any other way stays as it is. The keys `left_out` of the weights count as fitting.
    """
    result, notes = dict(tensors), []
    name = models.family_of(model)
    if name is None:
        return result, notes
    family = FAMILIES[name]
    own = Layout.of(model, family)
    words = _words(family, own.shapes)
    shapes = {key: shape for key, shape in own.shapes.items() if key in left_out} | shapes_of(tensors)
    pairs = {key: TensorPair(key, shapes[key], own.shapes[key]) for key in words if key in shapes}
    pairs = {key: pair for key, pair in pairs.items() if _can_change(pair, words[key])}
    theirs = replace(own, shapes=shapes, grid=_grid(pairs, shapes, own, image_size), windows=_windows(pairs, own))
    for key, pair in pairs.items():
        if key in tensors and _is_known(pair, theirs):
            steps, more = size_steps(pair, words[key], key, theirs, own)
            result[key] = carry_out(steps, tensors[key], tensors, [])
            notes += more
    return result, sorted(set(notes))


def _can_change(pair: TensorPair, words: tuple[str, ...]) -> bool:
    """Whether a tensor has the model's shape but for axes that can be changed, and none of them is absurd."""
    if len(pair.teacher) != len(pair.student) or (
        len(pair.teacher) == 4 and math.prod(pair.teacher[2:]) > LARGEST_PATCH**2
    ):
        return False
    axes = zip(pair.teacher, pair.student, (*words, "-", "-"), strict=False)  # axes without a word are kept
    return all(size == target or (word in CHANGED and size > 0) for size, target, word in axes)


def _is_known(pair: TensorPair, theirs: Layout) -> bool:
    """Whether the grid or the windows that a tensor is for are known."""
    if pair.key == "pos_embed":
        return theirs.grid is not None
    name = pair.key.removesuffix(TABLE)
    return name == pair.key or name in theirs.windows


def _windows(pairs: Mapping[str, TensorPair], own: Layout) -> dict[str, tuple[int, int]]:
    """Find the sides of the windows behind the tables of relative positions, where they are square or the model's."""
    windows = {}
    for name, window in own.windows.items():
        pair = pairs.get(name + TABLE)
        side = (math.isqrt(pair.teacher[0]) + 1) // 2 if pair else 0
        if pair and pair.teacher == pair.student:
            windows[name] = window
        elif pair and (2 * side - 1) ** 2 == pair.teacher[0]:
            windows[name] = (side, side)
    return windows


def _grid(
    pairs: Mapping[str, TensorPair], shapes: Mapping[str, tuple[int, ...]], own: Layout, image_size: object
) -> tuple[int, int] | None:
    """Find the rows and columns of patches behind a position embedding; None if there is none or they are not known."""
    tokens_agree = all(shapes.get(token) == own.shapes.get(token) for token in TOKENS)
    if own.grid is None or not tokens_agree or not pairs.keys() >= {"pos_embed", KERNEL}:
        return None
    rows, own_rows = (shape[1] for shape in (pairs["pos_embed"].teacher, pairs["pos_embed"].student))
    patches = rows - (own_rows - math.prod(own.grid))
    candidates = [own.grid, (math.isqrt(max(patches, 0)),) * 2]
    sizes = image_size if isinstance(image_size, list | tuple) else [image_size] * 2
    if len(sizes) == 2 and all(isinstance(size, int) for size in sizes):
        candidates.insert(0, tuple(size // side for size, side in zip(sizes, pairs[KERNEL].teacher[2:], strict=True)))
    return next((grid for grid in candidates if min(grid) > 0 and math.prod(grid) == patches), None)
