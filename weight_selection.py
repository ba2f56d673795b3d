"""Initialize a small model with a larger pretrained one's weights: select them, and write an initialization file.

The method, after section 3 of *Initializing Models with Larger Ones* (arXiv 2311.18823), is this. `teacher` and `student`
are two models' tensors by name, without their heads:

    def select(teacher, student):
        selected = {}
        for name, small in student.items():  # block 3 reads the teacher's block 3, so the first layers are kept
            tensor = teacher[name]
            for axis, size in enumerate(small.shape):
                stride = tensor.shape[axis] // size
                evenly_spaced = torch.arange(0, tensor.shape[axis], stride)
                tensor = tensor.index_select(axis, evenly_spaced)
            selected[name] = tensor
        return selected

The published pairs divide evenly. For any other pair of a family, the script chooses one list of indices per axis group,
so that what one tensor writes to a channel the next one reads from it; it cuts fused projections such as qkv block by block, and can
follow other rules. It plans first (selection.match, selection.plan), then copies (selection.tensors).
"""

from options import ACTIVATION_RULES, LEAST_IMAGES, given_in_vain, needs_images, selection_options

if __name__ == "__main__":
    selection_options()  # -h and usage errors answer before torch is imported

import argparse
import logging
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

import models
from datasets import load_unlabelled
from images.settings import View
from images.transforms import evaluation_batches
from models import ModelSpec
from selection.activations.scratch import BATCH, Calibration
from selection.families import FAMILIES
from selection.family import Layout
from selection.match import match
from selection.picture import check_plot, draw
from selection.plan import Outline, choose
from selection.refit import Refit
from selection.rules import Choices
from selection.running import Running, image_size
from selection.tensors import magnitudes, select
from utils import Stream, UserError, check_creatable, json_lines, permutation, run_script, start_logging
from weightfiles.initialization import check_replaceable, write_initialization
from weightfiles.lazy import Weights
from weightfiles.read import WEIGHT_SUFFIXES, check_finite, shapes_of
from weightfiles.teacher import read_teacher

log = logging.getLogger(__name__)

PUBLISHED = Choices()


@dataclass(frozen=True)
class OnImages:
    """Images to run the teacher on, for the rules by activation; with `refit` also to refit the student."""

    images: Calibration
    refit: Refit | None = None


# ---- from two models to the student's tensors ----


def select_weights(
    teacher: ModelSpec,
    student: ModelSpec,
    *,
    pretrained_path: str | None = None,
    model_key: str = "model|module|state_dict",
    choices: Choices = PUBLISHED,
    include_head: bool = False,
    plan_only: bool = False,
    on_images: OnImages | None = None,
) -> tuple[dict[str, Tensor], dict]:
    """Select the student's tensors (none with `plan_only`), and describe them for the `.json` beside the file.

    Raises UserError if the pair does not fit or the weights are not this teacher's.
    """
    if pretrained_path and not os.path.isfile(pretrained_path):
        problem = "is not a file" if os.path.exists(pretrained_path) else "does not exist"
        raise UserError(f"--pretrained_path {pretrained_path} {problem}")
    student_model, family = build(student)
    teacher_model, teacher_family = build(teacher)
    if teacher_family != family:
        raise UserError(f"{teacher.name} is of the family {teacher_family}, {student.name} of the family {family}")
    weights, classes = None, 0
    if not plan_only or choices.element_selection == "magnitude" or on_images:
        weights = read_teacher(teacher, teacher_model, pretrained_path, model_key)
    if include_head:
        classes = _count_classes(weights, teacher_model, teacher.name)
        student = replace(student, kwargs={"num_classes": classes, **student.kwargs})
        student_model, _ = build(student)
    outline = make_outline(teacher_model, student_model, choices, include_head=include_head, weights=weights)
    running = on_images and Running(teacher, teacher_model, student_model, weights, on_images.images, classes)
    plan = choose(outline, choices, _scores(outline, choices.element_selection, weights, running))
    tensors = {} if plan_only else select(weights, plan)
    check_finite(tensors, pretrained_path or teacher.name)
    about = {"calibration": running.about} if running else {}
    if running and tensors and on_images.refit:
        spread = choices.layer_selection == "uniform"
        tensors, refit = running.refit(student, tensors, plan, on_images.refit, to_stage_end=spread)
        about = {"refit": refit}
        check_finite(tensors, f"the refitted {student.name}")
    return tensors, {
        "family": family,
        "student": _described(student),
        "teacher": _described(teacher) | {"file": pretrained_path},
        "choices": asdict(choices) | {"heads": plan.heads, "include_head": include_head},
        "versions": {"torch": str(torch.__version__), "timm": timm.__version__},
        **about,
        "plan": plan.as_json(),
    }


