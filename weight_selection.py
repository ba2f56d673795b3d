"""Cut a larger pretrained model's weights into the shape of a smaller one and write them as an initialization file.

Three steps, after section 3 of *Initializing Models with Larger Ones* (arXiv 2311.18823): each student layer gets a
teacher layer, each student tensor the teacher's tensor of the same place, and each of its axes some of the teacher's
positions. The package selection plans and copies; here are the options, the two models and the file.
"""

from options import selection_options

if __name__ == "__main__":
    selection_options()  # -h and usage errors answer before torch is imported

import logging
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import models
from selection.families import FAMILIES
from selection.family import Layout
from selection.match import match
from selection.picture import check_plot, draw
from selection.plan import Plan, choose
from selection.rules import Choices
from selection.teacher import read_teacher
from selection.tensors import magnitudes, select
from utils import UserError, json_lines, run_script, start_logging
from weightfiles.initialization import check_replaceable, write_initialization
from weightfiles.lazy import Weights
from weightfiles.read import WEIGHT_SUFFIXES, check_finite, shapes_of

log = logging.getLogger(__name__)

PUBLISHED = Choices()
DEFAULT_TEACHER = {
    "vit": "vit_small_patch16_224_in21k",
    "convnext": "convnext_tiny_in22k",
    "eva": "vit_small_patch16_dinov3_qkvb",
    "swin": "swin_base_patch4_window7_224",
    "mixer": "mixer_b16_224",
    "resnet": "resnet34",
}


# ---- the teacher's weights ----


# ---- the script ----


def build(name: str, kwargs: dict) -> tuple[nn.Module, str]:
    """The model `name` without values, and its family; UserError for an unknown name and for one outside the families."""
    model = models.create(name, kwargs, device="meta")
    family = models.family_of(model)
    if family is None:
        known = ", ".join(f"{family} ({kind.__name__})" for family, kind in models.FAMILIES.items())
        raise UserError(f"{name} is a {type(model).__name__}; the families to select from are {known}")
    return model, family


def make_plan(
    teacher: nn.Module,
    student: nn.Module,
    choices: Choices,
    *,
    include_head: bool,
    weights: Weights | None,
) -> Plan:
    """The plan of a pair; `weights` of the teacher are read for "magnitude" alone, their head counts if it is taken."""
    family, left_out = FAMILIES[models.family_of(student)], () if include_head else models.head_prefixes(student)
    layout = Layout.of(teacher, family, left_out)
    if include_head and weights is not None:
        layout = replace(layout, shapes=layout.shapes | weights.shapes)
    outline = match(family, layout, Layout.of(student, family, left_out), choices)
    return choose(outline, choices, magnitudes(weights, outline) if choices.element_selection == "magnitude" else None)


def initialize(
    teacher_name: str,
    student_name: str,
    *,
    teacher_kwargs: dict | None = None,
    student_kwargs: dict | None = None,
    pretrained_path: str | None = None,
    model_key: str = "model|module|state_dict",
    choices: Choices = PUBLISHED,
    include_head: bool = False,
    plan_only: bool = False,
) -> tuple[dict[str, Tensor], dict]:
    """The student's tensors (none with `plan_only`) and the description that goes beside them.

    Raises UserError for a pair that does not fit and for weights that are not this teacher's.
    """
    teacher_kwargs, student_kwargs = teacher_kwargs or {}, student_kwargs or {}
    if pretrained_path and not os.path.isfile(pretrained_path):
        is_there = os.path.exists(pretrained_path)
        raise UserError(f"--pretrained_path {pretrained_path} {'is not a file' if is_there else 'does not exist'}")
    student, family = build(student_name, student_kwargs)
    teacher, teacher_family = build(teacher_name, teacher_kwargs)
    if teacher_family != family:
        raise UserError(f"{teacher_name} is of the family {teacher_family}, {student_name} of the family {family}")
    weights = None
    if not plan_only or choices.element_selection == "magnitude":
        weights = read_teacher(teacher_name, teacher_kwargs, teacher, pretrained_path, model_key)
    if include_head:
        student_kwargs = {"num_classes": _classes(weights, teacher, teacher_name), **student_kwargs}
        student, _ = build(student_name, student_kwargs)
    plan = make_plan(teacher, student, choices, include_head=include_head, weights=weights)
    tensors = {} if plan_only else select(weights, plan)
    check_finite(tensors, pretrained_path or teacher_name)
    description = {
        "family": family,
        "student": dict(zip(("model", "kwargs"), models.timm_arguments(student_name, student_kwargs), strict=True)),
        "teacher": dict(zip(("model", "kwargs"), models.timm_arguments(teacher_name, teacher_kwargs), strict=True))
        | {"file": pretrained_path},
        "choices": asdict(choices) | {"heads": plan.heads, "include_head": include_head},
        "versions": {"torch": str(torch.__version__), "timm": timm.__version__},
        "plan": plan.as_json(),
    }
    return tensors, description


