"""Cut a larger pretrained model's weights into the shape of a smaller one and write them as an initialization file.

Three steps, after section 3 of *Initializing Models with Larger Ones* (arXiv 2311.18823): each student layer gets a
teacher layer (the first ones), each student tensor the teacher's tensor of the same place, and each of its axes evenly
spaced positions of the teacher's. `make_plan` decides all of that from names and shapes; `select` copies.
"""

from options import selection_options

if __name__ == "__main__":
    selection_options()  # -h and usage errors answer before torch is imported

import logging
import os
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import convnext, vision_transformer
from torch import Tensor, nn

import models
from utils import UserError, first_line, run_script, start_logging
from weights import WEIGHT_SUFFIXES, check_finite, check_replaceable, read_weights, write_initialization

log = logging.getLogger(__name__)

# The axis groups of each family: a pattern of tensor names, then a group for each axis. Positions of one group are
# chosen once and used by every tensor on it, so that what one tensor writes to a slot the next one reads from it.
# "-" is an axis kept as it is, "3*g" one of three blocks, each cut like g; axes not named are kept.
AXES = {
    "vit": {
        r"(cls|reg|dist)_token|pos_embed": "- - stream",
        r"patch_embed\.proj\.weight": "stream",
        r"patch_embed\.proj\.bias": "stream",
        r"(norm|norm_pre|fc_norm)\.(weight|bias)": "stream",
        r"blocks\.\d+\.norm[12]\.(weight|bias)": "stream",
        r"blocks\.\d+\.ls[12]\.gamma": "stream",
        r"(blocks\.\d+)\.attn\.qkv\.weight": r"3*\1.attn stream",
        r"(blocks\.\d+)\.attn\.qkv\.bias": r"3*\1.attn",
        r"(blocks\.\d+)\.attn\.proj\.weight": r"stream \1.attn",
        r"(blocks\.\d+)\.mlp\.fc1\.weight": r"\1.mlp stream",
        r"(blocks\.\d+)\.mlp\.fc1\.bias": r"\1.mlp",
        r"(blocks\.\d+)\.mlp\.fc2\.weight": r"stream \1.mlp",
        r"blocks\.\d+\.(attn\.proj|mlp\.fc2)\.bias": "stream",
        r"(head|head_dist)\.weight": "- stream",
        r"(head|head_dist)\.bias": "-",
    },
    "convnext": {
        r"stem\.\d+\.(weight|bias)": "stages.0",
        r"(stages\.\d+)\.blocks\.\d+\.(gamma|conv_dw\.weight|conv_dw\.bias|norm\.weight|norm\.bias)": r"\1",
        r"((stages\.\d+)\.blocks\.\d+)\.mlp\.fc1\.weight": r"\1.mlp \2",
        r"((stages\.\d+)\.blocks\.\d+)\.mlp\.fc1\.bias": r"\1.mlp",
        r"((stages\.\d+)\.blocks\.\d+)\.mlp\.fc2\.weight": r"\2 \1.mlp",
        r"(stages\.\d+)\.blocks\.\d+\.mlp\.fc2\.bias": r"\1",
        **{rf"stages\.{s}\.downsample\.0\.(weight|bias)": f"stages.{s - 1}" for s in (1, 2, 3)},
        **{rf"stages\.{s}\.downsample\.1\.weight": f"stages.{s} stages.{s - 1}" for s in (1, 2, 3)},
        r"(stages\.\d+)\.downsample\.1\.bias": r"\1",
        r"head\.norm\.(weight|bias)": "stages.3",
        r"head\.fc\.weight": "- stages.3",
        r"head\.fc\.bias": "-",
    },
}
DEFAULT_TEACHER = {"vit": "vit_small_patch16_224_in21k", "convnext": "convnext_tiny_in22k"}
CONVERTERS = {"vit": vision_transformer.checkpoint_filter_fn, "convnext": convnext.checkpoint_filter_fn}

Shapes = Mapping[str, tuple[int, ...]]


# ---- the plan: a function of names and shapes ----


@dataclass(frozen=True)
class Group:
    """An axis group: how many slots the teacher has along it, and which of them the student keeps, ascending."""

    size: int
    kept: list[int]


@dataclass(frozen=True)
class Source:
    """Where a student tensor comes from: a teacher tensor and, for each axis, its group (None: kept whole) and blocks."""

    key: str
    axes: tuple[tuple[str | None, int], ...]