def build(spec: ModelSpec) -> tuple[nn.Module, str]:
    """Build a model without values and name its family. Raises UserError if there is no such model or family."""
    model = models.create(spec.name, spec.kwargs, device="meta")
    family = models.family_of(model)
    if family is None:
        known = ", ".join(f"{name} ({family.kind.__name__})" for name, family in models.FAMILIES.items())
        raise UserError(f"{spec.name} is a {type(model).__name__}; the families to select from are {known}")
    return model, family


def make_outline(
    teacher: nn.Module, student: nn.Module, choices: Choices, *, include_head: bool, weights: Weights | None
) -> Outline:
    """Match a pair of models of one family.

    If the head is taken, its shapes are those in the file: a trained head may have other classes than timm's model of
    that name.
    """
    family = FAMILIES[models.family_of(student)]
    left_out = () if include_head else models.head_prefixes(student)
    layout = Layout.of(teacher, family, left_out)
    if include_head and weights is not None:
        layout = replace(layout, shapes=layout.shapes | weights.shapes)
    return match(family, layout, Layout.of(student, family, left_out), choices)


def _scores(
    outline: Outline, rule: str, weights: Weights | None, running: Running | None
) -> dict[str, np.ndarray] | None:
    """Score the indices of each axis group, if the rule needs it; see `selection.rules.select_indices`."""
    if rule not in ("magnitude", *ACTIVATION_RULES):
        return None
    scores = magnitudes(weights, outline)
    return running.scores(outline, rule, scores) if rule in ACTIVATION_RULES else scores


def _described(spec: ModelSpec) -> dict:
    name, kwargs = models.timm_arguments(spec.name, spec.kwargs)
    return {"model": name, "kwargs": kwargs}


def _count_classes(weights: Weights | None, model: nn.Module, name: str) -> int:
    """Count the classes of the teacher's classifier: those in its file, or else those of timm's model."""
    shapes = shapes_of(model.state_dict()) if weights is None else weights.shapes
    bias = next((key for key in ("head.fc.bias", "head.bias", "fc.bias") if key in shapes), None)
    if bias is None:
        raise UserError(f"--include_head: {name} has no classifier to take")
    return shapes[bias][0]


# ---- the script ----


def main(argv: list[str] | None = None) -> Path | None:
    """Run the script. Returns the file it wrote; None with --plan."""
    options = selection_options(argv)
    start_logging()
    teacher, student, family = _pair(options)
    # whatever cannot be written is refused before the work is done
    if options.plot:
        check_plot(Path(options.plot))
    if not options.plan:
        path = _output_path(options.output_dir, family)
        check_replaceable(path)
    rule = options.element_selection or ("energy" if options.refit else "uniform")
    heads = options.heads or ("keep" if options.refit else None)
    on_images = None
    if options.refit:
        log.info("--refit: --element_selection %s and --heads %s", rule, heads)
    if needs_images(options):
        scratch = Path() if options.plan else next(folder for folder in path.absolute().parents if folder.exists())
        images = calibration_images(options, student, scratch)
        refit = Refit(options.ridge, options.refit_target, options.refit_layers) if options.refit else None
        on_images = OnImages(images, refit)
    tensors, description = select_weights(
        teacher,
        student,
        pretrained_path=options.pretrained_path,
        model_key=options.model_key,
        choices=Choices(options.layer_selection, rule, heads, options.seed),
        include_head=options.include_head,
        plan_only=options.plan,
        on_images=on_images,
    )
    _log_remarks(options, description)
    if options.plot:
        draw(description, Path(options.plot))
    if options.plan:
        print(json_lines(description, levels=3))
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {path.parent} cannot be made: {error.strerror}") from error
    sha256 = write_initialization(path, tensors, description)
    count = sum(tensor.numel() for tensor in tensors.values())
    what = f"{len(tensors)} tensors, {count:,} values for {student.name} from {teacher.name}"
    print(f"{path}: {what}, sha256 {sha256[:12]}…")
    return path


