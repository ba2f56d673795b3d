"""Read weight files from anywhere without running code from them."""

import contextlib
import io
import mmap
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from utils import UserError, first_line
from weightfiles.guard import check_archive, check_content, check_old_format, check_pickle

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WEIGHT_SUFFIXES = (".pth", ".pt", ".safetensors")


def read_weights(path: str | Path, model_key: str = "model|module|state_dict", prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` file or of anything `torch.save` wrote, by key, on the CPU.

    A file may nest its weights, as a training checkpoint does: `model_key` lists the names to look for, separated by
    "|", and the first one found counts. A single name must be there. `prefix` and DDP's "module." are removed from the
    keys. Raises UserError with the path and the reason.
    """
    path = Path(path)
    content = unwrap(path, read_file(path), model_key, prefix)
    check_plain(path, content)
    return content


def unwrap(path: Path, content: Mapping, model_key: str, prefix: str = "") -> dict:
    """Pick the weights from the content of the file `path`, as `read_weights` says; its values need not be tensors."""
    keys = model_key.split("|")
    wrapping = next((key for key in keys if isinstance(content.get(key), Mapping)), None)
    if wrapping:
        content = content[wrapping]
    elif len(keys) == 1:
        raise UserError(
            f"{path} has no weights under {model_key} (--model_key, --teacher_key); its keys: {_some(content)}"
        )
    for start in ("module.", prefix):
        if start and content and all(isinstance(key, str) and key.startswith(start) for key in content):
            content = {key[len(start) :]: value for key, value in content.items()}
        elif start and start == prefix:
            raise UserError(f"{path}: not every key begins with --model_prefix {prefix}; its keys: {_some(content)}")
    if not content:
        raise UserError(f"{path} is not a state dict of tensors: it is empty; name the part to read with --model_key")
    return dict(content)


def shapes_of(tensors: Mapping[str, Tensor], left_out: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor whose name does not begin with `left_out`."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items() if not key.startswith(left_out)}


def check_plain(path: Path, content: Mapping) -> None:
    """Raise UserError naming the first item in a file that is not a tensor with a string as its key."""
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            what = f"{_shown(key)} is a {type(value).__name__}"
            raise UserError(f"{path} is not a state dict of tensors: {what}; name the part to read with --model_key")


def read_file(path: Path) -> Mapping:
    """Read the mapping that a weight file holds; UserError if it is not a weight file."""
    check_file(path)
    with reading(path):
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if is_archive(path):
            _test_archive(path)
            return unpickle(path, map_location="cpu")
        return _read_old(path)


def check_file(path: Path) -> None:
    """Raise UserError unless `path` is a file and not empty."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def reading(path: Path, part: str = "") -> Iterator[None]:
    """Turn any error while reading into a UserError that names the file, and the `part` of it."""
    try:
        yield
    except (MemoryError, UserError):
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {_refusal(path, error)}") from error
    except (
        Exception
    ) as error:  # damaged bytes make the readers raise almost anything, IndexError and AttributeError too
        # torch's longer messages advise to load the file with weights_only=False
        reason = "it is damaged, or no such file" if "torch.load" in str(error) else first_line(error)
        raise UserError(f"{path} cannot be read as weights: {f'{part}: ' * bool(part)}{reason}") from error


def unpickle(path: Path, **options) -> Mapping:
    """Load the mapping that `torch.save` wrote, with `options` of `torch.load`, without running code from the file."""
    # torch's warnings guess what is wrong with a file; `reading` reports it
    with warnings.catch_warnings(action="ignore"):
        content = torch.load(path, weights_only=True, **options)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    check_content(content, path.stat().st_size)
    return content


def is_archive(path: Path) -> bool:
    """Whether torch.load takes the file for a zip archive. If not, it can only be torch's old format."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _test_archive(path: Path) -> None:
    """ValueError if a zip archive does not match its own checksums: torch.load does not compare them."""
    with open_archive(path)[0] as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"its part {damaged} does not match its checksum")


def open_archive(path: Path) -> tuple[zipfile.ZipFile, list[list]]:
    """An archive of torch.save with its directory and pickle checked, and the ids of the storages that it asks for.

    Raises ValueError, UnpicklingError or zipfile's own errors. The archive stays open.
    """
    archive, asked = zipfile.ZipFile(path), []
    check_archive(archive, path.stat().st_size)
    names = archive.namelist()
    if len({name.partition("/")[0] for name in names}) > 1:
        raise ValueError("it holds more than one folder")
    for name in names:
        if name.endswith("/data.pkl"):
            asked += check_pickle(io.BytesIO(archive.read(name)))
    return archive, asked


def _read_old(path: Path) -> Mapping:
    """Read a file of torch's old format: pickles followed by the values, without checksums."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        count = check_old_format(mapped, len(mapped))
    storages = []

    def noted(storage: torch.UntypedStorage, _: str) -> torch.UntypedStorage:
        storages.append(storage)
        return storage

    content = unpickle(path, map_location=noted)
    if len(storages) != count:
        # torch would leave the others uninitialized
        raise ValueError(f"it has values for {count} of {len(storages)} storages")
    return content


def _refusal(path: Path, error: Exception) -> str:
    """Say in one line why torch's restricted unpickler refused a file."""
    forbidden = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
    if forbidden and forbidden[1].startswith("torch."):
        return f"it holds more than plain tensors ({forbidden[1]})"
    if forbidden:
        return f"it is a pickle that would run code ({forbidden[1]}), not plain tensors"
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    return "it is a web page" if start[:1] == b"<" else "it is not a file of weights, or damaged"


def _some(keys: Mapping) -> str:
    """The first few keys for an error line."""
    return ", ".join(map(_shown, list(keys)[:5])) + (", …" if len(keys) > 5 else "")


def _shown(key: object) -> str:
    """A key for an error line; only its type if it is not a string."""
    return key if isinstance(key, str) else f"a {type(key).__name__}"


def check_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise UserError naming the first tensor that is not floating point or holds NaN or infinity."""
    for key, tensor in tensors.items():
        check_dtype(key, tensor, source)
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {key} holds values that are not finite")


def check_dtype(key: str, tensor: Tensor, source: str | Path) -> None:
    """Raise UserError if a tensor is not floating point; counts of batches may be int64."""
    if tensor.dtype not in FLOATING and not (key.endswith("num_batches_tracked") and tensor.dtype == torch.int64):
        raise UserError(
            f"{source}: {key} has dtype {str(tensor.dtype).removeprefix('torch.')}, expected floating point"
        )
