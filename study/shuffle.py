"""Shuffles a teacher: every tensor keeps its values, and so its statistics, in places drawn from a seed.

python study/shuffle.py vit/teacher/checkpoint-19.pth vit/teacher-shuffled.pth --seed 0
"""

import argparse
import io
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(1, str(Path(__file__).parents[1]))

from utils import run_script, write_atomically
from weightfiles.read import read_weights


def shuffled(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same values tensor by tensor, in an order that depends on the seed and on the tensors before it."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(tensor: Tensor) -> Tensor:
        return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view(tensor.shape)

    return {key: shuffle(tensor) for key, tensor in tensors.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="shuffle.py", description="Shuffle each tensor of a file within itself.")
    parser.add_argument("source", type=Path, help="weights, or a checkpoint of main.py")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args(argv)
    buffer = io.BytesIO()
    torch.save(shuffled(read_weights(wanted.source), wanted.seed), buffer)
    write_atomically(wanted.target, buffer.getvalue())


if __name__ == "__main__":
    sys.exit(run_script(main))
