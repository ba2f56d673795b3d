"""The teacher: its weights by name or from a file, as the tensors of its timm model."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from timm.models import convnext, eva, mlp_mixer, swin_transformer, vision_transformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import models
from utils import UserError, first_line
from weightfiles.guard import check_arrays
from weightfiles.hub import pretrained_file
from weightfiles.lazy import Weights, open_weights
from weightfiles.read import FLOATING, check_dtype, shapes_of

log = logging.getLogger(__name__)

LARGEST_PATCH = 64  # pixels on a side
# timm's readers of released files in other layouts
CONVERTERS = {
    "vit": vision_transformer.checkpoint_filter_fn,
    "convnext": convnext.checkpoint_filter_fn,
    "eva": eva.checkpoint_filter_fn,
    "swin": swin_transformer.checkpoint_filter_fn,
    "mixer": mlp_mixer.checkpoint_filter_fn,
}


def read_teacher(name: str, kwargs: dict, model: nn.Module, path: str | None, model_key: str) -> Weights:
    """The teacher's weights by timm's names, from `path`, else from the file that timm knows by `name`.

    Each tensor is read when it is asked for, if the file is laid out as timm does it. `model` is the teacher, on any
    device. Raises UserError for weights that cannot be had, and a file that is not this teacher's.
    """
    option = f"--pretrained_path {path}"
    if path is None:
        if name in models.VARIANTS:
            raise UserError(
                f"--pretrained_model {name} is a shape without weights: give --pretrained_path FILE, or a timm name"
            )
        log.info("reading the weights of %s through timm; without network, stop and give --pretrained_path FILE", name)
        path = pretrained_file(model, name)
        option = f"--pretrained_model {name}: its file {path}"
    if str(path).endswith(".npz"):
        weights = _read_npz(path, name, kwargs, option)
    else:
        weights = open_weights(path, model_key)
        if _difference(weights.shapes, model) is not None:
            weights = _converted(weights, model, name, path, option)
    if weights.whole:
        log.info("%s is read whole: %s", path, weights.whole)

    def read(key: str) -> Tensor:
        tensor = weights[key]
        check_dtype(key, tensor, option)
        return tensor

    return Weights(weights.shapes, read, weights.whole)


def _converted(weights: Weights, model: nn.Module, name: str, path: str | Path, option: str) -> Weights:
    """Weights of another layout as timm reads them for this model."""
    _check_kernels(weights.shapes, option)
    converter = CONVERTERS.get(models.family_of(model), lambda tensors, model: tensors)
    try:
        converted = Weights.in_memory(converter(dict(weights), model), "timm converts its layout")
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{option} has no layout that {name} is known in ({first_line(error)})") from error
    difference = _difference(converted.shapes, model)
    if difference:
        raise UserError(f"{option} {difference} of {name}; see --pretrained_kwargs")
    for key in {"patch_embed.proj.weight", "pos_embed"} & weights.shapes.keys() & converted.shapes.keys():
        had, has = weights.shapes[key], converted.shapes[key]
        if len(had) == len(has) and had != has:
            log.warning("%s: timm made %s of %s %s: is it a file of %s?", path, list(has), key, list(had), name)
    return converted


def _read_npz(path: str | Path, name: str, kwargs: dict, option: str) -> Weights:
    """A ViT's weights from the `.npz` of its original release, by timm's own reader."""
    model = models.create(name, kwargs)  # timm's reader needs real tensors to copy into
    try:
        _check_kernels(check_arrays(path), option)
        with _ExactCopies() as copies:
            model.load_pretrained(path)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # on damaged bytes numpy and zlib raise almost anything
        raise UserError(f"{option} cannot be read as the weights of {name}: {first_line(error)}") from error
    # the head stays as it was made where the file has one of other classes
    filled = {key: tensor for key, tensor in model.state_dict().items() if tensor.data_ptr() in copies.filled}
    difference = _difference(shapes_of(filled), model)
    if difference:
        raise UserError(f"{option} {difference} of {name}; see --pretrained_kwargs")
    return Weights.in_memory(filled, "timm reads it")


def _check_kernels(shapes: Mapping[str, tuple[int, ...]], option: str) -> None:
    """UserError for a kernel of patches much larger than any model's: timm's resizing grows with the square of its area."""
    for key, shape in shapes.items():
        sides = shape[:2] if key.endswith("/kernel") else shape[2:] if key.endswith(".weight") else ()
        if len(shape) == 4 and math.prod(sides) > LARGEST_PATCH**2:
            raise UserError(f"{option} has {key} {list(shape)}, a kernel larger than {LARGEST_PATCH} x {LARGEST_PATCH}")


class _ExactCopies(TorchFunctionMode):
    """Refuses what timm's reader would spread over, or convert to, the model's tensor: ValueError. Notes what it fills."""

    def __init__(self) -> None:
        super().__init__()
        self.filled = set()  # addresses

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ == "copy_":
            target, array = args
            if array.shape != target.shape or array.dtype not in FLOATING:
                raise ValueError(f"an array of {array.dtype} {list(array.shape)} stands for {list(target.shape)}")
            self.filled.add(target.data_ptr())
        return function(*args, **(kwargs or {}))


def _difference(found: Mapping[str, tuple], model: nn.Module) -> str | None:
    """How a file's tensors differ from those of the model, the head apart, before the words "of MODEL"; None if not."""
    head = models.head_prefixes(model)
    expected = shapes_of(model.state_dict(), head)
    if not expected.keys() & found.keys():
        return f"has none of the tensors, but such as {next(iter(found), 'none')},"
    for key, shape in expected.items():
        if found.get(key) != shape:
            seen = f"has {key} {list(found[key])}" if key in found else f"has no {key}"
            return f"{seen}, unlike the {list(shape)}"
    extra = sorted(key for key in found if key not in expected and not key.startswith(head))
    return f"has {extra[0]}, which is no tensor" if extra else None
