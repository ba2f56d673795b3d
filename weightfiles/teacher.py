"""Read the teacher: its weights by name or from a file, under the names of its timm model."""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import models
from models import ModelSpec
from utils import UserError, first_line
from weightfiles import layouts
from weightfiles.guard import check_arrays
from weightfiles.hub import pretrained_file
from weightfiles.lazy import Weights, open_weights
from weightfiles.read import FLOATING, check_dtype, shapes_of

log = logging.getLogger(__name__)

LARGEST_PATCH = 64  # pixels on a side


def read_teacher(
    spec: ModelSpec, model: nn.Module, path: str | Path | None, model_key: str, options: str = "--pretrained"
) -> Weights:
    """Open the teacher's weights under timm's names, from `path` or else from the file that timm has for its name.

    `model` is the teacher, on any device. A file in timm's own layout or in one of weightfiles.layouts is read tensor by
    tensor, when asked for. Raises UserError if the weights cannot be found or are another model's; it names `options`
    followed by _model, _path or _kwargs.
    """
    option = f"{options}_path {path}"
    if path is None:
        path = file_of(spec.name, model, options)
        option = f"{options}_model {spec.name}: its file {path}"
    if str(path).endswith(".npz"):
        weights = _read_npz(path, spec, option)
    else:
        weights = open_weights(path, model_key)
        if _difference(weights.shapes, model):
            weights = _converted(weights, model, spec.name, path, option)
    if weights.whole:
        log.info("%s is read whole: %s", path, weights.whole)

    def read(key: str) -> Tensor:
        tensor = weights[key]
        check_dtype(key, tensor, option)
        return tensor

    return Weights(weights.shapes, read, weights.whole)


def file_of(name: str, model: nn.Module, options: str = "--pretrained") -> Path:
    """Find or download the weights that timm has for a name. UserError if there are none."""
    if name in models.VARIANTS:
        hint = f"give {options}_path FILE, or a timm name"
        raise UserError(f"{options}_model {name} is a shape without weights: {hint}")
    # said before the download, because without a network it takes minutes to fail
    log.info("reading the weights of %s through timm; without network, stop and give %s_path FILE", name, options)
    return pretrained_file(model, name, options)


def _kwargs_of(option: str) -> str:
    """Name the option of the constructor's arguments that goes with "--pretrained_path FILE" and the like."""
    return f"{option.partition('_')[0]}_kwargs"


def _converted(weights: Weights, model: nn.Module, name: str, path: str | Path, option: str) -> Weights:
    """Put weights of another layout under timm's names for this model."""
    _check_kernels(weights.shapes, option)
    try:
        found = layouts.to_timm(weights, model)
    except ValueError as error:
        raise UserError(f"{option} cannot be read as the weights of {name}: {error}") from error
    if found is None:
        return _by_timm(weights, model, name, path, option)
    if difference := _difference(found.weights.shapes, model):
        raise UserError(f"{option} ({found.layout} layout) {difference} of {name}; see {_kwargs_of(option)}")
    log.info("%s: %s layout; left out: %s", path, found.layout, ", ".join(found.unused) or "none")
    for remark in found.remarks:
        log.warning("%s: %s", path, remark)
    return found.weights


def _by_timm(weights: Weights, model: nn.Module, name: str, path: str | Path, option: str) -> Weights:
    """Let timm convert weights of its original release, or of another image or patch size."""
    family = models.family_of(model)
    converter = models.FAMILIES[family].converter if family else None
    try:
        tensors = converter(dict(weights), model) if converter else dict(weights)
        converted = Weights.in_memory(tensors, "timm converts its layout")
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        converted = weights  # of another layout or shape: how it differs says more than where the converter stopped
    difference = _difference(converted.shapes, model)
    if difference and not _is_known(converted, model):
        raise UserError(_unknown(weights, name, option))
    if difference:
        raise UserError(f"{option} {difference} of {name}; see {_kwargs_of(option)}")
    for key in {"patch_embed.proj.weight", "pos_embed"} & weights.shapes.keys() & converted.shapes.keys():
        # timm resamples these to the model's size: right for another image size, wrong for another model's file
        old, new = weights.shapes[key], converted.shapes[key]
        if len(old) == len(new) and old != new:
            log.warning("%s: timm made %s of %s %s: is it a file of %s?", path, list(new), key, list(old), name)
    return converted


