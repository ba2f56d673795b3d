"""Initialization files: weight_selection.py writes them, with a .json beside them, and --initialize reads them."""

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from files import InUse, Lock, check_creatable, read_text, write_together
from models import family_of
from utils import UserError, first_line, json_lines
from weightfiles.folder import find_file, library_files
from weightfiles.lazy import open_file, sha256_of
from weightfiles.read import WEIGHT_SUFFIXES, check_finite, format_of
from weightfiles.reading import ANY_PART, Part, Wanted, log_reading
from weightfiles.search import find

INITIALIZATION_FORMAT = "weight-selection initialization 1"
OTHER_SUFFIXES = (".bin", ".ckpt", ".npz", ".tar", ".json")  # of files, too, so not a folder's name
LARGEST = 64 * 2**20  # bytes of a description; those of the largest pairs have a few million
LARGEST_IN_CHECKPOINT = 10**5  # characters of the parts that go into each checkpoint of a run
WAIT_SECONDS = 60.0  # for another process that writes the same file


def output_path(output_dir: str, family: str) -> Path:
    """Name the file to write: `output_dir` if it has a suffix of weights, else <family>.pth in it.

    Raises UserError, before the work is done, if the file cannot be written there.
    """
    path = Path(output_dir)
    if path.suffix not in WEIGHT_SUFFIXES:
        if path.suffix.lower() in (*WEIGHT_SUFFIXES, *OTHER_SUFFIXES):
            raise UserError(f"--output_dir {path}: wanted a folder, or a file ending in {', '.join(WEIGHT_SUFFIXES)}")
        path = path / f"{family}.pth"
    elif os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        raise UserError(f"--output_dir {path} is a folder named like a file; name the file in it")
    check_creatable(path, f"--output_dir {output_dir} cannot be made")
    return path


def check_replaceable(path: Path) -> None:
    """Raise UserError if writing an initialization file to `path` would destroy anything but an initialization file."""
    neighbours = [path, *(path.with_suffix(suffix) for suffix in WEIGHT_SUFFIXES if suffix != path.suffix)]
    in_the_way = [file for file in [*neighbours, path.with_suffix(".json")] if os.path.lexists(file)]
    if in_the_way and (read_description(path) is None or any(os.path.lexists(file) for file in neighbours[1:])):
        raise UserError(
            f"--output_dir: {in_the_way[0]} is there and would be lost or left without its .json: name another file"
        )


def write_initialization(path: Path, tensors: Mapping[str, Tensor], description: dict) -> str:
    """Write the weights to `path` and `description` to the `.json` beside it; return the weights' sha256.

    If one cannot be written, both stay as they were. A crash between the two renames leaves a pair that readers refuse
    and that a second call may replace. `left_out` in the description lists the keys that are left to random init; a
    `.safetensors` file holds that list too. Of two processes that write the same file, one waits for the other. UserError
    as `check_replaceable` says: what is there may have changed since the work began.
    """
    if path.suffix == ".safetensors":
        left_out = description.get("left_out")
        metadata = {"format": "pt"} | ({"left_out": json.dumps(left_out)} if left_out else {})
        weights = safetensors.torch.save(dict(tensors), metadata=metadata)
    else:
        buffer = io.BytesIO()
        torch.save(dict(tensors), buffer)
        weights = buffer.getvalue()
    sha256 = hashlib.sha256(weights).hexdigest()
    text = json_lines({"format": INITIALIZATION_FORMAT, "sha256": sha256, **description}, levels=3) + "\n"
    with _alone(path):
        check_replaceable(path)
        write_together({path.with_suffix(".json"): text.encode(), path: weights})
    return sha256


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from writing an initialization file of this name; wait for one that does."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            lock = Lock(path.with_name(f".{path.stem}.lock"))  # .pth and .safetensors share one .json
            break
        except InUse as holder:
            if time.monotonic() > end:
                raise UserError(f"{path} is being written by another process ({holder})") from holder
            time.sleep(0.05)
        except OSError as error:
            raise UserError(f"{path} could not be written ({first_line(error)})") from error
    try:
        yield
    finally:
        lock.remove()


