"""The recipe's augmentation for whole batches on the training device, distributed as `loader.train_transform` does.

What happens to an image is drawn on the host from (seed, epoch, index) alone. So the images that share an operation
are known there, each operation touches only those, and nothing waits for the device.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from images import image_ops
from images.draws import OPERATIONS, Draws, crop_boxes, draw_layer, erase_boxes, integers, parse_policy
from utils import Stream, UserError, derive_seed

CPU_CHUNK = 32  # images at once there: drawing for 8 takes 4 times as long an image, the whole is about as fast
PADDING = 4  # pixels around an image of up to 32 px, from which the crop is taken


class Step(NamedTuple):
    """One operation on the images at `index`: called with them and `arguments`, it returns what replaces them."""

    operation: Callable
    index: np.ndarray | Tensor
    arguments: Sequence[np.ndarray | Tensor] = ()


def _fixed_tables(level: np.ndarray, factor: np.ndarray, parts: Callable[[str], slice]) -> np.ndarray:
    """What the operations make of levels 0 to 255 that need not know the image; float32 [count, 256], in order."""
    pixel = np.arange(256)
    bits = 4 - (level[parts("PosterizeIncreasing"), None] / 10 * 4).astype(int)
    threshold = 256 - np.minimum(256, (level[parts("SolarizeIncreasing"), None] / 10 * 256).astype(int))
    added = np.minimum(128, (level[parts("SolarizeAdd"), None] / 10 * 110).astype(int))
    brightness = factor[parts("BrightnessIncreasing"), None].astype(np.float32)
    inverted = parts("Invert")
    return np.concatenate([
        np.repeat(255 - pixel[None], inverted.stop - inverted.start, axis=0),
        pixel // 2 ** (8 - bits.clip(0)) * 2 ** (8 - bits.clip(0)),  # 0 bits: black
        np.where(pixel < threshold, pixel, 255 - pixel),
        np.where(pixel < 128, np.minimum(255, pixel + added), pixel),
        np.clip(brightness * pixel.astype(np.float32), 0, 255),
    ]).astype(np.float32)  # fmt: skip


def _matrices(amount: np.ndarray, size: int, parts: Callable[[str], slice]) -> np.ndarray:
    """The rows of six that Image.transform takes, [batch, 6]; amounts of -1 to 1 are magnitudes up to 10."""
    matrices = np.zeros((len(amount), 6))
    matrices[:, (0, 4)] = 1
    for name, column, most in (("ShearX", 1, 0.3), ("ShearY", 3, 0.3)):
        matrices[parts(name), column] = most * amount[parts(name)]
    for name, column in (("TranslateXRel", 2), ("TranslateYRel", 5)):
        matrices[parts(name), column] = 0.45 * size * amount[parts(name)]
    angle, middle = np.radians(-30 * amount[parts("Rotate")]), size / 2  # about the middle, by up to 30 degrees
    cos, sin = np.cos(angle), np.sin(angle)
    rows = (cos, sin, middle * (1 - cos - sin), -sin, cos, middle * (1 + sin - cos))
    matrices[parts("Rotate")] = np.stack(rows, axis=1)
    return matrices


class DeviceAugment:
    """Random crop and flip, RandAugment, normalization and random erasing of uint8 batches on `device`.

    The options are `loader.train_transform`'s. With `crop` off, images come cropped and resized to
    input_size x input_size (`cropped`). `shapes` [images, 2] are the heights and widths of images that are stored
    stretched to another size. UserError for a policy that is not offered.
    """

    def __init__(
        self, *, input_size: int, mean: Sequence[float], std: Sequence[float], hflip: float, aa: str,
        train_interpolation: str, reprob: float, remode: str, recount: int, seed: int, device: torch.device,
        crop: bool = True, shapes: np.ndarray | None = None, color_jitter: float | None = 0.4
    ):  # fmt: skip
        self.policy = None if aa in ("", "none", None) else parse_policy(aa)
        if self.policy is None and color_jitter:
            mend = "use --augment timm, --color_jitter 0, or a policy like rand-m9-mstd0.5-inc1"
            raise UserError(f"--augment device does not offer --color_jitter {color_jitter} (as --aa is off): {mend}")
        self.size, self.hflip, self.interpolation, self.crop = input_size, hflip, train_interpolation, crop
        self.reprob, self.remode, self.recount = reprob, remode, recount
        self.seed, self.device = seed, torch.device(device)
        self.fill = torch.tensor([min(255, round(255 * value)) for value in mean], device=device).float()
        mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.scale = (1 / (255 * std)).float().to(device).view(3, 1, 1)
        self.shift = (-mean / std).float().to(device).view(3, 1, 1)
        self.kernels = image_ops.interpolation_kernels(device)
        self.generator = torch.Generator(self.device)
        self.shapes = shapes

    def __getstate__(self) -> dict:
        """Without what lies on the device: workers only draw boxes (`cropped`), and may be unable to get it."""
        there = ("fill", "scale", "shift", "kernels", "generator")
        return {name: value for name, value in self.__dict__.items() if name not in there}

    @torch.no_grad()
    def __call__(self, images: Tensor, epoch: int, indices: np.ndarray, key: tuple[int, int]) -> Tensor:
        """uint8 [batch, 3, H, W] on the device -> float [batch, 3, S, S], augmented and normalized.

        The draws depend on (seed, epoch, index) alone, but the noise of erased boxes on (seed, *key),
        key = (step, chunk).
        """
        height, width = images.shape[2:]
        if not self.crop and (height, width) != (self.size, self.size):
            raise ValueError(f"images of {height} x {width} px, but without a crop {self.size} x {self.size} is needed")
        self.generator.manual_seed(derive_seed(Stream.NOISE, self.seed, *key))
        with torch.autocast(self.device.type, enabled=False):  # bfloat16 has too few bits for the resizing
            parts = [self._augment(images[part], epoch, indices[part]) for part in self.parts(len(images))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def parts(self, count: int) -> list[slice]:
        """A batch of `count` images as it is gone through: on a GPU all at once."""
        chunk = CPU_CHUNK if self.device.type == "cpu" else count
        return [slice(start, start + chunk) for start in range(0, count, chunk)]

    def _augment(self, images: Tensor, epoch: int, indices: np.ndarray) -> Tensor:
        boxes, steps, erasing = self.to_device(*self.plan(epoch, indices, *images.shape[2:]))
        images = self._resize(images, boxes) if self.crop else images.clone()
        apply(steps, images)
        images = (images * self.scale).add_(self.shift)
        apply(erasing, images)
        return images

    def plan(self, epoch: int, indices: np.ndarray, height: int, width: int) -> tuple[np.ndarray, list, list]:
        """What the images of `indices` will go through: crops [batch, 8], steps on levels, steps on the result.

        A crop is top, left, height, width, the shift down and right, flipped or not, cubic or not.
        """
        draws = self._draws(epoch, indices)
        boxes = self._boxes(draws, *(np.array([[height], [width]]) if self.shapes is None else self.shapes[indices].T))
        if self.shapes is not None:  # the boxes are those of the images, in the pixels that are left of them
            boxes[:, :4] *= (np.array([height, width]) / self.shapes[indices])[:, [0, 1, 0, 1]]
        flip = boxes[:, 6] > 0
        steps = [] if self.crop or not flip.any() else [Step(image_ops.mirror, np.flatnonzero(flip))]
        for layer in range(self.policy.layers if self.policy else 0):
            steps += self.layer(draws.uniforms(1 + layer, 6))
        return boxes, steps, self._erasing(draws)

    def _draws(self, epoch: int, indices: np.ndarray) -> Draws:
        return Draws(derive_seed(Stream.AUGMENT, self.seed, epoch), indices)

    def _boxes(self, draws: Draws, height: np.ndarray, width: np.ndarray) -> np.ndarray:
        """The crops [batch, 8] of images of these sizes."""
        flip, cubic, *place = draws.uniforms(0, 24)
        place, flip = np.stack(place), flip < self.hflip
        shift = np.zeros((2, len(flip)))
        if self.size <= 32:
            shift = integers(place[-2:], 2 * PADDING) - PADDING
            box = [np.broadcast_to(side, len(flip)) for side in (0, 0, height, width)]
            cubic = np.ones_like(cubic)
        else:
            box, cubic = crop_boxes(place, height, width), self._is_cubic(cubic)
        return np.stack((*box, *shift, flip, cubic), axis=1).astype(np.float64)

    def cropped(self, image: Image.Image, epoch: int, index: int) -> np.ndarray:
        """What a worker does of it where `crop` is off: an image, not decoded yet, cropped and resized; uint8 [S, S, 3]."""
        size = np.array([image.height, image.width])
        boxes = self._boxes(self._draws(epoch, np.array([index])), *size[:, None])[0]
        (top, left, down, across), shift, cubic = boxes[:4], boxes[4:6].astype(int), boxes[7]
        if image.format == "JPEG":
            # the decoder leaves out what the resizing would: halves, quarters, eighths, never below what is needed
            enough = max(1, min(down, across) / self.size)
            image.draft("RGB", (math.ceil(image.width / enough), math.ceil(image.height / enough)))
        ratio = np.array([image.height, image.width]) / size
        (top, left), (bottom, right) = (top, left) * ratio, (top + down, left + across) * ratio
        image, box = image.convert("RGB"), (left, top, right, bottom)
        if all(side == int(side) for side in box):  # else a part of a pixel at the edge counts
            image = image.crop(tuple(map(int, box)))
            box = None
        kernel = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
        pixels = np.asarray(image.resize((self.size, self.size), kernel, box))
        if not shift.any():
            return pixels
        down, right = PADDING + shift
        padded = np.pad(pixels, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
        return padded[down : down + self.size, right : right + self.size]

    def _is_cubic(self, uniform: np.ndarray) -> np.ndarray:
        return uniform < {"bicubic": 2, "bilinear": -1, "random": 0.5}[self.interpolation]

    def layer(self, u: np.ndarray) -> list[Step]:
        """One operation of each image, or none, from deviates [6, batch]; the operations of one kind together."""
        operations, magnitudes, signs = draw_layer(self.policy, u[:5])
        order = np.argsort(operations, kind="stable")
        bounds = np.searchsorted(operations[order], np.arange(len(OPERATIONS) + 1)).tolist()

        def parts(first: str, last: str | None = None) -> slice:
            return slice(bounds[OPERATIONS.index(first)], bounds[OPERATIONS.index(last or first) + 1])

        level, amount = magnitudes[order], (signs * magnitudes / 10)[order]
        cubic = self._is_cubic(u[5])[order]
        factor = np.maximum(0.1, 1 + 0.9 * amount)
        pointwise = parts("Invert", "Equalize")
        stretched = parts("AutoContrast")
        steps = [Step(
            functools.partial(image_ops.point_operations, stretched=stretched.stop - stretched.start),
            order[pointwise],
            (_fixed_tables(level, factor, parts), factor[parts("ContrastIncreasing")]),
        )]  # fmt: skip
        matrices = _matrices(amount, self.size, parts)
        strides = np.tile((1.0, self.size), (len(order), 1))
        vertical = parts("ShearY", "TranslateYRel")
        matrices[vertical] = matrices[vertical][:, (3, 4, 5, 0, 1, 2)]
        strides[vertical] = (self.size, 1)
        for group, both_axes in ((parts("ShearX", "TranslateYRel"), False), (parts("Rotate"), True)):
            for kind in (False, True):
                here = group.start + np.flatnonzero(cubic[group] == kind)
                options = {"kernel": self.kernels[kind], "fill": self.fill, "both_axes": both_axes}
                transform = functools.partial(image_ops.affine, **options)
                steps.append(Step(transform, order[here], (matrices[here], strides[here])))
        for operation, name in ((image_ops.color, "ColorIncreasing"), (image_ops.sharpness, "SharpnessIncreasing")):
            steps.append(Step(operation, order[parts(name)], (factor[parts(name)],)))
        return [step for step in steps if len(step.index)]

    def _erasing(self, draws: Draws) -> list[Step]:
        """For each of up to `recount` boxes the images that have one."""
        if not self.reprob:
            return []
        chosen, count = draws.uniforms(1000, 2)
        count = np.where(chosen <= self.reprob, 1 + integers(count, self.recount - 1), 0)
        steps = []
        for number in range(self.recount):
            boxes, fits = erase_boxes(draws.uniforms(1001 + number, 22), 1 / np.maximum(count, 1), self.size)
            index = np.flatnonzero(fits & (count > number))
            if len(index):
                steps.append(Step(self._erase, index, (boxes[index],)))
        return steps

    def _erase(self, images: Tensor, boxes: Tensor) -> Tensor:
        shape = images.shape if self.remode == "pixel" else (len(images), 3, 1, 1)
        if self.remode in ("pixel", "rand"):
            content = torch.randn(shape, generator=self.generator, device=self.device)
        else:
            content = torch.zeros(shape, device=self.device)
        return image_ops.erase(images, boxes, content)

    def _resize(self, images: Tensor, boxes: Tensor) -> Tensor:
        top, left, down, across, shift_down, shift_right, flip, cubic = boxes.unbind(1)
        if self.size <= 32 or self.interpolation != "random":
            cubic = self.size <= 32 or self.interpolation == "bicubic"
        height, width = images.shape[2:]
        # rows and columns as one batch; what the shorter axis has not is outside every box
        axes = [torch.cat(pair) for pair in ((top, left), (down, across), (shift_down, shift_right))]
        flip = torch.cat((torch.zeros_like(flip), flip))
        cubic = cubic.repeat(2) if isinstance(cubic, Tensor) else cubic
        matrices = image_ops.filter_matrices(*axes, flip, cubic, max(height, width), self.size)
        rows, columns = matrices[: len(top), :, :height], matrices[len(top) :, :, :width]
        return image_ops.resample(images, rows, columns)

    def to_device(self, boxes: np.ndarray, *lists: list[Step]) -> tuple:
        """The same with tensors on the device, sent in two copies that the host does not wait for."""
        steps = [step for group in lists for step in group]
        indices = iter(self._send([step.index for step in steps], np.int64))
        floats = iter(self._send([boxes, *(value for step in steps for value in step.arguments)], np.float32))
        boxes = next(floats)

        def sent(step: Step) -> Step:
            return Step(step.operation, next(indices), [next(floats) for _ in step.arguments])

        return boxes, *([sent(step) for step in group] for group in lists)

    def _send(self, arrays: list[np.ndarray], dtype: type) -> list[Tensor]:
        if not arrays:
            return []
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays], dtype=dtype, casting="unsafe"))
        if self.device.type == "cuda":
            flat = flat.pin_memory()
        parts = flat.to(self.device, non_blocking=True).split([array.size for array in arrays])
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def apply(steps: list[Step], images: Tensor) -> None:
    """Replace the images that each step concerns, in place."""
    for step in steps:
        images.index_copy_(0, step.index, step.operation(images.index_select(0, step.index), *step.arguments))
