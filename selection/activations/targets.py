"""Which of a student's layers can be refitted, and what the teacher's values are that each should give."""

import re
import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from selection.activations.alignment import Alignment, Rows
from selection.activations.scratch import BATCH, Batch
from selection.activations.segments import Segments
from selection.activations.trace import Call, Trace, Write
from selection.plan import Plan
from utils import Stream, derive_seed

ROWS_PER_UNKNOWN = 24  # rows of a regression, for each unknown of an output


@dataclass
class Fit:
    """A layer of the student, where its target is in the teacher, and the target's values, batch by batch."""

    key: str
    kind: str  # as in Call
    teacher_key: str
    rows: Rows
    writes: bool  # the target is the stream behind it
    fold: Tensor | None  # the teacher's LayerScale that the student's layer has absorbed, of the kept channels
    unknowns: int  # of each output
    targets: list[Tensor] = field(default_factory=list)
    scale: str | None = None  # the student's own LayerScale behind it

    def chosen(self, batch: Batch, fitting: int) -> Tensor:
        """Choose which places of a batch take part, if there are more than enough in the `fitting` images together."""
        per_image = len(self.rows.student) // BATCH
        count, wanted = per_image * len(batch), ROWS_PER_UNKNOWN * self.unknowns
        if self.kind == "batch_norm" or per_image * fitting <= wanted:
            return torch.arange(count)
        seed = derive_seed(Stream.ROWS, zlib.crc32(self.key.encode()), batch.number)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return order[: -(-wanted * len(batch) // fitting)]


class KeepTargets:
    """A visitor of the teacher that keeps the targets of one batch after the other."""

    def __init__(self, fits: list[Fit], fitting: int) -> None:
        self.batch: Batch | None = None
        self._outputs = {fit.teacher_key: fit for fit in fits if not fit.writes}
        self.written = {fit.teacher_key: fit for fit in fits if fit.writes}
        self._fitting = fitting

    def ran(self, call: Call) -> None:
        fit = self._outputs.get(call.key)
        if fit is None:
            return
        target = fit.rows.of_teacher(call.values, fit.chosen(self.batch, self._fitting))
        if fit.kind == "batch_norm":
            target = moments(target)
        fit.targets.append(target if fit.fold is None else target * fit.fold)

    def wrote(self, call: Call, write: Write) -> None:
        fit = self.written[call.key]
        chosen = fit.chosen(self.batch, self._fitting)
        behind, inside = (call.channels_last(each) for each in (write.behind, write.inside))
        arrives = fit.rows.of_teacher(inside, chosen)[:, 0] > 0
        fit.targets.append(fit.rows.of_teacher(behind, chosen)[arrives])


def moments(values: Tensor) -> Tensor:
    """Sum [rows, channels] and their squares over the rows, float64 [2, channels]."""
    values = values.double()
    return torch.stack([values.sum(0), values.square().sum(0)])


@dataclass
class Seen:
    """The layers that a part of a model runs, in order, and which addition to the stream each writes to, scaled by what."""

    calls: dict[str, Call] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    writes: dict[str, int] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Segments, stream: Tensor, after: int, last: int | None) -> "Seen":
        """Run the part behind block `after` up to block `last` for the `stream` of one image."""
        seen = cls()
        with Trace(model, seen):
            model.run(stream, after, last)
        return seen

    def ran(self, call: Call) -> None:
        if call.key in self.calls:
            self.repeated.add(call.key)
        self.calls[call.key] = call

    def wrote(self, call: Call, write: Write) -> None:
        self.writes[call.key] = write.number
        if write.scale_key:
            self.scales[call.key] = write.scale_key


class Targets:
    """The counterpart of each of the student's layers in the teacher."""

    def __init__(self, teacher: Segments, student: Segments, plan: Plan, layers: str, own_outputs: bool) -> None:
        """`layers`: see Family. `own_outputs`: also the target of a layer that writes to the stream is its output."""
        self.alignment = Alignment(teacher, student, plan)
        self._teacher, self._student, self._plan, self._own_outputs = teacher, student, plan, own_outputs
        self._layers = re.compile(layers)

    def ends(self, to_stage_end: bool) -> list[int]:
        """List the last of the teacher's blocks that each of the student's stands for.

        It stands for its own and for those that are left out behind it. The last of a stage stands for its own only,
        or for all up to the end of the stage.
        """
        ends = []
        for block in self._student.blocks:
            stage, number = self._layers.fullmatch(f"{block}.").groups()
            group = self._plan.layers[stage]
            kept = [*group.kept, group.size if to_stage_end else group.kept[-1] + 1]
            ends.append(self._teacher.blocks.index(f"{stage}.{kept[int(number) + 1] - 1}"))
        return ends

    def fits(self, student: Seen, teacher: Seen, stream: Tensor, end: int | None) -> tuple[list[Fit], dict[str, str]]:
        """List what can be refitted, in order, and why the rest cannot. `end` is the teacher's last block, None if none."""
        fits, left = [], {}
        for key in student.calls:
            if key in self._plan.sources:  # a head that is not taken has no source
                fit = self._fit(key, student, teacher, stream, end)
                if isinstance(fit, Fit):
                    fits.append(fit)
                else:
                    left[key] = fit
        return fits, left

    def _fit(self, key: str, student: Seen, teacher: Seen, stream: Tensor, end: int | None) -> Fit | str:
        source, call = self._plan.sources[key], student.calls[key]
        teacher_key = self._counterpart(key, student, teacher, end)
        if source.key is None or teacher_key not in teacher.calls:
            return "the teacher has none" if source.key is None else "the teacher's does not run there"
        if key in student.repeated or isinstance(call.padding, str):
            return "it runs twice" if key in student.repeated else f"its padding is {call.padding!r}"
        places = [
            (BATCH * shape[0], *shape[1:-1])
            for shape in (each.channels_last(each.output).shape for each in (teacher.calls[teacher_key], call))
        ]
        channels = source.axes[0] if source.axes else None
        channels = None if channels is None else torch.from_numpy(self._plan.axis_indices(channels))
        rows = self.alignment.rows(*places, stream, channels)
        if rows is None:
            return "its places differ from the teacher's"
        writes = key in student.writes and teacher_key in teacher.writes and not self._own_outputs
        folded = next((step[1] for step in source.steps if step[0] == "times"), None)
        fold = None if folded is None else self._teacher.model.get_parameter(folded)
        fold = fold if fold is None or channels is None else fold[channels]
        scale = self._scale(call, student)
        return Fit(key, call.kind, teacher_key, rows, writes, fold, call.unknowns, scale=scale)

    def _scale(self, call: Call, student: Seen) -> str | None:
        """Name the LayerScale that the student has behind this layer alone, with a value for each of its outputs."""
        name, outputs = student.scales.get(call.key), call.channels_last(call.output).shape[-1]
        scale = dict(self._student.model.named_parameters()).get(name)
        alone = list(student.scales.values()).count(name) == 1
        return name if alone and scale is not None and scale.numel() == outputs else None

    def _counterpart(self, key: str, student: Seen, teacher: Seen, end: int | None) -> str | None:
        """Name the teacher's layer whose values a student's layer should give.

        The last write of a block stands for those of the blocks that are left out behind it.
        """
        own = self._plan.sources[key].key
        if own is None or end is None or student.writes.get(key) != max(student.writes.values(), default=None):
            return own
        later = self._layers.sub(f"{self._teacher.blocks[end]}.", own, count=1)
        return later if later in teacher.writes else own

    def stream(self, student: Seen) -> Tensor:
        """Find the teacher's channels that a part of the student keeps of the stream, int64 [its width].

        They are the outputs of its last layer that writes channels of no group of its own block.
        """
        kept = torch.arange(0)
        for key, call in student.calls.items():
            source, block = self._plan.sources.get(key), self._layers.match(key)
            axis = source.axes[0] if source and source.axes else None
            if source is None or call.kind == "batch_norm":
                continue
            if (axis is None and block is None) or (axis is None and key in student.writes):
                kept = torch.arange(call.channels_last(call.output).shape[-1])
            elif axis is not None and not (block and any(str(factor).startswith(block[0]) for factor in axis)):
                kept = torch.from_numpy(self._plan.axis_indices(axis))
        return kept
