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
    EVA,
    MIXER,
    PAIRS,
    SMALL_CONVNEXT,
    SMALL_EVA,
    SMALL_MIXER,
    SMALL_SWIN,
    SMALL_VIT,
    SWIN,
    VIT,
    random_tensors,
)
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table

import models
from models import ModelSpec
from options import SELECTION_FAMILIES
from selection.families import FAMILIES
from selection.family import Refused
from selection.plan import Group
from selection.rules import Choices
from weight_selection import make_plan, select_weights

# pairs of which one side has what the other lacks: the teacher's name and arguments, the student's
VIT_NAME, DINOV2 = "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"
EVA02, DINOV3 = "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"
CONV_MLP = {**CONVNEXT, "conv_mlp": True}
PLAIN_V2 = {**CONVNEXT, "use_grn": False}  # neither GRN nor LayerScale
POOLED = {"class_token": False, "global_pool": "avg"}
NORMED, SAPIENS = {"qk_norm": True, "embed_dim": 18}, "vit_large_patch16_sapiens2"
UNEQUAL_PAIRS = {
    "LayerScale folded": (VIT_NAME, {**VIT, "init_values": 1.0}, VIT_NAME, SMALL_VIT),
    "LayerScale begins": (VIT_NAME, VIT, VIT_NAME, {**SMALL_VIT, "init_values": 1.0}),
    "patches and image": (VIT_NAME, VIT, VIT_NAME, {**SMALL_VIT, "patch_size": 6, "img_size": 18}),
    "rows merged into tokens": (VIT_NAME, {**VIT, "reg_tokens": 4}, VIT_NAME, {**SMALL_VIT, "no_embed_class": True}),
    "rows begin": (VIT_NAME, {**VIT, "no_embed_class": True}, VIT_NAME, {**SMALL_VIT, "img_size": 24}),
    "fewer registers": (VIT_NAME, {**VIT, "reg_tokens": 4}, VIT_NAME, {**SMALL_VIT, "reg_tokens": 2}),
    "fewer registers merged": (
        VIT_NAME,
        {**VIT, "reg_tokens": 4},
        VIT_NAME,
        {**SMALL_VIT, "reg_tokens": 2, "no_embed_class": True},
    ),
    "registers begin": (VIT_NAME, VIT, VIT_NAME, {**SMALL_VIT, "reg_tokens": 2}),
    "distilled from plain": (VIT_NAME, VIT, "deit_tiny_distilled_patch16_224", SMALL_VIT),
    "plain from distilled": ("deit_tiny_distilled_patch16_224", VIT, VIT_NAME, SMALL_VIT),
    "class token left out": (VIT_NAME, VIT, VIT_NAME, {**SMALL_VIT, **POOLED}),
    "class token begins": (VIT_NAME, {**VIT, **POOLED}, VIT_NAME, SMALL_VIT),
    "pooling left out": ("vit_base_patch16_siglip_224", VIT, VIT_NAME, SMALL_VIT),
    "ViT from DINOv2": (DINOV2, VIT, VIT_NAME, {**SMALL_VIT, "patch_size": 8, "img_size": 40}),
    "biases begin": (DINOV3, EVA, f"{DINOV3}_qkvb", SMALL_EVA),
    "EVA-02 folds LayerScale": (EVA02, {**EVA, "init_values": 1.0}, EVA02, SMALL_EVA),
    "EVA-02 of other patches": (EVA02, EVA, EVA02, {**SMALL_EVA, "patch_size": 8}),
    "ConvNeXt V2 from V1": ("convnext_atto", CONV_MLP, "convnextv2_atto", SMALL_CONVNEXT),
    "linear from 1x1": ("convnext_atto", CONV_MLP, "convnext_atto", {**SMALL_CONVNEXT, "conv_mlp": False}),
    "1x1 from linear": ("convnext_atto", {**CONVNEXT, "conv_mlp": False}, "convnextv2_atto", SMALL_CONVNEXT),
    "other windows": (
        "swin_tiny_patch4_window7_224",
        SWIN,
        "swin_tiny_patch4_window7_224",
        {**SMALL_SWIN, "window_size": (2, 3), "img_size": 48, "patch_size": 4},
    ),
    "mixer of other patches": ("small_mixer", MIXER, "small_mixer", {**SMALL_MIXER, "img_size": 24, "patch_size": 6}),
}


