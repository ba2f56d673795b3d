"""Which slots of which teacher tensor a student tensor inherits: a plan made of names and shapes, and the copying.

Slots are planned for axis groups, not for tensors: all tensors on one axis keep the same slots of it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from utils import UserError

# The axis groups of each family: a pattern of tensor names, then a group for each axis. Positions of one group are
# chosen once and used by every tensor on it, so that what one tensor writes to a slot the next one reads from it.
# "-" is an axis kept as it is, "3*g" one of three blocks, each cut like g; axes not named are kept.
AXES = {
    "vit": {
        r"(cls|reg|dist)_token|pos_embed": "- - stream",
        r"patch_embed\.proj\.weight": "stream",
        r"patch_embed\.proj\.bias": "stream",
        r"(norm|norm_pre|fc_norm)\.(weight|bias)": "stream",
        r"blocks\.\d+\.norm[12]\.(weight|bias)": "stream",
        r"blocks\.\d+\.ls[12]\.gamma": "stream",
        r"(blocks\.\d+)\.attn\.qkv\.weight": r"3*\1.attn stream",
        r"(blocks\.\d+)\.attn\.qkv\.bias": r"3*\1.attn",
        r"(blocks\.\d+)\.attn\.proj\.weight": r"stream \1.attn",
        r"(blocks\.\d+)\.mlp\.fc1\.weight": r"\1.mlp stream",
        r"(blocks\.\d+)\.mlp\.fc1\.bias": r"\1.mlp",
        r"(blocks\.\d+)\.mlp\.fc2\.weight": r"stream \1.mlp",
        r"blocks\.\d+\.(attn\.proj|mlp\.fc2)\.bias": "stream",
        r"(head|head_dist)\.weight": "- stream",
        r"(head|head_dist)\.bias": "-",
    },
    "convnext": {
        r"stem\.\d+\.(weight|bias)": "stages.0",
        r"(stages\.\d+)\.blocks\.\d+\.(gamma|conv_dw\.weight|conv_dw\.bias|norm\.weight|norm\.bias)": r"\1",
        r"((stages\.\d+)\.blocks\.\d+)\.mlp\.fc1\.weight": r"\1.mlp \2",
        r"((stages\.\d+)\.blocks\.\d+)\.mlp\.fc1\.bias": r"\1.mlp",
        r"((stages\.\d+)\.blocks\.\d+)\.mlp\.fc2\.weight": r"\2 \1.mlp",
        r"(stages\.\d+)\.blocks\.\d+\.mlp\.fc2\.bias": r"\1",
        **{rf"stages\.{s}\.downsample\.0\.(weight|bias)": f"stages.{s - 1}" for s in (1, 2, 3)},
        **{rf"stages\.{s}\.downsample\.1\.weight": f"stages.{s} stages.{s - 1}" for s in (1, 2, 3)},
        r"(stages\.\d+)\.downsample\.1\.bias": r"\1",
        r"head\.norm\.(weight|bias)": "stages.3",
        r"head\.fc\.weight": "- stages.3",
        r"head\.fc\.bias": "-",
    },
}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Group:
    """An axis group: how many slots the teacher has along it, and which of them the student keeps, ascending."""

    size: int
    kept: list[int]


@dataclass(frozen=True)
class Source:
    """Where a student tensor comes from: a teacher tensor and, for each axis, its group (None: kept whole) and blocks."""

    key: str
    axes: tuple[tuple[str | None, int], ...]


@dataclass(frozen=True)
class Plan:
    """Which slots of which teacher tensor go where."""

    groups: dict[str, Group]
    sources: dict[str, Source]

    def indices(self, student_key: str) -> list[list[int] | None]:
        """The teacher's positions along each axis of a student tensor, ascending; None for an axis kept whole."""
        found = []
        for name, blocks in self.sources[student_key].axes:
            group = self.groups.get(name)
            found.append(group and [block * group.size + slot for block in range(blocks) for slot in group.kept])
        return found

    def as_json(self) -> dict:
        """Plain values: each group's indices once, and the group of each axis of each tensor."""
        groups = {name: {"teacher_size": group.size, "indices": group.kept} for name, group in self.groups.items()}
        tensors = {
            key: {"from": source.key, "axes": [_label(*axis) for axis in source.axes]}
            for key, source in self.sources.items()
        }
        return {"groups": groups, "tensors": tensors}


