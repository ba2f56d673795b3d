"""Put two models side by side: which teacher tensor each student tensor is cut from, and which axes go together.

No weight is read and no index chosen here. Layers are in selection.layers, axis groups in selection.axes, what is
resampled in selection.positions. The notes say what is not a plain copy of teacher values.
"""

import re
from collections.abc import Mapping

from options.selection import INCONSISTENT_RULES
from selection.axes import AxisGroups, TensorPair, head_rule, heads_are_fixed
from selection.family import MUST_AGREE, Family, Layout, Refused
from selection.layers import LayerMap, any_layer
from selection.plan import Outline, Source
from selection.positions import TOKENS, StepsAndNotes, merged_row_steps, size_steps
from selection.rules import Choices


def match(family: Family, teacher: Layout, student: Layout, choices: Choices) -> Outline:
    """Find each student tensor's teacher tensor and axes. Raises Refused, naming the tensor, if the pair does not fit."""
    return _Matching(family, teacher, student, choices).outline()


class _Matching:
    """A pair of models being matched."""

    def __init__(self, family: Family, teacher: Layout, student: Layout, choices: Choices) -> None:
        self.family, self.teacher, self.student, self.choices = family, teacher, student, choices
        self.notes: dict[str, set[str]] = {}
        self.table = family.axes(student.shapes)
        self._check_kinds()
        self._check_gates()
        self.heads = head_rule(self.table, choices.heads)
        self.layers = LayerMap(family, teacher.shapes, student.shapes, choices.layer_selection)
        inconsistent = choices.element_selection in INCONSISTENT_RULES
        self.groups = AxisGroups(teacher, student, self.layers, self.table, self.heads, each_for_itself=inconsistent)
        self.folds = self._folds()
        if heads_are_fixed(self.table) and choices.heads is None:
            # notes are part of the .json files and keep the word "slots"
            self._note("heads are kept whole: slots of different heads cannot be mixed here")

    def outline(self) -> Outline:
        sources = {key: self._source(key) for key in self.student.shapes}
        self._check_leftovers(sources)
        return Outline(sources, self.groups.sizes, self.layers.stages, self.heads, self.notes)

    def _note(self, text: str, *keys: str) -> None:
        """Note what is not a plain copy: of these student tensors, or of the whole pair."""
        self.notes.setdefault(text, set()).update(keys)

    def _noted(self, key: str, steps_and_notes: StepsAndNotes) -> list[tuple]:
        steps, notes = steps_and_notes
        for note in notes:
            self._note(note, key)
        return steps

    # ---- do both compute the same kind of function? ----

    def _check_kinds(self) -> None:
        """Refuse a pair with other layers, norms or rotations; note another activation or pooling."""
        takes_head = any(re.match(r"(head|fc)\.", key) for key in self.student.shapes)
        for kind in self.teacher.kinds | self.student.kinds:
            in_teacher, in_student = (layout.kinds.get(kind, "none") for layout in (self.teacher, self.student))
            if in_teacher == in_student:
                continue
            if kind in MUST_AGREE:
                raise Refused("other layers", f"{kind}: the teacher's are {in_teacher}, the student's {in_student}")
            if kind != "pooling" or takes_head:  # pooling is part of the head: no other tensor depends on it
                self._note(f"{kind}: the teacher's is {in_teacher}, the student's {in_student}")

    def _check_gates(self) -> None:
        """Refuse a pair if an MLP's first projection also holds a gate on one side only."""
        teacher_table = self.family.axes(self.teacher.shapes)
        if teacher_table == self.table:
            return
        for key in self.student.shapes:
            in_teacher, in_student = (self._is_gated(table, key) for table in (teacher_table, self.table))
            if in_teacher != in_student:
                side = "teacher" if in_teacher else "student"
                raise Refused("other layers", f"{key}: only the {side}'s MLP has a gate")

    def _is_gated(self, table: Mapping[str, str], key: str) -> bool:
        words = self.family.words(table, key)
        return bool(words) and words[0].startswith("2*")

    # ---- where each tensor comes from ----

    def _source(self, key: str) -> Source:
        shape, teacher_key = self.student.shapes[key], self._counterpart(key)
        if teacher_key is None:
            return self._without_teacher(key, shape)
        steps = self._folding_steps(key)
        pair = TensorPair(key, self.teacher.shapes[teacher_key], shape)
        if {len(pair.teacher), len(pair.student)} == {2, 4}:
            # a linear layer and a 1x1 convolution: the same values, compared as convolutions
            steps.append(("reshape", list(shape)))
            pair = TensorPair(key, (*pair.teacher, 1, 1)[:4], (*pair.student, 1, 1)[:4])
        if len(pair.teacher) != len(pair.student):
            raise Refused("axes", f"{pair} have different numbers of axes")
        words = self.family.words(self.table, key)
        if words is None:
            raise Refused("unknown tensor", f"{key} is not a tensor that this family knows how to cut")
        words = [*words, *["-"] * len(pair.student)][: len(pair.student)]  # axes without a word are kept whole
        axes = tuple(self.groups.axis(pair, number, word) for number, word in enumerate(words))
        steps += self._noted(key, size_steps(pair, words, teacher_key, self.teacher, self.student))
        steps += self._noted(key, merged_row_steps(teacher_key, self.teacher, self.student))
        return Source(teacher_key, axes, tuple(steps))

    def _counterpart(self, key: str) -> str | None:
        """Find the teacher tensor that a student tensor is cut from, or None."""
        name = self.layers.in_teacher(key)
        if name in self.teacher.shapes:
            return name
        for pair in self.family.same:
            for own, other in (pair, pair[::-1]):
                renamed = other + name.removeprefix(own)
                if name.startswith(own) and renamed in self.teacher.shapes and renamed not in self.student.shapes:
                    self._note(f"{key} from the teacher's {renamed}", key)
                    return renamed
        if key == "dist_token" and "cls_token" in self.teacher.shapes:
            self._note("dist_token from the teacher's cls_token", key)
            return "cls_token"
        return None

    def _without_teacher(self, key: str, shape: tuple[int, ...]) -> Source:
        """Make a tensor that the teacher lacks: filled with a neutral value, or noise for a token."""
        value, _ = self.family.find(self.family.neutral, key)
        if value is None and key.endswith(".bias") and self._counterpart(f"{key[:-4]}weight"):
            value = 0.0
        if value is not None:
            self._note(f"{any_layer(key)} begins at {value:g}, which changes nothing: the teacher has none", key)
            return Source(None, (), (("fill", value, list(shape)),))
        if key in TOKENS:
            self._note(f"{key} begins as noise of 1e-6: the teacher has none", key)
            return Source(None, (), (("noise", 1e-6, list(shape), self.choices.seed, key),))
        missing = self.layers.in_teacher(key)
        raise Refused(
            "no teacher tensor", f"the teacher has no tensor {missing}, which the student needs {list(shape)}"
        )

    # ---- LayerScale, and what nobody takes ----

    def _folds(self) -> dict[str, str]:
        """Find the student's projections whose LayerScale only the teacher has: projection -> the teacher's LayerScale."""
        teacher_scales, student_scales = (self.family.scaled(each.shapes) for each in (self.teacher, self.student))
        projections = {key.rpartition(".")[0] for key in self.student.shapes} - student_scales.keys()
        in_teacher = {name: self.layers.in_teacher(name) for name in projections}
        return {name: teacher_scales[other] for name, other in in_teacher.items() if other in teacher_scales}

    def _folding_steps(self, key: str) -> list[tuple]:
        """Multiply a projection by the LayerScale that the student lacks, which is exact."""
        scale = self.folds.get(key.rpartition(".")[0])
        if scale is None:
            return []
        self._note(f"LayerScale folded into {any_layer(key)}", key)
        return [("times", scale)]

    def _check_leftovers(self, sources: Mapping[str, Source]) -> None:
        """Refuse a pair if a layer that is taken has a tensor that nobody takes: without it the layer computes another function."""
        taken = {source.key for source in sources.values()} | set(self.folds.values())
        for key, shape in self.teacher.shapes.items():
            if key in taken or not self.layers.takes(key):
                continue
            if re.fullmatch(self.family.left_out, key):
                self._note(f"{key.partition('.')[0]} left out: the student has none")
                continue
            message = f"the teacher's {key} {list(shape)} has no counterpart in the student; see --student_kwargs"
            raise Refused("leftover", message)
