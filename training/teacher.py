"""The teacher of a distilled run: which model it is, where its weights are, and what has to agree with the run."""

import argparse
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import models
from models.build import check_forward
from models.fit import check_fit
from options import plain, training_defaults
from training import distributed
from training.checkpoint import (
    BEST_CHECKPOINTS,
    CHECKPOINT_FORMAT,
    check_checkpoint,
    newest_checkpoint,
    numbered_checkpoints,
)
from utils import UserError
from weightfiles.lazy import INDEX_SUFFIX, read_index
from weightfiles.read import check_file, check_finite, check_plain, read_file, unwrap
from weightfiles.teacher import file_of, read_teacher

log = logging.getLogger(__name__)


class Teacher:
    """A frozen model that takes images as the student's run normalizes them.

    `width` is the size of its outputs: classes or, if it has no head, pooled features. `source` is what has to be the
    same when a run is resumed: the sha256 of the file, the key of the weights in it, the model, and its arguments.
    """

    def __init__(self, model: nn.Module, width: int, source: dict, mean_and_std: tuple, given: tuple):
        """Freeze `model`, trained on images normalized by `mean_and_std`; it will get images normalized by `given`."""
        self.model, self.width, self.source = model.eval().requires_grad_(False), width, source
        self.scale = self.shift = None
        if tuple(map(tuple, mean_and_std)) != given:
            (mean, std), (given_mean, given_std) = (
                torch.tensor(each)[..., None, None] for each in (mean_and_std, given)
            )
            device = next(model.parameters()).device
            self.scale, self.shift = (given_std / std).to(device), ((given_mean - mean) / std).to(device)  # [3, 1, 1]

    @torch.no_grad()  # not inference mode: what it returns takes part in the student's backward pass
    def __call__(self, images: Tensor) -> Tensor:
        """Return the model's outputs [batch, width] for images [batch, 3, H, W]."""
        return self.model(images if self.scale is None else images * self.scale + self.shift)