def calibration_images(options: argparse.Namespace, student: ModelSpec, folder: Path) -> Calibration:
    """Draw the images of --data_path by --seed and keep them in a file in `folder`, as main.py's evaluation sees them."""
    images = load_unlabelled(options.data_set, options.data_path)
    if len(images) < LEAST_IMAGES:
        raise UserError(f"--data_path {options.data_path} has {len(images)} images; at least {LEAST_IMAGES} are needed")
    chosen = permutation(len(images), Stream.CALIBRATION, options.seed)[: options.calibration_images]
    size = options.input_size or image_size(build(student)[0])
    view = View(size, None, options.imagenet_default_mean_and_std)
    about = {"data_set": options.data_set, "input_size": size, "mean": list(view.mean), "std": list(view.std)}
    return Calibration(evaluation_batches(images, chosen, view, BATCH), len(chosen), folder, about)


def _pair(options: argparse.Namespace) -> tuple[ModelSpec, ModelSpec, str]:
    """The teacher, the student and their family. The student decides the family, else --model_type, else the teacher."""
    teacher, student = options.pretrained_model, options.student_model
    if student:
        _, family = build(ModelSpec(student, options.student_kwargs))
        if options.model_type not in (None, family):
            text = "--student_model %s is of the family %s; --model_type %s has no effect"
            log.warning(text, student, family, options.model_type)
    elif options.model_type:
        family = options.model_type
    else:
        family = build(ModelSpec(teacher, options.pretrained_kwargs))[1] if teacher else "vit"
    defaults = models.FAMILIES[family]
    return (
        ModelSpec(teacher or defaults.teacher, options.pretrained_kwargs),
        ModelSpec(student or defaults.student, options.student_kwargs),
        family,
    )


def _log_remarks(options: argparse.Namespace, description: dict) -> None:
    """Log what is not a plain copy, and each option that has no effect."""
    for note, count in description["plan"]["notes"].items():
        log.info("%s%s", note, f" ({count} tensors)" * (count > 1))
    if options.heads and description["choices"]["heads"] is None:
        log.warning("--heads %s has no effect: the family %s has none", options.heads, description["family"])
    if not needs_images(options):
        for name in given_in_vain(options):
            log.warning("--%s has no effect without --refit true or a rule by activation", name)
    if options.plan and options.output_dir:
        log.warning("--output_dir has no effect with --plan: nothing is written there")


def _output_path(output_dir: str, family: str) -> Path:
    """Name the file to write: `output_dir` if it has a suffix of weights, else <family>.pth in it.

    Raises UserError, before the work is done, if the file cannot be written there.
    """
    path = Path(output_dir)
    if path.suffix not in WEIGHT_SUFFIXES and path.suffix.lower() in (*WEIGHT_SUFFIXES, ".bin", ".npz", ".json"):
        raise UserError(f"--output_dir {path}: wanted a folder, or a file ending in {', '.join(WEIGHT_SUFFIXES)}")
    if path.suffix not in WEIGHT_SUFFIXES:
        path = path / f"{family}.pth"
    elif path.is_dir():
        raise UserError(f"--output_dir {path} is a folder named like a file; name the file in it")
    check_creatable(path, f"--output_dir {output_dir} cannot be made")
    return path


if __name__ == "__main__":
    sys.exit(run_script(main))
