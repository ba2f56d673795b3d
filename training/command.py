"""The command of main.py that trains from an initialization file."""

import argparse
import os
import shlex
from pathlib import Path

from models import ModelSpec
from options.parser import keyword_text
from options.selection import needs_images
from selection.pair import build
from selection.running import image_size
from training.trained import Trained


def how_to_train(options: argparse.Namespace, teacher: Trained, student: ModelSpec, path: Path) -> str:
    """Write the command that trains from the file at `path`, or say why main.py cannot train this student."""
    kwargs = {name: value for name, value in student.kwargs.items() if name not in ("num_classes", "img_size")}
    given = options.input_size if needs_images(options) else None
    height, width = image_size(build(student)[0]) or [given or teacher.input_size or 224] * 2
    if height != width or kwargs.get("in_chans", 3) not in (1, 3):
        wants = f"{height} x {width} px and {kwargs.get('in_chans', 3)} channels"
        return f"main.py trains on square images of 3 channels or 1, but this student takes {wants}"
    script = Path(__file__).parents[1] / "main.py"
    words = ["python3", os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)]
    words += ["--model", student.name, "--input_size", str(height), "--initialize", str(path)]
    if kwargs:
        words += ["--model_kwargs", *(keyword_text(name, value) for name, value in kwargs.items())]
    imagenet = options.imagenet_default_mean_and_std if needs_images(options) else teacher.imagenet
    if imagenet is False:
        words += ["--imagenet_default_mean_and_std", "false"]
    if options.exif or teacher.exif:
        words += ["--exif", "true"]
    return f"to train from it, add --data_path to:\n{shlex.join(words)}"
