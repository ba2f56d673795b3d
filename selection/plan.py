"""Which slots of which teacher tensor a student tensor inherits: the plan as data.

selection.match finds each student tensor's teacher tensor and the axis groups that tie the tensors together: an
outline. Here the slots of each group are chosen. Neither reads a weight; "magnitude" needs a score for each slot.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from selection.rules import Choices, select_slots

Axis = tuple[str | int, ...] | None  # factors, outermost first: a group, or a number of slots all kept; None: all kept


@dataclass(frozen=True)
class Group:
    """An axis group: how many slots the teacher has along it, and which of them the student keeps, ascending."""

    size: int
    kept: list[int]


@dataclass(frozen=True)
class Source:
    """Where a student tensor comes from: a teacher tensor (None: none), its axes, and what is done to the slots taken.

    Steps are named in `selection.tensors.STEPS`, each with its arguments behind it.
    """

    key: str | None
    axes: tuple[Axis, ...] = ()
    steps: tuple[tuple, ...] = ()


@dataclass(frozen=True)
class Outline:
    """A plan before the slots are chosen: sources, the sizes of groups (teacher, student), layers by stage, and notes."""

    sources: dict[str, Source]
    sizes: dict[str, tuple[int, int]]
    layers: dict[str, Group]
    heads: str | None  # "blend" or "keep"; None where there are none
    notes: dict[str, int]  # what is not a plain copy of slots, with the number of tensors


@dataclass(frozen=True)
class Plan:
    """Which slots of which teacher tensor go where."""

    groups: dict[str, Group]
    sources: dict[str, Source]
    layers: dict[str, Group]
    heads: str | None
    notes: dict[str, int]

    def indices(self, student_key: str) -> list[list[int] | None]:
        """The teacher's positions along each axis of a student tensor, ascending; None for an axis kept whole."""
        return [axis and self.positions(axis).tolist() for axis in self.sources[student_key].axes]

    def positions(self, axis: tuple[str | int, ...]) -> np.ndarray:
        """The teacher's positions along an axis of these factors, ascending; int64 [student's slots]."""
        if axis not in self._positions:
            found = np.zeros(1, dtype=np.int64)
            for factor in axis:
                size, kept = (factor, range(factor)) if isinstance(factor, int) else self._sized(factor)
                found = (found[:, None] * size + np.asarray(kept)).ravel()
            self._positions[axis] = found
        return self._positions[axis]

    def _sized(self, name: str) -> tuple[int, list[int]]:
        return self.groups[name].size, self.groups[name].kept

    @cached_property
    def _positions(self) -> dict[tuple, np.ndarray]:
        return {}  # most axes are shared by many tensors

    def as_json(self) -> dict:
        """Plain values: each group's indices once, and the groups and steps of each tensor."""
        layers, groups = (
            {name: {"teacher_size": group.size, "indices": group.kept} for name, group in kind.items()}
            for kind in (self.layers, self.groups)
        )
        tensors = {}
        for key, source in self.sources.items():
            axes = [axis and "*".join(map(str, axis)) for axis in source.axes]
            tensors[key] = {"from": source.key, "axes": axes}
            if source.steps:
                tensors[key]["steps"] = [list(step) for step in source.steps]
        return {"layers": layers, "notes": self.notes, "groups": groups, "tensors": tensors}


def choose(outline: Outline, choices: Choices, scores: Mapping[str, np.ndarray] | None = None) -> Plan:
    """The outline with the slots of each group chosen."""
    groups = {}
    for name, (size, target) in outline.sizes.items():
        score = None if scores is None else scores[name]
        kept = select_slots(choices.element_selection, size, target, group=name, seed=choices.seed, score=score)
        groups[name] = Group(size, kept)
    sources = dict(outline.sources)
    if "registers" in groups and "pos_embed" in sources:
        # rows of the position embedding go with their registers
        steps = tuple(_with_registers(step, groups["registers"].kept) for step in sources["pos_embed"].steps)
        sources["pos_embed"] = replace(sources["pos_embed"], steps=steps)
    return Plan(groups, sources, outline.layers, outline.heads, outline.notes)


def _with_registers(step: tuple, kept: list[int]) -> tuple:
    if step[0] != "positions":
        return step
    name, rows, *rest = step
    return name, [row and [row[0], kept[row[1]] if row[0] == "reg_token" else row[1]] for row in rows], *rest
