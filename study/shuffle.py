"""Shuffle a teacher: each tensor keeps its values, and so its statistics, but in a random order.

python -m study.shuffle vit/teacher/checkpoint-19.pth vit/teacher-shuffled.pth --seed 0
"""

import io
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from files import write_atomically
from options.parser import Parser
from utils import run_script
from weightfiles.lazy import open_weights


def shuffled(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return each tensor with its values shuffled. The order depends on the seed and on the tensors before it."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(tensor: Tensor) -> Tensor:
        return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view(tensor.shape)

    return {key: shuffle(tensor) for key, tensor in tensors.items()}


def main(argv: list[str] | None = None) -> None:
    description = "Shuffle the values of each tensor of a file."
    parser = Parser(prog="python -m study.shuffle", description=description)
    parser.add_argument("source", type=Path, help="weights, or a checkpoint of main.py")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    buffer = io.BytesIO()
    torch.save(shuffled(open_weights(options.source), options.seed), buffer)
    write_atomically(options.target, buffer.getvalue())


if __name__ == "__main__":
    sys.exit(run_script(main))
