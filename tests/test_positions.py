"""Tokens, position embeddings, patches and windows that are not the same in teacher and student."""

import numpy as np
import pytest
import torch
from small_models import layout, plan_of, vit_layout
from timm.layers import resample_patch_embed, resize_rel_pos_bias_table

from selection.families import FAMILIES
from selection.family import Layout, Refused
from selection.rules import Choices
from selection.tensors import select


def student_of(teacher_shapes, student_shapes, weights, grids=((1, 2), (1, 2)), choices=None):
    """The student's tensors, and the notes, for two ViTs of these tensors alone."""
    layouts = [vit_layout(shapes, grid) for shapes, grid in zip((teacher_shapes, student_shapes), grids, strict=True)]
    plan = plan_of(*layouts, choices)
    return select(weights, plan), plan.notes


def token_weights(**tensors):
    """A tensor [1, rows, 2] for each list of rows that are both of this value, and its shapes."""
    weights = {key: torch.tensor([[[float(value)] * 2 for value in rows]]) for key, rows in tensors.items()}
    return weights, {key: tuple(value.shape) for key, value in weights.items()}


# columns: the teacher's tokens and rows of the position embedding (of two patches), the student's numbers of rows, and
# their values; "cls_token" and so on without "_token"
@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        # tokens and rows that both have
        ({"cls": [1], "pos_embed": [10, 20, 30]}, {"cls": 1, "pos_embed": 3}, {"cls": [1], "pos_embed": [10, 20, 30]}),
        # the student has no rows for tokens: they are added to the tokens
        ({"cls": [1], "pos_embed": [10, 20, 30]}, {"cls": 1, "pos_embed": 2}, {"cls": [11], "pos_embed": [20, 30]}),
        ({"cls": [1], "reg": [2, 3], "pos_embed": [10, 20, 30, 40, 50]}, {"cls": 1, "reg": 2, "pos_embed": 2},
         {"cls": [11], "reg": [22, 33], "pos_embed": [40, 50]}),
        # the teacher has none: they begin at 0
        ({"cls": [1], "pos_embed": [20, 30]}, {"cls": 1, "pos_embed": 3}, {"cls": [1], "pos_embed": [0, 20, 30]}),
        ({"cls": [1], "reg": [2], "pos_embed": [20, 30]}, {"cls": 1, "reg": 1, "pos_embed": 4},
         {"cls": [1], "reg": [2], "pos_embed": [0, 0, 20, 30]}),
        # the distillation token from the class token, and its row
        ({"cls": [1], "pos_embed": [10, 20, 30]}, {"cls": 1, "dist": 1, "pos_embed": 4},
         {"cls": [1], "dist": [1], "pos_embed": [10, 10, 20, 30]}),
        ({"cls": [1], "pos_embed": [10, 20, 30]}, {"cls": 1, "dist": 1, "pos_embed": 2},
         {"cls": [11], "dist": [11], "pos_embed": [20, 30]}),
        ({"cls": [1], "dist": [2], "pos_embed": [10, 15, 20, 30]}, {"cls": 1, "dist": 1, "pos_embed": 2},
         {"cls": [11], "dist": [17], "pos_embed": [20, 30]}),
        # what the student lacks is left out, with its row
        ({"cls": [1], "dist": [2], "pos_embed": [10, 15, 20, 30]}, {"cls": 1, "pos_embed": 3},
         {"cls": [1], "pos_embed": [10, 20, 30]}),
        ({"cls": [1], "reg": [2, 3], "pos_embed": [10, 20, 30, 40, 50]}, {"cls": 1, "pos_embed": 3},
         {"cls": [1], "pos_embed": [10, 40, 50]}),
        ({"cls": [1], "pos_embed": [10, 20, 30]}, {"pos_embed": 2}, {"pos_embed": [20, 30]}),
        # two of four registers: 0 and 2, with their rows
        ({"cls": [1], "reg": [2, 3, 4, 5], "pos_embed": [10, 11, 12, 13, 14, 20, 30]}, {"cls": 1, "reg": 2, "pos_embed": 5},
         {"cls": [1], "reg": [2, 4], "pos_embed": [10, 11, 13, 20, 30]}),
        ({"cls": [1], "reg": [2, 3, 4, 5], "pos_embed": [10, 11, 12, 13, 14, 20, 30]}, {"cls": 1, "reg": 2, "pos_embed": 2},
         {"cls": [11], "reg": [13, 17], "pos_embed": [20, 30]}),
        # rows of registers that the teacher lacks begin at 0, and the registers as noise
        ({"cls": [1], "pos_embed": [10, 20, 30]}, {"cls": 1, "reg": 1, "pos_embed": 4}, {"cls": [1], "pos_embed": [10, 0, 20, 30]}),
    ],
)  # fmt: skip
def test_tokens_and_their_rows_are_those_worked_out_by_hand(teacher, student, expected):
    def named(rows):
        return {key if key == "pos_embed" else f"{key}_token": value for key, value in rows.items()}

    weights, shapes = token_weights(**named(teacher))
    student_shapes = {key: (1, rows, 2) for key, rows in named(student).items()}
    tensors, notes = student_of(shapes, student_shapes, weights)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == student_shapes
    for key, rows in named(expected).items():
        assert tensors[key].tolist() == [[[value] * 2 for value in rows]], key
    differ = teacher.keys() != student.keys() or (len(teacher["pos_embed"]) > 2) != (student["pos_embed"] > 2)
    assert bool(notes) == differ  # fewer of a kind are a choice like any other


