"""Pillow's image operations for batches of uint8 images on any device, each in few tensor operations.

Every function returns new tensors, never makes the host wait for the device, and takes separate arguments for each image.
"""

import torch
from torch import Tensor
from torch.nn import functional


def _bell(distance: Tensor, cubic: Tensor | bool) -> Tensor:
    """Weigh pixels by their distance from the centre: by the cubic with a = -0.5 if `cubic`, else by a triangle."""
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
    """Make the matrices that crop, resize, shift and flip one axis: float [batch, size_out, size_in].

    Pixels start .. start + length - 1 are treated as a whole image. It is resized to size_out (when shrinking, with
    Pillow's wider support), shifted by -shift with zeros moving in, then mirrored if `flip`. All arguments are [batch].
    """
    start, length, shift, flip = (value.view(-1, 1) for value in (start, length, shift, flip))
    output = torch.arange(size_out, device=start.device)
    output = torch.where(flip > 0, size_out - 1 - output, output) + shift  # [batch, size_out]
    scale = length / size_out
    centre = (start + (output + 0.5) * scale).unsqueeze(2)
    pixel = torch.arange(size_in, device=start.device)
    if isinstance(cubic, Tensor):
        cubic = cubic.view(-1, 1, 1) > 0
    weights = _bell(((pixel + 0.5 - centre) / scale.clamp(min=1).unsqueeze(2)).abs(), cubic)
    weights = weights * ((pixel >= start) & (pixel < start + length)).unsqueeze(1)  # [batch, size_out, size_in]
    valid = (output >= 0) & (output < size_out)
    # inside the image the sum is at least 0.5; outside it is 0, and 0 / 0 would put NaN into rows that must be zero
    return weights * (valid / weights.sum(2).clamp(min=0.1)).unsqueeze(2)


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply the matrices of both axes, rounding after each as Pillow does; uint8 [batch, 3, S, S].

    The horizontal axis comes first, as in Pillow before 13. Pillow 13 begins with the rows if they shrink more.
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


def blend(base: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """Blend from `base` (factor 0) to `images` (factor 1) and beyond, clip, and cut off fractions; uint8.

    There is one factor per entry of the first axis.
    """
    factors = factors.view(-1, *[1] * (images.dim() - 1))
    return (base + factors * (images - base)).clamp_(0, 255).to(torch.uint8)


def gray(images: Tensor) -> Tensor:
    """Convert levels, float [..., 3, H, W], to Pillow's mode L, float [..., 1, H, W]; float32 is exact up to 2**24."""
    red, green, blue = images.split(1, dim=-3)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536).floor_()


