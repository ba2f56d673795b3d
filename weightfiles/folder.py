"""The folder of a model as libraries write it: which file has the weights, and what its config.json says of the model."""

import json
import operator
import os
import re
from collections.abc import Mapping
from pathlib import Path

from utils import UserError, first_line
from weightfiles.read import check_file

INDEX_SUFFIX = ".index.json"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# the files that libraries put into the folder of a model, in the order in which transformers looks for them
FOLDER_FILES = [f"{name}{suffix}" for name in (WEIGHTS, "pytorch_model.bin") for suffix in ("", INDEX_SUFFIX)]
LARGEST = 64 * 2**20  # bytes of a config.json; the names of 21,843 classes have one
MARK = "weight_selection"  # what config.json says to this project alone: checkpoint, sha256 of the weights, --exif


def library_files(folder: Path) -> list[Path]:
    """List the files of weights that libraries put into the folder of a model, the one to take first."""
    return [folder / name for name in FOLDER_FILES if os.path.isfile(folder / name)]


def find_file(path: str | Path, option: str = "") -> Path:
    """Return the file that a path names, which may be the folder of a model as libraries write it.

    Raises UserError, beginning with `option`, if there is none.
    """
    path = Path(path)
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        files = library_files(path)
        if not files:
            names = ", ".join(FOLDER_FILES)
            raise UserError(f"{option}{path} is a folder without {names}: name the file of weights in it")
        path = files[0]
    try:
        check_file(path)
    except UserError as error:
        raise UserError(f"{option}{error}") from error
    return path


def read_config(folder: Path) -> dict | None:
    """Read the config.json of a folder that timm can load; None if the folder has none. UserError if it is damaged."""
    file = folder / CONFIG
    try:
        content = _content(file) if os.path.isfile(file) else {}
        if "architecture" not in content:
            return None
        seen, arguments = content["pretrained_cfg"], dict(content.get("model_args") or {})
        channels, height, width = map(operator.index, seen["input_size"])
        if seen.get("fixed_input_size"):  # as timm does for what others have written
            arguments.setdefault("img_size", [height, width])
        if channels != 3:
            arguments.setdefault("in_chans", channels)
        names, count = content.get("label_names"), int(content["num_classes"])
        if names is not None and not (isinstance(names, list) and len(names) == count):
            raise ValueError(f"its label_names are not a list of {count} names")
        if not re.fullmatch(r"\w+", content["architecture"]):  # a name with a source would be looked up in the network
            raise ValueError(f"{content['architecture']} is not a name of timm")
        return content | {"model_args": arguments, "label_names": names and list(map(str, names))}
    except (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not describe a model ({type(error).__name__}: {error})") from error


def _content(file: Path) -> object:
    """Read a JSON file. OSError, ValueError or RecursionError if it cannot be read, or is far larger than a config.json."""
    if file.stat().st_size > LARGEST:
        raise ValueError(f"it is larger than {LARGEST >> 20} MiB")
    return json.loads(file.read_bytes())


def mark_of(config: Mapping) -> Mapping:
    """Return what export.py has written into a config.json for this project alone; {} if somebody else wrote it."""
    mark = config.get(MARK)
    return mark if isinstance(mark, dict) else {}


def settings_beside(path: Path) -> dict:
    """Return what transformers' config.json in the folder of a model says; {} if there is none. UserError if it is damaged."""
    file = path.parent / CONFIG
    if path.name not in FOLDER_FILES or not os.path.isfile(file):
        return {}
    try:
        content = _content(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} does not describe the model of {path.name}: {first_line(error)}") from error
    return content if isinstance(content, dict) and "model_type" in content else {}
