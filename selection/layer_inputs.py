"""What a layer sees for each place of its output, as rows that a regression can use."""

import math

from torch import Tensor
from torch.nn import functional as F

from selection.trace import Call


def last_channels(value: Tensor, kind: str) -> Tensor:
    """View a layer's output [..., channels] with its channels last, as a convolution's [batch, C, H, W] are not."""
    return value if kind == "linear" else value.permute(0, 2, 3, 1)


def inputs(call: Call, rows: Tensor) -> Tensor:
    """Gather what a layer sees for these rows of its output: [rows, groups, inputs], as its weight's other axes.

    `rows` are indices into the output's axes but the channels, flattened.
    """
    if call.kind == "linear":
        return call.input.reshape(-1, 1, call.input.shape[-1])[rows]
    height, width = call.output.shape[2:]
    image, place = rows // (height * width), rows % (height * width)
    patches = _patches(call)[image, :, place // width, place % width]  # [rows, C, kernel, kernel]
    return patches.reshape(len(rows), call.groups, -1)


def _patches(call: Call) -> Tensor:
    """View a convolution's input as the patches [batch, C, H, W, kernel, kernel] of its places."""
    x = F.pad(call.input, (call.padding[1], call.padding[1], call.padding[0], call.padding[0]))
    for axis in (0, 1):
        extent = call.dilation[axis] * (call.kernel[axis] - 1) + 1
        x = x.unfold(2 + axis, extent, call.stride[axis])
    return x[..., :: call.dilation[0], :: call.dilation[1]]


def unknowns(call: Call) -> int:
    """Count the unknowns of each of a layer's outputs: its inputs, and the bias."""
    width = call.input.shape[-1] if call.kind == "linear" else call.input.shape[1] // call.groups
    return width * math.prod(call.kernel) + bool(call.bias)
