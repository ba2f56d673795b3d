"""Every family: its table of axes holds for a real model, and what a plan says is what the student gets."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from small_models import (
    CONVNEXT,
    DEIT,
    EVA,
    EVA02,
    MIXER,
    PAIRS,
    PARALLEL,
    SIGLIP,
    SMALL_CONVNEXT,
    SMALL_EVA,
    SMALL_MIXER,
    SMALL_SWIN,
    SMALL_VIT,
    SWIN,
    SWIN_T,
    VIT,
    VIT_T,
    indices_of,
    random_tensors,
)
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from timm.models import adapt_input_conv

import models
from models import ModelSpec
from options.selection import SELECTION_FAMILIES
from selection.families import FAMILIES
from selection.plan import Group, choose
from selection.rules import Choices
from weight_selection import make_outline, select_weights

VITS, EVAS, CONVNEXTS, MIXERS = (VIT, SMALL_VIT), (EVA, SMALL_EVA), (CONVNEXT, SMALL_CONVNEXT), (MIXER, SMALL_MIXER)
DINOV2, DINOV3, ATTO = "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "convnext_atto"
ATTO_V2, WINDOWS = "convnextv2_atto", {"window_size": (2, 3), "img_size": 48, "patch_size": 4}
CONVOLUTIONS, NO_GRN = {"conv_mlp": True}, {"use_grn": False}
SCALED, NO_ROWS, POOLED = {"init_values": 1.0}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}
# pairs of which one side has what the other lacks: what a note says, the sizes of teacher and student, the teacher's
# name and further arguments, the student's
FOLDED = {
    "ViT folds LayerScale": ("LayerScale folded", VITS, VIT_T, SCALED, VIT_T, {}),
    "parallel ViT folds LayerScale": ("LayerScale folded", VITS, PARALLEL, SCALED, PARALLEL, {"init_values": 0}),
    "EVA-02 folds LayerScale": ("LayerScale folded", EVAS, EVA02, SCALED, EVA02, {}),
    "ConvNeXt folds LayerScale": ("LayerScale folded", CONVNEXTS, ATTO, CONVOLUTIONS, ATTO_V2, NO_GRN),
    "ConvNeXt V2 from V1": ("LayerScale folded", CONVNEXTS, ATTO, CONVOLUTIONS, ATTO_V2, {}),
    "V2 of 1x1 from V1 of linear": ("LayerScale folded", CONVNEXTS, ATTO, {"conv_mlp": False}, ATTO_V2, CONVOLUTIONS),
    "linear from 1x1": ("", CONVNEXTS, ATTO, CONVOLUTIONS, ATTO, {"conv_mlp": False}),
    "1x1 from linear": ("", CONVNEXTS, ATTO, {"conv_mlp": False}, ATTO, CONVOLUTIONS),
    "rows merged": ("pos_embed added", VITS, VIT_T, {"reg_tokens": 2}, VIT_T, {"reg_tokens": 2, **NO_ROWS}),
    "DINOv2 keeps its registers": ("LayerScale folded", VITS, DINOV2, {}, VIT_T, {"reg_tokens": 4, **NO_ROWS}),
}
BEGUN = {
    "ViT begins LayerScale": ("begins at 1, which changes nothing", VITS, VIT_T, {}, VIT_T, {"init_values": 1e-5}),
    "EVA-02 begins LayerScale": ("begins at 1, which changes nothing", EVAS, EVA02, {}, EVA02, {"init_values": 1e-5}),
    "DINOv3 begins biases": ("begins at 0, which changes nothing", EVAS, DINOV3, {}, f"{DINOV3}_qkvb", {}),
    "ConvNeXt begins LayerScale": ("begins at 1", CONVNEXTS, ATTO_V2, NO_GRN, ATTO, CONVOLUTIONS),
    "ConvNeXt V2 from plain": ("begins at 0, which changes nothing", CONVNEXTS, ATTO_V2, NO_GRN, ATTO_V2, {}),
    "rows begin": ("pos_embed begins at 0 in the rows of", VITS, VIT_T, NO_ROWS, VIT_T, {}),
    "registers get rows": ("pos_embed begins at 0", VITS, DINOV2, {}, DINOV2, {"no_embed_class": False}),
}
CHANGED = {
    "patches": ("of 4x4 to 6x6", VITS, VIT_T, {}, VIT_T, {"patch_size": 6, "img_size": 18}),
    "rows begin, larger images": ("4x4 patches to 6x6", VITS, VIT_T, NO_ROWS, VIT_T, {"img_size": 24}),
    "registers and rows left out": ("reg_token left out", VITS, VIT_T, {"reg_tokens": 4}, VIT_T, NO_ROWS),
    "fewer registers": ("", VITS, VIT_T, {"reg_tokens": 4}, VIT_T, {"reg_tokens": 2}),
    "fewer, merged": ("row of reg_token", VITS, VIT_T, {"reg_tokens": 4}, VIT_T, {"reg_tokens": 2, **NO_ROWS}),
    "registers begin": ("reg_token begins as noise", VITS, VIT_T, {}, VIT_T, {"reg_tokens": 2}),
    "distilled from plain": ("dist_token from the teacher's cls_token", VITS, VIT_T, {}, DEIT, {}),
    "plain from distilled": ("dist_token left out: the student has none", VITS, DEIT, {}, VIT_T, {}),
    "class token left out": ("fc_norm.bias from the teacher's norm.bias", VITS, VIT_T, {}, VIT_T, POOLED),
    "class token begins": ("norm.weight from the teacher's fc_norm.weight", VITS, VIT_T, POOLED, VIT_T, {}),
    "pooling left out": ("attn_pool left out: the student has none", VITS, SIGLIP, {}, VIT_T, {}),
    "ViT from DINOv2": ("to 8x8", VITS, DINOV2, {}, VIT_T, {"patch_size": 8, "img_size": 40}),
    "EVA-02 of other patches": ("to 8x8", EVAS, EVA02, {}, EVA02, {"patch_size": 8}),
    "mixer of other patches": ("to 6x6", MIXERS, "small_mixer", {}, "small_mixer", {"img_size": 24, "patch_size": 6}),
    "grey": ("adapted from 3 to 1 image channels", VITS, VIT_T, {}, VIT_T, {"in_chans": 1}),
    "grey of other patches": ("from 3 to 1 image channels", VITS, VIT_T, {}, VIT_T, {"in_chans": 1, "patch_size": 8}),
    "colours from grey": ("from 1 to 3 image channels", VITS, VIT_T, {"in_chans": 1}, VIT_T, {}),
    "EVA-02 of 4 channels": ("from 3 to 4 image channels", EVAS, EVA02, {}, EVA02, {"in_chans": 4}),
    "other windows": ("of 4x4 to 2x3", (SWIN, SMALL_SWIN), SWIN_T, {}, SWIN_T, WINDOWS),
}


def test_families_are_the_same_in_every_table():
    assert SELECTION_FAMILIES == tuple(models.FAMILIES) == tuple(FAMILIES)


@torch.no_grad()
def outputs(name, kwargs, tensors, create=models.create, channels=3):
    """The logits for two images of noise of the model with these tensors; float64 [2, classes]. 1 channel: grey noise."""
    model, size = create(name, kwargs), kwargs.get("img_size", 32)
    model.double().eval().load_state_dict(tensors)
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model(images.expand(-1, kwargs.get("in_chans", 3), -1, -1))


def error(ours, expected):
    """Return the largest difference relative to the largest expected value."""
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def select(folder, pair, dtype=torch.float64, **options):
    """A teacher's random tensors, the student's, and the plan's description as its file has it."""
    teacher, teacher_kwargs, student, student_kwargs = pair
    tensors = random_tensors(models.create(teacher, teacher_kwargs), dtype)
    safetensors.torch.save_file(tensors, folder / "teacher.safetensors")
    specs = ModelSpec(teacher, teacher_kwargs), ModelSpec(student, student_kwargs)
    result, description = select_weights(*specs, pretrained_path=str(folder / "teacher.safetensors"), **options)
    return tensors, result, json.loads(json.dumps(description))


