"""Take something away from weights, to see what of them a student's gain is made of.

    python -m study.controls shuffled selected.pth shuffled.pth --seed 0

Query, key and value count as tensors of their own. A "vector" is a norm's weight or a bias.
"""

import argparse
import io
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from files import write_atomically
from options.parser import Parser
from utils import run_script
from weightfiles.lazy import open_weights

Control = Callable[[str, Tensor, Generator], Tensor]


def _shuffled(key: str, tensor: Tensor, generator: Generator) -> Tensor:
    return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view(tensor.shape)


def _moments(key: str, tensor: Tensor, generator: Generator) -> Tensor:
    deviation, mean = torch.std_mean(tensor.float(), correction=0)
    return (mean + deviation * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


def _along(axis: int) -> Control:
    """Return the control that shuffles a matrix along an axis, each line in an order of its own.

    A matrix has a row for each output; an embedding has one for each token.
    """

    def shuffle(key: str, tensor: Tensor, generator: Generator) -> Tensor:
        rows = tensor[0] if tensor.dim() > 2 and len(tensor) == 1 else tensor
        rows = rows.reshape(len(rows), -1)
        order = torch.rand(rows.shape, generator=generator).argsort(axis)
        return rows.gather(axis, order).view(tensor.shape)

    return shuffle


def _fresh(key: str, tensor: Tensor, generator: Generator) -> Tensor:
    """Draw timm's initial values of a ViT: truncated normal ones, in a convolution torch's own."""
    fresh = torch.empty_like(tensor, dtype=torch.float32)
    if tensor.dim() == 4:
        nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
    elif key.endswith("cls_token"):
        nn.init.normal_(fresh, std=1e-6, generator=generator)
    else:
        nn.init.trunc_normal_(fresh, std=0.02, generator=generator)
    return fresh.to(tensor.dtype)


def _but_vectors(control: Control) -> Control:
    return lambda key, tensor, generator: tensor if tensor.dim() == 1 else control(key, tensor, generator)


CONTROLS: dict[str, Control] = {
    "shuffled": _shuffled,  # each tensor keeps its values, in a random order
    "moments": _moments,  # normal values of each tensor's mean and standard deviation
    # vectors stay as they are
    "matrices": _but_vectors(_shuffled),
    "rows": _but_vectors(_along(1)),  # each output keeps its values
    "columns": _but_vectors(_along(0)),  # each input keeps its values
    "vectors": _but_vectors(_fresh),  # all else is as timm initializes it
}


def controlled(tensors: Mapping[str, Tensor], control: str, seed: int) -> dict[str, Tensor]:
    """Return the tensors as a control leaves them; it draws from one stream, by the seed, for one after the other."""
    generator, change = torch.Generator().manual_seed(seed), CONTROLS[control]
    return {
        key: torch.cat([change(key, part, generator) for part in tensor.chunk(3 if ".qkv." in key else 1)])
        for key, tensor in tensors.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m study.controls", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("control", choices=CONTROLS, help="what is left of each tensor")
    parser.add_argument("source", type=Path, help="a file of weights")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    buffer = io.BytesIO()
    torch.save(controlled(open_weights(options.source), options.control, options.seed), buffer)
    write_atomically(options.target, buffer.getvalue())


if __name__ == "__main__":
    sys.exit(run_script(main))
