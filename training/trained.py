"""A trained model to take weights from: which model it is, and where its weights are. A run of main.py knows both."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import models
from models.pixels import MeanAndStd, mean_and_std
from options.training import plain, training_defaults
from training.checkpoint import CHECKPOINT_FORMAT, check_checkpoint, checkpoint_of
from utils import UserError
from weightfiles.lazy import find_file, library_files, read_mapped
from weightfiles.read import check_file


@dataclass(frozen=True)
class Trained:
    """A model and the file of its weights. What only a run of main.py knows is None for other files."""

    name: str | None  # None: nobody says
    kwargs: dict
    path: Path | None = None  # None: timm knows where
    classes: list[str] | int | None = None
    input_size: int | None = None
    imagenet: bool | None = None  # whether its images were normalized by ImageNet's mean and std
    exif: bool | None = None  # whether they were turned as their EXIF orientation says

    @property
    def channels(self) -> int:
        """How many channels the model's images have."""
        return self.kwargs.get("in_chans", 3)

    @property
    def mean_and_std(self) -> MeanAndStd | None:
        """By which a run's images were normalized."""
        return None if self.imagenet is None else mean_and_std(self.imagenet, self.channels)


def find_trained(name: str | None, kwargs: dict, location: str | None, key: str, options: str) -> Trained:
    """Find out which model `location` holds: a file of weights, or a run of main.py, which says it itself.

    A run is a checkpoint or the folder of one, where `key` picks the best of the weights that it names. UserError if
    there is no such file, or a run is of another model than `name` and `kwargs`; it names `options` followed by _model,
    _kwargs or _path.
    """
    if not location:
        return Trained(name, kwargs)
    try:
        path, state = _open(Path(location), key)
    except UserError as error:
        raise UserError(f"{options}_path {error}") from error
    if state is None:
        return Trained(name, kwargs, path)
    run = _read_run(path, state, f"{options}_path")
    if name and models.timm_arguments(name, {}) != models.timm_arguments(run.name, {}):
        raise UserError(f"{options}_model {name}, but {options}_path {path} is a checkpoint of {run.name}")
    _check_kwargs(run, kwargs, options)
    return run


def _open(path: Path, key: str) -> tuple[Path, dict | None]:
    """Return the file that `path` names or, in a folder, the best or else newest checkpoint; and its state if it is one.

    The state's tensors may be mapped: they are neither read nor checked here.
    """
    if library_files(path):
        return find_file(path), None
    path = checkpoint_of(path, key)
    check_file(path)
    if path.suffix not in (".pth", ".pt", ".bin"):
        return path, None
    state = read_mapped(path)
    return path, check_checkpoint(path, state) if state and state.get("format") == CHECKPOINT_FORMAT else None


def _read_run(path: Path, state: dict, option: str) -> Trained:
    """Read from a checkpoint of main.py what model it holds. UserError if that is damaged."""
    then, classes = training_defaults() | state["options"], state["data"].get("classes")
    name, kwargs, size = then["model"], then["model_kwargs"], then["input_size"]
    kinds = (name, str), (kwargs, dict), (size, int), (classes, int | list | None)
    if not all(isinstance(value, kind) for value, kind in kinds):
        raise UserError(f"{option} {path}: the options or classes in this checkpoint are damaged")
    if "img_size" not in kwargs and models.takes_image_size(models.create(name, kwargs, device="meta")):
        kwargs = kwargs | {"img_size": size}
    seen = bool(then["imagenet_default_mean_and_std"]), bool(then["exif"])
    return Trained(name, kwargs, path, classes, size, *seen)


def _check_kwargs(run: Trained, kwargs: dict, options: str) -> None:
    """UserError if arguments of a constructor contradict a run's, which come from JSON."""
    known = run.kwargs
    if run.classes is not None:
        known = known | {"num_classes": run.classes if isinstance(run.classes, int) else len(run.classes)}
    for key, value in plain(argparse.Namespace(**kwargs)).items():
        if known.get(key) != value:
            problem = f"is a checkpoint of a model with {key}={known[key]}" if key in known else f"has no {key}"
            raise UserError(f"{options}_kwargs {key}={value}, but {options}_path {run.path} {problem}")
