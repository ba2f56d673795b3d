"""What the recipe's augmentation draws: the distributions of timm and torchvision, for whole batches at once."""

import math
import re
from typing import NamedTuple

import numpy as np

from utils import UserError

# timm's "increasing" operations, those of one kind side by side
OPERATIONS = (
    *("Invert", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd", "BrightnessIncreasing"),
    *("ContrastIncreasing", "AutoContrast", "Equalize"),
    *("ShearX", "TranslateXRel", "ShearY", "TranslateYRel", "Rotate", "ColorIncreasing", "SharpnessIncreasing"),
)
TRIES = 10  # for a box that fits, before the crop falls back and the erasing is left out


class Policy(NamedTuple):
    """timm's RandAugment: how many operations an image, how likely each is, and the magnitude's distribution."""

    magnitude: int = 10
    layers: int = 2
    probability: float = 0.5
    deviation: float = 0.0  # inf: uniform from 0 to the magnitude
    limit: float = 10.0


def parse_policy(aa: str) -> Policy:
    """The policy that timm reads from a string like rand-m9-mstd0.5-inc1; UserError for what is not offered here."""
    start, *sections = aa.split("-")
    matches = [re.fullmatch(r"(mstd|mmax|inc|m|n|p)(\d.*)", section) for section in sections]
    try:
        if start != "rand" or None in matches:
            raise ValueError("not a part of RandAugment")
        numbers = {}
        for key, text in (match.groups() for match in matches):
            number = float(text) if key in ("mstd", "p") else int(text)
            if key not in numbers or key not in ("mstd", "mmax"):  # in timm the first of these two counts
                numbers[key] = number
        if not numbers.get("inc"):
            raise ValueError("operations that weaken with the magnitude")
    except ValueError as error:
        offered = "use --augment timm, or a policy like rand-m9-mstd0.5-inc1"
        raise UserError(f"--augment device does not offer --aa {aa!r}: {offered}") from error
    deviation = numbers.get("mstd", 0.0)
    return Policy(
        magnitude=numbers.get("m", 10),
        layers=numbers.get("n", 2),
        probability=numbers.get("p", 0.5),
        deviation=math.inf if deviation > 100 else deviation,
        limit=float(numbers.get("mmax") or 10),
    )


class Draws:
    """Uniform deviates in [0, 1) for each image of a batch, from (key, index, purpose, number) by SplitMix64."""

    def __init__(self, key: int, indices: np.ndarray):
        self.state = _scramble(np.asarray(indices).astype(np.uint64) * _GOLDEN + np.uint64(key))

    def uniforms(self, purpose: int, count: int) -> np.ndarray:
        """float64 [count, batch]."""
        numbers = np.arange(1 + 2**16 * purpose, 1 + 2**16 * purpose + count).astype(np.uint64)
        return (_scramble(self.state + numbers[:, None] * _GOLDEN) >> np.uint64(11)) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _scramble(z: np.ndarray) -> np.ndarray:
    # the finalizer of SplitMix64 (Steele, Lea and Flood 2014)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def integers(uniform: np.ndarray, most: np.ndarray | int) -> np.ndarray:
    """Whole numbers from 0 to `most`, equally likely."""
    return np.floor(uniform * (most + 1))


def crop_boxes(u: np.ndarray, height: np.ndarray | int, width: np.ndarray | int) -> tuple[np.ndarray, ...]:
    """Top, left, height, width of random resized crops of images of these sizes, [batch] each, from deviates [22, batch].

    An area of 0.08 to 1 of the image, an aspect of 3/4 to 4/3; where no try fits, the largest such box in the middle.
    """
    area = (0.08 + 0.92 * u[:TRIES]) * (height * width)
    aspect = np.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u[TRIES : 2 * TRIES])
    across, down = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (across <= width) & (down <= height)  # [tries, batch]
    first, found = np.argmax(fits, axis=0)[None], fits.any(axis=0)
    widest = np.minimum(width, np.rint(height * (4 / 3)))
    highest = np.minimum(height, np.rint(width / (3 / 4)))
    down = np.where(found, np.take_along_axis(down, first, 0)[0], highest)
    across = np.where(found, np.take_along_axis(across, first, 0)[0], widest)
    top = np.where(found, integers(u[-2], height - down), (height - highest) // 2)
    left = np.where(found, integers(u[-1], width - across), (width - widest) // 2)
    return top, left, down, across


def erase_boxes(u: np.ndarray, share: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [batch, 4] (top, left, height, width) from deviates [22, batch], and where a try fitted.

    An area of 0.02 to 1/3 of size x size, times `share` [batch]; an aspect of 0.3 to 1 / 0.3.
    """
    area = (0.02 + (1 / 3 - 0.02) * u[:TRIES]) * size**2 * share
    aspect = np.exp(math.log(0.3) * (1 - 2 * u[TRIES : 2 * TRIES]))
    down, across = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (across < size) & (down < size)
    first = np.argmax(fits, axis=0)[None]
    down, across = np.take_along_axis(down, first, 0)[0], np.take_along_axis(across, first, 0)[0]
    boxes = np.stack((integers(u[-2], size - down), integers(u[-1], size - across), down, across), axis=1)
    return boxes, fits.any(axis=0)


class Layer(NamedTuple):
    """One operation of each image: its place in OPERATIONS or behind them all for none, its magnitude, its sign."""

    operation: np.ndarray
    magnitude: np.ndarray
    sign: np.ndarray


def draw_layer(policy: Policy, u: np.ndarray) -> Layer:
    """[batch] each, from deviates [5, batch]."""
    operation = np.floor(u[0] * len(OPERATIONS)).astype(int)
    if math.isinf(policy.deviation):
        magnitude = policy.magnitude * u[2]
    else:
        normal = np.sqrt(-2 * np.log(1 - u[2])) * np.cos(2 * np.pi * u[3])  # Box and Muller
        magnitude = policy.magnitude + policy.deviation * normal
    return Layer(
        np.where(u[1] <= policy.probability, operation, len(OPERATIONS)),
        np.clip(magnitude, 0, policy.limit),
        np.where(u[4] > 0.5, -1, 1),
    )
