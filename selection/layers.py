"""Layers: which of the teacher's each of the student's takes, and what its tensors are called there."""

import re

from selection.family import Family, Refused, Shapes
from selection.plan import Group
from selection.rules import select_layers


class LayerMap:
    """The teacher's layer for each of the student's layers, stage by stage."""

    def __init__(self, family: Family, teacher: Shapes, student: Shapes, rule: str) -> None:
        self.pattern = re.compile(family.layers)
        self.stages: dict[str, Group] = {}
        teacher_depths = self._depths(teacher)
        for stage, depth in self._depths(student).items():
            available = teacher_depths.get(stage, 0)
            if depth > available:
                raise Refused("depth", f"{stage}: the student has {depth} layers, the teacher {available}")
            kept = select_layers(rule, available, depth, first_stays=family.first_stays, turns=family.turns)
            self.stages[stage] = Group(available, kept)

    def _depths(self, shapes: Shapes) -> dict[str, int]:
        depths: dict[str, int] = {}
        for layer in filter(None, map(self.pattern.match, shapes)):
            depths[layer[1]] = max(depths.get(layer[1], 0), int(layer[2]) + 1)
        return depths

    def in_teacher(self, name: str) -> str:
        """Translate a student's name (of a tensor, module or group) to the layer that the teacher has in its place."""
        layer = self.pattern.match(name if name.endswith(".") else f"{name}.")  # the name of a layer itself has no "."
        if layer is None:
            return name
        return f"{name[: layer.start(2)]}{self.stages[layer[1]].kept[int(layer[2])]}{name[layer.end(2) :]}"

    def takes(self, teacher_key: str) -> bool:
        """Tell whether a teacher's tensor is in a layer that the student takes, or in no layer at all."""
        layer = self.pattern.match(teacher_key)
        return layer is None or (layer[1] in self.stages and int(layer[2]) in self.stages[layer[1]].kept)


def any_layer(key: str) -> str:
    """Replace layer numbers by `*`, so that one note covers a tensor's namesakes in all layers."""
    return re.sub(r"\.\d+\.", ".*.", key)
