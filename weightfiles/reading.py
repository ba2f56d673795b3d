"""A model that is wanted from a file, one way to read the file as that model, and what to say of it."""

import logging
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import nn

import models
from options.parser import MODEL_KEY
from utils import few
from weightfiles.lazy import Weights
from weightfiles.read import shapes_of

log = logging.getLogger(__name__)

TIMM = "timm"  # the layout that needs no conversion
NAMES_SHOWN = 10  # of what was left out
# If keys that the model does not have begin like this, they belong to another model, whose outputs differ from ours: one
# with registers or a position embedding, say. A model of self-supervision may have such parts beside the encoder, too.
OF_ANOTHER_MODEL = re.compile(
    r"(?!mask_|decoder|predictor|proj|head|text)\w*(token|pos_embed|position_embed|rel_pos|norm)|(ln|bn)[_\d]"
)


class Part(NamedTuple):
    """Where in a file to search: in the first of the parts that `key` lists, among the keys that begin with `prefix`."""

    key: str = MODEL_KEY
    prefix: str = ""


ANY_PART = Part()


@dataclass(frozen=True)
class Wanted:
    """A model to find in a file, and how error messages call what they are about."""

    model: nn.Module
    name: str
    option: str  # "--pretrained_path FILE"
    kwargs: str = "--pretrained_kwargs"  # the option of the constructor's arguments
    pick: str = "--model_prefix"  # the option that picks one of several models in a file
    of_any_size: frozenset[str] = frozenset()  # tensors that the caller brings to the model's size
    left_out: frozenset[str] = frozenset()  # tensors that the file may lack, because it says so

    @cached_property
    def own(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the model's tensors."""
        return shapes_of(self.model.state_dict())

    @cached_property
    def needed(self) -> dict[str, tuple[int, ...]]:
        """The shapes that a file must have: all but those left out, and the head's, which may be of other classes."""
        head = models.head_prefixes(self.model)
        return {key: shape for key, shape in self.own.items() if not (key.startswith(head) or key in self.left_out)}

    def has_beside(self, key: str) -> bool:
        """Tell whether a key that the model lacks lies beside it, so that the model computes the same without it."""
        if key.startswith(models.head_prefixes(self.model)):
            return True
        # an attribute may be None or an identity here, and hold tensors in another model of the kind
        name = key.partition(".")[0]
        return not (hasattr(self.model, name) or OF_ANOTHER_MODEL.match(name))


@dataclass(frozen=True)
class Reading:
    """One way to read a file: the tensors whose keys begin with `prefix`, under timm's names."""

    weights: Weights
    prefix: str
    layout: str
    left_out: list[str]  # keys of the file; of the reading that `find` returns, names of groups of them
    remarks: list[str] = field(default_factory=list)  # what to warn of
    fault: str = ""  # why a file of a known layout cannot be read

    def share(self, wanted: Wanted) -> float:
        """Return which share of the model's tensors is there, whatever their shapes."""
        return 1.0 if self.fault else sum(key in self.weights for key in wanted.needed) / max(1, len(wanted.needed))

    def misfit(self, wanted: Wanted) -> str:
        """Say how the tensors differ from the model's, apart from its head and what lies beside; "" if they fit."""
        if self.fault:
            return f"cannot be read as the weights of {wanted.name}: {self.fault}; see {wanted.kwargs}"
        shapes, difference = self.weights.shapes, ""
        for key, shape in wanted.needed.items():
            if shapes.get(key) != shape and not (key in wanted.of_any_size and key in shapes):
                seen = f"has {key} {list(shapes[key])}" if key in shapes else f"has no {key}"
                difference = f"{seen}, unlike the {list(shape)}"
                break
        else:
            extra = next((key for key in shapes if key not in wanted.own and not wanted.has_beside(key)), None)
            difference = f"has {extra}, which is no tensor" if extra else ""
        layout = f"({self.layout} layout) " * (self.layout != TIMM)
        return f"{layout}{difference} of {wanted.name}; see {wanted.kwargs}" if difference else ""


def log_reading(reading: Reading, wanted: Wanted, path: str | Path) -> None:
    """Log what is taken from a file, and what may be wrong with it."""
    log.info("%s", coverage(reading, wanted, path))
    if reading.weights.whole:
        log.info("%s is read whole: %s", path, reading.weights.whole)
    for remark in reading.remarks:
        log.warning("%s: %s", path, remark)


def coverage(reading: Reading, wanted: Wanted, path: str | Path) -> str:
    """Say in a line what a reading takes from a file. The head counts apart, because its classes may be others."""
    taken = sum(key in reading.weights for key in wanted.needed)
    under = f" under {reading.prefix}" * bool(reading.prefix)
    line = (
        f"{taken} of {len(wanted.needed)} tensors of {wanted.name} taken from {path} ({reading.layout} layout{under})"
    )
    head = [key for key in wanted.own if key not in wanted.needed]
    if head:
        shapes = [reading.weights.shapes[key] for key in head if key in reading.weights]
        classes = [shape[0] for shape in shapes if len(shape) > 1]
        line += f"; head: {f'{classes[-1]} classes' if classes else 'none'}"
    return line + f"; left out: {few(reading.left_out, NAMES_SHOWN)}" * bool(reading.left_out)
