"""Tokens and position embeddings that differ between teacher and student."""

import numpy as np
import pytest
import torch
from small_models import plan_of, vit_layout

from selection.family import Refused
from selection.tensors import select


def student_of(teacher_shapes, student_shapes, weights, grids=((1, 2), (1, 2))):
    """The student's tensors, and the notes, for two ViTs of these tensors alone."""
    layouts = [vit_layout(shapes, grid) for shapes, grid in zip((teacher_shapes, student_shapes), grids, strict=True)]
    plan = plan_of(*layouts)
    return select(weights, plan), plan.notes


def token_weights(**tensors):
    """A tensor [1, rows, 2] for each list of rows that are both of this value, and its shapes."""
    weights = {key: torch.tensor([[[float(value)] * 2 for value in rows]]) for key, rows in tensors.items()}
    return weights, {key: tuple(value.shape) for key, value in weights.items()}


def named_rows(text):
    rows = {name: values for name, *values in map(str.split, text.split(","))}
    return {"pos_embed" if name == "pos" else f"{name}_token": values for name, values in rows.items()}


# the teacher's tokens and rows of the position embedding, the last two of patches, and the student's; ~: noise
@pytest.mark.parametrize(
    "pair",
    [
        # tokens and rows that both have
        "cls 1, pos 10 20 30 -> cls 1, pos 10 20 30",
        # the student has no rows for tokens: they are added to the tokens
        "cls 1, pos 10 20 30 -> cls 11, pos 20 30",
        "cls 1, reg 2 3, pos 10 20 30 40 50 -> cls 11, reg 22 33, pos 40 50",
        # the teacher has none: they begin at 0
        "cls 1, pos 20 30 -> cls 1, pos 0 20 30",
        "cls 1, reg 2, pos 20 30 -> cls 1, reg 2, pos 0 0 20 30",
        # the distillation token from the class token, and its row
        "cls 1, pos 10 20 30 -> cls 1, dist 1, pos 10 10 20 30",
        "cls 1, pos 10 20 30 -> cls 11, dist 11, pos 20 30",
        "cls 1, dist 2, pos 10 15 20 30 -> cls 11, dist 17, pos 20 30",
        # what the student lacks is left out, with its row
        "cls 1, dist 2, pos 10 15 20 30 -> cls 1, pos 10 20 30",
        "cls 1, reg 2 3, pos 10 20 30 40 50 -> cls 1, pos 10 40 50",
        "cls 1, pos 10 20 30 -> pos 20 30",
        # two of four registers: 0 and 2, with their rows
        "cls 1, reg 2 3 4 5, pos 10 11 12 13 14 20 30 -> cls 1, reg 2 4, pos 10 11 13 20 30",
        "cls 1, reg 2 3 4 5, pos 10 11 12 13 14 20 30 -> cls 11, reg 13 17, pos 20 30",
        # rows of registers that the teacher lacks begin at 0, and the registers as noise
        "cls 1, pos 10 20 30 -> cls 1, reg ~, pos 10 0 20 30",
    ],
)
def test_tokens_and_their_rows_are_those_worked_out_by_hand(pair):
    teacher, expected = map(named_rows, pair.split(" -> "))
    weights, shapes = token_weights(**teacher)
    student_shapes = {key: (1, len(rows), 2) for key, rows in expected.items()}
    tensors, notes = student_of(shapes, student_shapes, weights)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == student_shapes
    for key, rows in expected.items():
        assert rows == ["~"] or tensors[key].tolist() == [[[float(value)] * 2 for value in rows]], key
    differ = teacher.keys() != expected.keys() or (len(teacher["pos_embed"]) > 2) != (len(expected["pos_embed"]) > 2)
    assert bool(notes) == differ  # fewer of a kind are a choice like any other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_what_the_teacher_lacks_begins_in_its_dtype(dtype):
    weights = {"blocks.0.mlp.fc2.weight": torch.ones(4, 4, dtype=dtype)}
    shapes = {"blocks.0.mlp.fc2.weight": (2, 2), "blocks.0.ls2.gamma": (2,), "reg_token": (1, 3, 2)}
    tensors, _ = student_of({"blocks.0.mlp.fc2.weight": (4, 4)}, shapes, weights)
    assert {key: tensor.dtype for key, tensor in tensors.items()} == dict.fromkeys(shapes, dtype)
    assert tensors["blocks.0.ls2.gamma"].tolist() == [1, 1]
    assert len(torch.unique(tensors["reg_token"][0].double(), dim=0)) == 3