def test_new_tokens_are_small_and_differ():
    weights, shapes = token_weights(pos_embed=[20, 30])
    tensors, notes = student_of(shapes, {"reg_token": (1, 4, 2), "pos_embed": (1, 2, 2)}, weights)
    assert tensors["reg_token"].abs().max() < 1e-5 and len(torch.unique(tensors["reg_token"])) == 8
    assert any("reg_token begins as noise" in note for note in notes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_what_the_teacher_lacks_begins_in_its_dtype(dtype):
    weights = {"blocks.0.mlp.fc2.weight": torch.ones(4, 4, dtype=dtype)}
    shapes = {"blocks.0.mlp.fc2.weight": (2, 2), "blocks.0.ls2.gamma": (2,), "reg_token": (1, 3, 2)}
    tensors, _ = student_of({"blocks.0.mlp.fc2.weight": (4, 4)}, shapes, weights)
    assert {key: tensor.dtype for key, tensor in tensors.items()} == dict.fromkeys(shapes, dtype)
    assert tensors["blocks.0.ls2.gamma"].tolist() == [1, 1]
    assert len(torch.unique(tensors["reg_token"][0].double(), dim=0)) == 3


def test_rows_for_tokens_that_do_not_exist_are_refused():
    weights, shapes = token_weights(cls_token=[1], pos_embed=[10, 11, 20, 30])
    with pytest.raises(Refused, match="pos_embed has 2 rows besides those of 1x2 patches") as refused:
        student_of(shapes, {"cls_token": (1, 1, 2), "pos_embed": (1, 3, 2)}, weights)
    assert refused.value.reason == "positions"


def test_constant_position_embedding_is_constant_on_any_grid():
    weights, shapes = token_weights(cls_token=[1], pos_embed=[9, *[5] * 6])
    tensors, notes = student_of(
        shapes, {"cls_token": (1, 1, 2), "pos_embed": (1, 5, 2)}, weights, grids=((2, 3), (2, 2))
    )
    # the weights of a resampled point add up to 1, in float32
    np.testing.assert_allclose(tensors["pos_embed"], [[[9.0, 9], *[[5.0, 5]] * 4]], rtol=1e-6)
    assert "pos_embed resampled from 2x3 patches to 2x2" in notes


def test_patches_are_resampled_by_timms_function():
    key = "patch_embed.proj.weight"
    weights = {key: torch.randn(4, 3, 14, 14, generator=torch.Generator().manual_seed(0))}
    tensors, notes = student_of({key: (4, 3, 14, 14)}, {key: (2, 3, 16, 16)}, weights)
    assert torch.equal(tensors[key], resample_patch_embed(weights[key][[0, 2]], [16, 16]))
    assert list(notes) == [f"{key} resampled from patches of 14x14 to 16x16"]


def test_relative_positions_follow_their_heads_to_other_windows():
    attention = "layers.0.blocks.0.attn"
    key = f"{attention}.relative_position_bias_table"

    def swin(offsets, heads, window):
        shapes, counts = {key: (offsets, heads)}, {f"{attention}.heads": heads}
        return Layout(shapes, counts, {}, None, {attention: window}), FAMILIES["swin"]

    teacher, student = swin(9, 4, (2, 2)), swin(25, 2, (3, 3))
    table = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    plan = plan_of(teacher, student, Choices(heads="keep"))
    expected = resize_rel_pos_bias_table(table[:, [0, 2]], [3, 3], (25, 2))
    assert torch.equal(select({key: table}, plan)[key], expected)
    same = plan_of(teacher, teacher, Choices(heads="keep"))
    assert torch.equal(select({key: table}, same)[key], table)


def test_swin_tables_take_the_heads_whose_rows_are_taken():
    teacher, student = layout("swin_base_patch4_window7_224"), layout("swin_tiny_patch4_window7_224")
    plan = plan_of(teacher, student, Choices("uniform", "random", "keep"))
    for stage, heads in enumerate((3, 6, 12, 24)):
        name = f"layers.{stage}.blocks.1.attn"
        columns = plan.indices(f"{name}.proj.weight")[1]
        kept = plan.indices(f"{name}.relative_position_bias_table")[1]
        assert len(kept) == heads and sorted({column // 32 for column in columns}) == kept