def test_families_are_the_same_in_every_table():
    assert SELECTION_FAMILIES == tuple(models.FAMILIES) == tuple(FAMILIES)


@torch.no_grad()
def outputs(name, kwargs, tensors, create=models.create):
    """The logits for two images of noise of the model with these tensors; float64 [2, classes]."""
    model, size = create(name, kwargs), kwargs.get("img_size", 32)
    model.double().eval().load_state_dict(tensors)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model(images)


def error(found, expected):
    """The largest difference, in units of the largest value expected."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def selected(folder, pair, tensors, **options):
    """The student's tensors and the plan's description, as its file has it, from a teacher file with `tensors`."""
    teacher, teacher_kwargs, student, student_kwargs = pair
    file = folder / "teacher.safetensors"
    safetensors.torch.save_file(tensors, file)
    specs = ModelSpec(teacher, teacher_kwargs), ModelSpec(student, student_kwargs)
    result, description = select_weights(*specs, pretrained_path=str(file), **options)
    return result, json.loads(json.dumps(description))


# ---- the tables hold: a group's indices can change places in all tensors on it together, and only so ----


def shuffled(group, generator):
    """The group with its indices in another order."""
    order = generator.permutation(group.size)
    if (np.diff(order) == 1).all():
        order = order[::-1]
    return Group(group.size, order.tolist())


def moved(tensor, indices):
    for axis, positions in enumerate(indices):
        if positions is not None:
            tensor = tensor.index_select(axis, torch.tensor(positions))
    return tensor


@pytest.mark.parametrize("kind", PAIRS)
def test_shuffled_groups_leave_the_outputs_as_they_were(kind):
    name, kwargs, _, _ = PAIRS[kind]
    model = models.create(name, kwargs)
    tensors = random_tensors(model)
    expected = outputs(name, kwargs, tensors)
    plan = make_plan(model, model, Choices(heads="keep"), include_head=True, weights=None)
    assert not plan.notes and not any(source.steps for source in plan.sources.values())
    generator = np.random.default_rng(0)
    orders = {group: shuffled(plan.groups[group], generator) for group in plan.groups}

    every = replace(plan, groups=orders)
    result = {key: moved(tensor, every.indices(key)) for key, tensor in tensors.items()}
    assert error(outputs(name, kwargs, result), expected) < 1e-12  # float64: sums in another order differ by 1e-15

    # the same order in one of the tensors alone: the outputs above are not equal by chance
    several = [group for group in orders if plan.groups[group].size > 1]
    for group in several[:: math.ceil(len(several) / 5)]:
        one = replace(plan, groups=plan.groups | {group: orders[group]})
        key = next(key for key in tensors if moved(tensors[key], one.indices(key)).ne(tensors[key]).any())
        result = tensors | {key: moved(tensors[key], one.indices(key))}
        assert error(outputs(name, kwargs, result), expected) > 1e-6, (group, key)


@pytest.mark.parametrize("kind", ["vit norms in each head", "dinov3", "eva02", "eva02 separate q k v"])
def test_channels_in_a_head_that_the_table_keeps_do_not_move(kind):
    name, kwargs, _, _ = PAIRS[kind]
    model = models.create(name, kwargs)
    tensors = random_tensors(model)
    plan = make_plan(model, model, Choices(heads="keep"), include_head=True, weights=None)

    def within_head(axis):  # the 8 channels as a group
        return axis and tuple("channels" if factor == 8 else factor for factor in axis)

    sources = {key: replace(source, axes=tuple(map(within_head, source.axes))) for key, source in plan.sources.items()}
    order = replace(plan, sources=sources, groups=plan.groups | {"channels": Group(8, [1, 0, 2, 3, 4, 5, 6, 7])})
    result = {key: moved(tensor, order.indices(key)) for key, tensor in tensors.items()}
    assert not torch.equal(result["blocks.0.attn.proj.weight"], tensors["blocks.0.attn.proj.weight"])
    assert error(outputs(name, kwargs, result), outputs(name, kwargs, tensors)) > 1e-6


def test_tokens_of_a_mixer_cannot_be_shuffled():
    name, kwargs, _, _ = PAIRS["mixer"]
    tensors = random_tensors(models.create(name, kwargs))
    order = torch.tensor([1, 0, *range(2, 16)])
    result = dict(tensors)
    for key in filter(lambda key: ".mlp_tokens." in key, tensors):
        axis = {"fc1.weight": 1, "fc2.weight": 0, "fc2.bias": 0}.get(key.partition(".mlp_tokens.")[2])
        result[key] = tensors[key] if axis is None else tensors[key].index_select(axis, order)
    assert error(outputs(name, kwargs, result), outputs(name, kwargs, tensors)) > 1e-6


# ---- the student has what the plan says ----


@pytest.mark.parametrize("kind", PAIRS)
def test_student_of_the_teachers_size_is_the_teacher(kind, tmp_path):
    name, kwargs, _, _ = PAIRS[kind]
    tensors = random_tensors(models.create(name, kwargs))
    result, description = selected(tmp_path, (name, kwargs, name, kwargs), tensors, include_head=True)
    student = description["student"]["model"], description["student"]["kwargs"]
    by_timm = outputs(*student, result, create=lambda name, kwargs: timm.create_model(name, **kwargs))
    assert torch.equal(by_timm, outputs(name, kwargs, tensors))


def positions(plan, axis):
    """The teacher's positions along an axis of the plan, as its text says: factors joined by "*", outermost first."""
    found = [0]
    for factor in axis.split("*"):
        group = plan["groups"].get(factor) or {"teacher_size": int(factor), "indices": range(int(factor))}
        found = [outer * group["teacher_size"] + inner for outer in found for inner in group["indices"]]
    return found


