"""Refit one layer: regress what it lacks on what it sees, and add the solution to its weight and bias."""

import torch
from torch import Tensor

from selection.activations.scratch import BATCH, Batch
from selection.activations.segments import Segments
from selection.activations.targets import Fit, moments
from selection.activations.trace import Call, Write

NEGLIGIBLE = 1e-10  # of the largest eigenvalue: directions in which the inputs do not vary
SMALL_SCALE = 1e-3  # of the largest: a channel scaled by less keeps its weights, which would only fit noise
LEAST_VARIANCE = 1e-3  # of the running variance: a batch norm's input that varies less counts as constant


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
        values = self._fit.rows.of_student(call.values, chosen)
        if call.kind == "batch_norm":
            self._moments += moments(values)
        else:
            self._add(call, chosen, next(self._targets) - values)
        self._student.stop()

    def wrote(self, call: Call, write: Write) -> None:
        chosen = self._fit.chosen(self.batch, self._fitting)
        values = [write.behind, write.inside] + [write.scale] * (write.scale is not None)
        behind, inside, *scale = (self._fit.rows.of_student(call.channels_last(each), chosen) for each in values)
        arrives = inside[:, 0] > 0
        residual = next(self._targets) - behind[arrives]
        if scale:
            factor = scale[0][arrives]
            fits = (factor.abs() >= SMALL_SCALE * factor.abs().max()) & (factor != 0)
            residual = torch.where(fits, residual / factor, 0.0)
        self._add(call, chosen[arrives], residual)
        self._student.stop()

    def _add(self, call: Call, chosen: Tensor, residual: Tensor) -> None:
        x = call.inputs(self._fit.rows.student[chosen])
        self._equations.add(x, residual.reshape(len(x), call.groups, -1))

    def apply(self, ridge: float) -> None:
        """Change the layer; a batch norm gets new statistics."""
        tensors = self._student.model.state_dict(keep_vars=True)
        if self._fit.kind == "batch_norm":
            self._renew(tensors)
            return
        weight, bias = self._equations.solve(ridge, centred=bool(self._call.bias))
        fixed = [key not in tensors for key, size in self._call.bias for _ in range(size)]
        if any(fixed):  # Eva's keys have no bias that can be fitted, its queries and values do
            weight[:, fixed] = self._equations.solve(ridge, centred=False)[0][:, fixed]
        selected = _row_norms(tensors[self._fit.key])
        _increase(tensors[self._fit.key], weight)
        parts = bias.split([size for _, size in self._call.bias]) if self._call.bias else ()
        for (key, _), part in zip(self._call.bias, parts, strict=True):
            if key in tensors:  # other parts are constants of the model's
                _increase(tensors[key], part)
        if self._fit.scale is not None and not any(fixed):
            self._restore_norms(tensors, selected)

    def _restore_norms(self, tensors: dict[str, Tensor], selected: Tensor) -> None:
        """Give the rows of the weight the norms that they had, and what they lose to the LayerScale behind the layer.

        The function stays. But a LayerScale may be 1e-4, and the fitted row then 1e4 times as large as the selected one:
        an optimizer that takes steps of one size would never move the row, and overthrow the LayerScale in one step.
        """
        factor = _row_norms(tensors[self._fit.key]) / selected
        factor = torch.where((selected > 0) & (factor > 0), factor, 1.0)
        for key in (self._fit.key, *(key for key, _ in self._call.bias)):
            tensors[key].copy_(tensors[key].double() / factor.view(-1, *[1] * (tensors[key].ndim - 1)))
        scale = tensors[self._fit.scale]
        scale.copy_(scale.double() * factor.view(scale.shape))

    def _renew(self, tensors: dict[str, Tensor]) -> None:
        """Move the running statistics as far from the teacher's as the student's input is from the teacher's."""
        rows = len(self._fit.rows.student) // BATCH * self._fitting
        (mean, variance), (teacher_mean, teacher_variance) = (
            (sums[0] / rows, (sums[1] / rows - (sums[0] / rows).square()).clamp(min=0))
            for sums in (self._moments, sum(self._fit.targets))
        )
        mean_key, variance_key = self._fit.key, self._fit.key.removesuffix("mean") + "var"
        _increase(tensors[mean_key], mean - teacher_mean)
        floor = LEAST_VARIANCE * tensors[variance_key].double()
        ratio = (variance + floor) / (teacher_variance + floor)
        # what hardly varies on these images says nothing of the variance on others
        tensors[variance_key].copy_(tensors[variance_key] * torch.where(teacher_variance > floor, ratio, 1.0))


def _increase(tensor: Tensor, by: Tensor) -> None:
    tensor.copy_(tensor.double() + by.reshape(tensor.shape))


def _row_norms(weight: Tensor) -> Tensor:
    return weight.detach().double().flatten(1).norm(dim=1)


class NormalEquations:
    """Sums over rows, in float64, of inputs `x` [rows, groups, inputs] and residuals `r` [rows, groups, outputs]."""

    def __init__(self) -> None:
        self.rows = 0
        self.x = self.r = self.xx = self.xr = 0.0

    def add(self, x: Tensor, r: Tensor) -> None:
        """Add rows; a linear layer and a plain convolution have one group."""
        x, r = x.double().transpose(0, 1), r.double().transpose(0, 1)  # [groups, rows, …]
        self.rows += x.shape[1]
        self.x, self.r = self.x + x.sum(1), self.r + r.sum(1)
        self.xx, self.xr = self.xx + x.mT @ x, self.xr + x.mT @ r

    def solve(self, ridge: float, *, centred: bool) -> tuple[Tensor, Tensor]:
        """Return what to add to the weight [groups, outputs, inputs] and, if `centred`, to the bias [groups * outputs].

        The penalty is `ridge` times the mean diagonal of the inputs' covariance. Without centring the bias's part is 0.
        """
        mean_x, mean_r = (self.x / self.rows, self.r / self.rows) if centred else (0 * self.x, 0 * self.r)
        covariance = self.xx / self.rows - mean_x[:, :, None] * mean_x[:, None, :]
        wanted = self.xr / self.rows - mean_x[:, :, None] * mean_r[:, None, :]
        values, vectors = torch.linalg.eigh(covariance)  # ascending, orthonormal columns
        largest = values[:, -1:].clamp(min=torch.finfo(values.dtype).tiny)
        penalty = ridge * covariance.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        inverse = torch.where(values > NEGLIGIBLE * largest, 1 / (values + penalty), 0.0)
        weight = vectors @ (inverse[:, :, None] * (vectors.mT @ wanted))  # [groups, inputs, outputs]
        bias = mean_r - (mean_x[:, None, :] @ weight)[:, 0]
        return weight.mT, bias.flatten()
