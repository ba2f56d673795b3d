"""Pillow's image operations for batches of uint8 images on any device: what it computes, as few tensor operations.

Every function returns new tensors, waits for nothing on the host and takes arguments of its own for each image.
"""

import torch
from torch import Tensor
from torch.nn import functional


def _bell(distance: Tensor, cubic: Tensor | bool) -> Tensor:
    """Weights by distance from the centre: of the cubic with a = -0.5 where `cubic`, else of the triangle."""
    x = distance
    if cubic is False:
        return (1 - x).clamp(min=0)
    near = ((1.5 * x - 2.5) * x) * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    curve = torch.where(x < 1, near, far * (x < 2))
    return curve if cubic is True else torch.where(cubic, curve, (1 - x).clamp(min=0))


def filter_matrices(
    start: Tensor, length: Tensor, shift: Tensor, flip: Tensor, cubic: Tensor | bool, size_in: int, size_out: int
) -> Tensor:
    """What each output pixel of one axis takes of each input pixel; float [batch, size_out, size_in].

    Pixels start .. start + length - 1 are an image of their own, resized to size_out with support widened when
    shrinking (as Pillow does), then moved by -shift with zeros behind it, then mirrored where `flip`; all [batch].
    """
    start, length, shift, flip = (value.view(-1, 1) for value in (start, length, shift, flip))
    place = torch.arange(size_out, device=start.device)
    place = torch.where(flip > 0, size_out - 1 - place, place) + shift  # [batch, size_out]
    scale = length / size_out
    centre = (start + (place + 0.5) * scale).unsqueeze(2)
    pixel = torch.arange(size_in, device=start.device)
    if isinstance(cubic, Tensor):
        cubic = cubic.view(-1, 1, 1) > 0
    weights = _bell(((pixel + 0.5 - centre) / scale.clamp(min=1).unsqueeze(2)).abs(), cubic)
    weights = weights * ((pixel >= start) & (pixel < start + length)).unsqueeze(1)  # [batch, size_out, size_in]
    valid = (place >= 0) & (place < size_out)
    # the sum is at least 0.5 inside the image; 0 / 0 outside would spoil the row that has to be zero
    return weights * (valid / weights.sum(2).clamp(min=0.1)).unsqueeze(2)


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Both axes through their matrices, rounded after each as Pillow does; uint8 [batch, 3, S, S].

    Each row's columns first: so did Pillow until 13, which begins with the rows where they shrink the most.
    """
    batch, channels, height, width = images.shape
    size = columns.shape[1]
    lines = images.transpose(1, 2).reshape(batch, height * channels, width).float()
    lines = _to_levels(torch.bmm(lines, columns.transpose(1, 2)))  # [batch, height * channels, size]
    both = _to_levels(torch.bmm(rows, lines.view(batch, height, channels * size)))
    both = both.view(batch, rows.shape[1], channels, size).transpose(1, 2)
    return both.to(torch.uint8, memory_format=torch.contiguous_format)


def _to_levels(values: Tensor) -> Tensor:
    return values.add_(0.5).clamp_(0, 255).floor_()


def mirror(images: Tensor) -> Tensor:
    """Left and right exchanged."""
    return images.flip(3)


def blend(base: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """From `base` (factor 0) through `images` (1) and beyond, clipped and cut to integers; uint8.

    One factor for each of the first axis.
    """
    factors = factors.view(-1, *[1] * (images.dim() - 1))
    return (base + factors * (images - base)).clamp_(0, 255).to(torch.uint8)


def _gray(images: Tensor) -> Tensor:
    """Pillow's mode L, [batch, H, W] float from float [batch, 3, H, W]; every step is exact below 2**24."""
    red, green, blue = images.unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536).floor_()


