"""See each layer that a model runs, by the tensor it uses, and where its output is added to the stream."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from selection.activations.segments import Segments

# operations by which values only change places
LAYOUT = frozenset(
    "transpose permute reshape view flatten unflatten contiguous roll __getitem__ clone dropout movedim swapaxes "
    "squeeze unsqueeze".split()
)
RESHAPING = frozenset("reshape view flatten unsqueeze contiguous".split())  # values stay in their order
ADDING = frozenset("add add_ __add__ __iadd__ __radd__".split())
SCALING = frozenset("mul mul_ __mul__ __imul__ __rmul__".split())


@dataclass(frozen=True, eq=False)
class Call:
    """One run of a layer: its input and output as it sees them, channels last for a linear layer, at 1 for a convolution.

    `key` is its weight's name; for a batch norm that of its running mean. `bias` lists the parameters that its bias
    consists of, one behind the other, each with its size; None stands for values that are no parameter.
    """

    key: str
    kind: str  # "linear", "conv2d" or "batch_norm"
    input: Tensor
    output: Tensor
    bias: tuple[tuple[str | None, int], ...] = ()
    # of a convolution; `padding` may be a word of torch's
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def channels_last(self, value: Tensor) -> Tensor:
        """View a value in the layout of the output [..., channels] or, of a convolution, [batch, C, H, W], channels last."""
        return value if self.kind == "linear" else value.permute(0, 2, 3, 1)

    @property
    def values(self) -> Tensor:
        """What a fit compares, [..., channels]: the output; of a batch norm, which has to be normalized, the input."""
        return self.channels_last(self.input if self.kind == "batch_norm" else self.output)

    def inputs(self, places: Tensor) -> Tensor:
        """Gather what the layer sees for these places of its output: [places, groups, inputs], as its weight's other axes.

        `places` are indices into the output's axes but the channels, flattened.
        """
        if self.kind == "linear":
            return self.input.reshape(-1, 1, self.input.shape[-1])[places]
        height, width = self.output.shape[2:]
        image, place = places // (height * width), places % (height * width)
        patches = self._patches()[image, :, place // width, place % width]  # [places, C, kernel, kernel]
        return patches.reshape(len(places), self.groups, -1)

    def _patches(self) -> Tensor:
        """View a convolution's input as the patches [batch, C, H, W, kernel, kernel] of its places."""
        x = F.pad(self.input, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        for axis in (0, 1):
            extent = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            x = x.unfold(2 + axis, extent, self.stride[axis])
        return x[..., :: self.dilation[0], :: self.dilation[1]]

    @property
    def unknowns(self) -> int:
        """Count the unknowns of each of the outputs: its inputs, and the bias."""
        width = self.input.shape[-1] if self.kind == "linear" else self.input.shape[1] // self.groups
        return width * math.prod(self.kernel) + bool(self.bias)


@dataclass(frozen=True, eq=False)
class Write:
    """The addition of a layer's output to the stream, all in the layout of that output.

    `behind` is the stream behind it, and `inside` is 1 where the output arrives and 0 where it was cropped away.
    `scale` is what multiplies the output on its way (LayerScale, batch norm), None if nothing does. `scale_key` names
    the parameter if it is a single one, with a value for each channel. `number` counts the additions of the block.
    """

    behind: Tensor
    inside: Tensor
    scale: Tensor | None
    scale_key: str | None
    number: int


class Visitor(Protocol):
    """Who looks at the layers of a forward pass."""

    def ran(self, call: Call) -> None:
        """A layer ran."""

    def wrote(self, call: Call, write: Write) -> None:
        """The output of a layer that is followed was added to the stream."""


@dataclass
class _Branch:
    """A layer's output on its way to the stream: `leaf` is the output, and the way back to its layout is a gradient.

    `scaled_by` names the parameters in `scale`; None stands for others, and for a batch norm.
    """

    call: Call
    leaf: Tensor
    scale: Tensor | None = None
    scaled_by: tuple[str | None, ...] = ()

    def back(self, end: Tensor, values: Tensor) -> Tensor:
        """Bring `values`, in the layout of `end`, into that of the leaf."""
        return torch.autograd.grad(end, self.leaf, values.expand(end.shape).to(end.dtype), retain_graph=True)[0]


class _Placed(torch.autograd.Function):
    """Give the values of `y` the places of `x`: a scaling changes values, and what comes back must not be scaled."""

    @staticmethod
    def forward(context, x: Tensor, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Trace(TorchFunctionMode):
    """While active, tell a visitor of each layer that runs, and of each of `follow` that is added to the stream.

    Layers are told by the tensors they use, so that those count which run without their module's call. An output is
    followed within its block through operations that move values or scale them by parameters. It writes to the stream
    if it is then added to something that depends on the images. `follow` None: all layers. One use is one forward pass.
    """

    def __init__(self, segments: Segments, visitor: Visitor, follow: Collection[str] | None = None) -> None:
        super().__init__()
        self._names = segments.names
        self._segments, self._visitor, self._follow = segments, visitor, follow
        self._branches: dict[int, _Branch] = {}
        self._constants: dict[int, tuple] = {}  # made of parameters alone -> what they are, for a bias
        self._alive: list[Tensor] = []  # an id is a tensor's as long as that lives
        self._additions: dict[str, int] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self._segments.active:
            return function(*args, **kwargs)
        name = function.__name__
        if name in ("linear", "conv2d"):
            return self._layer(name, function, args, kwargs)
        if function is F.batch_norm:
            return self._batch_norm(args, kwargs)
        place = next((i for i, each in enumerate(args[:2]) if id(each) in self._branches), None)
        if place is None:
            return self._note_constant(name, args, function(*args, **kwargs))
        branch, tensor = self._branches[id(args[place])], args[place]
        if name in LAYOUT:
            with torch.enable_grad():
                return self._on_branch(function(*args, **kwargs), branch)
        other = args[1 - place] if len(args) > 1 else None
        if name in SCALING and (self._is_constant(other) or not isinstance(other, Tensor)):
            factor = other if isinstance(other, Tensor) else torch.full((1,), float(other))
            names = tuple(name for name, _ in self._pieces(other)) if isinstance(other, Tensor) else ()
            return self._scaled(tensor, tensor.detach() * factor, factor, branch, names)
        if name in ADDING and isinstance(other, Tensor) and not self._is_constant(other):
            return self._added(args[0], other if place == 0 else args[1])
        return function(*args, **kwargs)

    # ---- layers ----

    def _layer(self, kind: str, function, args: tuple, kwargs: dict) -> Tensor:
        given = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False))
        given |= kwargs
        output = function(*args, **kwargs)
        key = self._names.get(id(given["weight"]))
        if key is None:
            return output
        geometry = {}
        if kind == "conv2d":
            pairs = {
                name: given.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
            }
            geometry = {name: value if isinstance(value, str) else _pair(value) for name, value in pairs.items()}
            geometry |= {"groups": given.get("groups", 1), "kernel": tuple(given["weight"].shape[2:])}
        call = Call(key, kind, given["input"], output, self._pieces(given.get("bias")), **geometry)
        return self._started(call)

    def _batch_norm(self, args: tuple, kwargs: dict) -> Tensor:
        given = dict(
            zip(
                ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
                args,
                strict=False,
            )
        )
        given |= kwargs
        x, mean, variance = (given[name] for name in ("input", "running_mean", "running_var"))
        branch = self._branches.get(id(x))
        output = F.batch_norm(x.detach(), *args[1:], **kwargs)
        if id(mean) in self._names:
            self._visitor.ran(Call(self._names[id(mean)], "batch_norm", x.detach(), output))
        if branch is None:
            return output
        factor = (variance + given.get("eps", 1e-5)).rsqrt()
        if given.get("weight") is not None:
            factor = factor * given["weight"]
        return self._scaled(x, output, factor.view(1, -1, *[1] * (x.ndim - 2)), branch, (None,))

    def _started(self, call: Call) -> Tensor:
        self._visitor.ran(call)
        if self._segments.inside is None or (self._follow is not None and call.key not in self._follow):
            return call.output
        leaf = call.output.detach().requires_grad_()
        with torch.enable_grad():
            return self._on_branch(leaf.clone(), _Branch(call, leaf))

    # ---- branches ----

    def _on_branch(self, tensor: Tensor, branch: _Branch) -> Tensor:
        self._branches[id(tensor)] = branch
        self._alive.append(tensor)
        return tensor

    def _scaled(self, x: Tensor, y: Tensor, factor: Tensor, branch: _Branch, names: tuple[str | None, ...]) -> Tensor:
        scale = branch.back(x, factor)
        scale = scale if branch.scale is None else scale * branch.scale
        with torch.enable_grad():
            placed = _Placed.apply(x, y)
        return self._on_branch(placed, _Branch(branch.call, branch.leaf, scale, (*branch.scaled_by, *names)))

    def _added(self, *operands: Tensor) -> Tensor:
        behind = operands[0].detach() + operands[1].detach()
        block = self._segments.inside
        if block is None:
            return behind
        number = self._additions[block] = self._additions.get(block, -1) + 1
        for operand in operands:
            branch = self._branches.get(id(operand))
            if branch is not None and operand.shape == behind.shape:
                inside, behind_it = branch.back(operand, torch.ones(1)), branch.back(operand, behind)
                key = branch.scaled_by[0] if len(branch.scaled_by) == 1 else None
                self._visitor.wrote(branch.call, Write(behind_it, inside, branch.scale, key, number))
        return behind

    # ---- tensors made of parameters alone ----

    def _is_constant(self, value: object) -> bool:
        return isinstance(value, nn.Parameter) or id(value) in self._names or id(value) in self._constants

    def _note_constant(self, name: str, args: tuple, output: object) -> object:
        flat = [each for arg in args for each in (arg if isinstance(arg, list | tuple) else [arg])]
        tensors = [each for each in flat if isinstance(each, Tensor)]
        if isinstance(output, Tensor) and tensors and all(map(self._is_constant, tensors)):
            same = name == "cat" or (name in RESHAPING and output.numel() == tensors[0].numel())
            pieces = [piece for each in tensors for piece in self._pieces(each)] if same else ()
            self._constants[id(output)] = tuple(pieces)
            self._alive.append(output)
        return output

    def _pieces(self, bias: Tensor | None) -> tuple[tuple[str | None, int], ...]:
        if bias is None:
            return ()
        known = self._constants.get(id(bias))
        return known or ((self._names.get(id(bias)), bias.numel()),)


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)