def _label(group: str | None, blocks: int) -> str | None:
    return group if blocks == 1 else f"{blocks}*{group}"


def select_indices(source: int, target: int) -> list[int]:
    """Evenly spaced positions to keep when `source` slots shrink to `target`; ascending.

    Divisible sizes use a constant stride; others round `linspace(0, source - 1)` in float32, ties to even, as the
    paper's code does (weight_selection.py:14-18 at e9b6d0c). Raises ValueError if target > source or target < 1.
    """
    if not 1 <= target <= source:
        raise ValueError(f"cannot keep {target} of {source} slots")
    if source % target == 0:
        return list(range(0, source, source // target))
    return torch.round(torch.linspace(0, source - 1, target)).long().tolist()


def axes_of(family: str, key: str, dimensions: int) -> tuple[tuple[str | None, int], ...]:
    """The group (None: kept whole) and the number of blocks of each of a tensor's axes; UserError for an unknown name."""
    for pattern, template in AXES[family].items():
        match = re.fullmatch(pattern, key)
        if match:
            words = match.expand(template).split()
            words += ["-"] * (dimensions - len(words))
            parts = (word.rpartition("*") for word in words)
            return tuple((None if group == "-" else group, int(blocks or 1)) for blocks, _, group in parts)
    raise UserError(f"{key} is not a tensor that the family {family} knows how to cut")


def make_plan(family: str, teacher: Shapes, student: Shapes) -> Plan:
    """The plan that fills every tensor of `student` from `teacher`, the first layers and evenly spaced slots.

    Both map tensor names to shapes, without the head if it is not to be inherited. Raises UserError naming the first
    tensor that does not fit, and teacher tensors in the inherited layers that the student has no place for.
    """
    groups, sources = {}, {}
    for key, shape in student.items():
        if key not in teacher:
            raise UserError(f"the teacher has no tensor {key}, which the student needs {list(shape)}")
        source = Source(key, axes_of(family, key, len(shape)))
        for size, target, (name, blocks) in _paired_axes(key, teacher[key], shape, source):
            if name is not None:
                group = groups.setdefault(name, Group(size // blocks, select_indices(size // blocks, target // blocks)))
                if (group.size, len(group.kept)) != (size // blocks, target // blocks):
                    raise UserError(f"{key} does not agree with the tensors before it on the width of {name}")
        sources[key] = source
    _refuse_leftovers(teacher, student)
    return Plan(groups, sources)


def _paired_axes(key: str, teacher: tuple, student: tuple, source: Source):
    """(teacher size, student size, axis) for each axis of a tensor; UserError naming both shapes if they cannot fit."""
    shapes = f"{key}: the teacher's {list(teacher)}"
    if len(teacher) != len(student):
        raise UserError(f"{shapes} has another number of axes than the student's {list(student)}")
    for size, target, (name, _) in zip(teacher, student, source.axes, strict=True):
        if size < target:
            raise UserError(f"{shapes} is smaller than the student's {list(student)}")
        if name is None and size != target:
            raise UserError(
                f"{shapes} and the student's {list(student)} differ along an axis that is not selected from"
            )
    return zip(teacher, student, source.axes, strict=True)


def _refuse_leftovers(teacher: Shapes, student: Shapes) -> None:
    """UserError if an inherited layer of the teacher has a tensor without a counterpart: dropping it changes the layer."""
    layer = re.compile(r".*blocks\.\d+\.")
    kept = {match[0] for match in map(layer.match, student) if match}
    for key in teacher:
        match = layer.match(key)
        if key not in student and (match is None or match[0] in kept):
            raise UserError(f"the teacher's {key} {list(teacher[key])} has no counterpart in the student")


def select(teacher: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The student's tensors, copied from the teacher's slots as planned; contiguous, in the teacher's dtypes."""
    student = {}
    for key, source in plan.sources.items():
        tensor = teacher[source.key]
        for axis, positions in enumerate(plan.indices(key)):
            if positions is not None:
                tensor = tensor.index_select(axis, torch.tensor(positions))
        student[key] = tensor.clone(memory_format=torch.contiguous_format)
    return student