@dataclass(frozen=True)
class Plan:
    """Which slots of which teacher tensor go where."""

    groups: dict[str, Group]
    sources: dict[str, Source]

    def indices(self, student_key: str) -> list[list[int] | None]:
        """The teacher's positions along each axis of a student tensor, ascending; None for an axis kept whole."""
        found = []
        for name, blocks in self.sources[student_key].axes:
            group = self.groups.get(name)
            found.append(group and [block * group.size + slot for block in range(blocks) for slot in group.kept])
        return found

    def as_json(self) -> dict:
        """Plain values: each group's indices once, and the group of each axis of each tensor."""
        groups = {name: {"teacher_size": group.size, "indices": group.kept} for name, group in self.groups.items()}
        tensors = {
            key: {"from": source.key, "axes": [_label(*axis) for axis in source.axes]}
            for key, source in self.sources.items()
        }
        return {"groups": groups, "tensors": tensors}


def _label(group: str | None, blocks: int) -> str | None:
    return group if blocks == 1 else f"{blocks}*{group}"


def select_indices(source: int, target: int) -> list[int]:
    """Evenly spaced positions to keep when `source` slots shrink to `target`; ascending.

    Divisible sizes use a constant stride; others round `linspace(0, source - 1)` in float32, ties to even, as the
    paper's code does (weight_selection.py:14-18 at e9b6d0c). Raises ValueError if target > source or target < 1.
    """
    if not 1 <= target <= source:
        raise ValueError(f"cannot keep {target} of {source} slots")
    if source % target == 0:
        return list(range(0, source, source // target))
    return torch.round(torch.linspace(0, source - 1, target)).long().tolist()


def axes_of(family: str, key: str, dimensions: int) -> tuple[tuple[str | None, int], ...]:
    """The group (None: kept whole) and the number of blocks of each of a tensor's axes; UserError for an unknown name."""
    for pattern, template in AXES[family].items():
        match = re.fullmatch(pattern, key)
        if match:
            words = match.expand(template).split()
            words += ["-"] * (dimensions - len(words))
            parts = (word.rpartition("*") for word in words)
            return tuple((None if group == "-" else group, int(blocks or 1)) for blocks, _, group in parts)
    raise UserError(f"{key} is not a tensor that the family {family} knows how to cut")


def make_plan(family: str, teacher: Shapes, student: Shapes) -> Plan:
    """The plan that fills every tensor of `student` from `teacher`, the first layers and evenly spaced slots.

    Both map tensor names to shapes, without the head if it is not to be inherited. Raises UserError naming the first
    tensor that does not fit, and teacher tensors in the inherited layers that the student has no place for.
    """
    groups, sources = {}, {}
    for key, shape in student.items():
        if key not in teacher:
            raise UserError(f"the teacher has no tensor {key}, which the student needs {list(shape)}")
        source = Source(key, axes_of(family, key, len(shape)))
        for size, target, (name, blocks) in _paired_axes(key, teacher[key], shape, source):
            if name is not None:
                group = groups.setdefault(name, Group(size // blocks, select_indices(size // blocks, target // blocks)))
                if (group.size, len(group.kept)) != (size // blocks, target // blocks):
                    raise UserError(f"{key} does not agree with the tensors before it on the width of {name}")
        sources[key] = source
    _refuse_leftovers(teacher, student)
    return Plan(groups, sources)


def _paired_axes(key: str, teacher: tuple, student: tuple, source: Source):
    """(teacher size, student size, axis) for each axis of a tensor; UserError naming both shapes if they cannot fit."""
    shapes = f"{key}: the teacher's {list(teacher)}"
    if len(teacher) != len(student):
        raise UserError(f"{shapes} has another number of axes than the student's {list(student)}")
    for size, target, (name, _) in zip(teacher, student, source.axes, strict=True):
        if size < target:
            raise UserError(f"{shapes} is smaller than the student's {list(student)}")
        if name is None and size != target:
            raise UserError(
                f"{shapes} and the student's {list(student)} differ along an axis that is not selected from"
            )
    return zip(teacher, student, source.axes, strict=True)


def _refuse_leftovers(teacher: Shapes, student: Shapes) -> None:
    """UserError if an inherited layer of the teacher has a tensor without a counterpart: dropping it changes the layer."""
    layer = re.compile(r".*blocks\.\d+\.")
    kept = {match[0] for match in map(layer.match, student) if match}
    for key in teacher:
        match = layer.match(key)
        if key not in student and (match is None or match[0] in kept):
            raise UserError(f"the teacher's {key} {list(teacher[key])} has no counterpart in the student")


def select(teacher: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The student's tensors, copied from the teacher's slots as planned; contiguous, in the teacher's dtypes."""
    student = {}
    for key, source in plan.sources.items():
        tensor = teacher[source.key]
        for axis, positions in enumerate(plan.indices(key)):
            if positions is not None:
                tensor = tensor.index_select(axis, torch.tensor(positions))
        student[key] = tensor.clone(memory_format=torch.contiguous_format)
    return student


# ---- the two models ----


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