def _is_known(weights: Weights, model: nn.Module) -> bool:
    """Tell whether most of the tensors have a counterpart in the model, whatever the numbers of their layers."""
    names = set(map(_pattern, model.state_dict()))
    return sum(_pattern(key) in names for key in weights) > len(weights) / 2


def _unknown(weights: Weights, name: str, option: str) -> str:
    """Say that a file is in no layout that its model can be read from, and which it is in or what its keys look like."""
    line = f"{option} has no layout that {name} is known in"
    if layout := layouts.recognize(weights):
        return f"{line}: it is a {layout.model} in {layout.library} layout"
    examples = list(dict.fromkeys(map(_pattern, weights)))[:5]
    known = ", ".join(("timm", "its original release", *layouts.LIBRARIES))
    return f"{line} ({known}): its keys look like {', '.join(examples)}"


def _pattern(key: str) -> str:
    """Put N for each number in a key that is no end of a word: blocks.7.norm1.bias becomes blocks.N.norm1.bias."""
    return re.sub(r"(?<![A-Za-z\d])\d+", "N", key)


def _read_npz(path: str | Path, spec: ModelSpec, option: str) -> Weights:
    """Read a ViT's weights from the `.npz` of its original release, by timm's own reader."""
    model = models.create(spec.name, spec.kwargs)  # timm's reader needs real tensors to copy into
    try:
        _check_kernels(check_arrays(path), option)
        with _ExactCopies() as copies:
            model.load_pretrained(path)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # on damaged bytes numpy and zlib raise almost anything
        raise UserError(f"{option} cannot be read as the weights of {spec.name}: {first_line(error)}") from error
    # timm leaves a head of another number of classes at its random values: it is not the file's
    filled = {key: tensor for key, tensor in model.state_dict().items() if tensor.data_ptr() in copies.filled}
    difference = _difference(shapes_of(filled), model)
    if difference:
        raise UserError(f"{option} {difference} of {spec.name}; see {_kwargs_of(option)}")
    return Weights.in_memory(filled, "timm reads it")


def _check_kernels(shapes: Mapping[str, tuple[int, ...]], option: str) -> None:
    """Refuse a patch kernel far larger than any model's: the time of timm's resizing grows with the square of its area."""
    for key, shape in shapes.items():
        sides = shape[:2] if key.endswith("/kernel") else shape[2:] if key.endswith(".weight") else ()
        if len(shape) == 4 and math.prod(sides) > LARGEST_PATCH**2:
            raise UserError(f"{option} has {key} {list(shape)}, a kernel larger than {LARGEST_PATCH} x {LARGEST_PATCH}")


class _ExactCopies(TorchFunctionMode):
    """Let timm's reader copy only arrays of a tensor's own shape and of floating point, and record which it fills.

    `copy_` alone spreads an array of one value over a whole tensor and converts any dtype. Of the 40 arrays of a ViT with
    2 layers, each cut to one value in turn, 26 would be accepted silently. With this class it is the head's bias alone,
    whose head timm then leaves out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.filled: set[int] = set()  # addresses of tensors

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ == "copy_":
            target, array = args
            if array.shape != target.shape or array.dtype not in FLOATING:
                raise ValueError(f"an array of {array.dtype} {list(array.shape)} stands for {list(target.shape)}")
            self.filled.add(target.data_ptr())
        return function(*args, **(kwargs or {}))


def _difference(in_file: Mapping[str, tuple], model: nn.Module) -> str | None:
    """Say how a file's tensors differ from the model's, apart from the head; None if they do not.

    The text goes between "FILE" and "of MODEL".
    """
    head = models.head_prefixes(model)
    expected = shapes_of(model.state_dict(), head)
    if not expected.keys() & in_file.keys():
        return f"has none of the tensors, but such as {next(iter(in_file), 'none')},"
    for key, shape in expected.items():
        if in_file.get(key) != shape:
            seen = f"has {key} {list(in_file[key])}" if key in in_file else f"has no {key}"
            return f"{seen}, unlike the {list(shape)}"
    extra = sorted(key for key in in_file if key not in expected and not key.startswith(head))
    return f"has {extra[0]}, which is no tensor" if extra else None