# ---- the tables hold: a group's indices can change places in all tensors on it together, and only so ----


def shuffled(group, generator):
    """The group with its indices in another order."""
    order = generator.permutation(group.size)
    if (np.diff(order) == 1).all():
        order = order[::-1]
    return Group(group.size, order.tolist())


def taken(tensor, indices):
    """The tensor's slice: along each axis the indices, or all of them for None."""
    for axis, kept in enumerate(indices):
        if kept is not None:
            tensor = tensor.index_select(axis, torch.tensor(kept))
    return tensor


@pytest.mark.parametrize("kind", PAIRS)
def test_shuffled_groups_leave_the_outputs_as_they_were(kind):
    name, kwargs, _, _ = PAIRS[kind]
    model = models.create(name, kwargs)
    tensors = random_tensors(model)
    expected = outputs(name, kwargs, tensors)
    choices = Choices(heads="keep")
    plan = choose(make_outline(model, model, choices, include_head=True, weights=None), choices)
    assert not plan.notes and not any(source.steps for source in plan.sources.values())
    generator = np.random.default_rng(0)
    orders = {group: shuffled(plan.groups[group], generator) for group in plan.groups}

    every = replace(plan, groups=orders)
    result = {key: taken(tensor, indices_of(every, key)) for key, tensor in tensors.items()}
    assert error(outputs(name, kwargs, result), expected) < 1e-12  # float64: sums in another order differ by 1e-15

    # the same order in one of the tensors alone: the outputs above are not equal by chance
    several = [group for group in orders if plan.groups[group].size > 1]
    for group in several[:: math.ceil(len(several) / 5)]:
        one = replace(plan, groups=plan.groups | {group: orders[group]})
        key = next(key for key in tensors if taken(tensors[key], indices_of(one, key)).ne(tensors[key]).any())
        result = tensors | {key: taken(tensors[key], indices_of(one, key))}
        assert error(outputs(name, kwargs, result), expected) > 1e-6, (group, key)


