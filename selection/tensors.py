"""Copy: make the student's tensors from slices of the teacher's, as planned. Also the scores that rank indices."""

import math
import warnings
import zlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from torch import Tensor

from selection.plan import Outline, Plan
from utils import Stream, UserError, derive_seed
from weightfiles.read import widened


def select(teacher: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Make the student's tensors as planned, contiguous: copies in the teacher's dtypes, what is computed in float32.

    Holds one teacher tensor at a time, so that `teacher` may read each from a file when asked for it.
    """
    tensors = {key: _student_tensor(teacher, plan, key) for key in plan.sources}
    # tensors that the teacher lacks get the dtype of the copies
    copies = (key for key, source in plan.sources.items() if source.key and not _computes(source.steps))
    dtype = next((tensors[key].dtype for key in copies if tensors[key].is_floating_point()), torch.float32)
    return {key: tensor if plan.sources[key].key else tensor.to(dtype) for key, tensor in tensors.items()}


def _student_tensor(teacher: Mapping[str, Tensor], plan: Plan, key: str) -> Tensor:
    source = plan.sources[key]
    whole = tensor = torch.empty(0) if source.key is None else teacher[source.key]
    if tensor.ndim == len(source.axes) - 2:
        tensor = tensor[..., None, None]  # a linear layer's weight, seen as that of the student's 1x1 convolution
    indices = [axis and torch.from_numpy(plan.axis_indices(axis)) for axis in source.axes]
    for axis, kept in enumerate(indices):
        if kept is not None and len(kept) < tensor.shape[axis]:
            tensor = tensor.index_select(axis, kept)  # the method itself: this slice of the teacher is the student's
    tensor = carry_out(source.steps, tensor, teacher, indices)
    if tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
        return tensor.clone(memory_format=torch.contiguous_format)  # the teacher's may be a view of its file
    return tensor.contiguous()


def carry_out(steps: Iterable[tuple], tensor: Tensor, teacher: Mapping[str, Tensor], indices: list) -> Tensor:
    """Apply steps of a plan to the slice of a teacher tensor at `indices`, in float32 if they compute anything.

    The products of a LayerScale of 1e-5 and a weight are below what float16 can hold.
    """
    if _computes(steps) and tensor.is_floating_point():
        tensor = widened(tensor)
    for name, *arguments in steps:
        tensor = STEPS[name](tensor, teacher, indices, *arguments)
    return tensor


def _computes(steps: Iterable[tuple]) -> bool:
    return any(name != "reshape" for name, *_ in steps)


# ---- steps after the slice: (tensor, teacher, indices of its axes, arguments) -> tensor ----


def _cut(tensor: Tensor, axis: int, kept: Tensor | None) -> Tensor:
    return tensor if kept is None else tensor.index_select(axis, kept)


def _times(tensor: Tensor, teacher: Mapping[str, Tensor], indices: list, key: str) -> Tensor:
    """Fold LayerScale into the projection before it: it scales the outputs, the first axis of weight and bias."""
    scale = _cut(teacher[key], 0, indices[0])
    return tensor * scale.view(-1, *[1] * (tensor.ndim - 1))


def _plus(tensor: Tensor, teacher: Mapping[str, Tensor], indices: list, key: str, first: int, count: int) -> Tensor:
    """Add to tokens [1, count, width] their rows of the position embedding."""
    rows = _cut(_cut(teacher[key][:, first : first + count], 1, indices[1]), 2, indices[2])
    return tensor + rows


def _positions(
    tensor: Tensor,
    teacher: Mapping[str, Tensor],
    indices: list,
    rows: list,
    first: dict,
    prefix: int,
    old: list,
    new: list,
) -> Tensor:
    """Make a position embedding [1, rows + patches, width]: rows for the student's tokens, then its grid of patches."""
    grid = resample_abs_pos_embed(tensor[:, prefix:], new, old, num_prefix_tokens=0)
    zero = torch.zeros_like(tensor[:, :1])
    token_rows = [zero if row is None else tensor[:, first[row[0]] + row[1]].unsqueeze(1) for row in rows]
    return torch.cat([*token_rows, grid], dim=1)


def _patch(tensor: Tensor, teacher: Mapping[str, Tensor], indices: list, size: list) -> Tensor:
    return resample_patch_embed(tensor, size)


def _window(tensor: Tensor, teacher: Mapping[str, Tensor], indices: list, old: list, new: list) -> Tensor:
    """Resize a table of relative positions [offsets, heads] to windows of `new` patches."""
    shape = (math.prod(2 * side - 1 for side in new), tensor.shape[1])
    with warnings.catch_warnings(action="ignore"):  # torch warns of how timm calls it
        return resize_rel_pos_bias_table(tensor, new, shape, old_window_size=old)


def _channels(tensor: Tensor, teacher: Mapping[str, Tensor], indices: list, count: int) -> Tensor:
    """Sum a kernel [width, channels, …] over channels for grey images, or repeat and scale it, as timm does.

    The values are those of timm.models.adapt_input_conv, which older versions have for 3 channels alone.
    """
    if count == 1:
        return tensor.sum(1, keepdim=True)
    old = tensor.shape[1]
    return tensor.repeat(1, -(-count // old), *[1] * (tensor.ndim - 2))[:, :count] * (old / count)


def _reshape(tensor: Tensor, teacher: Mapping[str, Tensor], indices: list, shape: list) -> Tensor:
    return tensor.reshape(shape)


def _gain(tensor: Tensor, teacher: Mapping[str, Tensor], indices: list, factor: float) -> Tensor:
    return tensor * factor


def _fill(tensor: Tensor, teacher: Mapping[str, Tensor], indices: list, value: float, shape: list) -> Tensor:
    return torch.full(shape, value)


def _noise(
    tensor: Tensor, teacher: Mapping[str, Tensor], indices: list, std: float, shape: list, seed: int, key: str
) -> Tensor:
    """Make tokens that differ from one another: equal ones would stay equal through all of training."""
    generator = np.random.RandomState(derive_seed(Stream.SLOTS, seed, zlib.crc32(key.encode())) % 2**32)
    return torch.from_numpy(generator.standard_normal(shape) * std).float()


STEPS = {
    "times": _times,
    "plus": _plus,
    "positions": _positions,
    "patch": _patch,
    "window": _window,
    "channels": _channels,
    "reshape": _reshape,
    "gain": _gain,
    "fill": _fill,
    "noise": _noise,
}


# ---- scores ----


def magnitudes(teacher: Mapping[str, Tensor], outline: Outline, order: int = 2) -> dict[str, np.ndarray]:
    """Score each index of each axis group: its norms of `order` 1 or 2, summed over all teacher tensors on the group.

    Returns group -> float64 [the teacher's size]. A projection is scored with the LayerScale that is folded into it.
    """
    scores = {name: np.zeros(size) for name, (size, _) in outline.sizes.items()}
    for source in outline.sources.values():
        if source.key is None:
            continue
        tensor = teacher[source.key].double()
        for name, *arguments in source.steps:
            if name == "times":
                tensor = _times(tensor, teacher, [None] * tensor.ndim, *arguments)
        axes = [axis or (size,) for axis, size in zip(source.axes, [*tensor.shape, 1, 1], strict=False)]
        names = [factor for axis in axes for factor in axis]
        sizes = [factor if isinstance(factor, int) else outline.sizes[factor][0] for factor in names]
        powers = tensor.reshape(sizes).abs() ** order
        for place, name in enumerate(names):
            if isinstance(name, str):
                others = [axis for axis in range(len(names)) if axis != place]
                scores[name] += ((powers.sum(others) if others else powers) ** (1 / order)).numpy()
        if not powers.isfinite().all():
            raise UserError(f"{source.key} of the teacher holds values that are not finite")
    return scores
