"""Axis groups: which axes of which tensors share one list of indices, and how long that axis is in both models."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from selection.family import Layout, Refused
from selection.layers import LayerMap
from selection.plan import Axis

UNMIXABLE = "channels of different heads cannot be mixed here (rotary positions, or norms in each head)"


@dataclass(frozen=True)
class TensorPair:
    """The shapes of a student tensor and of the teacher tensor that it is cut from."""

    key: str
    teacher: tuple[int, ...]
    student: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.key}: the teacher's {list(self.teacher)} and the student's {list(self.student)}"


def heads_are_fixed(table: Mapping[str, str]) -> bool:
    """Tell whether a head's channels must stay together and in order."""
    return any(".heads*-" in words for words in table.values())


def head_rule(table: Mapping[str, str], wanted: str | None) -> str | None:
    """Decide between "blend" and "keep"; None for a model without heads. `wanted` is what --heads asks for."""
    if not any(".heads" in words for words in table.values()):
        return None
    if not heads_are_fixed(table):
        return wanted or "blend"
    if wanted == "blend":
        raise Refused("heads", f"--heads blend: {UNMIXABLE}: use --heads keep")
    return "keep"


class AxisGroups:
    """The axis groups of a pair of models, recorded tensor by tensor.

    `sizes` maps a group's name to its size in the teacher and in the student.
    """

    def __init__(
        self,
        teacher: Layout,
        student: Layout,
        layers: LayerMap,
        table: Mapping[str, str],
        heads: str | None,
        *,
        each_for_itself: bool,
    ) -> None:
        self.sizes: dict[str, tuple[int, int]] = {}
        self._teacher, self._student, self._layers, self._table, self._heads = teacher, student, layers, table, heads
        self._each_for_itself = each_for_itself  # every axis of every tensor is a group of its own
        self._shared: dict[str, tuple[int, int]] = {}  # sizes of groups across tensors, to check that tensors agree

    def axis(self, pair: TensorPair, number: int, word: str) -> Axis:
        """Split an axis of a tensor into the factors that its word in the family's table names; record their sizes."""
        if word in ("~", "rgb"):
            return None  # changed whole, by a step of selection.positions
        names = self._names(word)
        teacher_counts = [self._teacher.counts.get(self._layers.in_teacher(name)) for name in names]
        student_counts = [self._student.counts.get(name) for name in names]
        teacher_sizes = _factor_sizes(pair.key, names, teacher_counts, pair.teacher[number])
        student_sizes = _factor_sizes(pair.key, names, student_counts, pair.student[number])
        factors: list[str | int] = []
        for name, size, target in zip(names, teacher_sizes, student_sizes, strict=True):
            if name == "-" or name.isdigit():
                if size != target:
                    raise _unequal(pair, size, target, in_heads=len(names) > 1)
                factors.append(size)
            else:
                factors.append(self._group(pair, number, name, size, target))
        return tuple(factors) if any(isinstance(factor, str) for factor in factors) else None

    def _names(self, word: str) -> list[str]:
        """The factors of an axis. Blended heads are one factor, heads x channels."""
        names = word.split("*")
        slots = next((place for place, name in enumerate(names) if name.endswith(".slots")), None)
        if slots is not None and self._heads == "blend":
            names[slots - 1 : slots + 1] = [names[slots].removesuffix(".slots")]  # "a.heads*a.slots" becomes "a"
        return names

    def _group(self, pair: TensorPair, number: int, name: str, size: int, target: int) -> str:
        """Record a group's sizes and return its name."""
        if not target:
            raise Refused("widths", f"{pair.key}: the student's {list(pair.student)} leaves nothing for {name}")
        if target > size:
            raise self._too_small(pair, name, size, target)
        if self._shared.setdefault(name, (size, target)) != (size, target):
            raise Refused("widths", f"{pair.key} does not agree with the tensors before it on the width of {name}")
        if self._each_for_itself:
            name = f"{name} of {pair.key}[{number}]"
        self.sizes[name] = size, target
        return name

    def _too_small(self, pair: TensorPair, name: str, size: int, target: int) -> Refused:
        if name.endswith((".heads", ".slots")):
            what = "heads" if name.endswith(".heads") else "channels in each head"
            problem = f"{pair.key}: the student has {target} {what}, the teacher {size}"
            hint = "; --heads blend takes a head's channels from several" if self._blending_helps(name) else ""
            return Refused("heads", problem + hint)
        if all(own <= size for own, size in zip(pair.student, pair.teacher, strict=True)):
            return Refused("narrower", f"{pair.key}: {name} has size {target} in the student, {size} in the teacher")
        return Refused(
            "narrower",
            f"{pair.key}: the teacher's {list(pair.teacher)} is smaller than the student's {list(pair.student)}",
        )

    def _blending_helps(self, name: str) -> bool:
        if self._heads != "keep" or heads_are_fixed(self._table):
            return False
        # a table of relative positions has an axis of heads alone, which must fit even if heads are blended
        return name.endswith(".slots") or not any(words.endswith(".heads") for words in self._table.values())


def _factor_sizes(key: str, names: list[str], counts: list[int | None], size: int) -> list[int]:
    """Find the size of each factor of an axis of `size`. At most one may be unknown; it gets the quotient."""
    known = [int(name) if name.isdigit() else count for name, count in zip(names, counts, strict=True)]
    if known.count(None) > 1:
        raise Refused("unknown tensor", f"{key}: how its axis of {size} divides into {' x '.join(names)} is not known")
    if None in known:
        others = math.prod(count for count in known if count is not None)
        known[known.index(None)] = size // others
    if math.prod(known) != size:
        raise Refused("widths", f"{key}: an axis of {size} does not divide into {' x '.join(names)}")
    return known


def _unequal(pair: TensorPair, size: int, target: int, *, in_heads: bool) -> Refused:
    """The refusal of an axis that is kept whole but is not equally long in both models."""
    if in_heads:
        sizes = f"the teacher's heads have {size} channels, the student's {target}"
        return Refused("heads", f"{pair.key}: {sizes}; they must be equal, because {UNMIXABLE}")
    return Refused("fixed axis", f"{pair} differ along an axis that is not selected from")
