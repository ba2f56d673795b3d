"""A trained model to take weights from: which model it is, and where its weights are.

A run of main.py knows both, and so does a folder whose config.json names timm's architecture, as export.py writes it.
"""

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path

import models
from models.build import our_name
from models.pixels import MeanAndStd, mean_and_std
from options.training import plain, training_defaults
from training.checkpoint import CHECKPOINT_FORMAT, check_checkpoint, checkpoint_of
from utils import UserError, first_line
from weightfiles.folder import CONFIG, FOLDER_FILES, find_file, library_files, mark_of, read_config
from weightfiles.lazy import check_described, read_mapped
from weightfiles.read import check_file


@dataclass(frozen=True)
class Trained:
    """A model and the file of its weights. What nobody says is None."""

    name: str | None
    kwargs: dict
    path: Path | None = None  # None: timm knows where
    classes: list[str] | int | None = None
    input_size: int | None = None
    mean_and_std: MeanAndStd | None = None  # by which its images were normalized
    exif: bool | None = None  # whether they were turned as their EXIF orientation says

    @property
    def channels(self) -> int:
        """How many channels the model's images have."""
        return self.kwargs.get("in_chans", 3)

    @property
    def imagenet(self) -> bool | None:
        """The value of --imagenet_default_mean_and_std by which its images were normalized; None if none is it."""
        values = (value for value in (True, False) if self.mean_and_std == mean_and_std(value, self.channels))
        return next(values, None)


def find_trained(name: str | None, kwargs: dict, location: str | None, key: str, options: str) -> Trained:
    """Find out which model `location` holds: a file of weights, or what says it itself.

    A run of main.py does, by a checkpoint or its folder, where `key` picks the best of the weights that it names; and so
    does a folder with timm's config.json, or the file of weights in it if there is no `name`. UserError if there is no
    such file, or it is of another model than `name` and `kwargs`; it names `options` followed by _model, _kwargs or _path.
    """
    if not location:
        return Trained(name, kwargs)
    try:
        path, state = _open(Path(location), key)
        named_alone = path.name in FOLDER_FILES and (name is None or os.path.isdir(location))
        config = read_config(path.parent) if state is None and named_alone else None
        described = config and _described(path, config)
    except UserError as error:
        raise UserError(f"{options}_path {error}") from error
    if state is not None:
        run = _read_run(path, state, f"{options}_path")
        if name and models.timm_arguments(name, {}) != models.timm_arguments(run.name, {}):
            raise UserError(f"{options}_model {name}, but {options}_path {path} is a checkpoint of {run.name}")
        _check_kwargs(run, kwargs, options, "is a checkpoint of")
        return run
    if not described or (name or "").startswith("hf-hub:"):
        return Trained(name, kwargs, path)
    timm_name, given = models.timm_arguments(name, kwargs) if name else (described.name, kwargs)
    if timm_name.partition(".")[0] != described.name.partition(".")[0]:
        raise UserError(f"{options}_model {name}, but {options}_path {path} has a {CONFIG} of {described.name}")
    # what it does not list is timm's default, and timm resamples the weights for another image size
    checked = {
        key: value for key, value in given.items() if key in (*described.kwargs, "num_classes") and key != "img_size"
    }
    _check_kwargs(described, checked, options, f"has a {CONFIG} of")
    more = {key: value for key, value in given.items() if key != "num_classes"}
    return replace(described, kwargs=described.kwargs | more)


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
    seen = mean_and_std(bool(then["imagenet_default_mean_and_std"]), kwargs.get("in_chans", 3))
    return Trained(name, kwargs, path, classes, size, seen, bool(then["exif"]))


def _described(path: Path, config: dict) -> Trained:
    """Read from the config.json beside a file what model it holds. UserError if it does not describe one, or other weights."""
    check_described(path, config)
    seen, arguments = config["pretrained_cfg"], config["model_args"]
    try:
        name, arguments = models.timm_arguments(our_name(config["architecture"], arguments), arguments)
        normalized = tuple(tuple(map(float, seen[each])) for each in ("mean", "std")) if "mean" in seen else None
    except (LookupError, TypeError, UserError, ValueError) as error:
        raise UserError(f"{path.parent / CONFIG} does not describe a model: {first_line(error)}") from error
    classes = config["label_names"] or int(config["num_classes"])
    return Trained(name, arguments, path, classes, seen["input_size"][1], normalized, mark_of(config).get("exif"))


def _check_kwargs(known: Trained, kwargs: dict, options: str, relation: str) -> None:
    """UserError if arguments of a constructor contradict those that are known, which come from JSON."""
    arguments = known.kwargs
    if known.classes is not None:
        count = known.classes if isinstance(known.classes, int) else len(known.classes)
        arguments = arguments | {"num_classes": count}
    for key, value in plain(argparse.Namespace(**kwargs)).items():
        if arguments.get(key) != value:
            problem = f"{relation} a model with {key}={arguments[key]}" if key in arguments else f"has no {key}"
            raise UserError(f"{options}_kwargs {key}={value}, but {options}_path {known.path} {problem}")
