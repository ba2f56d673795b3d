"""The random numbers of `--augment device`, for whole batches: the distributions of timm and torchvision.

They depend on (seed, epoch, index) alone, so a resumed run draws what the uninterrupted one draws.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from utils import UserError

# timm's "increasing" operations; the order keeps those of one kind together (point by point, affine, others)
OPERATIONS = (
    *("Invert", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd", "BrightnessIncreasing"),
    *("ContrastIncreasing", "AutoContrast", "Equalize"),
    *("ShearX", "TranslateXRel", "ShearY", "TranslateYRel", "Rotate", "ColorIncreasing", "SharpnessIncreasing"),
)
TRIES = 10  # to find a box that fits; after that a crop takes the middle of the image, and erasing erases nothing

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's increment, 2**64 / golden ratio


class Policy(NamedTuple):
    """timm's RandAugment: `layers` operations per image, each with a probability, and how magnitudes are drawn."""

    magnitude: int = 10
    layers: int = 2
    probability: float = 0.5
    deviation: float = 0.0  # inf: uniform from 0 to the magnitude
    limit: float = 10.0


def parse_policy(aa: str) -> Policy:
    """Parse a string like rand-m9-mstd0.5-inc1 as timm does; UserError for a policy that we do not offer."""
    start, *sections = aa.split("-")
    matches = [re.fullmatch(r"(mstd|mmax|inc|m|n|p)(\d.*)", section) for section in sections]
    try:
        if start != "rand" or None in matches:
            raise ValueError("not a part of RandAugment")
        numbers = {}
        for key, text in (match.groups() for match in matches):
            number = float(text) if key in ("mstd", "p") else int(text)
            # timm takes the first mstd and the first mmax, but the last of the others
            if key not in numbers or key not in ("mstd", "mmax"):
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
    """Uniform random numbers in [0, 1) for each image of a batch: SplitMix64 of (key, index, purpose, number).

    A hash and not a generator: the numbers of a whole batch come at once, whatever was drawn before.
    """

    def __init__(self, key: int, indices: np.ndarray):
        self.state = _scramble(np.asarray(indices).astype(np.uint64) * _GOLDEN + np.uint64(key))

    def uniforms(self, purpose: int, count: int) -> np.ndarray:
        """Draw `count` numbers per image, float64 [count, batch]; each `purpose` has its own."""
        numbers = np.arange(1 + 2**16 * purpose, 1 + 2**16 * purpose + count).astype(np.uint64)
        return (_scramble(self.state + numbers[:, None] * _GOLDEN) >> np.uint64(11)) * 2.0**-53


def _scramble(z: np.ndarray) -> np.ndarray:
    # SplitMix64's finalizer (Steele, Lea and Flood 2014): each input bit changes half of the output bits
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def integers(uniform: np.ndarray, most: np.ndarray | int) -> np.ndarray:
    """Turn uniform numbers into whole ones from 0 to `most`, equally likely."""
    return np.floor(uniform * (most + 1))


def crop_boxes(u: np.ndarray, height: np.ndarray | int, width: np.ndarray | int) -> tuple[np.ndarray, ...]:
    """Turn uniform numbers [22, batch] into the boxes of torchvision's random resized crop: top, left, height, width.

    `height` and `width` are those of the images. A box has 0.08 to 1 of the image's area and an aspect of 3/4 to 4/3.
    If no try fits into the image, it is the largest box of such an aspect in the middle.
    """
    area = (0.08 + 0.92 * u[:TRIES]) * (height * width)
    aspect = np.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u[TRIES : 2 * TRIES])
    box_width, box_height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (box_width <= width) & (box_height <= height)  # [tries, batch]
    first, any_fits = np.argmax(fits, axis=0)[None], fits.any(axis=0)
    widest = np.minimum(width, np.rint(height * (4 / 3)))
    highest = np.minimum(height, np.rint(width / (3 / 4)))
    box_height = np.where(any_fits, np.take_along_axis(box_height, first, 0)[0], highest)
    box_width = np.where(any_fits, np.take_along_axis(box_width, first, 0)[0], widest)
    top = np.where(any_fits, integers(u[-2], height - box_height), (height - highest) // 2)
    left = np.where(any_fits, integers(u[-1], width - box_width), (width - widest) // 2)
    return top, left, box_height, box_width


def erase_boxes(u: np.ndarray, share: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Turn uniform numbers [22, batch] into (boxes [batch, 4]: top, left, height, width; whether a try fitted [batch]).

    A box has 0.02 to 1/3 of the area of size x size, times `share` [batch], and an aspect of 0.3 to 1 / 0.3.
    """
    area = (0.02 + (1 / 3 - 0.02) * u[:TRIES]) * size**2 * share
    aspect = np.exp(math.log(0.3) * (1 - 2 * u[TRIES : 2 * TRIES]))
    box_height, box_width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (box_width < size) & (box_height < size)
    first = np.argmax(fits, axis=0)[None]
    box_height, box_width = np.take_along_axis(box_height, first, 0)[0], np.take_along_axis(box_width, first, 0)[0]
    boxes = np.stack(
        (integers(u[-2], size - box_height), integers(u[-1], size - box_width), box_height, box_width), axis=1
    )
    return boxes, fits.any(axis=0)


class Layer(NamedTuple):
    """One operation per image, [batch] each: its index in OPERATIONS (one past the last for none), magnitude, sign."""

    operation: np.ndarray
    magnitude: np.ndarray
    sign: np.ndarray


def draw_layer(policy: Policy, u: np.ndarray) -> Layer:
    """Turn uniform numbers [5, batch] into one operation per image."""
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
