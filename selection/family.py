"""How to describe a family of models to selection: a table of axis groups, and facts that shapes do not show."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from torch import nn

from utils import UserError
from weightfiles.read import shapes_of

Shapes = Mapping[str, tuple[int, ...]]


class Refused(UserError):
    """A pair that cannot be planned; `reason` is one of a few categories, for counting."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Family:
    """A kind of model, described by patterns of tensor names (full matches).

    `axes` maps a model's shapes to its table: a pattern of names -> a word per axis. A word names an axis group. Its
    indices are chosen once and used by every tensor on it, so that each channel one tensor writes is the channel that
    the next one reads. A word may be a product, outermost factor first: "3*g" is three blocks, each cut like g;
    "a.heads*a.slots" is the channels of each head. "-" is kept whole and in order, "~" is resampled, "rgb" is adapted to
    the channels of the student's images. Axes without a word are kept.
    """

    axes: Callable[[Shapes], Mapping[str, str]]
    parts: Mapping[str, str]  # patterns of tensor names -> the part they belong to, of options.PARTS
    layers: str  # how a layer's names begin: group 1 is its stage, group 2 its number in the stage
    first_stays: bool = False  # the first layer of a stage is of a kind of its own: it downsamples
    turns: int = 1  # how many kinds of layer take turns within a stage (plain and shifted windows)
    scales: Mapping[str, str] = field(
        default_factory=dict
    )  # LayerScale -> the projection before it, which can absorb it
    neutral: Mapping[str, float] = field(
        default_factory=dict
    )  # what the teacher may lack -> a value that changes nothing
    same: tuple[tuple[str, str], ...] = ()  # beginnings of names that stand for each other
    left_out: str = "(?!)"  # teacher tensors that a student can do without; the default matches none

    def words(self, table: Mapping[str, str], key: str) -> tuple[str, ...] | None:
        """Look up the words for the axes of tensor `key`; None for a name that the family does not know."""
        for pattern, template in table.items():
            match = _matcher(pattern)(key)
            if match:
                return tuple(match.expand(template).split())
        return None

    def part_of(self, key: str) -> str | None:
        """Name the part that tensor `key` belongs to; None for a name that the family does not know."""
        return self.find(self.parts, key)[0]

    def block_of(self, name: str) -> str:
        """Return the beginning of a name that says its block, such as "blocks.3."; "" outside of blocks."""
        block = re.match(self.layers, name)
        return block[0] if block else ""

    def scaled(self, keys: Iterable[str]) -> dict[str, str]:
        """Find among a model's tensors the projections that a LayerScale follows: projection -> LayerScale."""
        scales = {}
        for key in keys:
            template, match = self.find(self.scales, key)
            if match:
                scales[match.expand(template)] = key
        return scales

    def find(self, patterns: Mapping[str, object], key: str):
        """Return the value of the first of `patterns` that matches `key`, and the match; (None, None) without one."""
        for pattern, value in patterns.items():
            match = _matcher(pattern)(key)
            if match:
                return value, match
        return None, None


@cache
def _matcher(pattern: str):
    return re.compile(pattern).fullmatch


@dataclass(frozen=True)
class Layout:
    """What a plan needs to know about one model; it holds no weights."""

    shapes: dict[str, tuple[int, ...]]
    counts: dict[str, int]  # heads of each attention and groups of each convolution, which no shape shows
    kinds: dict[str, str]  # what else no name or shape shows: kinds of layers, norms, activation, …
    grid: tuple[int, int] | None  # rows and columns of patches that the position embedding is for
    windows: dict[str, tuple[int, int]]  # sides of the windows of each attention, in patches

    @classmethod
    def of(cls, model: nn.Module, family: Family, left_out: tuple[str, ...] = ()) -> "Layout":
        """Describe a model on any device, without the tensors whose names begin with `left_out`."""
        counts, windows = {}, {}
        for name, module in model.named_modules():
            if isinstance(getattr(module, "num_heads", None), int):
                counts[f"{name}.heads"] = module.num_heads
            if isinstance(module, nn.Conv2d):
                counts[f"{name}.groups"] = module.groups
            if hasattr(module, "relative_position_bias_table"):
                windows[name] = tuple(module.window_size)
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        shapes = shapes_of(model.state_dict(), left_out)
        return cls(shapes, counts, kinds_of(model, family), grid and tuple(grid), windows)


# if these differ, the same weights compute another function; differences of the other kinds are only noted
MUST_AGREE = ("layers", "norms", "rotary positions")
_NORMS = ("RMSNorm", "SimpleNorm", "BatchNorm", "GroupNorm", "LayerNorm")


def kinds_of(model: nn.Module, family: Family) -> dict[str, str]:
    """Name what a model is made of and its tensors do not show: layers, norms, activation, rotations, pooling."""
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    made_of = {
        "layers": {kind for name, kind in classes.items() if re.fullmatch(family.layers, f"{name}.")},
        "norms": {norm for norm in _NORMS for kind in classes.values() if norm.lower() in kind.lower()},
        "activation": {kind for name, kind in classes.items() if re.fullmatch(r"(.+\.)?act\d?", name)} - {"Identity"},
    }
    rope = getattr(model, "rope", None)
    if rope is not None:
        halves = any(getattr(module, "rotate_half", False) for module in model.modules())
        made_of["rotary positions"] = {f"{type(rope).__name__} of {'halves' if halves else 'pairs'}"}
    made_of["pooling"] = {str(getattr(model, "global_pool", "") or "none")}
    return {name: " and ".join(sorted(kinds)) or "none" for name, kinds in made_of.items()}


def packed(shapes: Shapes, projection: str, back: str) -> str:
    """Return "2*" if `projection` packs the two halves of a gated MLP, else "".

    Packed, its output is twice as wide as what the projection back, `back`, reads.
    """
    for key, shape in shapes.items():
        if re.fullmatch(projection, key):
            return "2*" if shape[0] == 2 * shapes[re.sub(projection, back, key)][1] else ""
    return ""