def as_described(plan, key, teacher):
    """A student tensor made from the plan's JSON alone; None for noise."""
    source = plan["tensors"][key]
    indices = [axis and positions(plan, axis) for axis in source["axes"]]
    tensor = None
    if source["from"]:
        tensor = teacher[source["from"]].numpy()
        tensor = tensor.reshape(tensor.shape + (1,) * (len(indices) - tensor.ndim))
        for axis, kept in enumerate(indices):
            tensor = tensor if kept is None else tensor.take(kept, axis)
    for step, *arguments in source.get("steps", []):
        tensor = described_step(step, tensor, teacher, indices, arguments)
    return tensor


def described_step(step, tensor, teacher, indices, arguments):
    if step == "noise":
        return None
    if step == "fill":
        value, shape = arguments
        return np.full(shape, value)
    if step == "reshape":
        return tensor.reshape(arguments[0])
    if step == "times":
        scale = teacher[arguments[0]].numpy()
        scale = scale if indices[0] is None else scale[indices[0]]
        return (tensor.T * scale).T
    if step == "patch":
        return resample_patch_embed(torch.from_numpy(tensor), arguments[0]).numpy()
    if step == "window":
        old, new = arguments
        places = math.prod(2 * side - 1 for side in new), tensor.shape[1]
        return resize_rel_pos_bias_table(torch.from_numpy(tensor), new, places, old_window_size=old).numpy()
    if step == "plus":
        key, first, count = arguments
        rows = teacher[key].numpy()[:, first : first + count]
        rows = rows if indices[1] is None else rows.take(indices[1], 1)
        return tensor + rows.take(indices[2], 2)
    assert step == "positions"
    rows, first, tokens, old, new = arguments
    grid = resample_abs_pos_embed(torch.from_numpy(tensor[:, tokens:]), new, old, num_prefix_tokens=0).numpy()
    rows = [tensor[:, [first[row[0]] + row[1]]] if row else 0 * tensor[:, :1] for row in rows]
    return np.concatenate([*rows, grid], 1)


