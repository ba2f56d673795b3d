"""The teacher of a distilled run: which model it is, where its weights are, and what has to agree with the run."""

import argparse
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

import models
from models.build import check_forward
from models.fit import check_fit
from models.pixels import MeanAndStd, Renormalize, for_channels, image_channels, mean_and_std
from options.training import plain
from training import distributed
from training.trained import Trained, find_trained
from utils import UserError
from weightfiles.lazy import sha256_of
from weightfiles.read import check_finite
from weightfiles.reading import Part
from weightfiles.teacher import file_of, read_teacher

log = logging.getLogger(__name__)


class Teacher:
    """A frozen model that takes images as the student's run makes them, of other mean, std or channels than its own.

    `width` is the size of its outputs: classes or, if it has no head, pooled features. `source` is what has to be the
    same when a run is resumed: the sha256 of the file, the key of the weights in it, the model, and its arguments.
    """

    def __init__(self, model: nn.Module, width: int, source: dict, trained_on: MeanAndStd, given: MeanAndStd):
        """Freeze `model`, trained on images normalized by `trained_on`; it will get images normalized by `given`."""
        self.model, self.width, self.source = model.eval().requires_grad_(False), width, source
        self.renormalize = Renormalize(given, trained_on, next(model.parameters()).device)

    @torch.no_grad()  # not inference mode: what it returns takes part in the student's backward pass
    def __call__(self, images: Tensor) -> Tensor:
        """Return the model's outputs [batch, width] for images [batch, channels, H, W]."""
        return self.model(self.renormalize(images))


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
    channels = image_channels(named.kwargs, "--teacher_kwargs")
    shape = (channels, options.input_size, options.input_size)
    width = check_forward(model, option, shape, num_classes or None, "--teacher_kwargs")
    model.to(device, memory_format=torch.channels_last if options.channels_last else torch.preserve_format)
    if options.compile:
        model.compile()  # without CUDA graphs, whose outputs the student's graphs would overwrite
    by_timm = for_channels((model.pretrained_cfg["mean"], model.pretrained_cfg["std"]), channels)
    trained_on = named.mean_and_std or by_timm
    log.info("teacher: %s from %s, for images of mean %s and standard deviation %s", named.name, path, *trained_on)
    source = {"model": named.name, "kwargs": named.kwargs, "key": options.teacher_key, "sha256": sha256_of(path)}
    seen = image_channels(options.model_kwargs, "--model_kwargs")
    given = mean_and_std(options.imagenet_default_mean_and_std, seen)
    if seen != channels:
        grey, colour = "the grey images in three equal channels", "the images in grey"
        log.info("teacher: it sees %s", grey if channels == 3 else colour)
    return Teacher(model, width, plain(argparse.Namespace(**source)), trained_on, given)


def find_teacher(options: argparse.Namespace) -> Trained:
    """Find out what the options say of the teacher. UserError if there is no such file or they contradict it."""
    name, kwargs = options.teacher_model, options.teacher_kwargs
    if "num_classes" in kwargs:
        raise UserError(
            f"--teacher_kwargs num_classes={kwargs['num_classes']}: the number of classes comes from the data"
        )
    trained = find_trained(name, kwargs, options.teacher_path, options.teacher_key, "--teacher")
    if trained.name is None:
        raise UserError(
            f"--teacher_path {trained.path} is no checkpoint of main.py: name its model with --teacher_model"
        )
    return trained


def read_tensors(named: Trained, model: nn.Module, key: str) -> tuple[dict[str, Tensor], Path]:
    """Read the teacher's tensors, without a head that `model` does not have; return them and their file."""
    path = named.path
    if path is None:
        with distributed.main_first():
            path = file_of(named.name, model, "--teacher")
    spec = models.ModelSpec(named.name, named.kwargs)
    return dict(read_teacher(spec, model, path, Part(key), "--teacher")), path


def check_same_classes(theirs: list[str] | int, ours: list[str] | int, option: str) -> None:
    """UserError unless a run's classes are the data's: as many and, if both have names, the same in the same order."""
    counts = [each if isinstance(each, int) else len(each) for each in (theirs, ours)]
    if counts[0] != counts[1]:
        raise UserError(f"{option} has {counts[0]} classes, but the data has {counts[1]}")
    if not (isinstance(theirs, int) or isinstance(ours, int)):
        for number, (their, our) in enumerate(zip(theirs, ours, strict=True)):
            if their != our:
                raise UserError(f"{option}: its class {number} is {their}, but the data's is {our}")
