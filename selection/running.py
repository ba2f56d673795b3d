"""A teacher and a student that run, side by side on the same images: with the same grid of patches, in float32."""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor, nn

import models
from models import ModelSpec
from models.pixels import Renormalize
from selection.activations.scores import activation_scores
from selection.activations.scratch import Calibration
from selection.activations.segments import Segments
from selection.families import FAMILIES
from selection.family import Layout
from selection.match import match
from selection.plan import Outline, Plan, choose
from selection.refit import Refit, Report, refit
from selection.rules import Choices
from selection.tensors import select
from weightfiles.lazy import Weights

log = logging.getLogger(__name__)


class Running:
    """A teacher that runs on images, at its own widths but with the student's grid of patches and windows.

    Tables that belong to another grid are resampled, as the plan resamples the student's. `about` says for the `.json` which images
    these are, and which of the constructor's arguments that changed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        teacher: nn.Module,
        student: nn.Module,
        weights: Weights,
        images: Calibration,
        classes: int,
        to_teacher: Renormalize,
    ) -> None:
        """`teacher` and `student` are the models on any device. `classes`: of the teacher's head; 0: without it.

        `to_teacher` makes the teacher's images of the student's, if one is grey.
        """
        self._family, self._images = FAMILIES[models.family_of(teacher)], images
        regridded = {name: size for name, size in _grid(student).items() if _grid(teacher).get(name, size) != size}
        tensors: Mapping[str, Tensor] = weights
        if regridded:
            spec = replace(spec, kwargs={**spec.kwargs, **regridded})
            head = models.head_prefixes(teacher)
            pair = teacher, models.create(spec.name, spec.kwargs, device="meta")
            layouts = (Layout.of(model, self._family, head) for model in pair)
            choices = Choices(heads="keep")
            tensors = {key: weights[key] for key in weights if key.startswith(head)}
            tensors |= select(weights, choose(match(self._family, *layouts, choices), choices))
        self.about = images.about | {"teacher_rebuilt_with": regridded}
        spec = replace(spec, kwargs={**spec.kwargs, "num_classes": classes})
        self._teacher = self._segments(spec, tensors, "teacher", to_teacher)

    def _segments(self, spec: ModelSpec, tensors: Mapping[str, Tensor], role: str, *prepare: Renormalize) -> Segments:
        name = f"the {role} {spec.name}"
        return Segments(_filled(spec, tensors), self._family.layers, self._images.shape, name, *prepare)

    def scores(self, outline: Outline, rule: str, magnitudes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Score the indices of each group by a rule of `options.ACTIVATION_RULES`."""
        return activation_scores(self._teacher, outline, self._family, self._images, rule, magnitudes)

    def refit(
        self, student: ModelSpec, tensors: dict[str, Tensor], plan: Plan, settings: Refit, *, to_stage_end: bool
    ) -> tuple[dict[str, Tensor], dict]:
        """Refit the student's selected tensors; return all of them, and what the `.json` says of it.

        What is refitted is float32, the other tensors have their dtypes.
        """
        students = tuple(self._segments(student, tensors, "student") for _ in range(2))
        layers = self._family.layers
        report = refit(
            self._teacher, students, plan, layers, self._images, settings=settings, to_stage_end=to_stage_end
        )
        _log(report)
        after, before = (each.model.state_dict() for each in students)
        changed = {key: after[key] for key in tensors if not torch.equal(before[key], after[key])}
        about = {
            "ridge": "inf" if math.isinf(settings.ridge) else settings.ridge,
            "target": settings.target,
            "layers": settings.layers,
            "refitted": len(report.refitted),
            "left_as_selected": report.left,
        }
        about |= asdict(report.closeness) | {"selected": asdict(report.selected)}
        return {**tensors, **changed}, self.about | about


def _log(report: Report) -> None:
    """Say how many layers were refitted, and how near the student is to its teacher."""
    left = ", ".join(f"{key} ({reason})" for key, reason in report.left.items()) or "none"
    count = len(report.refitted) + len(report.left)
    log.info("%d of %d layers refitted; left as selected: %s", len(report.refitted), count, left)
    before, after = (list(each.explained_variance.values())[-1] for each in (report.selected, report.closeness))
    text = "the student explains %.1f %% of the teacher's last stream as selected, %.1f %% refitted"
    log.info(text, 100 * before, 100 * after)
    if after < before:
        log.warning("the refit followed the noise of too few images: raise --calibration_images or --ridge")


def _grid(model: nn.Module) -> dict[str, int | tuple[int, int]]:
    """Return the constructor's arguments by which a model's patches and windows are laid out."""
    embed = getattr(model, "patch_embed", None) or getattr(model, "stem", None)
    sizes = {
        "img_size": getattr(embed, "img_size", None),
        "patch_size": getattr(embed, "patch_size", None),
        "window_size": max(
            (m.window_size for m in model.modules() if hasattr(m, "relative_position_bias_table")), default=None
        ),
    }
    return {name: tuple(size) for name, size in sizes.items() if size is not None}


def _filled(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build a model with these tensors; a head that is not among them keeps its own values."""
    model = models.create(spec.name, spec.kwargs)
    own = {key: tensors[key] for key in model.state_dict() if key in tensors}  # others are of a head that is left out
    models.inherit(model, own, f"the weights do not fit {spec.name}")
    return model


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the height and width of the images that a model is made for, in pixels; None if it takes any."""
    return _grid(model).get("img_size")
