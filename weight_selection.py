"""Cut a larger pretrained model's weights into the shape of a smaller one and write them as an initialization file.

Three steps, after section 3 of *Initializing Models with Larger Ones* (arXiv 2311.18823): each student layer gets a
teacher layer (the first ones), each student tensor the teacher's tensor of the same place, and each of its axes evenly
spaced positions of the teacher's. selection.py plans and copies; here are the options, the two models and the file.
"""

from options import selection_options

if __name__ == "__main__":
    selection_options()  # -h and usage errors answer before torch is imported

import logging
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from timm.models import convnext, vision_transformer
from torch import Tensor, nn

import models
from selection import make_plan, select
from utils import UserError, first_line, run_script, start_logging
from weights import WEIGHT_SUFFIXES, check_finite, check_replaceable, read_weights, write_initialization

log = logging.getLogger(__name__)

DEFAULT_TEACHER = {"vit": "vit_small_patch16_224_in21k", "convnext": "convnext_tiny_in22k"}
CONVERTERS = {"vit": vision_transformer.checkpoint_filter_fn, "convnext": convnext.checkpoint_filter_fn}


def read_teacher(name: str, kwargs: dict, path: str | None, model_key: str) -> tuple[dict[str, Tensor], nn.Module]:
    """The teacher's weights by timm's names, and the teacher built without values; from `path`, else through timm.

    Raises UserError for an unknown name, weights that cannot be had, and a file that is not this teacher's.
    """
    if path is None:
        return _download(name, kwargs)
    teacher = models.create(name, kwargs, device="meta")
    family = _known_family(name, teacher)
    if path.endswith(".npz"):
        return _read_npz(path, name, kwargs), teacher
    tensors = read_weights(path, model_key)
    try:
        tensors = CONVERTERS[family](tensors, teacher)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"--pretrained_path {path} has no layout that {name} is known in ({first_line(error)})"
        ) from error
    _check_architecture(path, name, tensors, teacher)
    return tensors, teacher


def _known_family(name: str, model: nn.Module) -> str:
    family = models.family_of(model)
    if family is None:
        raise UserError(
            f"{name} is a {type(model).__name__}; the families to select from are {', '.join(models.FAMILIES)}"
        )
    return family


def _download(name: str, kwargs: dict) -> tuple[dict[str, Tensor], nn.Module]:
    """The pretrained weights that timm knows by `name`, from its cache or the network, and the model."""
    if name in models.VARIANTS:
        raise UserError(
            f"--pretrained_model {name} is a shape without weights: give --pretrained_path FILE, or a timm name"
        )
    if not name.startswith("hf-hub:"):
        _known_family(name, models.create(name, kwargs, device="meta"))  # a wrong name is said before the download
    log.info("reading the weights of %s through timm; without network, stop and give --pretrained_path FILE", name)
    try:
        teacher = models.create(name, kwargs, pretrained=True)
    except UserError as error:
        raise UserError(
            f"--pretrained_model {error}; give --pretrained_path FILE, or a name that has weights"
        ) from error
    _known_family(name, teacher)
    return teacher.state_dict(), teacher


def _read_npz(path: str, name: str, kwargs: dict) -> dict[str, Tensor]:
    """A ViT's weights from the `.npz` of its original release, by timm's own reader."""
    if not os.path.isfile(path):
        raise UserError(f"--pretrained_path {path} is not a file")
    model = models.create(name, kwargs)  # timm's reader needs real tensors to copy into
    try:
        model.load_pretrained(path)
    except (AttributeError, KeyError, ValueError, RuntimeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--pretrained_path {path} cannot be read as the weights of {name}: {first_line(error)}"
        ) from error
    return model.state_dict()


def _check_architecture(path: str, name: str, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """UserError unless a file's tensors are those of the model, the head apart."""
    head = models.head_prefixes(model)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items() if not key.startswith(head)}
    found = {key: tuple(value.shape) for key, value in tensors.items() if not key.startswith(head)}
    for key, shape in expected.items():
        if found.get(key) != shape:
            seen = f"has {key} {list(found[key])}" if key in found else f"has no {key}"
            raise UserError(f"--pretrained_path {path} {seen}, but {name} needs {list(shape)}; see --pretrained_kwargs")
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise UserError(f"--pretrained_path {path} has {extra[0]}, which {name} does not; see --pretrained_kwargs")


