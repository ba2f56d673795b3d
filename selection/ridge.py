"""Ridge regression: sums over rows, and the solution of the normal equations."""

import torch
from torch import Tensor

NEGLIGIBLE = 1e-10  # of the largest eigenvalue: directions in which the inputs do not vary


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
