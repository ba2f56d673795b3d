"""The recipe's augmentation for whole batches on the training device, with the distributions of `train_transform`.

The host draws what happens to an image from (seed, epoch, index) alone. So it knows which images share an operation:
each operation touches only those, and nothing waits for the device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from images import image_ops
from images.crop import RandomCrop
from images.draws import OPERATIONS, Draws, draw_layer, erase_boxes, integers, parse_policy
from images.settings import Augmentation, View
from utils import Stream, UserError, derive_seed

CPU_CHUNK = 32  # images at a time on a CPU: as fast as a whole batch; 8 at a time take 4 times as long to draw for


class Step(NamedTuple):
    """One operation on the images at `index`: called with them and `arguments`, it returns what replaces them."""

    operation: Callable
    index: np.ndarray | Tensor
    arguments: Sequence[np.ndarray | Tensor] = ()


def _fixed_tables(level: np.ndarray, factor: np.ndarray, parts: Callable[[str], slice]) -> np.ndarray:
    """Tabulate the operations that need not see the image, over levels 0 to 255: float32 [images, 256], in order."""
    pixel = np.arange(256)
    inverted = parts("Invert")
    bits = 4 - (level[parts("PosterizeIncreasing"), None] / 10 * 4).astype(int)
    step = 2 ** (8 - bits.clip(0))  # 0 bits: black
    threshold = 256 - np.minimum(256, (level[parts("SolarizeIncreasing"), None] / 10 * 256).astype(int))
    added = np.minimum(128, (level[parts("SolarizeAdd"), None] / 10 * 110).astype(int))
    brightness = factor[parts("BrightnessIncreasing"), None].astype(np.float32)
    tables = (
        np.repeat(255 - pixel[None], inverted.stop - inverted.start, axis=0),
        pixel // step * step,
        np.where(pixel < threshold, pixel, 255 - pixel),
        np.where(pixel < 128, np.minimum(255, pixel + added), pixel),
        np.clip(brightness * pixel.astype(np.float32), 0, 255),
    )
    return np.concatenate(tables).astype(np.float32)


def _matrices(amount: np.ndarray, size: int, parts: Callable[[str], slice]) -> np.ndarray:
    """Build the six coefficients of PIL's Image.transform, [images, 6]; amount -1 to 1 is a signed magnitude / 10."""
    matrices = np.zeros((len(amount), 6))
    matrices[:, (0, 4)] = 1
    for name, column, most in (("ShearX", 1, 0.3), ("ShearY", 3, 0.3)):
        matrices[parts(name), column] = most * amount[parts(name)]
    for name, column in (("TranslateXRel", 2), ("TranslateYRel", 5)):
        matrices[parts(name), column] = 0.45 * size * amount[parts(name)]
    angle, middle = np.radians(-30 * amount[parts("Rotate")]), size / 2  # by up to 30 degrees
    cos, sin = np.cos(angle), np.sin(angle)
    rows = (cos, sin, middle * (1 - cos - sin), -sin, cos, middle * (1 + sin - cos))
    matrices[parts("Rotate")] = np.stack(rows, axis=1)
    return matrices


