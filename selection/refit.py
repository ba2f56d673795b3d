"""Refit a student's layers so that, fed with its own activations, they give the teacher's.

The walk is block by block, and in a block layer by layer, in the order in which they run. Each dense layer and
convolution is fitted by ridge regression on the student's activations, with all layers before it refitted already. A
layer that writes to the stream (residual connection) has as target the teacher's stream behind it, less the student's
stream before it, so that it also mends what came before. Any other has the teacher's output. What is regressed is the
residual that the selected weights leave, so a student that computes the teacher's function already is not changed.
"""

import contextlib
import logging
import math
import re
import sys
from dataclasses import dataclass, field

from torch import Tensor
from tqdm import tqdm

import models
from options.selection import REFIT_TARGETS
from selection.activations.alignment import Alignment
from selection.activations.regression import Regression
from selection.activations.scratch import Batch, Calibration, Scratch
from selection.activations.segments import IMAGES, Segments
from selection.activations.targets import Fit, KeepTargets, Seen, Targets
from selection.activations.trace import Trace
from selection.plan import Plan
from selection.rules import check_rule
from utils import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refit:
    """What to fit, and to what. The fields are options of weight_selection.py."""

    ridge: float = 0.01  # the penalty, as a share of the inputs' mean variance; inf leaves all as selected
    target: str = "stream"  # "outputs": layers that write to the stream have the outputs of the teacher's as well
    layers: str = ""  # a regular expression to find in the name of a layer's weight; other layers stay as selected

    def __post_init__(self) -> None:
        check_rule("target", self.target, REFIT_TARGETS)


@dataclass
class Closeness:
    """How near a student is to its teacher on the images held out of the regressions.

    `explained_variance`: the share of the variance of the teacher's stream behind each block, at the kept channels.
    `top1_agreement`: the share of images of which both name the same class; None without a common head.
    """

    explained_variance: dict[str, float] = field(default_factory=dict)
    top1_agreement: float | None = None


@dataclass
class Report:
    """What was refitted, what was left as selected and why, and the closeness with refitted and with selected weights."""

    refitted: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    closeness: Closeness = field(default_factory=Closeness)
    selected: Closeness = field(default_factory=Closeness)


def refit(
    teacher: Segments,
    students: tuple[Segments, Segments],
    plan: Plan,
    layers: str,
    images: Calibration,
    *,
    settings: Refit,
    to_stage_end: bool = False,
) -> Report:
    """Refit the first student in place; the second is its twin, which keeps the selected weights for comparison.

    `layers` is the pattern of Family. UserError if the disk is full or the teacher's activations are not finite.
    """
    targets = Targets(teacher, students[0], plan, layers, settings.target == "outputs")
    walk = _Walk(teacher, students, images)
    report, after = Report(), IMAGES
    ends = [*targets.ends(to_stage_end), None]  # None: the model's own output
    for block, end in enumerate(tqdm(ends, "refit", unit="block", disable=not sys.stderr.isatty(), leave=False)):
        last = None if end is None else block
        seen = walk.see(students[0], block - 1, last)
        stream = targets.stream(seen)
        fits, left = targets.fits(seen, walk.see(teacher, after, end), stream, end)
        reasons = {fit.key: _kept_by(settings, fit.key) for fit in fits}
        fits = [fit for fit in fits if not reasons[fit.key]]
        left |= {key: reason for key, reason in reasons.items() if reason}
        walk.run_teacher(fits, after, end)
        for fit in fits:
            walk.refit(fit, settings.ridge, block - 1, last)
        report.left |= left
        report.refitted += [fit.key for fit in fits]
        for student, closeness in zip(students, (report.closeness, report.selected), strict=True):
            if end is not None:
                walk.advance(student, block - 1, last, only_held_out=student is students[1])
                share = walk.explained(student, block, end, stream, targets.alignment)
                closeness.explained_variance[students[0].blocks[block]] = share
            elif any(key.startswith(models.head_prefixes(students[0].model)) for key in plan.sources):
                closeness.top1_agreement = walk.agreement(student, block - 1, after)
        after = end
    return report


def _kept_by(settings: Refit, key: str) -> str:
    """Say why the settings keep a layer as selected; "" if they do not."""
    if math.isinf(settings.ridge):
        return "the ridge is inf"
    return "" if re.search(settings.layers, key) else f"--refit_layers {settings.layers}"