RANDOM, INCONSISTENT = Choices("uniform", "random", "keep"), Choices("last", "random_inconsistent", seed=3)
CASES = [(kind, RANDOM) for kind in PAIRS | UNEQUAL_PAIRS]
CASES += [(kind, INCONSISTENT) for kind in ("vit", "swin", "resnext")]
CASES += [(kind, Choices("middle", "magnitude")) for kind in ("dinov2", "fewer registers merged", "1x1 from linear")]


@pytest.mark.parametrize(("kind", "choices"), CASES, ids=lambda value: getattr(value, "element_selection", value))
def test_student_tensors_are_what_the_description_says(kind, choices, tmp_path):
    pair = (PAIRS | UNEQUAL_PAIRS)[kind]
    tensors = random_tensors(models.create(*pair[:2]))
    result, description = selected(tmp_path, pair, tensors, choices=choices)
    student = timm.create_model(description["student"]["model"], **description["student"]["kwargs"])
    rest = student.load_state_dict(result, strict=False)
    assert not rest.unexpected_keys and all(key.startswith(("head.", "head_dist.", "fc.")) for key in rest.missing_keys)
    assert result.keys() == description["plan"]["tensors"].keys()
    for key, tensor in result.items():
        expected = as_described(description["plan"], key, tensors)
        if expected is None:  # noise: small, and no two tokens alike
            assert 0 < tensor.abs().max() < 1e-5 and len(torch.unique(tensor[0], dim=0)) == tensor.shape[1]
        else:
            assert np.array_equal(tensor.numpy(), expected), key
            assert tensor.is_contiguous()


# ---- what only one side has changes nothing if it can be folded or begun so ----


SAME_FUNCTION = {
    "ViT folds LayerScale": (VIT_NAME, {**VIT, "init_values": 1.0}, VIT_NAME, VIT),
    "parallel ViT folds LayerScale": (
        "vit_small_patch16_18x2_224",
        {**VIT, "init_values": 1.0},
        "vit_small_patch16_18x2_224",
        {**VIT, "init_values": 0},
    ),
    "EVA-02 folds LayerScale": (EVA02, {**EVA, "init_values": 1.0}, EVA02, EVA),
    "ConvNeXt folds LayerScale": ("convnext_atto", CONV_MLP, "convnextv2_atto", PLAIN_V2),
    "ConvNeXt V2 from V1": ("convnext_atto", CONV_MLP, "convnextv2_atto", CONVNEXT),
    "rows of the tokens merged": (
        VIT_NAME,
        {**VIT, "reg_tokens": 2},
        VIT_NAME,
        {**VIT, "reg_tokens": 2, "no_embed_class": True},
    ),
    "DINOv2 folds and keeps its registers": (DINOV2, VIT, VIT_NAME, {**VIT, "reg_tokens": 4, "no_embed_class": True}),
}
SAME_OUTPUTS = {
    "ViT begins LayerScale": (VIT_NAME, VIT, VIT_NAME, {**VIT, "init_values": 1e-5}),
    "EVA-02 begins LayerScale": (EVA02, EVA, EVA02, {**EVA, "init_values": 1e-5}),
    "DINOv3 begins biases": (DINOV3, EVA, f"{DINOV3}_qkvb", EVA),
    "ConvNeXt begins LayerScale": ("convnextv2_atto", PLAIN_V2, "convnext_atto", CONV_MLP),
    "ConvNeXt V2 from plain": ("convnextv2_atto", PLAIN_V2, "convnextv2_atto", CONVNEXT),
    "rows of the tokens begin": (VIT_NAME, {**VIT, "no_embed_class": True}, VIT_NAME, VIT),
    "registers get rows": (DINOV2, VIT, DINOV2, {**VIT, "no_embed_class": False}),
}