def color(images: Tensor, factors: Tensor) -> Tensor:
    """Change the saturation by `factors` [batch]: 0 gives gray, 1 the image."""
    images = images.float()
    return blend(gray(images), images, factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Change the sharpness by `factors` [batch]: 0 gives Pillow's SMOOTH filter, which skips the border, 1 the image."""
    images = images.float()
    # the filter is 5 in the middle of 3 x 3 ones
    total = functional.avg_pool2d(images, 3, stride=1, divisor_override=1) + 4 * images[..., 1:-1, 1:-1]
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = (total / 13 + 0.5).floor_()
    return blend(smooth, images, factors)


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each level by its entry in the table of its image and channel; tables: uint8 [batch, 3, 256]."""
    count = len(images) * 3
    offsets = torch.arange(0, count * 256, 256, dtype=torch.int32, device=images.device)
    positions = images + offsets.view(-1, 3, 1, 1)
    return tables.reshape(-1).index_select(0, positions.view(-1)).view(images.shape)


def point_operations(images: Tensor, tables: Tensor, contrasts: Tensor, stretched: int) -> Tensor:
    """Apply the operations that map each level by itself, all through look-up tables.

    The batch is sorted by operation: first one image per entry of `tables` (float [.., 256], the same for all channels),
    then one per factor in `contrasts`, then `stretched` images for autocontrast; the rest is equalized.
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
    levels_of_gray = gray(images.float()).int()
    pixels = levels_of_gray[0].numel()
    # (2 * sum + pixels) / (2 * pixels) is the mean rounded, in integers
    mean = (levels_of_gray.sum((1, 2, 3)) * 2 + pixels).div(2 * pixels, rounding_mode="floor").float()
    levels = torch.arange(256, dtype=torch.float32, device=images.device).expand(len(images), -1)
    return blend(mean.unsqueeze(1), levels, factors).unsqueeze(1).expand(-1, 3, -1)


def _histograms(images: Tensor) -> Tensor:
    """Count how often each level occurs in each channel; int32 [batch, 3, 256]."""
    count = len(images) * 3
    offsets = torch.arange(0, count * 256, 256, device=images.device)
    positions = (images + offsets.view(-1, 3, 1, 1)).view(-1)
    one = torch.ones(1, dtype=torch.int32, device=images.device)
    counts = torch.zeros(count * 256, dtype=torch.int32, device=images.device)
    return counts.scatter_add_(0, positions, one.expand_as(positions)).view(-1, 3, 256)


def _autocontrast_tables(counts: Tensor) -> Tensor:
    """Map the darkest level that occurs to 0 and the lightest to 255; a channel of one level stays as it is."""
    levels = torch.arange(256, dtype=torch.int32, device=counts.device)
    occurs = counts > 0
    high = (occurs * levels).amax(2, keepdim=True)
    low = 255 - (occurs * (255 - levels)).amax(2, keepdim=True)
    span = (high - low).clamp(min=1)
    stretched = ((levels - low) * 255).div(span, rounding_mode="floor").clamp(0, 255)
    return torch.where(high > low, stretched, levels).to(torch.uint8)


def _equalize_tables(counts: Tensor) -> Tensor:
    """Map each level to the number of pixels below it, in steps of 1/255 of all but the lightest level's pixels."""
    levels = torch.arange(256, dtype=torch.int32, device=counts.device)
    below = counts.cumsum(2)
    lightest = counts.gather(2, ((counts > 0) * levels).amax(2, keepdim=True).long())
    step = (below[..., -1:] - lightest).div(255, rounding_mode="floor")
    half = step.div(2, rounding_mode="floor")
    spread = (half + below - counts).div(step.clamp(min=1), rounding_mode="floor").clamp(max=255)
    return torch.where(step > 0, spread, levels).to(torch.uint8)


def interpolation_kernels(device: torch.device) -> dict[bool, Tensor]:
    """Make the kernels for `affine`: False for linear, True for cubic interpolation.

    A kernel, float [4, taps], has per neighbouring pixel its weight as a polynomial in d, the point's distance from the
    pixel before it. The cubic has a = -1, as in Image.transform and Image.rotate; Image.resize has a = -0.5.
    """
    line = [[1, 0], [-1, 1], [0, 0], [0, 0]]
    cubic = [[0, 1, 0, 0], [-1, 0, 1, 0], [2, -2, 1, -1], [-1, 1, -1, 1]]
    return {False: torch.tensor(line, device=device).float(), True: torch.tensor(cubic, device=device).float()}


def affine(images: Tensor, matrices: Tensor, steps: Tensor, kernel: Tensor, fill: Tensor, both_axes: bool) -> Tensor:
    """Take each pixel from the point that its image's matrix maps it to, like Image.transform; square images only.

    A shear or a translation moves points along one axis only; interpolating along both costs four times as much. So
    the first coordinate is the axis that is interpolated, and the second only with `both_axes` (a rotation). `matrices`
    [batch, 6] give the first coordinate in row 0; `steps` [batch, 2] are the distances in memory between neighbours
    along each coordinate, 1 or the width. Pixel centres are at halves. Points outside the image give `fill` [3].
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
    positions = (first[:, axes].unsqueeze(2) + offsets).clamp_(0, size - 1).mul_(steps[:, axes])
    constant, linear, square, cube = kernel.view(4, taps, 1, 1).unbind()
    weights = torch.addcmul(square, d[:, axes], cube)
    weights = torch.addcmul(constant, d[:, axes], torch.addcmul(linear, d[:, axes], weights))
    if both_axes:  # all pairs of neighbours: [batch, taps * taps, size, size]
        positions = (positions[:, 0].unsqueeze(1) + positions[:, 1].unsqueeze(2)).flatten(1, 2)
        weights = (weights[:, 0].unsqueeze(1) * weights[:, 1].unsqueeze(2)).flatten(1, 2)
    else:
        positions, weights = torch.addcmul(positions[:, 0], first[:, 1:], steps[:, 1]), weights[:, 0]
    count = positions.shape[1]
    # float32 holds these whole numbers exactly, as they are below 2**24
    positions = positions.long().view(batch, 1, -1).expand(-1, channels, -1)
    values = images.flatten(2).float().gather(2, positions).view(batch, channels, count, size, size)
    total = (values * weights.unsqueeze(1)).sum(2)
    # fractions are cut off: without 1e-3, weights that sum to slightly less than 1 would darken areas of one colour
    total = total.add_(1e-3).clamp_(0, 255)
    return torch.where(inside, total, fill.view(3, 1, 1)).to(torch.uint8)


def erase(images: Tensor, boxes: Tensor, content: Tensor) -> Tensor:
    """Put `content`, broadcast to [batch, 3, H, W], inside boxes [batch, 4]: top, left, height, width."""
    top, left, height, width = boxes.view(-1, 4, 1, 1, 1).unbind(1)
    row = torch.arange(images.shape[2], device=images.device).view(-1, 1)
    column = torch.arange(images.shape[3], device=images.device)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    return torch.where(inside, content, images)
