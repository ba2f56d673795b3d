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

import sys

try:
    from options.selection import selection_options
except ImportError as error:  # Python was told not to look beside this file
    sys.exit(f"weight_selection.py: error: {error}: unset PYTHONSAFEPATH, and start python without -P and -I")

if __name__ == "__main__":
    selection_options()  # answer -h and usage errors before importing torch
    from requirements import require_packages  # here, because -h need not wait for it

    require_packages()

import argparse
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor

import models
from datasets import load_unlabelled
from images.settings import View
from images.transforms import evaluation_batches
from models import ModelSpec
from models.initial import fresh_head
from models.pixels import Renormalize, image_channels, mean_and_std
from options.parser import text_values
from options.selection import ACTIVATION_RULES, LEAST_IMAGES, PARTS, SCORED_RULES, given_in_vain, needs_images
from selection.activations.scratch import BATCH, Calibration
from selection.pair import build, build_pair, count_classes, make_outline, outline_without_heads, take_parts
from selection.picture import check_plot, draw
from selection.plan import Outline, choose
from selection.refit import Refit
from selection.rules import Choices
from selection.running import Running, image_size
from selection.tensors import magnitudes, select
from training.command import how_to_train
from training.trained import Trained, find_trained
from utils import Stream, UserError, json_lines, permutation, run_script, start_logging
from weightfiles.initialization import check_replaceable, output_path, write_initialization
from weightfiles.lazy import Weights
from weightfiles.read import check_finite
from weightfiles.reading import ANY_PART, Part
from weightfiles.teacher import read_teacher

log = logging.getLogger(__name__)

PUBLISHED = Choices()


@dataclass(frozen=True)
class OnImages:
    """Images for the rules by activation; with `refit` also to refit the student.

    They are as the student sees them, and `to_teacher` makes the teacher's of them.
    """

    images: Calibration
    to_teacher: Renormalize
    refit: Refit | None = None


# ---- from two models to the student's tensors ----


def select_weights(
    teacher: ModelSpec,
    student: ModelSpec,
    *,
    pretrained_path: str | None = None,
    part: Part = ANY_PART,
    choices: Choices = PUBLISHED,
    include_head: bool = False,
    plan_only: bool = False,
    on_images: OnImages | None = None,
) -> tuple[dict[str, Tensor], dict]:
    """Select the student's tensors (none with `plan_only`), and describe them for the `.json` beside the file.

    Raises UserError if the pair does not fit or the weights are not this teacher's.
    """
    teacher_model, student_model, family = build_pair(teacher, student)
    outline = outline_without_heads(teacher_model, student_model, choices)  # before anything is read or downloaded
    weights, classes = None, 0
    if not plan_only or choices.element_selection in SCORED_RULES:
        weights = read_teacher(teacher, teacher_model, pretrained_path, part)
    include_head = include_head or "head" in (choices.take or ())
    if include_head:
        classes = count_classes(weights, teacher_model, teacher.name)
        student = replace(student, kwargs={"num_classes": classes, **student.kwargs})
        student_model, _ = build(student)
        outline = make_outline(teacher_model, student_model, choices, include_head=True, weights=weights)
    running = None
    if on_images:
        seen = on_images.images, classes, on_images.to_teacher
        running = Running(teacher, teacher_model, student_model, weights, *seen)
    whole = choose(outline, choices, _scores(outline, choices.element_selection, weights, running))
    plan, left_out = take_parts(whole, choices.take, family)
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
        "left_out": left_out,
        "versions": {"torch": str(torch.__version__), "timm": timm.__version__},
        **about,
        "plan": plan.as_json(),
    }


def _scores(
    outline: Outline, rule: str, weights: Weights | None, running: Running | None
) -> dict[str, np.ndarray] | None:
    """Score the indices of each axis group, if the rule needs it; see `selection.rules.select_indices`."""
    if rule not in SCORED_RULES:
        return None
    scores = magnitudes(weights, outline, order=1 if rule == "l1_inconsistent" else 2)
    return running.scores(outline, rule, scores) if rule in ACTIVATION_RULES else scores


def _described(spec: ModelSpec) -> dict:
    name, kwargs = models.timm_arguments(spec.name, spec.kwargs)
    return {"model": name, "kwargs": kwargs}


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
        path = output_path(options.output_dir, family)
        check_replaceable(path)
    rule = options.element_selection or ("energy" if options.refit else "uniform")
    heads = options.heads or ("keep" if options.refit else None)
    take = options.take and tuple(part for part in PARTS if part in options.take)
    on_images = None
    if options.refit:
        log.info("--refit: --element_selection %s and --heads %s", rule, heads)
    if needs_images(options):
        scratch = Path() if options.plan else next(folder for folder in path.absolute().parents if folder.exists())
        on_images = calibration_images(options, teacher, student, scratch)
    if options.new_head:
        student = replace(student, kwargs={**student.kwargs, "num_classes": options.new_head})
    tensors, description = select_weights(
        ModelSpec(teacher.name, teacher.kwargs),
        student,
        pretrained_path=teacher.path and str(teacher.path),
        part=Part(options.model_key, options.model_prefix),
        choices=Choices(options.layer_selection, rule, heads, options.seed, take, options.gain),
        include_head=options.include_head,
        plan_only=options.plan,
        on_images=on_images,
    )
    description["choices"]["new_head"] = options.new_head
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
    if options.new_head:
        tensors |= fresh_head(student, options.seed)
    sha256 = write_initialization(path, tensors, description)
    count = sum(tensor.numel() for tensor in tensors.values())
    what = f"{len(tensors)} tensors, {count:,} values for {student.name} from {teacher.name}"
    print(f"{path}: {what}, sha256 {sha256[:12]}…; {how_to_train(options, teacher, student, path)}")
    return path