@pytest.mark.parametrize("kind", SAME_FUNCTION)
def test_what_is_folded_or_merged_leaves_the_outputs_equal(kind, tmp_path):
    pair = SAME_FUNCTION[kind]
    tensors = random_tensors(models.create(*pair[:2]))
    result, description = selected(tmp_path, pair, tensors, include_head=True)
    assert description["plan"]["notes"]
    assert error(outputs(*pair[2:], result), outputs(*pair[:2], tensors)) < 1e-12  # float64: one rounding more each


@pytest.mark.parametrize("kind", SAME_OUTPUTS)
def test_what_begins_without_effect_leaves_the_outputs_equal(kind, tmp_path):
    pair = SAME_OUTPUTS[kind]
    tensors = random_tensors(models.create(*pair[:2]))
    result, description = selected(tmp_path, pair, tensors, include_head=True)
    assert any("changes nothing" in note or "begins at 0" in note for note in description["plan"]["notes"])
    assert torch.equal(outputs(*pair[2:], result), outputs(*pair[:2], tensors))


@pytest.mark.parametrize("teacher_has", [True, False], ids=["conv to linear", "linear to conv"])
def test_1x1_convolutions_and_linear_layers_have_the_same_values(teacher_has, tmp_path):
    kwargs = [{**CONVNEXT, "conv_mlp": has} for has in (teacher_has, not teacher_has)]
    tensors = random_tensors(models.create("convnext_atto", kwargs[0], device="meta"))
    result, _ = selected(tmp_path, ("convnext_atto", kwargs[0], "convnext_atto", kwargs[1]), tensors, include_head=True)
    key = "stages.2.blocks.1.mlp.fc1.weight"
    assert sorted((tensors[key].ndim, result[key].ndim)) == [2, 4]
    assert result.keys() == tensors.keys()
    assert all(torch.equal(result[key].flatten(), tensors[key].flatten()) for key in tensors)
    # convolutions and matrix products add up in another order
    assert error(outputs("convnext_atto", kwargs[1], result), outputs("convnext_atto", kwargs[0], tensors)) < 1e-12


@pytest.mark.parametrize(
    ("teacher", "student", "reason", "message"),
    [
        (
            ("convnextv2_atto", CONVNEXT),
            ("convnext_atto", SMALL_CONVNEXT),
            "leftover",
            r"grn\.weight .* no counterpart",
        ),
        ((VIT_NAME, {**VIT, "qk_norm": True}), (VIT_NAME, SMALL_VIT), "leftover", r"q_norm\.weight .* no counterpart"),
        ((VIT_NAME, VIT), (VIT_NAME, {**SMALL_VIT, **NORMED}), "no teacher tensor", r"attn\.q_norm\.weight"),
        ((DINOV2, VIT), (DINOV2, {**SMALL_VIT, "reg_tokens": 5}), "narrower", r"reg_token: .*1, 4, 24\].*\[1, 5, 12\]"),
        (("resnet18", {}), ("resnet50", {}), "other layers", "BasicBlock, the student's Bottleneck"),
        ((SAPIENS, {}), (SAPIENS, {}), "unknown tensor", r"k_proj\.weight is not a tensor"),
        (
            ("resnet50_gn", {}),
            ("resnet50_gn", {}),
            "unknown tensor",
            r"bn1\.weight is not a tensor that this family knows",
        ),
        (
            ("small_mixer", MIXER),
            ("small_mixer", {**SMALL_MIXER, "img_size": 12}),
            "fixed axis",
            "mlp_tokens.fc1.weight",
        ),
    ],
)
def test_pairs_that_would_compute_something_else_are_refused(teacher, student, reason, message):
    teacher, student = (models.create(*model, device="meta") for model in (teacher, student))
    with pytest.raises(Refused, match=message) as refused:
        make_plan(teacher, student, Choices(), include_head=False, weights=None)
    assert refused.value.reason == reason