class DeviceAugment:
    """Random crop and flip, RandAugment, normalization and random erasing of uint8 batches on `device`.

    UserError for a policy that only timm's way offers.
    """

    def __init__(self, view: View, augmentation: Augmentation, device: torch.device):
        self.policy = None if augmentation.aa in ("", "none", None) else parse_policy(augmentation.aa)
        if self.policy is None and augmentation.color_jitter:
            mend = "use --augment timm, --color_jitter 0, or a policy like rand-m9-mstd0.5-inc1"
            jitter = f"--color_jitter {augmentation.color_jitter} (as --aa is off)"
            raise UserError(f"--augment device does not offer {jitter}: {mend}")
        self.size, self.device, self.crop = view.input_size, torch.device(device), RandomCrop(view, augmentation)
        self.reprob, self.remode, self.recount = augmentation.reprob, augmentation.remode, augmentation.recount
        self.seed, self.generator = augmentation.seed, torch.Generator(self.device)  # of the noise in erased boxes
        self.fill = torch.tensor([min(255, round(255 * value)) for value in view.colours[0]], device=device).float()
        mean, std = torch.tensor(view.mean, dtype=torch.float64), torch.tensor(view.std, dtype=torch.float64)
        self.scale = (1 / (255 * std)).float().to(device).view(-1, 1, 1)
        self.shift = (-mean / std).float().to(device).view(-1, 1, 1)
        self.kernels = image_ops.interpolation_kernels(device)

    @torch.no_grad()
    def __call__(
        self, images: Tensor, epoch: int, indices: np.ndarray, key: tuple[int, int], shapes: np.ndarray | None
    ) -> Tensor:
        """Augment and normalize: uint8 [batch, 3, H, W] on the device -> float [batch, channels, S, S].

        `shapes` int [batch, 2] are the images' own heights and widths, which differ from (H, W) if they are stored
        stretched: crops have their aspect in the image itself. None: the images come cropped and flipped, S x S.
        The draws depend on (seed, epoch, index) alone, but the noise of erased boxes on (seed, *key),
        key = (epoch, chunk).
        """
        self.generator.manual_seed(derive_seed(Stream.NOISE, self.seed, *key))
        with torch.autocast(self.device.type, enabled=False):  # bfloat16 has too few bits for the resizing
            parts = [
                self._augment(images[part], epoch, indices[part], None if shapes is None else shapes[part])
                for part in self.parts(len(images))
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def parts(self, count: int) -> list[slice]:
        """Cut a batch of `count` images into the parts that are augmented together: on a GPU only one."""
        chunk = CPU_CHUNK if self.device.type == "cpu" else count
        return [slice(start, start + chunk) for start in range(0, count, chunk)]

    def _augment(self, images: Tensor, epoch: int, indices: np.ndarray, shapes: np.ndarray | None) -> Tensor:
        boxes, steps, erasing = self.to_device(*self.plan(epoch, indices, images.shape[2:], shapes))
        images = images.clone() if shapes is None else self._resize(images, boxes)
        apply(steps, images)
        if len(self.scale) == 1:
            images = image_ops.gray(images.float())
        images = (images * self.scale).add_(self.shift)
        apply(erasing, images)
        return images

    def plan(
        self, epoch: int, indices: np.ndarray, stored: Sequence[int], shapes: np.ndarray | None
    ) -> tuple[np.ndarray, list[Step], list[Step]]:
        """Draw what the images will go through: crops [batch, 8], steps on levels, steps on the normalized result.

        `stored` is the height and width that the pixels have. The crops are `RandomCrop.boxes` in those pixels, and
        empty if the images come cropped.
        """
        draws, boxes = self.crop.draws(epoch, indices), np.empty((0, 8))
        if shapes is not None:
            boxes = self.crop.boxes(draws, *shapes.T)
            boxes[:, :4] *= (np.array(stored) / shapes)[:, [0, 1, 0, 1]]
        steps = []
        for layer in range(self.policy.layers if self.policy else 0):
            steps += self.layer(draws.uniforms(1 + layer, 6))
        return boxes, steps, self._erasing(draws)

    def layer(self, u: np.ndarray) -> list[Step]:
        """Make one RandAugment layer from deviates [6, batch]: a step for each kind of operation that some image draws."""
        operations, magnitudes, signs = draw_layer(self.policy, u[:5])
        order = np.argsort(operations, kind="stable")
        bounds = np.searchsorted(operations[order], np.arange(len(OPERATIONS) + 1)).tolist()

        def parts(first: str, last: str | None = None) -> slice:
            return slice(bounds[OPERATIONS.index(first)], bounds[OPERATIONS.index(last or first) + 1])

        level, amount = magnitudes[order], (signs * magnitudes / 10)[order]
        cubic = self.crop.is_cubic(u[5])[order]
        factor = np.maximum(0.1, 1 + 0.9 * amount)
        pointwise = parts("Invert", "Equalize")
        stretched = parts("AutoContrast")
        by_table = functools.partial(image_ops.point_operations, stretched=stretched.stop - stretched.start)
        tables = _fixed_tables(level, factor, parts), factor[parts("ContrastIncreasing")]
        steps = [Step(by_table, order[pointwise], tables)]
        matrices = _matrices(amount, self.size, parts)
        strides = np.tile((1.0, self.size), (len(order), 1))
        vertical = parts("ShearY", "TranslateYRel")
        matrices[vertical] = matrices[vertical][:, (3, 4, 5, 0, 1, 2)]
        strides[vertical] = (self.size, 1)
        for group, both_axes in ((parts("ShearX", "TranslateYRel"), False), (parts("Rotate"), True)):
            for kind in (False, True):
                chosen = group.start + np.flatnonzero(cubic[group] == kind)
                options = {"kernel": self.kernels[kind], "fill": self.fill, "both_axes": both_axes}
                transform = functools.partial(image_ops.affine, **options)
                steps.append(Step(transform, order[chosen], (matrices[chosen], strides[chosen])))
        for operation, name in ((image_ops.color, "ColorIncreasing"), (image_ops.sharpness, "SharpnessIncreasing")):
            steps.append(Step(operation, order[parts(name)], (factor[parts(name)],)))
        return [step for step in steps if len(step.index)]

    def _erasing(self, draws: Draws) -> list[Step]:
        """Make a step for each of up to `recount` boxes, on the images that have that many."""
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
        shape = images.shape if self.remode == "pixel" else (*images.shape[:2], 1, 1)
        if self.remode in ("pixel", "rand"):
            content = torch.randn(shape, generator=self.generator, device=self.device)
        else:
            content = torch.zeros(shape, device=self.device)
        return image_ops.erase(images, boxes, content)

    def _resize(self, images: Tensor, boxes: Tensor) -> Tensor:
        top, left, down, across, shift_down, shift_right, flip, cubic = boxes.unbind(1)
        if self.size <= 32 or self.crop.interpolation != "random":  # one kernel for all is cheaper
            cubic = self.size <= 32 or self.crop.interpolation == "bicubic"
        height, width = images.shape[2:]
        # Rows and columns as one batch, as long as the longer axis: no box reaches beyond the end of the shorter one.
        axes = [torch.cat(pair) for pair in ((top, left), (down, across), (shift_down, shift_right))]
        flip = torch.cat((torch.zeros_like(flip), flip))
        cubic = cubic.repeat(2) if isinstance(cubic, Tensor) else cubic
        matrices = image_ops.filter_matrices(*axes, flip, cubic, max(height, width), self.size)
        rows, columns = matrices[: len(top), :, :height], matrices[len(top) :, :, :width]
        return image_ops.resample(images, rows, columns)

    def to_device(self, boxes: np.ndarray, *lists: list[Step]) -> tuple:
        """Send a plan to the device, in two copies (integers, floats) that the host does not wait for."""
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
    """Apply each step to its images, in place."""
    for step in steps:
        images.index_copy_(0, step.index, step.operation(images.index_select(0, step.index), *step.arguments))
