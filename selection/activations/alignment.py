"""Which values of a teacher's layer belong to which of a student's: the same tokens, and the channels that are kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selection.activations.segments import Segments
from selection.plan import Plan
from selection.positions import TOKENS


@dataclass(frozen=True)
class Rows:
    """For each place in both outputs, its index along the flattened axes before the channels; and the kept channels."""

    teacher: Tensor  # int64 [rows of the first `batch` entries]
    student: Tensor
    channels: Tensor | None  # the teacher's channels, int64 [the student's]; None: all

    def of_teacher(self, values: Tensor, chosen: Tensor) -> Tensor:
        """Pick rows and channels from the teacher's [..., channels]."""
        rows = values.reshape(-1, values.shape[-1])[self.teacher[chosen]]
        return rows if self.channels is None else rows[:, self.channels]

    def of_student(self, values: Tensor, chosen: Tensor) -> Tensor:
        """Pick rows from the student's [..., channels]."""
        return values.reshape(-1, values.shape[-1])[self.student[chosen]]


class Alignment:
    """The places of a pair of models that have the same grid of patches."""

    def __init__(self, teacher: Segments, student: Segments, plan: Plan) -> None:
        registers = plan.groups["registers"].kept if "registers" in plan.groups else None
        own, other = _tokens(student.model), _tokens(teacher.model)
        names = [(token, registers[row] if token == "reg_token" and registers else row) for token, row in own]
        shared = [row for row, name in enumerate(names) if name in other]
        self._tokens: tuple[Tensor, Tensor] | None = None
        if own != other:
            # of the images that run: they may have more patches than those that the model is made for
            patches = torch.arange(student.shapes[0][0] - len(own))
            in_teacher = torch.tensor([other.index(names[row]) for row in shared], dtype=torch.int64)
            in_student = torch.tensor(shared, dtype=torch.int64)
            self._tokens = torch.cat([in_teacher, len(other) + patches]), torch.cat([in_student, len(own) + patches])
            self._counts = len(other) + len(patches), len(own) + len(patches)

    def pick(self, teacher: Tensor, student: Tensor, stream: Tensor) -> tuple[Tensor, Tensor] | None:
        """Select from both what they share along every axis but the first; None if other sizes differ.

        `stream`: the channels of the teacher's stream that the student keeps, int64 [the student's width].
        """
        if teacher.ndim != student.ndim:
            return None
        for axis in range(1, teacher.ndim):
            sizes = teacher.shape[axis], student.shape[axis]
            if self._tokens and sizes == self._counts:
                teacher = teacher.index_select(axis, self._tokens[0])
                student = student.index_select(axis, self._tokens[1])
            elif sizes[0] != sizes[1]:
                if len(stream) != sizes[1] or int(stream.max()) >= sizes[0]:
                    return None
                teacher = teacher.index_select(axis, stream)
        return teacher, student

    def rows(
        self, teacher: Sequence[int], student: Sequence[int], stream: Tensor, channels: Tensor | None
    ) -> Rows | None:
        """Match two outputs by the sizes of their axes before the channels; None if these do not match.

        An axis of rows may be one of the stream's channels too: that of Mixer's token MLP.
        """
        places = [torch.arange(math.prod(sizes)).reshape(tuple(sizes)) for sizes in (teacher, student)]
        shared = self.pick(*places, stream)
        if shared is None or shared[0].shape != shared[1].shape:
            return None
        return Rows(shared[0].flatten(), shared[1].flatten(), channels)


def _tokens(model: nn.Module) -> list[tuple[str, int]]:
    """List the tokens before the patches, in the order in which they run: ("reg_token", 2) is the third register."""
    tensors = dict(model.named_parameters())
    return [(token, row) for token in TOKENS if token in tensors for row in range(tensors[token].shape[1])]
