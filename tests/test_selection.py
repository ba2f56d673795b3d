"""The plan: consistency, heads, pairs of any sizes, and what is refused or noted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SWIN_T, VIT, VIT_B, VIT_L, VIT_T, indices_of, layout, plan_of, vit_layout

from models import ModelSpec
from options.parser import keyword
from options.selection import LAYER_RULES
from selection.family import Refused
from selection.rules import Choices, evenly_spaced
from utils import UserError
from weight_selection import select_weights

# ---- consistency ----


def agree(qkv, proj, width):
    """Tell whether q, k and v take the channels that proj reads, each from its `width` rows, and share one stream."""
    rows, columns = qkv
    blocks = [[row - width * block for row in rows if row // width == block] for block in range(3)]
    return blocks == [proj[1]] * 3 and columns == proj[0]


def test_vit_l_is_cut_consistently_unlike_by_the_original():
    stream = evenly_spaced(1024, 192)
    assert not agree((evenly_spaced(3072, 576), stream), (stream, stream), 1024)
    for heads in ("blend", "keep"):
        plan = plan_of(layout(VIT_L), layout(VIT_T), Choices(heads=heads))
        for block in range(12):
            qkv, proj = (indices_of(plan, f"blocks.{block}.attn.{name}.weight") for name in ("qkv", "proj"))
            assert agree(qkv, proj, 1024)
            assert indices_of(plan, f"blocks.{block}.attn.qkv.bias") == [qkv[0]]


def test_qkv_is_cut_in_three_blocks_if_widths_do_not_divide():
    shapes = {"blocks.0.attn.qkv.weight": (30, 10), "blocks.0.attn.proj.weight": (10, 10)}
    smaller = {"blocks.0.attn.qkv.weight": (21, 7), "blocks.0.attn.proj.weight": (7, 7)}
    plan = plan_of(vit_layout(shapes), vit_layout(smaller))
    kept = [0, 2, 3, 4, 6, 8, 9]  # 10 -> 7 of the original
    rows = kept + [10 + i for i in kept] + [20 + i for i in kept]
    assert [indices_of(plan, key) for key in shapes] == [[rows, kept], [kept, kept]]


# ---- heads ----


@pytest.mark.parametrize(
    ("student", "heads", "expected"),
    [
        # three of twelve heads, evenly spaced
        ({}, "keep", [64 * head + channel for head in (0, 4, 8) for channel in range(64)]),
        # two of them, and every second of their 64 channels
        ({"num_heads": 2, "embed_dim": 64}, "keep", [64 * head + c for head in (0, 6) for c in range(0, 64, 2)]),
        ({}, None, list(range(0, 768, 4))),  # the published rule
    ],
)
def test_heads_are_kept_whole_or_blended(student, heads, expected):
    plan = plan_of(layout(VIT_B), layout(VIT_T, **student), Choices(heads=heads))
    assert plan.heads == (heads or "blend")
    for block in range(12):
        assert indices_of(plan, f"blocks.{block}.attn.proj.weight")[1] == expected
        rows = [768 * part + column for part in range(3) for column in expected]
        assert indices_of(plan, f"blocks.{block}.attn.qkv.bias") == [rows]


def test_rotary_heads_are_kept_and_the_description_says_so():
    pair = ModelSpec("vit_small_patch16_dinov3_qkvb"), ModelSpec("vit_tiny_patch16_dinov3_qkvb")
    tensors, description = select_weights(*pair, plan_only=True)
    assert not tensors and description["choices"]["heads"] == "keep"
    groups = description["plan"]["groups"]
    assert groups["blocks.1.attn.heads"] == {"teacher_size": 6, "indices": [0, 2, 4]}
    assert description["plan"]["tensors"]["blocks.1.attn.qkv.weight"]["axes"] == ["3*blocks.1.attn.heads*64", "stream"]


# ---- pairs of any sizes ----

PROPERTY = settings(derandomize=True, database=None, deadline=None, max_examples=25)
RULES = st.sampled_from(LAYER_RULES)
ELEMENTS = st.sampled_from(["uniform", "consecutive", "random", "random_inconsistent"])
CHOICES = st.builds(Choices, RULES, ELEMENTS, st.sampled_from([None, "blend", "keep"]), st.integers(0, 2**32))
VITS = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.sampled_from([1, 2, 4]))
SWINS = st.tuples(st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(1, 5), min_size=4, max_size=4))
STAGES = st.lists(st.tuples(st.integers(1, 3), st.integers(3, 9)), min_size=4, max_size=4)


def any_vit(sizes):
    heads, channels, depth, ratio = sizes
    shape = {"img_size": 32, "embed_dim": heads * channels, "num_heads": heads, "depth": depth, "mlp_ratio": ratio}
    return layout(VIT_T, "cpu", **shape)


def any_swin(sizes):
    heads, channels, depths = sizes
    shape = {"img_size": 32, "patch_size": 2, "window_size": 2, "embed_dim": heads * channels, "depths": depths}
    heads = [heads, heads, 2 * heads, 2 * heads]
    return layout(SWIN_T, "cpu", **shape, num_heads=heads)


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
        indices = indices_of(plan, key)
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


@pytest.mark.parametrize("names", ["resnet26d layers channels", "convnext_atto depths dims"])
@PROPERTY
@given(STAGES, STAGES, CHOICES, st.booleans())
def test_staged_models_are_planned_if_and_only_if_they_fit(names, teacher, student, choices, fit):
    if fit:  # two at random hardly ever do
        student = [tuple(map(min, *stages)) for stages in zip(teacher, student, strict=True)]
    (depths, widths), (teacher_depths, teacher_widths) = (zip(*stages, strict=True) for stages in (student, teacher))
    sizes = zip((*teacher_depths, *teacher_widths), (*depths, *widths), strict=True)
    possible = all(large >= small for large, small in sizes)
    name, depth, width = names.split()
    pair = [{depth: teacher_depths, width: teacher_widths}, {depth: depths, width: widths}]
    check_plan(*(layout(name, "cpu", **kwargs) for kwargs in pair), choices, possible)


@PROPERTY
@given(SWINS, SWINS, CHOICES)
def test_swins_are_planned_if_and_only_if_the_student_fits(teacher, student, choices):
    # the tables of relative positions have an axis of heads, whether these are kept whole or not
    possible = teacher[0] >= student[0] and teacher[0] * teacher[1] >= student[0] * student[1]
    possible &= all(large >= small for large, small in zip(teacher[2], student[2], strict=True))
    if choices.heads == "keep":
        possible &= teacher[1] >= student[1]
    plan = check_plan(any_swin(teacher), any_swin(student), choices, possible)
    for group in plan.layers.values() if plan else ():
        assert all(layer % 2 == number % 2 for number, layer in enumerate(group.kept))


# ---- what does not fit, and what only differs ----

# the reason that refusals are counted by; the teacher; the student; the choices; what the message says
REFUSED = r"""
depth | vit | vit depth=4 | | blocks: the student has 4 layers, the teacher 3
narrower | vit | vit embed_dim=48 | | cls_token: the teacher's \[1, 1, 24\] is smaller than the student's \[1, 1, 48\]
narrower | vit | vit mlp_ratio=10 | | mlp.fc1.weight: the teacher's \[96, 24\] is smaller than the student's \[240, 24\]
narrower | vit reg_tokens=4 | vit reg_tokens=5 | | reg_token: .*\[1, 4, 24\].*\[1, 5, 24\]
narrower | resnet50 | wide_resnet50_2 | | \[64, 64, 1, 1\] is smaller than the student's \[128, 64, 1, 1\]
narrower | resnext50_32x4d | resnet50 | | layer1.0.conv1.weight: layer1.0.in has size 64 in the student, 4 in the teacher$
narrower | wide_resnet50_2 | resnext50_32x4d | | layer1.0.conv2.groups has size 32 in the student, 1 in the teacher$
widths | resnext50_32x4d | resnext50_32x4d channels=(8,16,32,64) | | leaves nothing for layer1.0.in
fixed axis | small_mixer | small_mixer img_size=112 | | mlp_tokens.fc1.weight
positions | vit | vit img_size=2 | | 0x0 patches: they are smaller than a patch
leftover | convnextv2_atto | convnext_atto | | grn\.weight .* no counterpart
leftover | vit qk_norm=True | vit | | q_norm\.weight .* no counterpart
leftover | vit | vit pos_embed='' | | the teacher's pos_embed \[1, 17, 24\] has no counterpart
leftover | vit | vit qkv_bias=False | | blocks\.0\.attn\.qkv\.bias .* has no counterpart in the student
no teacher tensor | vit | vit qk_norm=True | | attn\.q_norm\.weight
no teacher tensor | resnet26 | resnet26d | | the teacher has no tensor conv1.0.weight, which the student needs
unknown tensor | vit_large_patch16_sapiens2 | vit_large_patch16_sapiens2 | | k_proj\.weight is not a tensor
unknown tensor | resnet50_gn | resnet50_gn | | bn1\.weight is not a tensor that this family knows
other layers | resnet18 | resnet50 | | BasicBlock, the student's Bottleneck
other layers | vit_small_patch16_18x2_224 | vit | | ParallelThingsBlock
other layers | vit | vit_giant_patch14_reg4_dinov2 | | blocks\.0\.mlp\.fc1\.weight: only the student's MLP has a gate
other layers | vit | vit_giant_patch14_reg4_dinov2 | element_selection=random_inconsistent | fc1.weight: only the student's MLP has a gate
other layers | vit norm_layer=rmsnorm | vit | | norms: the teacher's are RMSNorm, the student's LayerNorm
other layers | rotary | rotary rope_rotate_half=False | | rotary positions: .* RotaryEmbeddingDinoV3 of halves, the student's
other layers | rotary | rotary rope_type=cat | | rotary positions: .* RotaryEmbeddingDinoV3 of halves, the student's
other layers | rotary | rotary use_rot_pos_emb=False | | rotary positions: .* RotaryEmbeddingDinoV3 of halves, the student's none
heads | rotary | rotary | heads=blend | --heads blend: .*use --heads keep
heads | vit_small_patch16_dinov3_qkvb | rotary num_heads=6 | | heads have 64 channels, the student's 32; they must be equal
heads | vit | vit num_heads=6 | heads=keep | has 6 heads, the teacher 4; --heads blend takes
heads | vit | vit num_heads=1 | heads=keep | 24 channels in each head, the teacher 6; --heads blend takes
heads | swin | swin num_heads=(3,6,24,24) | | has 24 heads, the teacher 12$
heads | swin | swin num_heads=(3,6,24,24) | heads=keep | 24 heads, the teacher 12$
"""


def keywords(words):
    return dict(map(keyword, words))


def named(model):
    """The layout of a model of the table: its name, or that of a small one, and further arguments."""
    name, *words = model.split()
    known = {"vit": (VIT_T, VIT), "swin": (SWIN_T, {}), "rotary": ("vit_tiny_patch16_dinov3_qkvb", {})}
    name, kwargs = known.get(name, (name, {}))
    return layout(name, **{**kwargs, **keywords(words)})


@pytest.mark.parametrize("row", REFUSED.strip().splitlines())
def test_pairs_that_do_not_fit_are_refused(row):
    reason, teacher, student, choices, message = map(str.strip, row.split("|"))
    with pytest.raises(Refused, match=message) as refused:
        plan_of(named(teacher), named(student), Choices(**keywords(choices.split())))
    assert refused.value.reason == reason


def test_other_families_are_refused():
    with pytest.raises(
        UserError, match="swin_tiny_patch4_window7_224 is of the family swin, vit_tiny of the family vit"
    ):
        select_weights(ModelSpec(SWIN_T), ModelSpec("vit_tiny"), plan_only=True)


@pytest.mark.parametrize(
    ("larger", "asks"), [("depth=4", True), ("embed_dim=48", True), ("embed_dim=48 depth=2", False)]
)
def test_larger_student_that_would_be_a_teacher_is_asked_about(larger, asks):
    pair = ModelSpec(VIT_T, VIT), ModelSpec(VIT_T, {**VIT, **keywords(larger.split())})
    with pytest.raises(Refused) as refused:
        select_weights(*pair, pretrained_path="not/read/yet.pth")
    question = "; are teacher and student swapped? The other way round they fit"
    assert str(refused.value).endswith(question) == asks


def test_other_activation_is_noted_and_pooling_with_the_head():
    plan = plan_of(layout(VIT_T, **VIT, act_layer="quick_gelu"), layout(VIT_T, **VIT))
    assert plan.notes == {"activation: the teacher's is QuickGELU, the student's GELU": set()}
    for include_head in (True, False):
        pooled = [{}, {"global_pool": "avg", "fc_norm": False}]
        notes = plan_of(*(layout(VIT_T, include_head=include_head, **VIT, **more) for more in pooled)).notes
        assert ("pooling: the teacher's is token, the student's avg" in notes) == include_head
