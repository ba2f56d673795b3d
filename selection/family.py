"""What a family of models is to selection: a table of axis groups, and a few facts that names and shapes do not tell."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

from torch import nn

from utils import UserError
from weightfiles.read import shapes_of

Shapes = Mapping[str, tuple[int, ...]]


class Refused(UserError):
    """A pair that cannot be planned; `reason` is one of a few words, for counting."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Family:
    """A kind of model, described by patterns of tensor names (full matches).

    `axes` maps the shapes of a model to its table: a pattern of names, then a word for each axis. A word names a group,
    whose slots are chosen once and used by every tensor on it, so that what one tensor writes to a slot the next one
    reads from it. Words are products, outermost factor first: "3*g" is three blocks each cut like g, "a.heads*a.slots"
    the slots of each head. "-" is kept whole and in its order, "~" is resampled; axes that are not named are kept.
    """

    axes: Callable[[Shapes], Mapping[str, str]]
    layers: str  # beginning of a layer's names: group 1 is its stage, group 2 its number there
    first_stays: bool = False  # the first layer of a stage is of its own kind: it downsamples
    turns: int = 1  # kinds of layer that take turns within a stage: shifted and plain windows
    scales: Mapping[str, str] = field(default_factory=dict)  # LayerScale -> the projection before it, to fold it into
    neutral: Mapping[str, float] = field(default_factory=dict)  # may begin at a value that changes nothing
    same: tuple[tuple[str, str], ...] = ()  # beginnings of names that stand for each other
    left_out: str = "(?!)"  # teacher tensors that a student may do without

    def words(self, table: Mapping[str, str], key: str) -> tuple[str, ...] | None:
        """The words for the axes of tensor `key`; None for a name that the family does not know."""
        for pattern, template in table.items():
            match = _matcher(pattern)(key)
            if match:
                return tuple(match.expand(template).split())
        return None

    def find(self, patterns: Mapping[str, object], key: str):
        """What the first of `patterns` that matches `key` stands for, and the match; (None, None) without one."""
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
    """What a plan needs to know of one model: it holds no weight."""

    shapes: dict[str, tuple[int, ...]]
    counts: dict[str, int]  # heads of each attention, groups of each convolution: no shape tells them
    kinds: dict[str, str]  # what it is made of, where names and shapes do not tell: layers, norms, activation, …
    grid: tuple[int, int] | None  # patches that the position embedding is for, rows and columns
    windows: dict[str, tuple[int, int]]  # side lengths in patches of the windows of each attention

    @classmethod
    def of(cls, model: nn.Module, family: Family, left_out: tuple[str, ...] = ()) -> "Layout":
        """The layout of a model of `family`, on any device, without the tensors whose names begin with `left_out`."""
        counts, windows = {}, {}
        for name, module in model.named_modules():
            if isinstance(getattr(module, "num_heads", None), int):
                counts[f"{name}.heads"] = module.num_heads
            if isinstance(module, nn.Conv2d):
                counts[f"{name}.groups"] = module.groups
            if hasattr(module, "relative_position_bias_table"):
                windows[name] = tuple(module.window_size)
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        return cls(
            shapes_of(model.state_dict(), left_out), counts, kinds_of(model, family), grid and tuple(grid), windows
        )


# kinds that have to agree, or the same weights compute something else; of the others a difference is said
HAVE_TO_AGREE = ("layers", "norms", "rotary positions")
_NORMS = ("RMSNorm", "SimpleNorm", "BatchNorm", "GroupNorm", "LayerNorm")


def kinds_of(model: nn.Module, family: Family) -> dict[str, str]:
    """What a model is made of, where neither names nor shapes of its tensors tell; "none" for what it has none of."""
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    found = {
        "layers": {kind for name, kind in classes.items() if re.fullmatch(family.layers, f"{name}.")},
        "norms": {norm for norm in _NORMS for kind in classes.values() if norm.lower() in kind.lower()},
        "activation": {kind for name, kind in classes.items() if re.fullmatch(r"(.+\.)?act\d?", name)} - {"Identity"},
    }
    rope = getattr(model, "rope", None)
    if rope is not None:
        halves = any(getattr(module, "rotate_half", False) for module in model.modules())
        found["rotary positions"] = {f"{type(rope).__name__} of {'halves' if halves else 'pairs'}"}
    found["pooling"] = {str(getattr(model, "global_pool", "") or "none")}
    return {name: " and ".join(sorted(kinds)) or "none" for name, kinds in found.items()}


def packed(shapes: Shapes, projection: str, back: str) -> str:
    """ "2*" where a gated MLP's two halves are one projection, "" where not: its output is twice what `back` reads."""
    for key, shape in shapes.items():
        if re.fullmatch(projection, key):
            return "2*" if shape[0] == 2 * shapes[re.sub(projection, back, key)][1] else ""
    return ""
