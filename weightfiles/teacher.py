"""Read the teacher: its weights by name or from a file, under the names of its timm model."""

import logging
from pathlib import Path

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import models
from models import ModelSpec
from utils import UserError, first_line
from weightfiles.conversions import check_kernels
from weightfiles.folder import find_file
from weightfiles.guard import check_arrays
from weightfiles.hub import pretrained_file
from weightfiles.lazy import Weights, open_file
from weightfiles.read import FLOATING, check_dtype
from weightfiles.reading import ANY_PART, Part, Reading, Wanted, log_reading
from weightfiles.search import find

log = logging.getLogger(__name__)


def read_teacher(
    spec: ModelSpec, model: nn.Module, path: str | Path | None, part: Part = ANY_PART, options: str = "--pretrained"
) -> Weights:
    """Open the teacher's weights under timm's names, from `path` or else from the file that timm has for its name.

    `model` is the teacher, on any device. A file in timm's own layout is read tensor by tensor, when asked for. Raises
    UserError if the weights cannot be found or are another model's; it names `options` followed by _model, _path or
    _kwargs.
    """
    option = f"{options}_path {path}"
    if path is None:
        path = file_of(spec.name, model, options)
        option = f"{options}_model {spec.name}: its file {path}"
    path = find_file(path)
    pick = "--model_prefix" if options == "--pretrained" else f"{options}_key"
    wanted = Wanted(model, spec.name, option, f"{options}_kwargs", pick)
    reading = _read_npz(path, spec, wanted) if path.suffix == ".npz" else find(path, open_file(path), wanted, part)
    log_reading(reading, wanted, path)

    def read(key: str) -> Tensor:
        tensor = reading.weights[key]
        check_dtype(key, tensor, option)
        return tensor

    return Weights(reading.weights.shapes, read, reading.weights.whole)


def file_of(name: str, model: nn.Module, options: str = "--pretrained") -> Path:
    """Find or download the weights that timm has for a name. UserError if there are none."""
    if name in models.VARIANTS:
        hint = f"give {options}_path FILE, or a timm name"
        raise UserError(f"{options}_model {name} is a shape without weights: {hint}")
    # said before the download, because without a network it takes minutes to fail
    log.info("reading the weights of %s through timm; without network, stop and give %s_path FILE", name, options)
    return pretrained_file(model, name, options)


def _read_npz(path: Path, spec: ModelSpec, wanted: Wanted) -> Reading:
    """Read a ViT's weights from the `.npz` of its original release, by timm's own reader."""
    model = models.create(spec.name, spec.kwargs)  # timm's reader needs real tensors to copy into
    try:
        check_kernels(check_arrays(path), wanted.option)
        with _ExactCopies() as copies:
            model.load_pretrained(path)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # on damaged bytes numpy and zlib raise almost anything
        raise UserError(f"{wanted.option} cannot be read as the weights of {spec.name}: {first_line(error)}") from error
    # timm leaves a head of another number of classes at its random values: it is not the file's
    filled = {key: tensor for key, tensor in model.state_dict().items() if tensor.data_ptr() in copies.filled}
    reading = Reading(Weights.in_memory(filled, "timm reads it"), "", "original .npz", [])
    if misfit := reading.misfit(wanted):
        raise UserError(f"{wanted.option} {misfit}")
    return reading


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
