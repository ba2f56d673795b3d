"""The plan as data: which indices of which teacher tensor each student tensor takes.

selection.match makes an outline: each student tensor's teacher tensor, and the axis groups that tie tensors together.
Here the indices of each group are chosen. Neither reads a weight; `options.SCORED_RULES` need a score for each index.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from selection.rules import Choices, select_indices

# factors of an axis, outermost first: a group's name, or a size that is kept whole; None if the whole axis is
Axis = tuple[str | int, ...] | None


@dataclass(frozen=True)
class Group:
    """An axis group, or a stage of layers: its size in the teacher, and the indices that the student keeps, ascending."""

    size: int
    kept: list[int]


@dataclass(frozen=True)
class Source:
    """Where a student tensor comes from: a teacher tensor (None if it has none), its axes, and further steps.

    A step is a name in `selection.tensors.STEPS`, followed by its arguments.
    """

    key: str | None
    axes: tuple[Axis, ...] = ()
    steps: tuple[tuple, ...] = ()


@dataclass(frozen=True)
class Outline:
    """A plan whose indices are not chosen yet: `sizes` holds each group's size in the teacher and in the student."""

    sources: dict[str, Source]
    sizes: dict[str, tuple[int, int]]
    layers: dict[str, Group]
    heads: str | None  # "blend" or "keep"; None for models without heads
    notes: dict[str, set[str]]  # what is not a plain copy -> the student tensors it is about; none: the pair


@dataclass(frozen=True)
class Plan:
    """Which indices of which teacher tensor go where."""

    groups: dict[str, Group]
    sources: dict[str, Source]
    layers: dict[str, Group]
    heads: str | None
    notes: dict[str, set[str]]

    def without(self, keys: Iterable[str]) -> "Plan":
        """Leave out these student tensors, with the groups and notes that are about no other."""
        gone = set(keys)
        sources = {key: source for key, source in self.sources.items() if key not in gone}
        used = {factor for source in sources.values() for axis in source.axes for factor in axis or ()}
        return replace(
            self,
            sources=sources,
            groups={name: group for name, group in self.groups.items() if name in used},
            notes={note: about for note, about in self.notes.items() if not about or about & sources.keys()},
        )

    def axis_indices(self, axis: tuple[str | int, ...]) -> np.ndarray:
        """Return the teacher's indices along an axis of these factors, ascending; int64 [the student's size]."""
        if axis not in self._known_axes:
            indices = np.zeros(1, dtype=np.int64)
            for factor in axis:
                group = Group(factor, list(range(factor))) if isinstance(factor, int) else self.groups[factor]
                indices = (indices[:, None] * group.size + np.asarray(group.kept)).ravel()
            self._known_axes[axis] = indices
        return self._known_axes[axis]

    @cached_property
    def _known_axes(self) -> dict[tuple, np.ndarray]:
        return {}  # most axes are shared by many tensors

    def as_json(self) -> dict:
        """Return plain values for JSON: each group's indices once, and the groups and steps of each tensor."""
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
        notes = {note: max(1, len(about & self.sources.keys())) for note, about in self.notes.items()}
        return {"layers": layers, "notes": notes, "groups": groups, "tensors": tensors}


def choose(outline: Outline, choices: Choices, scores: Mapping[str, np.ndarray] | None = None) -> Plan:
    """Choose the indices of each group, and the gains; `scores` are those of `selection.tensors.magnitudes`."""
    groups = {}
    for name, (size, target) in outline.sizes.items():
        score = None if scores is None else scores[name]
        kept = select_indices(choices.element_selection, size, target, group=name, seed=choices.seed, score=score)
        groups[name] = Group(size, kept)
    sources = dict(outline.sources)
    if "registers" in groups and "pos_embed" in sources:
        # a register that is kept keeps its row of the position embedding
        steps = tuple(_with_registers(step, groups["registers"].kept) for step in sources["pos_embed"].steps)
        sources["pos_embed"] = replace(sources["pos_embed"], steps=steps)
    if choices.gain:
        sources = {key: _with_gain(key, source, groups, choices.gain) for key, source in sources.items()}
    return Plan(groups, sources, outline.layers, outline.heads, outline.notes)


def _with_gain(key: str, source: Source, groups: Mapping[str, Group], power: float) -> Source:
    """Multiply the weight of a dense layer or a convolution by (teacher's inputs / student's inputs) ** `power`.

    Its second axis is its inputs. Nothing else has that axis and such a name: embeddings and tokens are no `.weight`,
    norms have one axis, and a depthwise filter's second axis is kept whole.
    """
    inputs = source.axes[1] if key.endswith(".weight") and len(source.axes) > 1 else None
    chosen = [groups[factor] for factor in inputs or () if isinstance(factor, str)]
    ratio = math.prod(group.size for group in chosen) / math.prod(len(group.kept) for group in chosen)
    return source if ratio == 1 else replace(source, steps=(*source.steps, ("gain", ratio**power)))


def _with_registers(step: tuple, kept: list[int]) -> tuple:
    if step[0] != "positions":
        return step
    name, rows, *rest = step
    return name, [row and [row[0], kept[row[1]] if row[0] == "reg_token" else row[1]] for row in rows], *rest
