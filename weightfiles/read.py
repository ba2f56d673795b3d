"""Read weight files from anywhere without running code from them."""

import contextlib
import io
import json
import mmap
import os
import pickle
import re
import shlex
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from utils import UserError, first_line
from weightfiles.guard import check_archive, check_content, check_old_format, check_pickle
from weightfiles.harmless import STAND_INS

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WEIGHT_SUFFIXES = (".pth", ".pt", ".safetensors")
LFS_BYTES = 200  # more than a pointer of Git LFS has


def shapes_of(tensors: Mapping[str, Tensor], left_out: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor whose name does not begin with `left_out`."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items() if not key.startswith(left_out)}


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor to compute with: in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def flatten(content: Mapping) -> dict[str, Tensor]:
    """Return the tensors of nested mappings under their keys joined by dots; leave out what is no tensor under a string.

    Raises ValueError if two tensors have the same joined keys.
    """
    tensors = {}

    def add(prefix: str, mapping: Mapping) -> None:
        for key, value in mapping.items():
            name = f"{prefix}{key}"
            if isinstance(key, str) and isinstance(value, Mapping):
                add(f"{name}.", value)
            elif isinstance(key, str) and isinstance(value, Tensor):
                if name in tensors:
                    raise ValueError(f"it has two tensors {name}")
                tensors[name] = value

    add("", content)
    return tensors


def read_file(path: Path) -> Mapping:
    """Read the mapping that a weight file holds, whole; UserError if it is not a weight file."""
    check_file(path)
    with reading(path):
        match format_of(path):
            case "safetensors":
                return safetensors.torch.load_file(path)
            case "archive":
                _test_archive(path)
                return unpickle(path, map_location="cpu")
            case _:
                return _read_old(path)


def check_file(path: Path) -> None:
    """Raise UserError unless `path` is a file that has content of its own."""
    try:
        # unlike Path.is_file, os.stat tells a missing file from one that may not be reached
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path} is not a file")
        with open(path, "rb") as file:
            start = file.read(LFS_BYTES)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise UserError(f"{path} is empty")
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        size = re.search(rb"^size (\d+)$", start, re.MULTILINE)
        what = f"the file of {int(size[1]):,} bytes" if size else "the file"
        raise UserError(
            f"{path} is a pointer of Git LFS, not {what} that it stands for: run `git lfs pull` in its folder"
        )


@contextlib.contextmanager
def reading(path: Path, part: str = "") -> Iterator[None]:
    """Turn any error while reading into a UserError that names the file, and the `part` of it."""
    try:
        yield
    except (MemoryError, UserError):
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {_refusal(path, error)}") from error
    except Exception as error:  # damaged bytes make readers raise almost anything, IndexError and AttributeError too
        # torch's longer messages advise to load the file with weights_only=False
        reason = "it is damaged, or no such file" if "torch.load" in str(error) else first_line(error)
        if "header length" in reason or "not fully covered" in reason:  # safetensors' words
            reason = f"its size is not what its header says, as after half a download ({reason})"
        raise UserError(f"{path} cannot be read as weights: {f'{part}: ' * bool(part)}{reason}") from error


def unpickle(path: Path, *, map_location: str | Callable, mmap: bool = False) -> Mapping:
    """Load the mapping that `torch.save` wrote, as `torch.load` does, without running code from the file."""
    stand_ins = [(kind, name) for name, kind in STAND_INS.items()]
    with contextlib.ExitStack() as stack:
        # torch's warnings guess what is wrong with a file; `reading` reports it
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(torch.serialization.safe_globals(stand_ins))
        # by its path alone torch maps a file, and takes one for another format if it ends in .safetensors
        file = path if mmap else stack.enter_context(open(path, "rb"))
        content = torch.load(file, map_location=map_location, mmap=mmap, weights_only=True)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    check_content(content, path.stat().st_size)
    return content


def format_of(path: Path) -> str:
    """Tell by a file's first bytes, whatever its name, what it can only be: "safetensors", "archive" or "old" of torch.save."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(b"PK\x03\x04"):
        return "archive"
    return "safetensors" if start[8:] == b"{" else "old"  # a length in 8 bytes, then a JSON object


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
    try:
        archive, asked = zipfile.ZipFile(path), []
    except zipfile.BadZipFile as error:
        raise ValueError(f"its end is missing, as after half a download ({first_line(error)})") from error
    check_archive(archive, path.stat().st_size)
    names = archive.namelist()
    if names and all(name.endswith(".npy") for name in names):
        raise ValueError("it is an archive of numpy's arrays, whose name must end in .npz")
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError("it is a program of TorchScript; save the state dict of its module instead")
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
    if forbidden and forbidden[1].startswith(("torch._utils.", "torch.Tensor")):
        return f"it holds more than plain tensors ({forbidden[1]})"
    if forbidden:
        return (
            f"it holds a {forbidden[1]}, which is neither a tensor nor known to be harmless: reading it could run code; "
            f"if you trust the file, save its weights alone: {_weights_alone(path)}"
        )
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    return "it is a web page" if start[:1] == b"<" else "it is not a file of weights, or damaged"


def _weights_alone(path: Path) -> str:
    """The command that reads a file with the code in it, and writes the tensors in it to another file beside it."""
    source, target = json.dumps(str(path)), json.dumps(str(path.with_name(f"{path.stem}-weights.pth")))
    code = (
        "import torch; f = lambda x: x if torch.is_tensor(x) else {k: f(v) for k, v in (x.state_dict() if "
        'hasattr(x, "state_dict") else x).items() if torch.is_tensor(v) or hasattr(v, "state_dict") or hasattr(v, "items")}; '
        f'torch.save(f(torch.load({source}, "cpu", weights_only=False)), {target})'
    )
    return f"python -c {shlex.quote(code)}"


def shown_keys(keys: Iterable[str]) -> str:
    """A few keys for an error line, from the first to the last."""
    keys = list(keys)
    few = keys if len(keys) <= 4 else [keys[0], keys[len(keys) // 3], keys[2 * len(keys) // 3], keys[-1]]
    return ", ".join(few) + ", …" * (len(keys) > len(few))


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