# ---- the student has what the plan says ----


@pytest.mark.parametrize("kind", PAIRS)
def test_student_of_the_teachers_size_is_the_teacher(kind, tmp_path):
    teacher = PAIRS[kind][:2]
    tensors, result, description = select(tmp_path, teacher * 2, include_head=True)
    student = description["student"]["model"], description["student"]["kwargs"]
    by_timm = outputs(*student, result, create=lambda name, kwargs: timm.create_model(name, **kwargs))
    assert torch.equal(by_timm, outputs(*teacher, tensors))


def positions(plan, axis):
    """The teacher's positions along an axis of the plan, as its text says: factors joined by "*", outermost first."""
    along = [0]
    for factor in axis.split("*"):
        group = plan["groups"].get(factor) or {"teacher_size": int(factor), "indices": range(int(factor))}
        along = [outer * group["teacher_size"] + inner for outer in along for inner in group["indices"]]
    return along


def as_described(plan, key, teacher):
    """A student tensor made from the plan's JSON alone; None for noise."""
    source = plan["tensors"][key]
    indices = [axis and positions(plan, axis) for axis in source["axes"]]
    tensor = None
    if source["from"]:
        tensor = teacher[source["from"]]
        tensor = taken(tensor.reshape(tensor.shape + (1,) * (len(indices) - tensor.ndim)), indices)
    for step in source.get("steps", []):
        tensor = described_step(step, tensor, teacher, indices)
    return tensor


def described_step(step, tensor, teacher, indices):
    match step:
        case "noise", *_:
            return None
        case "fill", value, shape:
            return torch.full(shape, value, dtype=torch.float64)
        case "reshape", shape:
            return tensor.reshape(shape)
        case "times", key:
            return (tensor.movedim(0, -1) * taken(teacher[key], indices[:1])).movedim(-1, 0)
        case "channels", 1:
            return tensor.sum(1, keepdim=True)
        case "channels", count:
            cycle = [channel % tensor.shape[1] for channel in range(count)]
            return tensor[:, cycle] * (tensor.shape[1] / count)
        case "patch", size:
            return resample_patch_embed(tensor, size)
        case "window", old, new:
            places = math.prod(2 * side - 1 for side in new), tensor.shape[1]
            return resize_rel_pos_bias_table(tensor, new, places, old_window_size=old)
        case "plus", key, first, count:
            return tensor + taken(teacher[key][:, first : first + count], indices)
        case "positions", rows, first, tokens, old, new:
            grid = resample_abs_pos_embed(tensor[:, tokens:], new, old, num_prefix_tokens=0)
            rows = [tensor[:, [first[row[0]] + row[1]]] if row else 0 * tensor[:, :1] for row in rows]
            return torch.cat([*rows, grid], 1)