# ---- the script ----


def initialize(
    teacher_name: str,
    student_name: str,
    *,
    teacher_kwargs: dict | None = None,
    student_kwargs: dict | None = None,
    pretrained_path: str | None = None,
    model_key: str = "model|module|state_dict",
    include_head: bool = False,
) -> tuple[dict[str, Tensor], dict]:
    """The student's tensors and the description that goes beside them; raises UserError for a pair that does not fit."""
    teacher_kwargs, student_kwargs = teacher_kwargs or {}, student_kwargs or {}
    student = models.create(student_name, student_kwargs, device="meta")
    family = _known_family(student_name, student)
    tensors, teacher = read_teacher(teacher_name, teacher_kwargs, pretrained_path, model_key)
    if models.family_of(teacher) != family:
        raise UserError(
            f"{teacher_name} is of the family {models.family_of(teacher)}, {student_name} of the family {family}"
        )
    if include_head:
        student_kwargs = {"num_classes": _classes(tensors, teacher_name), **student_kwargs}
        student = models.create(student_name, student_kwargs, device="meta")
    left_out = () if include_head else models.head_prefixes(student)
    plan = make_plan(family, _shapes(tensors, left_out), _shapes(student.state_dict(), left_out))
    selected = select(tensors, plan)
    check_finite(selected, pretrained_path or teacher_name)
    description = {
        "family": family,
        "student": dict(zip(("model", "kwargs"), models.timm_arguments(student_name, student_kwargs), strict=True)),
        "teacher": dict(zip(("model", "kwargs"), models.timm_arguments(teacher_name, teacher_kwargs), strict=True))
        | {"file": pretrained_path},
        "choices": {
            "layer_selection": "first",
            "element_selection": "uniform",
            "heads": "blend",
            "include_head": include_head,
        },
        "versions": {"torch": str(torch.__version__), "timm": timm.__version__},
        "plan": plan.as_json(),
    }
    return selected, description


def _shapes(tensors: Mapping[str, Tensor], left_out: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items() if not key.startswith(left_out)}


def _classes(tensors: Mapping[str, Tensor], name: str) -> int:
    """How many classes the teacher's classifier has."""
    bias = next((tensors[key] for key in ("head.fc.bias", "head.bias") if key in tensors), None)
    if bias is None:
        raise UserError(f"--include_head: {name} has no classifier to take")
    return len(bias)


def main(argv: list[str] | None = None) -> Path:
    """Run the script; returns the file it wrote."""
    options = selection_options(argv)
    start_logging()
    student_name = options.student_model or models.DEFAULT_STUDENT[options.model_type or "vit"]
    family = _known_family(student_name, models.create(student_name, options.student_kwargs, device="meta"))
    if options.model_type and options.model_type != family:
        log.warning(
            "--student_model %s is of the family %s; --model_type %s has no effect",
            student_name,
            family,
            options.model_type,
        )
    teacher_name = options.pretrained_model or DEFAULT_TEACHER[family]
    path = _output_path(options.output_dir, family)
    check_replaceable(path)
    tensors, description = initialize(
        teacher_name,
        student_name,
        teacher_kwargs=options.pretrained_kwargs,
        student_kwargs=options.student_kwargs,
        pretrained_path=options.pretrained_path,
        model_key=options.model_key,
        include_head=options.include_head,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    sha256 = write_initialization(path, tensors, description)
    count = sum(tensor.numel() for tensor in tensors.values())
    print(
        f"{path}: {len(tensors)} tensors, {count:,} values for {student_name} from {teacher_name}, sha256 {sha256[:12]}…"
    )
    return path


def _output_path(output_dir: str, family: str) -> Path:
    """The file to write: `output_dir` itself if it is named like one, else <family>.pth in it.

    UserError, before the work is done, if it cannot be written there.
    """
    path = Path(output_dir)
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
