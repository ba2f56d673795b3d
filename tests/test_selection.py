"""The plan: consistency, heads, and pairs of any sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import layout, plan_of

from models import ModelSpec
from selection.family import Refused
from selection.rules import LAYER_RULES, Choices, evenly_spaced
from utils import UserError
from weight_selection import select_weights

VIT_B, VIT_L, VIT_T = "vit_base_patch16_224", "vit_large_patch16_224", "vit_tiny_patch16_224"
DINOV3_S, DINOV3_T, SWIN_T = "vit_small_patch16_dinov3", "vit_tiny_patch16_dinov3_qkvb", "swin_tiny_patch4_window7_224"


# ---- consistency ----


def agree(qkv, proj, width):
    """Whether q, k and v take from their blocks of `width` rows the channels that proj reads, and all the same stream."""
    rows, columns = qkv
    blocks = [[row - width * block for row in rows if row // width == block] for block in range(3)]
    return blocks == [proj[1]] * 3 and columns == proj[0]


def test_vit_l_is_cut_consistently_unlike_by_the_original():
    original = {
        "qkv": (evenly_spaced(3072, 576), evenly_spaced(1024, 192)),
        "proj": (evenly_spaced(1024, 192), evenly_spaced(1024, 192)),
    }
    assert not agree(original["qkv"], original["proj"], 1024)
    for heads in ("blend", "keep"):
        plan = plan_of(layout(VIT_L), layout(VIT_T), Choices(heads=heads))
        for block in range(12):
            qkv, proj = (plan.indices(f"blocks.{block}.attn.{name}.weight") for name in ("qkv", "proj"))
            assert agree(qkv, proj, 1024)
            assert plan.indices(f"blocks.{block}.attn.qkv.bias") == [qkv[0]]


def test_two_fused_blocks_and_four_merged_patches_are_cut_alike():
    dinov2 = "vit_giant_patch14_reg4_dinov2"
    plan = plan_of(
        layout(dinov2, depth=1), layout(dinov2, depth=1, embed_dim=192, num_heads=3), Choices("first", "random")
    )
    gate, value = np.split(np.array(plan.indices("blocks.0.mlp.fc1.bias")[0]), 2)
    assert gate.tolist() == (value - 4096).tolist() == plan.indices("blocks.0.mlp.fc2.weight")[1]
    plan = plan_of(layout("swin_base_patch4_window7_224"), layout(SWIN_T), Choices("first", "random"))
    merged = np.split(np.array(plan.indices("layers.1.downsample.reduction.weight")[1]), 4)
    stage = plan.indices("layers.0.blocks.0.norm1.weight")[0]
    assert [(part - 128 * number).tolist() for number, part in enumerate(merged)] == [stage] * 4


@pytest.mark.parametrize("element_selection", ["uniform", "random", "random_inconsistent"])
def test_an_mlp_with_a_gate_is_no_cut_of_one_without_by_any_rule(element_selection):
    with pytest.raises(Refused, match=r"blocks\.0\.mlp\.fc1\.weight: only the student's MLP has a gate") as refused:
        plan_of(
            layout(VIT_B, init_values=1.0),
            layout(
                "vit_giant_patch14_reg4_dinov2",
                embed_dim=192,
                depth=12,
                num_heads=3,
                mlp_ratio=4,
                patch_size=16,
                img_size=224,
            ),
            Choices("first", element_selection),
        )
    assert refused.value.reason == "other layers"


# ---- heads ----


def test_kept_heads_are_whole():
    plan = plan_of(layout(VIT_B), layout(VIT_T), Choices(heads="keep"))
    assert plan.heads == "keep"
    for block in range(12):
        columns = plan.indices(f"blocks.{block}.attn.proj.weight")[1]
        # three of twelve heads, evenly spaced: 0, 4, 8
        assert columns == [64 * head + channel for head in (0, 4, 8) for channel in range(64)]
        assert plan.indices(f"blocks.{block}.attn.qkv.bias") == [
            [768 * part + column for part in range(3) for column in columns]
        ]


def test_channels_within_kept_heads_are_chosen_if_sizes_differ():
    small = {"depth": 1, "num_heads": 2, "embed_dim": 64}
    plan = plan_of(layout(VIT_B, depth=1), layout(VIT_T, **small), Choices(heads="keep"))
    # heads 0 and 6 of twelve, every second of their 64 channels
    assert plan.indices("blocks.0.attn.proj.weight")[1] == [64 * h + c for h in (0, 6) for c in range(0, 64, 2)]


def test_blended_heads_are_the_default_and_the_published_rule():
    plan = plan_of(layout(VIT_B), layout(VIT_T))
    assert plan.heads == "blend"
    assert plan.indices("blocks.3.attn.proj.weight")[1] == list(range(0, 768, 4))


@pytest.mark.parametrize("kwargs", [{}, {"depth": 2}])
def test_rotary_heads_are_kept_and_the_description_says_so(kwargs):
    pair = ModelSpec("vit_small_patch16_dinov3_qkvb"), ModelSpec("vit_tiny_patch16_dinov3_qkvb", kwargs)
    tensors, description = select_weights(*pair, plan_only=True)
    assert not tensors and description["choices"]["heads"] == "keep"
    groups = description["plan"]["groups"]
    assert groups["blocks.1.attn.heads"] == {"teacher_size": 6, "indices": [0, 2, 4]}
    assert description["plan"]["tensors"]["blocks.1.attn.qkv.weight"]["axes"] == ["3*blocks.1.attn.heads*64", "stream"]
    assert select_weights(ModelSpec(VIT_B), ModelSpec(VIT_T), plan_only=True)[1]["choices"]["heads"] == "blend"


@pytest.mark.parametrize(
    ("teacher", "student", "kwargs", "heads", "message"),
    [
        (DINOV3_S, DINOV3_T, {}, "blend", "--heads blend: .*use --heads keep"),
        (DINOV3_S, DINOV3_T, {"num_heads": 6}, None, "heads have 64 channels, the student's 32; they must be equal"),
        (VIT_T, VIT_T, {"num_heads": 6}, "keep", "has 6 heads, the teacher 3; --heads blend takes"),
        (VIT_T, VIT_T, {"num_heads": 1}, "keep", "192 channels in each head, the teacher 64; --heads blend takes"),
        (SWIN_T, SWIN_T, {"num_heads": (3, 6, 24, 24)}, None, "the student has 24 heads, the teacher 12$"),
        (SWIN_T, SWIN_T, {"num_heads": (3, 6, 24, 24)}, "keep", "the student has 24 heads, the teacher 12$"),
    ],
)
def test_heads_that_do_not_fit_are_refused(teacher, student, kwargs, heads, message):
    with pytest.raises(Refused, match=message) as refused:
        plan_of(layout(teacher), layout(student, **kwargs), Choices(heads=heads))
    assert refused.value.reason == "heads"


# ---- pairs of any sizes ----

PROPERTY = settings(derandomize=True, database=None, deadline=None, max_examples=25)
RULES = st.sampled_from(list(LAYER_RULES))
ELEMENTS = st.sampled_from(["uniform", "consecutive", "random", "random_inconsistent"])
CHOICES = st.builds(Choices, RULES, ELEMENTS, st.sampled_from([None, "blend", "keep"]), st.integers(0, 2**32))
VITS = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.sampled_from([1, 2, 4]))
SWINS = st.tuples(st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(1, 5), min_size=4, max_size=4))
STAGES = st.lists(st.tuples(st.integers(1, 3), st.integers(3, 9)), min_size=4, max_size=4)


def any_vit(sizes):
    heads, channels, depth, ratio = sizes
    shape = {"img_size": 32, "embed_dim": heads * channels, "num_heads": heads, "depth": depth, "mlp_ratio": ratio}
    return layout(VIT_T, device="cpu", **shape)


def any_resnet(sizes):
    depths, widths = zip(*sizes, strict=True)
    return layout("resnet26d", device="cpu", layers=depths, channels=widths)


def any_convnext(sizes):
    depths, widths = zip(*sizes, strict=True)
    return layout("convnext_atto", device="cpu", depths=depths, dims=widths)


def any_swin(sizes):
    heads, channels, depths = sizes
    shape = {"img_size": 32, "patch_size": 2, "window_size": 2, "embed_dim": heads * channels, "depths": depths}
    heads = [heads, heads, 2 * heads, 2 * heads]
    return layout(SWIN_T, device="cpu", **shape, num_heads=heads)


def check_plan(teacher, student, choices, possible):
    """A plan is made if and only if it is possible, and covers each student tensor exactly once; returns it."""
    try:
        plan = plan_of(teacher, student, choices)
    except Refused as refused:
        assert not possible and str(refused) and refused.reason
        return None
    assert possible
    assert list(plan.sources) == list(student[0].shapes)
    for group in (*plan.groups.values(), *plan.layers.values()):
        assert group.kept == sorted(set(group.kept)) and group.kept[0] >= 0 and group.kept[-1] < group.size
    for key, shape in student[0].shapes.items():
        indices = plan.indices(key)
        whole = teacher[0].shapes[plan.sources[key].key]
        taken = [size if kept is None else len(kept) for kept, size in zip(indices, whole, strict=False)]
        assert (*taken, *whole[len(taken) :]) == shape, key
        for kept, size in zip(indices, whole, strict=False):
            assert kept is None or (kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < size), key
    again = plan_of(teacher, student, choices)
    assert (again.groups, again.sources, again.layers) == (plan.groups, plan.sources, plan.layers)
    return plan


@PROPERTY
@given(VITS, VITS, CHOICES)
def test_vits_are_planned_if_and_only_if_the_student_fits(teacher, student, choices):
    possible = teacher[0] * teacher[1] >= student[0] * student[1] and teacher[2] >= student[2]
    possible &= int(teacher[0] * teacher[1] * teacher[3]) >= int(student[0] * student[1] * student[3])
    if choices.heads == "keep":
        possible &= teacher[0] >= student[0] and teacher[1] >= student[1]
    check_plan(any_vit(teacher), any_vit(student), choices, possible)


@pytest.mark.parametrize("build", [any_resnet, any_convnext])
@PROPERTY
@given(STAGES, STAGES, CHOICES, st.booleans())
def test_staged_models_are_planned_if_and_only_if_they_fit(build, teacher, student, choices, fit):
    if fit:  # two at random hardly ever do
        student = [tuple(map(min, *stages)) for stages in zip(teacher, student, strict=True)]
    possible = all(
        small <= large for pair in zip(student, teacher, strict=True) for small, large in zip(*pair, strict=True)
    )
    check_plan(build(teacher), build(student), choices, possible)


@PROPERTY
@given(SWINS, SWINS, CHOICES)
def test_swins_are_planned_if_and_only_if_the_student_fits(teacher, student, choices):
    # the tables of relative positions have an axis of heads, whether these are kept whole or not
    possible = teacher[0] >= student[0] and teacher[0] * teacher[1] >= student[0] * student[1]
    possible &= all(there >= own for there, own in zip(teacher[2], student[2], strict=True))
    if choices.heads == "keep":
        possible &= teacher[1] >= student[1]
    plan = check_plan(any_swin(teacher), any_swin(student), choices, possible)
    for group in plan.layers.values() if plan else ():
        assert all(layer % 2 == number % 2 for number, layer in enumerate(group.kept))


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (
            "resnext50_32x4d",
            "resnet50",
            "layer1.0.conv1.weight: layer1.0.in has size 64 in the student, 4 in the teacher$",
        ),
        ("wide_resnet50_2", "resnext50_32x4d", "layer1.0.conv2.groups has size 32 in the student, 1 in the teacher$"),
        ("resnet26", "resnet26d", "the teacher has no tensor conv1.0.weight, which the student needs"),
        ("resnet50", "wide_resnet50_2", r"\[64, 64, 1, 1\] is smaller than the student's \[128, 64, 1, 1\]"),
    ],
)
def test_refusals_say_what_is_smaller(teacher, student, message):
    with pytest.raises(Refused, match=message):
        plan_of(layout(teacher), layout(student))


@pytest.mark.parametrize("pooled_is", ["student", "teacher"])
def test_norms_before_and_after_pooling_stand_for_each_other(pooled_is):
    shape = {"depth": 1, "num_heads": 3}
    pooled = layout(VIT_T, **shape, class_token=False, global_pool="avg")
    plan = (
        plan_of(layout(VIT_T, **shape), pooled) if pooled_is == "student" else plan_of(pooled, layout(VIT_T, **shape))
    )
    own, there = ("fc_norm", "norm") if pooled_is == "student" else ("norm", "fc_norm")
    for part in ("weight", "bias"):
        assert plan.sources[f"{own}.{part}"].key == f"{there}.{part}"
        assert f"{own}.{part} from the teacher's {there}.{part}" in plan.notes


def test_a_student_without_channels_is_refused():
    student = layout("resnext50_32x4d", device="cpu", channels=(8, 16, 32, 64))  # 8 * 4 / 64 channels a group: 0
    with pytest.raises(Refused, match="leaves nothing for layer1.0.in") as refused:
        plan_of(layout("resnext50_32x4d"), student)
    assert refused.value.reason == "widths"


def test_other_layers_and_other_families_are_refused():
    with pytest.raises(UserError, match="is of the family swin, .* of the family vit"):
        select_weights(ModelSpec(SWIN_T), ModelSpec(VIT_T), plan_only=True)
    with pytest.raises(Refused, match="ParallelThingsBlock") as refused:
        plan_of(layout("vit_small_patch16_18x2_224"), layout(VIT_T))
    assert refused.value.reason == "other layers"
