"""Image sets from Hugging Face's package `datasets`, whose name our own module `datasets.py` takes.

Python finds a module by its name in `sys.modules`, and both want the entry `datasets`. The package looks itself up there
not only when it is imported but also when it reads or unpickles rows. So all of that happens inside `hugging_face()`.
"""

import importlib
import io
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from images.folders import announce_download, folder_meant
from images.images import Images
from images.opening import open_image
from utils import UserError, first_line, hint

PROJECT = Path(__file__).resolve().parents[1]
_package: ModuleType | None = None  # Hugging Face's, once it is imported


@contextmanager
def hugging_face() -> Iterator[ModuleType]:
    """Let `import datasets` mean Hugging Face's package inside, and our module again afterwards."""
    global _package
    ours, search_path = sys.modules.pop("datasets", None), sys.path
    sys.path = [folder for folder in search_path if Path(folder).resolve() != PROJECT]
    try:
        if _package is not None:
            sys.modules["datasets"] = _package  # imported before, with all its parts
        _package = importlib.import_module("datasets")
        yield _package
    finally:
        sys.path = search_path
        sys.modules.pop("datasets", None)
        if ours is not None:
            sys.modules["datasets"] = ours


class Rows:
    """The images of a Hugging Face set: `[i]` is a tuple of the opened image alone, not decoded yet."""

    def __init__(self, rows, column: str):
        self.rows, self.column = rows, column

    def __getitem__(self, index: int) -> tuple[Image.Image]:
        with hugging_face():
            stored = self.rows[index][self.column]  # the bytes of an image file, or else its path
        return (open_image(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]),)

    # a worker that is spawned has to unpickle the rows inside hugging_face(), hence bytes within the pickle

    def __getstate__(self) -> bytes:
        with hugging_face():
            return pickle.dumps((self.rows, self.column))

    def __setstate__(self, state: bytes) -> None:
        with hugging_face():
            self.rows, self.column = pickle.loads(state)


def load_hugging_face(name: str, cache_dir: str, split: str, input_key: str, target_key: str) -> Images:
    """Load a split of `hfds/NAME`, downloading it to `cache_dir` if needed; UserError for a missing or unusable column."""
    short = name.removeprefix("hfds/")
    place = Path(short)
    if short.startswith(("/", ".")) and not place.exists():  # the hub would be asked for a minute
        raise UserError(f"--data_set {name}: no folder {place}{folder_meant(place)}")
    with hugging_face() as package:
        announce_download(name, cache_dir)
        try:
            rows = package.load_dataset(short, split=split, cache_dir=cache_dir)
        except OSError as error:  # there is no such set, or the hub cannot be reached
            there = [folder.name.replace("___", "/") for folder in Path(cache_dir).glob("[!_]*/")]
            if nearest := hint(short, there):
                reason = f"could be neither read nor downloaded ({first_line(error)})"
                raise UserError(f"--data_set {name} {reason}{nearest}, in {cache_dir}") from error
            raise
        for option, column in (("input_key", input_key), ("target_key", target_key)):
            if column not in rows.column_names:
                has = ", ".join(rows.column_names)
                folder = "; for folders of image files take --data_set image_folder" if has == input_key else ""
                raise UserError(f"--data_set {name} has no column {column} for --{option}; it has {has}{folder}")
        class_names = getattr(rows.features[target_key], "names", None)
        rows = rows.cast_column(
            input_key, package.Image(decode=False)
        )  # Rows decodes, so that an error can name the image
        labels = np.asarray(rows.select_columns([target_key]).with_format("numpy")[:][target_key])
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"--data_set {name}: column {target_key} for --target_key holds no class indices")
    return Images(name, labels, source=Rows(rows, input_key), class_names=class_names)
