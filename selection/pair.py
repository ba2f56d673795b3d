"""A teacher and a student as a pair: built without values, of one family, and matched."""

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

import models
from models import ModelSpec
from options.selection import PARTS
from selection.families import FAMILIES
from selection.family import Layout, Refused
from selection.match import match
from selection.plan import Outline, Plan
from selection.rules import Choices
from utils import UserError
from weightfiles.lazy import Weights
from weightfiles.read import shapes_of

STUDENT_IS_LARGER = ("depth", "narrower", "heads")  # reasons of Refused


def build(spec: ModelSpec) -> tuple[nn.Module, str]:
    """Build a model without values and name its family. Raises UserError if there is no such model or family."""
    model = models.create(spec.name, spec.kwargs, device="meta")
    family = models.family_of(model)
    if family is None:
        known = ", ".join(f"{name} ({family.kind.__name__})" for name, family in models.FAMILIES.items())
        raise UserError(f"{spec.name} is a {type(model).__name__}; the families to select from are {known}")
    return model, family


def build_pair(teacher: ModelSpec, student: ModelSpec) -> tuple[nn.Module, nn.Module, str]:
    """Build both without values and name their family. Raises UserError if that is not the same."""
    student_model, family = build(student)
    teacher_model, other = build(teacher)
    if other != family:
        raise UserError(f"{teacher.name} is of the family {other}, {student.name} of the family {family}")
    return teacher_model, student_model, family


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


def outline_without_heads(teacher: nn.Module, student: nn.Module, choices: Choices) -> Outline:
    """Match a pair; if the student is larger, but would do as the teacher, ask in the error whether they are swapped."""
    _check_parts(choices.take or (), student)
    try:
        return make_outline(teacher, student, choices, include_head=False, weights=None)
    except Refused as refused:
        if refused.reason in STUDENT_IS_LARGER and _fits(student, teacher, choices):
            question = "are teacher and student swapped? The other way round they fit"
            raise Refused(refused.reason, f"{refused}; {question}") from refused
        raise


def _fits(teacher: nn.Module, student: nn.Module, choices: Choices) -> bool:
    try:
        make_outline(teacher, student, choices, include_head=False, weights=None)
    except Refused:
        return False
    return True


def _check_parts(take: Iterable[str], student: nn.Module) -> None:
    """Raise UserError, naming what can be taken, if the family or this student of it lacks a part to take."""
    family = models.family_of(student)
    own = {FAMILIES[family].part_of(key) for key in student.state_dict()}
    for part in take:
        known = set(FAMILIES[family].parts.values())
        who, parts = ("the student", own) if part in known else (f"the family {family}", known)
        if part not in parts:
            listed = ", ".join(each for each in PARTS if each in parts)
            raise UserError(f"--take {part}: {who} has no {part}: its parts are {listed}")


def take_parts(plan: Plan, take: tuple[str, ...] | None, family: str) -> tuple[Plan, list[str]]:
    """Return the plan of these parts of a student, None for all of them, and the tensors that it leaves out."""
    left_out = [key for key in plan.sources if take is not None and FAMILIES[family].part_of(key) not in take]
    return plan.without(left_out), left_out


def count_classes(weights: Weights | None, model: nn.Module, name: str) -> int:
    """Count the classes of the teacher's classifier: those in its file, or else those of timm's model."""
    shapes = shapes_of(model.state_dict()) if weights is None else weights.shapes
    bias = next((key for key in ("head.fc.bias", "head.bias", "fc.bias") if key in shapes), None)
    if bias is None:
        raise UserError(f"--include_head: {name} has no classifier to take")
    return shapes[bias][0]