def read_description(path: Path) -> dict | None:
    """Read the `.json` beside an initialization file; None if weight_selection.py did not write one.

    UserError if it is far larger than any that weight_selection.py writes.
    """
    file = path.with_suffix(".json")
    try:
        if file.stat().st_size > LARGEST:
            raise UserError(f"{file} is larger than any description of weights: move it away")
        content = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError):
        return None
    if isinstance(content, dict) and content.get("format") == INITIALIZATION_FORMAT:
        return content
    return None


def find_initialization(location: str, family: str | None) -> Path:
    """Return the file that `--initialize` names; in a folder the one made for `family`, or a library's file of a model."""
    path = Path(location)
    if not os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        return path
    try:
        files = sorted(path / name for name in os.listdir(path) if Path(name).suffix in WEIGHT_SUFFIXES)
    except OSError as error:
        raise UserError(f"--initialize {path} cannot be read: {error.strerror}") from error
    fitting = [file for file in files if (read_description(file) or {}).get("family") == family]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and library_files(path):
        return find_file(path)
    names = ", ".join(file.name for file in fitting or files) or "no weights at all"
    problem = "several files" if fitting else "no file"
    raise UserError(
        f"--initialize {path}: the folder has {problem} made for the family {family} ({names}); name the file"
    )


def read_initialization(
    location: str, model: nn.Module, name: str, part: Part = ANY_PART, of_any_size: frozenset[str] = frozenset()
) -> tuple[dict[str, Tensor], dict]:
    """Read the model's weights from what `--initialize` names, and their origin: path, sha256, and more from the `.json`.

    `name` is that of --model. Tensors `of_any_size` may have another shape than the model's. The origin's `left_out` lists
    the keys that may be missing: those that the `.json` names, or else the safetensors metadata. Raises UserError if the
    file is made for a model of another family, does not fit, does not match its `.json`, or holds values that are not
    finite.
    """
    family = family_of(model)
    path = find_initialization(location, family)
    option = f"--initialize {path}"
    description = read_description(path) or {}
    known = {key: description.get(key) for key in ("family", "student", "teacher", "choices")}
    if not _is_plain(known) or len(json.dumps(known)) > LARGEST_IN_CHECKPOINT:
        raise UserError(f"{option}: {path.stem}.json holds what weight_selection.py does not write: make it again")
    if known["family"] not in (None, family):
        student = known["student"] if isinstance(known["student"], dict) else {}
        raise UserError(f"{option} was made for {student.get('model', known['family'])}, but --model is {name}")
    weights = open_file(path)
    left_out = _left_out(path, description)
    wanted = Wanted(model, name, option, "--model_kwargs", of_any_size=of_any_size, left_out=frozenset(left_out))
    reading = find(path, weights, wanted, part)
    tensors = dict(reading.weights)
    check_finite(tensors, option)
    sha256 = sha256_of(path)
    if description and description.get("sha256") != sha256:
        raise UserError(f"{option} is not the file that {path.stem}.json describes (sha256 differs): make it again")
    log_reading(reading, wanted, path)
    return tensors, {"path": str(path), "sha256": sha256, **known, "left_out": left_out}


def _left_out(path: Path, description: Mapping) -> list[str]:
    """Return the keys that are left out of a file on purpose, by its `.json` or else by its safetensors metadata."""
    where, left_out = f"{path.stem}.json", description.get("left_out", [])
    if not description and not path.name.endswith(".json") and format_of(path) == "safetensors":
        where = "its metadata"
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("left_out", "[]")
        try:
            left_out = json.loads(text)
        except (ValueError, RecursionError):
            left_out = None
    if not (isinstance(left_out, list) and all(isinstance(key, str) for key in left_out)):
        raise UserError(f"--initialize {path}: {where} holds what weight_selection.py does not write: make it again")
    return left_out


def _is_plain(value: object, depth: int = 8) -> bool:
    """Whether a JSON value can go into a checkpoint: not deeply nested, no number beyond 64 bits."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(each, depth - 1) for each in inner)
    return not isinstance(value, int) or abs(value) < 2**63