def color(images: Tensor, factors: Tensor) -> Tensor:
    """Saturation by `factors` [batch]: 0 is gray, 1 the image."""
    images = images.float()
    return blend(_gray(images).unsqueeze(1), images, factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Sharpness by `factors` [batch]: 0 is smoothed (5 in the middle of 3 x 3 ones; not the border), 1 the image."""
    images = images.float()
    total = functional.avg_pool2d(images, 3, stride=1, divisor_override=1) + 4 * images[..., 1:-1, 1:-1]
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = (total / 13 + 0.5).floor_()
    return blend(smooth, images, factors)


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Each pixel's level replaced by the entry in its image's and channel's table; tables: uint8 [batch, 3, 256]."""
    count = len(images) * 3
    offsets = torch.arange(0, count * 256, 256, dtype=torch.int32, device=images.device)
    places = images + offsets.view(-1, 3, 1, 1)
    return tables.reshape(-1).index_select(0, places.view(-1)).view(images.shape)


def point_operations(images: Tensor, tables: Tensor, contrasts: Tensor, stretched: int) -> Tensor:
    """Operations that look at one pixel at a time, by kind along the batch.

    First as many as `tables` has (float [.., 256], the same for all channels), then as many as `contrasts` has
    factors, then `stretched` images to autocontrast, then the rest to equalize.
    """
    first, second = len(tables), len(tables) + len(contrasts)
    parts = [tables.to(torch.uint8).unsqueeze(1).expand(-1, 3, -1)]
    if second > first:
        parts.append(_contrast_tables(images[first:second], contrasts))
    if len(images) > second:
        counts = _histograms(images[second:])
        parts += [_autocontrast_tables(counts[:stretched]), _equalize_tables(counts[stretched:])]
    return look_up(images, torch.cat(parts))


def _contrast_tables(images: Tensor, factors: Tensor) -> Tensor:
    gray = _gray(images.float()).int()
    pixels = gray[0].numel()
    # (2 * sum + pixels) / (2 * pixels) is the mean rounded, in integers
    mean = (gray.sum((1, 2)) * 2 + pixels).div(2 * pixels, rounding_mode="floor").float()
    levels = torch.arange(256, dtype=torch.float32, device=images.device).expand(len(images), -1)
    return blend(mean.unsqueeze(1), levels, factors).unsqueeze(1).expand(-1, 3, -1)


def _histograms(images: Tensor) -> Tensor:
    """How often each level occurs in each channel; int32 [batch, 3, 256]."""
    count = len(images) * 3
    offsets = torch.arange(0, count * 256, 256, device=images.device)
    places = (images + offsets.view(-1, 3, 1, 1)).view(-1)
    one = torch.ones(1, dtype=torch.int32, device=images.device)
    counts = torch.zeros(count * 256, dtype=torch.int32, device=images.device)
    return counts.scatter_add_(0, places, one.expand_as(places)).view(-1, 3, 256)


def _autocontrast_tables(counts: Tensor) -> Tensor:
    """The darkest level that occurs becomes 0, the lightest 255; a single level stays."""
    levels = torch.arange(256, dtype=torch.int32, device=counts.device)
    occurs = counts > 0
    high = (occurs * levels).amax(2, keepdim=True)
    low = 255 - (occurs * (255 - levels)).amax(2, keepdim=True)
    span = (high - low).clamp(min=1)
    stretched = ((levels - low) * 255).div(span, rounding_mode="floor").clamp(0, 255)
    return torch.where(high > low, stretched, levels).to(torch.uint8)


def _equalize_tables(counts: Tensor) -> Tensor:
    """Pillow's equalization: the count below each level, in steps of 1/255 of all but the lightest level's pixels."""
    levels = torch.arange(256, dtype=torch.int32, device=counts.device)
    below = counts.cumsum(2)
    lightest = counts.gather(2, ((counts > 0) * levels).amax(2, keepdim=True).long())
    step = (below[..., -1:] - lightest).div(255, rounding_mode="floor")
    half = step.div(2, rounding_mode="floor")
    spread = (half + below - counts).div(step.clamp(min=1), rounding_mode="floor").clamp(max=255)
    return torch.where(step > 0, spread, levels).to(torch.uint8)


def interpolation_kernels(device: torch.device) -> dict[bool, Tensor]:
    """Weights of the pixels around a point as polynomials in its distance d from the one before it, for `affine`.

    float [4, taps], by powers of d: False is the line, True the cubic with a = -1, which Image.transform and
    Image.rotate use, unlike Image.resize.
    """
    line = [[1, 0], [-1, 1], [0, 0], [0, 0]]
    cubic = [[0, 1, 0, 0], [-1, 0, 1, 0], [2, -2, 1, -1], [-1, 1, -1, 1]]
    return {False: torch.tensor(line, device=device).float(), True: torch.tensor(cubic, device=device).float()}


def affine(images: Tensor, matrices: Tensor, steps: Tensor, kernel: Tensor, fill: Tensor, both_axes: bool) -> Tensor:
    """Each pixel from where its image's matrix points, as Image.transform: pixel centres at halves; square images.

    Coordinates are an axis along which points may lie between pixel centres, then one across it, where they may only
    with `both_axes` (four times the work); matrices: [batch, 6], the first in row 0; steps: [batch, 2], from one
    pixel to the next in each axis, 1 or the width. Points outside give `fill` [3].
    """
    batch, channels, size, _ = images.shape
    coefficients = matrices.view(batch, 2, 3, 1, 1)
    x = torch.arange(size, device=images.device) + 0.5
    points = torch.addcmul(coefficients[:, :, 2], coefficients[:, :, 0], x)
    points = torch.addcmul(points, coefficients[:, :, 1], x.view(-1, 1))  # [batch, 2, size, size]
    inside = ((points >= 0) & (points < size)).all(1, keepdim=True)
    points = points - 0.5
    first = points.floor()
    d = (points - first).unsqueeze(2)
    taps = kernel.shape[1]
    offsets = torch.arange(taps, device=images.device).view(-1, 1, 1) - (taps // 2 - 1)
    steps = steps.view(batch, 2, 1, 1, 1)
    axes = slice(0, 2 if both_axes else 1)
    places = (first[:, axes].unsqueeze(2) + offsets).clamp_(0, size - 1).mul_(steps[:, axes])
    constant, linear, square, cube = kernel.view(4, taps, 1, 1).unbind()
    weights = torch.addcmul(square, d[:, axes], cube)
    weights = torch.addcmul(constant, d[:, axes], torch.addcmul(linear, d[:, axes], weights))
    if both_axes:  # the products of both: [batch, taps * taps, size, size]
        places = (places[:, 0].unsqueeze(1) + places[:, 1].unsqueeze(2)).flatten(1, 2)
        weights = (weights[:, 0].unsqueeze(1) * weights[:, 1].unsqueeze(2)).flatten(1, 2)
    else:
        places, weights = torch.addcmul(places[:, 0], first[:, 1:], steps[:, 1]), weights[:, 0]
    count = places.shape[1]
    # whole numbers below 2**24 are exact in float32
    places = places.long().view(batch, 1, -1).expand(-1, channels, -1)
    values = images.flatten(2).float().gather(2, places).view(batch, channels, count, size, size)
    total = (values * weights.unsqueeze(1)).sum(2)
    # the fraction is cut off; 1e-3 is for sums of weights a rounding error below 1, in areas of one colour
    total = total.add_(1e-3).clamp_(0, 255)
    return torch.where(inside, total, fill.view(3, 1, 1)).to(torch.uint8)


def erase(images: Tensor, boxes: Tensor, content: Tensor) -> Tensor:
    """`content`, of a shape that fits [batch, 3, H, W], inside boxes [batch, 4]: top, left, height, width."""
    top, left, height, width = boxes.view(-1, 4, 1, 1, 1).unbind(1)
    row = torch.arange(images.shape[2], device=images.device).view(-1, 1)
    column = torch.arange(images.shape[3], device=images.device)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    return torch.where(inside, content, images)
