"""Take something away from a teacher, to see what of it a student's gain is made of.

python -m study.controls shuffled vit/teacher/checkpoint-19.pth vit/teacher_shuffled.pth --seed 0
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


def _shuffled(tensor: Tensor, generator: Generator) -> Tensor:
    return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view(tensor.shape)


def _within_rows(tensor: Tensor, generator: Generator) -> Tensor:
    rows = _rows(tensor)
    order = torch.rand(rows.shape, generator=generator).argsort(1)
    return rows.gather(1, order).view(tensor.shape)


def _within_columns(tensor: Tensor, generator: Generator) -> Tensor:
    rows = _rows(tensor)
    order = torch.rand(rows.shape, generator=generator).argsort(0)
    return rows.gather(0, order).view(tensor.shape)


def _rows(tensor: Tensor) -> Tensor:
    """Return a matrix with a row for each output, of a vector for each value; of an embedding, for each token."""
    while tensor.dim() > 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor.reshape(len(tensor), -1)


def _moments(tensor: Tensor, generator: Generator) -> Tensor:
    deviation, mean = torch.std_mean(tensor.float(), correction=0)
    return (mean + deviation * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


def _vectors(tensor: Tensor, generator: Generator) -> Tensor:
    """Keep a norm or bias; else draw timm's initial values of a ViT: a truncated normal, in a convolution torch's own."""
    if tensor.dim() == 1:
        return tensor
    fresh = torch.empty_like(tensor, dtype=torch.float32)
    if tensor.dim() == 4:
        nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
    else:
        nn.init.trunc_normal_(fresh, std=0.02, generator=generator)
    return fresh.to(tensor.dtype)


CONTROLS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "shuffled": _shuffled,  # each tensor keeps its values, in a random order
    "rows": _within_rows,  # each output keeps its values, in a random order of its own
    "columns": _within_columns,  # each input keeps its values, in a random order of its own
    "moments": _moments,  # normal values of each tensor's mean and standard deviation
    "vectors": _vectors,  # norms and biases stay, all else is as initialized
}


def controlled(tensors: Mapping[str, Tensor], control: str, seed: int) -> dict[str, Tensor]:
    """Return the tensors as a control leaves them; it draws from one stream, by the seed, for one after the other."""
    generator = torch.Generator().manual_seed(seed)
    return {key: CONTROLS[control](tensor, generator) for key, tensor in tensors.items()}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m study.controls", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("control", choices=CONTROLS, help="what is left of each tensor")
    parser.add_argument("source", type=Path, help="weights, or a checkpoint of main.py")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    buffer = io.BytesIO()
    torch.save(controlled(open_weights(options.source), options.control, options.seed), buffer)
    write_atomically(options.target, buffer.getvalue())


if __name__ == "__main__":
    sys.exit(run_script(main))
