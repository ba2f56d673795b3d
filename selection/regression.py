"""Refit one layer: regress what it lacks on what it sees, and add the solution to its weight and bias."""

import torch
from torch import Tensor

from selection.layer_inputs import inputs, last_channels
from selection.ridge import NormalEquations
from selection.scratch import BATCH, Batch
from selection.segments import Segments
from selection.targets import Fit, moments
from selection.trace import Call, Write

SMALL_SCALE = 1e-3  # of the largest: a channel scaled by less keeps its weights, which would only fit noise


class Regression:
    """A visitor of the student that compares a layer with its target, one batch after the other."""

    def __init__(self, fit: Fit, fitting: int, student: Segments) -> None:
        self.batch: Batch | None = None
        self._fit, self._fitting, self._student = fit, fitting, student
        self._targets = iter(fit.targets)
        self._equations, self._moments, self._call = NormalEquations(), 0.0, None

    def ran(self, call: Call) -> None:
        if call.key != self._fit.key:
            return
        self._call = call
        if self._fit.writes:
            return
        chosen = self._fit.chosen(self.batch, self._fitting)
        if call.kind == "batch_norm":
            self._moments += moments(self._fit.rows.of_student(last_channels(call.input, call.kind), chosen))
        else:
            output = self._fit.rows.of_student(last_channels(call.output, call.kind), chosen)
            self._add(call, chosen, next(self._targets) - output)
        self._student.stop()

    def wrote(self, call: Call, write: Write) -> None:
        chosen = self._fit.chosen(self.batch, self._fitting)
        values = [write.behind, write.inside] + [write.scale] * (write.scale is not None)
        behind, inside, *scale = (self._fit.rows.of_student(last_channels(each, call.kind), chosen) for each in values)
        arrives = inside[:, 0] > 0
        residual = next(self._targets) - behind[arrives]
        if scale:
            factor = scale[0][arrives]
            fits = factor.abs() >= SMALL_SCALE * factor.abs().max()
            residual = torch.where(fits, residual / factor, 0.0)
        self._add(call, chosen[arrives], residual)
        self._student.stop()

    def _add(self, call: Call, chosen: Tensor, residual: Tensor) -> None:
        x = inputs(call, self._fit.rows.student[chosen])
        self._equations.add(x, residual.reshape(len(x), call.groups, -1))

    def apply(self, ridge: float) -> None:
        """Change the layer; a batch norm gets new statistics."""
        tensors = self._student.model.state_dict(keep_vars=True)
        if self._fit.kind == "batch_norm":
            self._renew(tensors)
            return
        weight, bias = self._equations.solve(ridge, centred=bool(self._call.bias))
        _increase(tensors[self._fit.key], weight)
        parts = bias.split([size for _, size in self._call.bias]) if self._call.bias else ()
        for (key, _), part in zip(self._call.bias, parts, strict=True):
            if key in tensors:  # other parts are constants of the model's
                _increase(tensors[key], part)

    def _renew(self, tensors: dict[str, Tensor]) -> None:
        """Move the running statistics as far from the teacher's as the student's input is from the teacher's."""
        rows = len(self._fit.rows.student) // BATCH * self._fitting
        (mean, variance), (teacher_mean, teacher_variance) = (
            (sums[0] / rows, (sums[1] / rows - (sums[0] / rows).square()).clamp(min=0))
            for sums in (self._moments, sum(self._fit.targets))
        )
        mean_key, variance_key = self._fit.key, self._fit.key.removesuffix("mean") + "var"
        _increase(tensors[mean_key], mean - teacher_mean)
        ratio = torch.where(teacher_variance > 0, variance / teacher_variance, 1.0)
        tensors[variance_key].copy_(tensors[variance_key] * ratio)


def _increase(tensor: Tensor, by: Tensor) -> None:
    tensor.copy_(tensor.double() + by.reshape(tensor.shape))
