"""The ridge regression of one layer, against solutions worked out by hand."""

import types

import pytest
import torch
from torch import nn

from selection.activations.alignment import Rows
from selection.activations.regression import NormalEquations, Regression
from selection.activations.scratch import BATCH, Batch
from selection.activations.targets import Fit
from selection.activations.trace import Call


def test_solution_is_the_textbook_ridge_regression():
    torch.manual_seed(0)
    x, r = torch.randn(50, 1, 3, dtype=torch.float64) + 2, torch.randn(50, 1, 2, dtype=torch.float64)
    equations = NormalEquations()
    for rows in (slice(0, 20), slice(20, 50)):
        equations.add(x[rows], r[rows])
    weight, bias = equations.solve(0.3, centred=True)
    centred, wanted = x[:, 0] - x[:, 0].mean(0), r[:, 0] - r[:, 0].mean(0)
    covariance = centred.mT @ centred / 50
    penalty = 0.3 * covariance.diagonal().mean() * torch.eye(3, dtype=torch.float64)
    by_hand = torch.linalg.solve(covariance + penalty, centred.mT @ wanted / 50).mT
    torch.testing.assert_close(weight[0], by_hand)
    torch.testing.assert_close(bias, r[:, 0].mean(0) - by_hand @ x[:, 0].mean(0))


def test_without_a_bias_nothing_is_centred():
    equations = NormalEquations()
    equations.add(torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[[2.0]], [[6.0]]]))
    weight, bias = equations.solve(0.0, centred=False)
    assert weight.item() == pytest.approx(2) and bias.item() == 0


def test_directions_without_variance_are_dropped():
    equations = NormalEquations()
    x = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [4.0, 4.0, 0.0]]).unsqueeze(1)  # equal channels, a zero one
    equations.add(x, 2 * x[..., :1])
    weight, _ = equations.solve(0.0, centred=True)
    torch.testing.assert_close(weight[0, 0], torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))


def test_outputs_without_a_bias_of_their_own_are_not_centred():
    """Both outputs shall be x + 1 at x = 1 and 3. Without a bias, the best factor is (1 * 2 + 3 * 4) / (1 + 9)."""
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(2, 1), requires_grad=False)
    layer.q_bias = nn.Parameter(torch.zeros(1), requires_grad=False)
    student = types.SimpleNamespace(model=layer, stop=lambda: None)
    x = torch.tensor([[1.0], [3.0]])
    rows = Rows(torch.arange(BATCH), torch.arange(BATCH), None)
    fit = Fit("weight", "linear", "weight", rows, False, None, 2, [(x + 1).expand(2, 2)])
    regression = Regression(fit, 2, student)
    regression.batch = Batch(0, slice(0, 2), held_out=False)
    regression.ran(Call("weight", "linear", x, torch.zeros(2, 2), (("q_bias", 1), ("k_bias", 1))))
    regression.apply(0.0)
    assert layer.q_bias.item() == pytest.approx(1)
    assert layer.weight.flatten().tolist() == pytest.approx([1, 1.4])