def _classes(weights: Weights | None, model: nn.Module, name: str) -> int:
    """How many classes the teacher's classifier has: in its file, or else as timm builds it."""
    shapes = shapes_of(model.state_dict()) if weights is None else weights.shapes
    bias = next((key for key in ("head.fc.bias", "head.bias", "fc.bias") if key in shapes), None)
    if bias is None:
        raise UserError(f"--include_head: {name} has no classifier to take")
    return shapes[bias][0]


def main(argv: list[str] | None = None) -> Path | None:
    """Run the script; returns the file it wrote, None with --plan."""
    options = selection_options(argv)
    start_logging()
    teacher_name, student_name, family = _names(options)
    if options.plot:
        check_plot(Path(options.plot))
    if not options.plan:
        path = _output_path(options.output_dir, family)
        check_replaceable(path)
    tensors, description = initialize(
        teacher_name,
        student_name,
        teacher_kwargs=options.pretrained_kwargs,
        student_kwargs=options.student_kwargs,
        pretrained_path=options.pretrained_path,
        model_key=options.model_key,
        choices=Choices(options.layer_selection, options.element_selection, options.heads, options.seed),
        include_head=options.include_head,
        plan_only=options.plan,
    )
    for note, count in description["plan"]["notes"].items():
        log.info("%s%s", note, f" ({count} tensors)" * (count > 1))
    if options.heads and description["choices"]["heads"] is None:
        log.warning("--heads %s has no effect: the family %s has none", options.heads, family)
    if options.plan and options.output_dir:
        log.warning("--output_dir has no effect with --plan: nothing is written there")
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
    print(
        f"{path}: {len(tensors)} tensors, {count:,} values for {student_name} from {teacher_name}, sha256 {sha256[:12]}…"
    )
    return path


def _names(options) -> tuple[str, str, str]:
    """The teacher, the student and the family that the options name: each counts where those before it are not given."""
    if options.student_model:
        family = build(options.student_model, options.student_kwargs)[1]
        if options.model_type not in (None, family):
            log.warning(
                "--student_model %s is of the family %s; --model_type %s has no effect",
                options.student_model,
                family,
                options.model_type,
            )
    elif options.model_type:
        family = options.model_type
    else:
        family = build(options.pretrained_model, options.pretrained_kwargs)[1] if options.pretrained_model else "vit"
    teacher_name = options.pretrained_model or DEFAULT_TEACHER[family]
    return teacher_name, options.student_model or models.DEFAULT_STUDENT[family], family


def _output_path(output_dir: str, family: str) -> Path:
    """The file to write: `output_dir` itself if it is named like one, else <family>.pth in it.

    UserError, before the work is done, if it cannot be written there.
    """
    path = Path(output_dir)
    if path.suffix not in WEIGHT_SUFFIXES and path.suffix.lower() in (*WEIGHT_SUFFIXES, ".bin", ".npz", ".json"):
        raise UserError(f"--output_dir {path}: wanted a folder, or a file ending in {', '.join(WEIGHT_SUFFIXES)}")
    if path.suffix not in WEIGHT_SUFFIXES:
        path = path / f"{family}.pth"
    elif path.is_dir():
        raise UserError(f"--output_dir {path} is a folder named like a file; name the file in it")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UserError(f"--output_dir {output_dir} cannot be made: {nearest} is not a folder that can be written to")
    return path


if __name__ == "__main__":
    sys.exit(run_script(main))
