"""Scores of indices by what a teacher's activations are on images: energy, and how well a channel explains the others."""

import numpy as np
import torch
from torch import Tensor

from options.selection import ACTIVATION_RULES
from selection.activations.scratch import BATCH, Calibration
from selection.activations.segments import IMAGES, Segments
from selection.activations.trace import Call, Trace
from selection.family import Family
from selection.plan import Axis, Outline
from selection.rules import check_rule
from utils import UserError

SCORED_IMAGES = 128  # scores differ little with more, and each costs a pass of the teacher


def activation_scores(
    teacher: Segments,
    outline: Outline,
    family: Family,
    images: Calibration,
    rule: str,
    magnitudes: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Score each index of each axis group, float64 [the teacher's size], by a rule of `options.ACTIVATION_RULES`.

    A head and a hidden unit count by the energy that they write: the mean square of its activation, times the squared
    norm of the weights that read it. A channel of the stream counts, summed over the layers that read it: by "energy",
    by its mean square there; by "coverage", by its turn in a greedy choice of the channels that best explain all of
    them linearly; by "magnitude_energy", by `magnitudes`. So do groups that no layer reads.
    """
    check_rule("element_selection", rule, ACTIVATION_RULES)
    local = _local_groups(outline, family)
    reads = {
        (key, source.key): source.axes[1]
        for key, source in outline.sources.items()
        if source.key and len(source.axes) > 1 and source.axes[1]
    }
    whole = {own for (_, own), axis in reads.items() if len(axis) > 1 or (rule == "coverage" and axis[0] not in local)}
    moments = _moments(teacher, images, {own for _, own in reads}, whole)
    tensors, scales, scores = teacher.model.state_dict(), family.scaled(teacher.model.state_dict()), {}
    stream: dict[str, Tensor] = {}
    for (_, own), axis in reads.items():
        moment = moments.get(own)
        if moment is None:
            continue
        for place, group in enumerate(axis):
            if not isinstance(group, str):
                continue
            labels = _labels(axis, place, outline, len(moment))
            if group in local:
                scale = tensors.get(scales.get(own.rpartition(".")[0]))
                energy = _energy_written(tensors[own], scale, moment, labels)
                scores[group] = scores.get(group, 0.0) + energy.numpy()
            else:
                mean = _diagonal(moment).mean().clamp(min=torch.finfo(torch.float64).tiny)  # a layer may see only zeros
                stream[group] = stream.get(group, 0.0) + _gathered(moment / mean, labels)
    if rule == "energy":
        scores |= {group: _diagonal(moment).numpy() for group, moment in stream.items()}
    elif rule == "coverage":
        scores |= {group: coverage(moment) for group, moment in stream.items()}
    return magnitudes | scores


def _moments(teacher: Segments, images: Calibration, keys: set[str], whole: set[str]) -> dict[str, Tensor]:
    """Sum over images the squares of the inputs of these layers, [inputs], or the products of those in `whole`."""
    moments = _SecondMoments(keys, whole)
    for batch in images.batches()[: -(-SCORED_IMAGES // BATCH)]:
        if not batch.held_out:
            with Trace(teacher, moments, follow=()):
                output = teacher.run(images.read(batch.images), IMAGES, None)
            if not all(each.isfinite().all() for each in (output, *moments.sums.values())):
                raise UserError("the teacher's activations are not finite for these images")
    return moments.sums


class _SecondMoments:
    """A visitor that makes the sums of `_moments`, in float64."""

    def __init__(self, keys: set[str], whole: set[str]) -> None:
        self._keys, self._whole = keys, whole
        self.sums: dict[str, Tensor] = {}

    def ran(self, call: Call) -> None:
        if call.key in self._keys and call.kind != "batch_norm":
            x = call.channels_last(call.input)
            x = x.reshape(-1, x.shape[-1])
            moment = (x.mT @ x) if call.key in self._whole else x.square().sum(0)
            self.sums[call.key] = self.sums.get(call.key, 0.0) + moment.double()

    def wrote(self, call: Call, write) -> None:
        """Nothing is followed."""


def _diagonal(moment: Tensor) -> Tensor:
    return moment if moment.ndim == 1 else moment.diagonal()


def _local_groups(outline: Outline, family: Family) -> set[str]:
    """List the groups whose tensors all lie in one block, or all outside: hidden units and heads, not the stream."""
    blocks: dict[str | int, set[str]] = {}
    for key, source in outline.sources.items():
        for factor in {factor for axis in source.axes for factor in axis or ()}:
            blocks.setdefault(factor, set()).add(family.block_of(key))
    return {group for group in outline.sizes if len(blocks[group]) == 1}


def _labels(axis: Axis, place: int, outline: Outline, channels: int) -> Tensor:
    """For each input of a layer, its index in the group at `place` among the factors of `axis`, int64 [channels]."""
    sizes = [factor if isinstance(factor, int) else outline.sizes[factor][0] for factor in axis]
    within = int(np.prod(sizes[place + 1 :]))
    return torch.arange(channels) // within % sizes[place]  # groups of a convolution repeat the axis


def _gathered(moment: Tensor, labels: Tensor) -> Tensor:
    """Add up the moments of a group that an axis repeats (Swin merges the channels of four neighbours)."""
    turns = labels.argsort(stable=True).reshape(int(labels.max()) + 1, -1).mT
    return sum(moment[turn] if moment.ndim == 1 else moment[turn][:, turn] for turn in turns)


def _energy_written(weight: Tensor, scale: Tensor | None, moment: Tensor, labels: Tensor) -> Tensor:
    """Return the mean square of what all inputs of one label write together, up to a factor, float64 [labels].

    `scale` is the LayerScale behind the layer. With the squares alone, or a convolution of several groups, as if inputs were independent of each other; always as
    if a convolution's taps were.
    """
    if scale is not None:
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    weight = weight.double().flatten(2) if weight.ndim > 2 else weight.double()[..., None]
    groups = len(moment) // weight.shape[1]
    if moment.ndim == 1 or groups > 1:
        norms = weight.square().sum(2).reshape(groups, -1, weight.shape[1]).sum(1).flatten()
        energies = norms * _diagonal(moment)
        return torch.zeros(int(labels.max()) + 1, dtype=torch.float64).index_add_(0, labels, energies)
    products = torch.einsum("oit,ojt->ij", weight, weight) * moment
    one_hot = torch.nn.functional.one_hot(labels).double()
    return ((products @ one_hot) * one_hot).sum(0)


def coverage(moment: Tensor) -> np.ndarray:
    """Rank channels by greedy column subset selection on their second moments [channels, channels], best first highest.

    Each turn takes the channel that explains most of what those before it leave of all channels.
    """
    left, score = moment.double().clone(), np.zeros(len(moment))
    smallest = 1e-6 * left.diagonal().max()
    for turn in range(len(moment)):
        own = left.diagonal()
        gains = torch.where(own > smallest, left.square().sum(0) / own, -1.0)
        gains[torch.from_numpy(score > 0)] = -2.0
        best = int(gains.argmax())
        score[best] = len(moment) - turn
        if own[best] > smallest:
            column = left[:, best].clone()
            left -= torch.outer(column, column) / column[best]
    return score