class _Walk:
    """A teacher and two students on their way through the images; the stream behind the last block of each is kept."""

    def __init__(self, teacher: Segments, students: tuple[Segments, Segments], images: Calibration) -> None:
        self._teacher, self._student, self._images = teacher, students[0], images
        everyone, held_out = range(images.count), range(images.fitting, images.count)
        self._streams = {
            model: Scratch(images.folder, which, max(map(math.prod, model.shapes[:IMAGES])))
            for model, which in zip((teacher, *students), (everyone, everyone, held_out), strict=True)
        }
        space = sum(stream.mebibytes for stream in self._streams.values())
        log.info("the refit keeps %.0f MiB of activations in %s while it runs", space, images.folder.resolve())

    def _read(self, model: Segments, images: slice, after: int) -> Tensor:
        return self._images.read(images) if after == IMAGES else self._streams[model].read(images, model.shapes[after])

    def _held_out(self) -> list[Batch]:
        return [batch for batch in self._images.batches() if batch.held_out]

    def see(self, model: Segments, after: int, last: int | None) -> Seen:
        """See which layers a part of a model runs."""
        return Seen.of(model, self._read(model, slice(0, 1), after), after, last)

    def advance(self, model: Segments, after: int, last: int, *, only_held_out: bool) -> None:
        """Run a part of a model for the images and keep its outputs."""
        for batch in self._held_out() if only_held_out else self._images.batches():
            self._streams[model].write(batch.images, model.run(self._read(model, batch.images, after), after, last))

    def run_teacher(self, fits: list[Fit], after: int, last: int | None) -> None:
        """Run a part of the teacher for all images; keep its outputs, unless it is the last part, and the targets."""
        keep = KeepTargets(fits, self._images.fitting)
        for keep.batch in self._images.batches():
            stream = self._read(self._teacher, keep.batch.images, after)
            watched = Trace(self._teacher, keep, follow=keep.written)
            with contextlib.nullcontext() if keep.batch.held_out else watched:
                output = self._teacher.run(stream, after, last)
            if not output.isfinite().all():
                raise UserError("the teacher's activations are not finite for these images")
            if last is not None:
                self._streams[self._teacher].write(keep.batch.images, output)

    def refit(self, fit: Fit, ridge: float, after: int, last: int | None) -> None:
        """Run a part of the student up to one of its layers, and refit that."""
        regression = Regression(fit, self._images.fitting, self._student)
        for regression.batch in self._images.batches():
            if not regression.batch.held_out:
                with Trace(self._student, regression, follow={fit.key} if fit.writes else ()):
                    self._student.run(self._read(self._student, regression.batch.images, after), after, last)
        regression.apply(ridge)
        fit.targets.clear()

    def explained(self, student: Segments, block: int, end: int, stream: Tensor, alignment: Alignment) -> float:
        """Measure which share of the variance of the teacher's stream the student's explains, on the images held out."""
        error = total = squares = rows = 0.0
        for batch in self._held_out():
            values = self._read(self._teacher, batch.images, end), self._read(student, batch.images, block)
            channel = values[1].ndim - 1 if values[1].shape[-1] == len(stream) else 1
            shared = alignment.pick(*values, stream)
            if shared is None:
                sizes = " and ".join(str(list(each.shape[1:])) for each in values)
                raise UserError(
                    f"{student.blocks[block]}: teacher and student differ in places, {sizes} with channels: "
                    "see --pretrained_kwargs and --student_kwargs"
                )
            wanted, given = (each.double().movedim(channel, -1).reshape(-1, len(stream)) for each in shared)
            error += (wanted - given).square().sum().item()
            squares += wanted.square().sum().item()
            total, rows = total + wanted.sum(0), rows + len(wanted)
        variance = squares - (total.square().sum() / rows).item()
        return 1 - error / variance if variance else float(error == 0)

    def agreement(self, student: Segments, after: int, end: int) -> float:
        """Measure for which share of the images held out student and teacher name the same class."""
        equal = images = 0
        for batch in self._held_out():
            models = ((student, after), (self._teacher, end))
            named = [model.run(self._read(model, batch.images, last), last, None).argmax(1) for model, last in models]
            equal, images = equal + (named[0] == named[1]).sum().item(), images + len(batch)
        return equal / images
