"""Start a model from the weights of an initialization file."""

import argparse
import logging
from pathlib import Path

from torch import nn

from models.fit import inherit
from selection.resize import follow_images, resized
from weightfiles.initialization import read_initialization
from weightfiles.reading import Part

log = logging.getLogger(__name__)


def load_initialization(path: Path, model: nn.Module, options: argparse.Namespace) -> dict:
    """Copy the weights of `--initialize` into the model; return where they come from. UserError if they do not fit.

    Weights for other images or patches are resampled, as a selection does.
    """
    part = Part(options.model_key, options.model_prefix)
    tensors, source = read_initialization(str(path), model, options.model, part, follow_images(model))
    option, left_out = f"--initialize {source['path']}", frozenset(source["left_out"])
    kwargs = source["student"].get("kwargs") if isinstance(source["student"], dict) else None
    image_size = kwargs.get("img_size") if isinstance(kwargs, dict) else None
    tensors, notes = resized(tensors, model, image_size, left_out)
    other_head = inherit(model, tensors, f"{option} does not fit --model {options.model}", left_out)
    for note in notes:
        log.info("%s: %s", option, note)
    if other_head:
        log.info("%s: %s is for other classes; the head starts from random values", option, ", ".join(other_head))
    if left_out:
        log.info("%s: its selection left out %d tensors, which start from random values", option, len(left_out))
    return source