def make_teacher(options: argparse.Namespace, classes: list[str] | int, device: torch.device) -> Teacher:
    """Read the teacher that the options name: for "logits" with a head, for "features" without.

    `classes` are the data's names of them, or how many there are. UserError in one line if the teacher does not take the
    run's images or, for "logits", has other classes.
    """
    named, num_classes = find_teacher(options), classes if isinstance(classes, int) else len(classes)
    wanted = f"--distillation {options.distillation} needs"
    if options.distillation == "features":
        num_classes, wanted = 0, f"{wanted} all of the teacher but its classifier"
    else:
        wanted = f"{wanted} a teacher with a classifier of the data's {num_classes} classes"
        if named.classes is not None:
            check_same_classes(named.classes, classes, f"--teacher_path {named.path}")
    model = models.create(named.name, {**named.kwargs, "num_classes": num_classes})
    tensors, path = read_tensors(named, model, options.teacher_key)
    check_finite(tensors, f"--teacher_path {path}")
    check_fit(tensors, model, f"{wanted}, but --teacher_path {path} does not fit {named.name}")
    model.load_state_dict(tensors)
    option = f"--teacher_model {named.name}"
    width = check_forward(model, option, options.input_size, num_classes or None, "--teacher_kwargs")
    model.to(device, memory_format=torch.channels_last if options.channels_last else torch.preserve_format)
    if options.compile:
        model.compile()  # without CUDA graphs, whose outputs the student's graphs would overwrite
    mean_and_std = named.mean_and_std or (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    log.info("teacher: %s from %s, for images of mean %s and standard deviation %s", named.name, path, *mean_and_std)
    source = {"model": named.name, "kwargs": named.kwargs, "key": options.teacher_key, "sha256": sha256_of(path)}
    given = models.MEAN_AND_STD[options.imagenet_default_mean_and_std]
    return Teacher(model, width, plain(argparse.Namespace(**source)), mean_and_std, given)


@dataclass(frozen=True)
class Named:
    """A teacher's model and where its weights are; more is known if they are in a checkpoint of main.py."""

    name: str
    kwargs: dict
    path: Path | None = None  # None: timm knows where
    state: dict | None = None  # the checkpoint
    classes: list[str] | int | None = None
    mean_and_std: tuple | None = None  # by which the images were normalized


def find_teacher(options: argparse.Namespace) -> Named:
    """Find out what the options say of the teacher. UserError if there is no such file or they contradict it."""
    name, kwargs = options.teacher_model, options.teacher_kwargs
    if "num_classes" in kwargs:
        raise UserError(
            f"--teacher_kwargs num_classes={kwargs['num_classes']}: the number of classes comes from the data"
        )
    if not options.teacher_path:
        return Named(name, kwargs)
    try:
        path, state = open_path(Path(options.teacher_path))
    except UserError as error:
        raise UserError(f"--teacher_path: {error}") from error
    if state is None:
        if not name:
            raise UserError(f"--teacher_path {path} is no checkpoint of main.py: name its model with --teacher_model")
        return Named(name, kwargs, path)
    then, classes = training_defaults() | state["options"], state["data"].get("classes")
    of_run = then["model_kwargs"]
    if not (isinstance(then["model"], str) and isinstance(of_run, dict) and isinstance(classes, int | list | None)):
        raise UserError(f"--teacher_path {path}: the options or classes in this checkpoint are damaged")
    if name and models.timm_arguments(name, {}) != models.timm_arguments(then["model"], {}):
        raise UserError(f"--teacher_model {name}, but --teacher_path {path} is a checkpoint of {then['model']}")
    if "img_size" not in of_run and models.takes_image_size(models.create(then["model"], of_run, device="meta")):
        of_run = of_run | {"img_size": then["input_size"]}
    for key, value in kwargs.items():
        if of_run.get(key) != value:
            problem = f"is a checkpoint of a model with {key}={of_run[key]}" if key in of_run else f"has no {key}"
            raise UserError(f"--teacher_kwargs {key}={value}, but --teacher_path {path} {problem}")
    mean_and_std = models.MEAN_AND_STD[bool(then["imagenet_default_mean_and_std"])]
    return Named(then["model"], of_run, path, state, classes, mean_and_std)


def open_path(path: Path) -> tuple[Path, dict | None]:
    """Return the file that `--teacher_path` names, or the best or else newest checkpoint in the folder that it names.

    Return also the training state in it if it is a checkpoint of main.py. UserError if it cannot be read.
    """
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        best = path / BEST_CHECKPOINTS["test_acc1"]
        if not best.exists():
            newest = newest_checkpoint(numbered_checkpoints(path))
            if newest is None:
                raise UserError(f"{path} has no checkpoint of main.py: wanted {best.name} or checkpoint-<epoch>.pth")
            return newest
        path = best
    check_file(path)
    if path.suffix not in (".pth", ".pt", ".bin"):
        return path, None
    state = read_file(path)
    return path, check_checkpoint(path, state) if state.get("format") == CHECKPOINT_FORMAT else None


def read_tensors(named: Named, model: nn.Module, key: str) -> tuple[dict[str, Tensor], Path]:
    """Read the teacher's tensors, without a head that `model` does not have; return them and their file."""
    path = named.path
    if path is None:
        with distributed.main_first():
            path = file_of(named.name, model, "--teacher")
    own = model.state_dict().keys()
    if named.state:
        tensors = unwrap(path, named.state, key)
        check_plain(path, tensors)
    else:
        tensors = read_teacher(models.ModelSpec(named.name, named.kwargs), model, path, key, "--teacher")
    left_out = () if model.num_classes else models.head_prefixes(model)
    return {name: tensors[name] for name in tensors if name in own or not name.startswith(left_out)}, path


def check_same_classes(theirs: list[str] | int, ours: list[str] | int, option: str) -> None:
    """UserError unless a run's classes are the data's: as many and, if both have names, the same in the same order."""
    counts = [each if isinstance(each, int) else len(each) for each in (theirs, ours)]
    if counts[0] != counts[1]:
        raise UserError(f"{option} has {counts[0]} classes, but the data has {counts[1]}")
    if not (isinstance(theirs, int) or isinstance(ours, int)):
        for number, (their, our) in enumerate(zip(theirs, ours, strict=True)):
            if their != our:
                raise UserError(f"{option}: its class {number} is {their}, but the data's is {our}")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file of weights; of an index and its files one after the other."""
    digest = hashlib.sha256()
    for each in [path, *(sorted(set(read_index(path).values())) if path.name.endswith(INDEX_SUFFIX) else ())]:
        with open(each, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