def pair_of(row, *, same_size):
    """The models of a row of the tables above, the student as large as the teacher or smaller."""
    _, (large, small), teacher, teacher_kwargs, student, student_kwargs = row
    return teacher, {**large, **teacher_kwargs}, student, {**(large if same_size else small), **student_kwargs}


UNEQUAL = FOLDED | BEGUN | CHANGED
SMALLER = PAIRS | {kind: pair_of(row, same_size=False) for kind, row in UNEQUAL.items()}
RANDOM, INCONSISTENT = Choices("uniform", "random", "keep"), Choices("last", "random_inconsistent", seed=3)
CASES = [(kind, RANDOM) for kind in SMALLER] + [(kind, INCONSISTENT) for kind in ("vit", "swin", "resnext")]
CASES += [(kind, Choices("middle", "magnitude")) for kind in ("dinov2", "fewer, merged", "V2 of 1x1 from V1 of linear")]


@pytest.mark.parametrize(("kind", "choices"), CASES, ids=lambda value: getattr(value, "element_selection", value))
def test_student_tensors_are_what_the_description_says(kind, choices, tmp_path):
    tensors, result, description = select(tmp_path, SMALLER[kind], choices=choices)
    student = timm.create_model(description["student"]["model"], **description["student"]["kwargs"])
    rest = student.load_state_dict(result, strict=False)
    assert not rest.unexpected_keys and all(key.startswith(("head.", "head_dist.", "fc.")) for key in rest.missing_keys)
    assert result.keys() == description["plan"]["tensors"].keys()
    assert kind in PAIRS or UNEQUAL[kind][0] in "\n".join(description["plan"]["notes"])
    for key, tensor in result.items():
        expected = as_described(description["plan"], key, tensors)
        if expected is None:  # noise: small, and no two tokens alike
            assert 0 < tensor.abs().max() < 1e-5 and len(torch.unique(tensor[0], dim=0)) == tensor.shape[1]
        else:
            assert torch.equal(tensor, expected) and tensor.is_contiguous(), key


@pytest.mark.parametrize("kind", FOLDED | BEGUN)
def test_what_can_be_folded_or_begun_changes_no_output(kind, tmp_path):
    pair = pair_of(UNEQUAL[kind], same_size=True)
    tensors, result, _ = select(tmp_path, pair, include_head=True)
    students, expected = outputs(*pair[2:], result), outputs(*pair[:2], tensors)
    # float64: a folded product is rounded once more, convolutions and matrix products add up in another order
    assert torch.equal(students, expected) if kind in BEGUN else error(students, expected) < 1e-12


# a kind of each family and of each stem
STEMS = ["vit", "dinov3", "convnext", "convnext overlapping stem", "swin", "mixer", "resnet basic", "resnet deep stem"]


@pytest.mark.parametrize("kind", STEMS)
@pytest.mark.parametrize("channels", [(3, 1), (1, 3), (3, 6)])
def test_weights_for_other_channels_see_the_same_in_grey_images(kind, channels, tmp_path):
    name, kwargs = PAIRS[kind][:2]
    pair = [name, {**kwargs, "in_chans": channels[0]}, name, {**kwargs, "in_chans": channels[1]}]
    tensors, result, description = select(tmp_path, pair, include_head=True)
    expected = outputs(*pair[:2], tensors, channels=1)
    assert error(outputs(*pair[2:], result, channels=1), expected) < 1e-12
    said = f"adapted from {channels[0]} to {channels[1]} image channels"
    assert [note for note in description["plan"]["notes"] if note.endswith(said)]


@pytest.mark.parametrize("channels", [1, 4])
def test_weights_for_other_channels_are_timms(channels, tmp_path):
    tensors, result, _ = select(tmp_path, (VIT_T, VIT, VIT_T, {**VIT, "in_chans": channels}), dtype=torch.float16)
    key = "patch_embed.proj.weight"
    assert torch.equal(result[key], adapt_input_conv(channels, tensors[key].float()))