def of_dtype(dtype, *, patch=2):
    """Two ViTs' layouts, of patches of 4 and of `patch`, and the first one's weights in this precision."""
    teacher = {"pos_embed": (1, 5, 4), "cls_token": (1, 1, 4), "patch_embed.proj.weight": (4, 3, 4, 4)}
    teacher |= {"blocks.0.attn.proj.weight": (4, 4), "blocks.0.ls1.gamma": (4,), "norm.weight": (4,)}
    student = {"pos_embed": (1, 9, 2), "cls_token": (1, 1, 2), "patch_embed.proj.weight": (2, 1, patch, patch)}
    student |= {"blocks.0.attn.proj.weight": (2, 2), "norm.weight": (2,), "reg_token": (1, 1, 2)}
    weights = {
        key: (torch.arange(1.0, 1 + np.prod(shape)).reshape(shape) * 1e-4).to(dtype) for key, shape in teacher.items()
    }
    return teacher, student, weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_computed_is_float32_and_what_is_copied_is_not(dtype):
    """Position rows merged into the token, a grid and patches resampled, channels added up, a LayerScale folded."""
    teacher, student, weights = of_dtype(dtype)
    tensors, notes = student_of(teacher, student, weights, grids=((2, 2), (3, 3)))
    assert len(notes) == 6
    computed = {"pos_embed", "cls_token", "patch_embed.proj.weight", "blocks.0.attn.proj.weight"}
    wide = torch.promote_types(dtype, torch.float32)
    assert {key: tensor.dtype for key, tensor in tensors.items()} == {
        key: wide if key in computed else dtype for key in student
    }
    exactly = {key: tensor.double() for key, tensor in weights.items()}
    expected, _ = student_of(teacher, student, exactly, grids=((2, 2), (3, 3)))
    for key in computed:
        torch.testing.assert_close(tensors[key].double(), expected[key], rtol=1e-5, atol=1e-12)  # float32's rounding


def test_products_too_small_for_half_precision_are_kept():
    teacher, student, weights = of_dtype(torch.float16)
    weights["blocks.0.ls1.gamma"] = torch.full((4,), 1e-5).half()
    folded = student_of(teacher, student, weights, grids=((2, 2), (3, 3)))[0]["blocks.0.attn.proj.weight"]
    scale = weights["blocks.0.ls1.gamma"].float()[0]
    assert torch.equal(folded, weights["blocks.0.attn.proj.weight"].float()[::2, ::2] * scale) and folded.all()


def test_rows_for_tokens_that_do_not_exist_are_refused():
    weights, shapes = token_weights(cls_token=[1], pos_embed=[10, 11, 20, 30])
    with pytest.raises(Refused, match="pos_embed has 2 rows besides those of 1x2 patches") as refused:
        student_of(shapes, {"cls_token": (1, 1, 2), "pos_embed": (1, 3, 2)}, weights)
    assert refused.value.reason == "positions"


def test_constant_position_embedding_is_constant_on_any_grid():
    weights, shapes = token_weights(cls_token=[1], pos_embed=[9, *[5] * 6])
    student = {"cls_token": (1, 1, 2), "pos_embed": (1, 5, 2)}
    tensors, notes = student_of(shapes, student, weights, grids=((2, 3), (2, 2)))
    # the weights of a resampled point add up to 1, in float32
    np.testing.assert_allclose(tensors["pos_embed"], [[[9.0, 9], *[[5.0, 5]] * 4]], rtol=1e-6)
    assert "pos_embed resampled from 2x3 patches to 2x2" in notes