def calibration_images(options: argparse.Namespace, teacher: Trained, student: ModelSpec, folder: Path) -> OnImages:
    """Draw the images of --data_path by --seed and keep them in a file in `folder`, as main.py's evaluation sees them."""
    images = load_unlabelled(options.data_set, options.data_path)
    exif = bool(options.exif or teacher.exif)  # as the teacher's run saw them
    images = images.upright() if exif else images
    if len(images) < LEAST_IMAGES:
        raise UserError(f"--data_path {options.data_path} has {len(images)} images; at least {LEAST_IMAGES} are needed")
    chosen = permutation(len(images), Stream.CALIBRATION, options.seed)[: options.calibration_images]
    log.info("%s of %s images of --data_set %s", f"{len(chosen):,}", f"{len(images):,}", options.data_set)
    height, width = image_size(build(student)[0]) or [teacher.input_size or 224] * 2
    if height != width:
        raise UserError(f"the student's images are {height} x {width}: a refit needs square ones")
    imagenet, channels = options.imagenet_default_mean_and_std, image_channels(student.kwargs, "--student_kwargs")
    view = View(options.input_size or height, None, imagenet, channels)
    seen = mean_and_std(imagenet, image_channels(teacher.kwargs, "--pretrained_kwargs"))
    if teacher.mean_and_std not in (None, seen):
        named = f"--imagenet_default_mean_and_std {teacher.imagenet}"
        own = "mean {} and standard deviation {}".format(*teacher.mean_and_std) if teacher.imagenet is None else named
        log.warning("%s was trained with %s, and sees images with %s", teacher.path, own, imagenet)
    about = {"data_set": options.data_set, "input_size": view.input_size, "exif": exif}
    about |= {"mean": list(view.mean), "std": list(view.std)}
    calibration = Calibration(evaluation_batches(images, chosen, view, BATCH), len(chosen), folder, about)
    refit = Refit(options.ridge, options.refit_target, options.refit_layers) if options.refit else None
    return OnImages(calibration, Renormalize((view.mean, view.std), seen), refit)


def _pair(options: argparse.Namespace) -> tuple[Trained, ModelSpec, str]:
    """The teacher, the student and their family. The student decides the family, else --model_type, else the teacher."""
    named, kwargs, student = options.pretrained_model, options.pretrained_kwargs, options.student_model
    teacher = find_trained(named, kwargs, options.pretrained_path, options.model_key, "--pretrained")
    if student:
        _, family = build(ModelSpec(student, options.student_kwargs))
        if options.model_type not in (None, family):
            text = "--student_model %s is of the family %s; --model_type %s has no effect"
            log.warning(text, student, family, options.model_type)
    elif options.model_type:
        family = options.model_type
    else:
        family = build(ModelSpec(teacher.name, teacher.kwargs))[1] if teacher.name else "vit"
    if teacher.name is None:
        teacher = replace(teacher, name=models.FAMILIES[family].teacher)
        text = "no --pretrained_model is given: the teacher%s is taken for %s, the default of the family %s"
        log.info(text, f" in {teacher.path}" if teacher.path else "", teacher.name, family)
    return teacher, ModelSpec(student or models.FAMILIES[family].student, options.student_kwargs), family


def _log_remarks(options: argparse.Namespace, description: dict) -> None:
    """Log what is not a plain copy, what is taken as text, and each option that has no effect."""
    for note, count in description["plan"]["notes"].items():
        log.info("%s%s", note, f" ({count} tensors)" * (count > 1))
    chosen = [group for kind in ("layers", "groups") for group in description["plan"][kind].values()]
    left_out = description["left_out"]
    if left_out:
        log.info("--take: %d tensors of other parts are left out, for random init", len(left_out))
    if not left_out and all(len(group["indices"]) == group["teacher_size"] for group in chosen):
        teacher, student = (description[role]["model"] for role in ("teacher", "student"))
        log.warning(
            "nothing is smaller in the student, %s, than in the teacher, %s: all of it is taken", student, teacher
        )
    if options.heads and description["choices"]["heads"] is None:
        log.warning("--heads %s has no effect: the family %s has none", options.heads, description["family"])
    for remark in (*text_values(options), *given_in_vain(options)):
        log.warning(remark)


if __name__ == "__main__":
    sys.exit(run_script(main))
