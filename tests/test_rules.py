"""The rules: which layers a student takes, and which indices of an axis group."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SWIN_T, VIT_B, VIT_T, indices_of, layout, plan_of, selected, vit_layout

from options.selection import ELEMENT_RULES, LAYER_RULES, SCORED_RULES
from selection.activations.scores import activation_scores
from selection.families import FAMILIES
from selection.family import Layout
from selection.match import match
from selection.plan import choose
from selection.refit import Refit
from selection.rules import Choices, select_indices, select_layers
from selection.tensors import magnitudes, select

# ---- layers ----


@pytest.mark.parametrize(
    ("source", "target", "kinds", "expected"),
    [
        # middle: one more after it than before; uniform: of 0, 2.75, 5.5, 8.25, 11, ties to even
        (12, 5, {}, "first 0 1 2 3 4, middle 3 4 5 6 7, last 7 8 9 10 11, uniform 0 3 6 8 11"),
        (12, 4, {}, "first 0 1 2 3, middle 4 5 6 7, last 8 9 10 11, uniform 0 3 6 9"),
        (4, 4, {}, "first 0 1 2 3, middle 0 1 2 3, last 0 1 2 3, uniform 0 1 2 3"),
        # uniform: of the 5 others the first and the last
        (6, 3, {"first_stays": True}, "first 0 1 2, middle 0 2 3, last 0 4 5, uniform 0 1 5"),
        (6, 1, {"first_stays": True}, "last 0"),
        (18, 6, {"turns": 2}, "first 0 1 2 3 4 5, middle 6 7 8 9 10 11, last 12 13 14 15 16 17, uniform 0 1 6 7 12 13"),
        # uniform: the first and the last of 3 rounds; the second loses its end
        (6, 3, {"turns": 2}, "uniform 0 1 4, last 2 3 4"),
        (5, 3, {"turns": 2}, "last 2 3 4"),
        (5, 4, {"turns": 2}, "last 0 1 2 3"),
        (2, 1, {"turns": 2}, "last 0"),
    ],
)
def test_layers_are_those_worked_out_by_hand(source, target, kinds, expected):
    for rule, *layers in map(str.split, expected.split(",")):
        assert select_layers(rule, source, target, **kinds) == list(map(int, layers)), rule


PROPERTY = settings(derandomize=True, database=None, deadline=None)
RULES = st.sampled_from(LAYER_RULES)
ELEMENTS = st.sampled_from(ELEMENT_RULES)


@PROPERTY
@given(RULES, st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(1, 2))
def test_layers_ascend_and_keep_their_kind(rule, source, target, first_stays, turns):
    if target > source:
        with pytest.raises(ValueError, match=f"{target} of {source} layers"):
            select_layers(rule, source, target, first_stays=first_stays, turns=turns)
        return
    layers = select_layers(rule, source, target, first_stays=first_stays, turns=1 if first_stays else turns)
    assert layers == sorted(set(layers)) and len(layers) == target and layers[0] >= 0 and layers[-1] < source
    if first_stays:
        assert layers[0] == 0
    else:
        assert all(layer % turns == number % turns for number, layer in enumerate(layers))


@pytest.mark.parametrize("rule", LAYER_RULES)
def test_swin_keeps_its_windows_and_resnet_its_first_layers(rule):
    choices = Choices(rule)
    swin = plan_of(layout("swin_base_patch4_window7_224"), layout(SWIN_T, depths=(2, 2, 5, 2)), choices)
    assert {name: group.size for name, group in swin.layers.items()} == {
        f"layers.{stage}.blocks": depth for stage, depth in enumerate((2, 2, 18, 2))
    }
    assert all(layer % 2 == number % 2 for number, layer in enumerate(swin.layers["layers.2.blocks"].kept))
    resnet = plan_of(layout("resnet101"), layout("resnet50"), choices)
    assert [len(group.kept) for group in resnet.layers.values()] == [3, 4, 6, 3]
    assert resnet.layers["layer3"].size == 23 and all(group.kept[0] == 0 for group in resnet.layers.values())


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: Choices("frist"), r"layer_selection='frist' is none of first, .*; nearest: first"),
        (lambda: Choices(element_selection="Energy"), "element_selection='Energy' is none of .*; nearest: energy"),
        (lambda: Choices(heads="mix"), "heads='mix' is none of blend, keep$"),
        (lambda: select_layers("", 4, 2), "layer_selection='' is none of first"),
        (
            lambda: select_indices("best", 4, 2, group="stream", seed=0, score=None),
            "element_selection='best' is none of",
        ),
        (lambda: activation_scores(*[None] * 4, "magnitude", {}), "'magnitude' is none of energy, coverage"),
        (lambda: Refit(target="output"), "target='output' is none of stream, outputs; nearest: outputs"),
    ],
)
def test_unknown_rule_is_refused_instead_of_running_as_another(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


def test_tensors_come_from_the_layer_that_the_rule_names():
    plan = plan_of(layout(VIT_B, depth=4), layout(VIT_T, depth=2), Choices("last"))
    assert plan.sources["blocks.0.mlp.fc1.weight"].key == "blocks.2.mlp.fc1.weight"
    assert plan.sources["blocks.1.norm1.bias"].key == "blocks.3.norm1.bias"


# ---- indices ----


@PROPERTY
@given(ELEMENTS, st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_indices_ascend_in_range_or_are_refused(rule, source, target, seed):
    score = np.random.default_rng(seed).integers(0, 4, source).astype(float)
    if target > source:
        with pytest.raises(ValueError, match=f"{target} of {source} indices"):
            select_indices(rule, source, target, group="stream", seed=seed, score=score)
        return
    kept = select_indices(rule, source, target, group="stream", seed=seed, score=score)
    assert kept == sorted(set(kept)) and len(kept) == target and kept[0] >= 0 and kept[-1] < source
    assert kept == select_indices(rule, source, target, group="stream", seed=seed, score=score)
    if rule in SCORED_RULES:  # of equals the earlier
        assert kept == sorted(sorted(range(source), key=lambda index: -score[index])[:target])


def test_consecutive_takes_the_first_and_magnitude_the_largest():
    score = np.array([1.0, 2, 3, 2, 2])  # of equals the earlier
    assert select_indices("consecutive", 5, 3, group="stream", seed=0, score=None) == [0, 1, 2]
    assert select_indices("magnitude", 5, 3, group="stream", seed=0, score=score) == [1, 2, 3]


def scored(weights, student):
    """The outline of a ViT of the shapes `student` from one with these weights, and the score of each index."""
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    outline = match(FAMILIES["vit"], vit_layout(shapes)[0], vit_layout(student)[0], Choices())
    return outline, magnitudes(weights, outline)


def test_magnitude_sums_norms_over_the_tensors_of_a_group():
    weights = {
        "blocks.0.mlp.fc1.weight": torch.tensor([[3.0, 4], [0, 0], [6, 8]]),  # rows: 5, 0, 10; columns: √45, √80
        "blocks.0.mlp.fc1.bias": torch.tensor([1.0, -7, 0]),  # 1, 7, 0
        "blocks.0.mlp.fc2.weight": torch.tensor([[0.0, 0, 0], [3, 0, -1]]),  # columns: 3, 0, 1; rows: 0, √10
    }
    shapes = {"blocks.0.mlp.fc1.weight": (2, 1), "blocks.0.mlp.fc1.bias": (2,), "blocks.0.mlp.fc2.weight": (1, 2)}
    outline, scores = scored(weights, shapes)
    np.testing.assert_allclose(scores["blocks.0.mlp"], [9, 7, 11], rtol=1e-15)
    np.testing.assert_allclose(scores["stream"], [45**0.5, 80**0.5 + 10**0.5], rtol=1e-15)
    plan = choose(outline, Choices(element_selection="magnitude"), scores)
    assert plan.groups["blocks.0.mlp"].kept == [0, 2] and plan.groups["stream"].kept == [1]
    assert select(weights, plan)["blocks.0.mlp.fc2.weight"].tolist() == [[3, -1]]


def test_magnitude_sums_over_fused_blocks_and_over_heads():
    weights = {"blocks.0.attn.qkv.bias": torch.arange(12.0)}  # q 0 1 2 3, k 4 5 6 7, v 8 9 10 11, two heads
    shapes = {"blocks.0.attn.qkv.bias": (12,)}
    teacher = Layout(shapes, {"blocks.0.attn.heads": 2}, {}, None, {})
    scores = {}
    for heads in ("blend", "keep"):
        choices = Choices(element_selection="magnitude", heads=heads)
        scores |= magnitudes(weights, match(FAMILIES["vit"], teacher, teacher, choices))
    a, b, c, d = squares = 0 + 16 + 64, 1 + 25 + 81, 4 + 36 + 100, 9 + 49 + 121
    np.testing.assert_allclose(scores["blocks.0.attn"], np.sqrt(squares), rtol=1e-15)
    np.testing.assert_allclose(scores["blocks.0.attn.heads"], np.sqrt([a + b, c + d]))
    np.testing.assert_allclose(scores["blocks.0.attn.slots"], np.sqrt([a + c, b + d]))


def test_magnitude_includes_a_folded_layer_scale():
    weights = {"blocks.0.mlp.fc2.weight": torch.tensor([[1.0], [1]]), "blocks.0.ls2.gamma": torch.tensor([3.0, 5])}
    assert scored(weights, {"blocks.0.mlp.fc2.weight": (1, 1)})[1]["stream"].tolist() == [3, 5]


@pytest.mark.parametrize(("rule", "rows"), [("l1_inconsistent", [1, 2]), ("magnitude_inconsistent", [0, 1])])
def test_each_axis_of_each_tensor_chooses_by_its_own_norm(rule, rows):
    weights = {
        "blocks.0.mlp.fc1.weight": torch.tensor([[5.0, 0], [4, -4], [-3, 3]]),  # L1: 5, 8, 6; L2: 5, √32, √18
        "blocks.0.mlp.fc1.bias": torch.tensor([1.0, -7, 2]),
        "blocks.0.mlp.fc2.weight": torch.tensor(
            [[0.0, 0, 9], [3, 0, -1]]
        ),  # L1 and L2: columns 3, 0, over 9; rows 9, under 5
    }
    shapes = {"blocks.0.mlp.fc1.weight": (2, 1), "blocks.0.mlp.fc1.bias": (2,), "blocks.0.mlp.fc2.weight": (1, 2)}
    choices, teacher = Choices(element_selection=rule), {key: tuple(value.shape) for key, value in weights.items()}
    outline = match(FAMILIES["vit"], vit_layout(teacher)[0], vit_layout(shapes)[0], choices)
    plan = choose(outline, choices, magnitudes(weights, outline, order=1 if rule.startswith("l1") else 2))
    kept = {key: indices_of(plan, key) for key in shapes}
    assert kept["blocks.0.mlp.fc1.weight"] == [rows, [0]] and kept["blocks.0.mlp.fc1.bias"] == [[1, 2]]
    assert kept["blocks.0.mlp.fc2.weight"] == [[0], [0, 2]]
    assert select(weights, plan)["blocks.0.mlp.fc2.weight"].tolist() == [[0, 9]]


def test_script_ranks_rows_and_columns_of_each_tensor_apart(small_teacher):
    path, weights = small_teacher
    for rule, order in (("l1_inconsistent", 1), ("magnitude_inconsistent", 2)):
        tensors = selected(path, choices=Choices(element_selection=rule))
        for key, sizes in (("blocks.0.mlp.fc1.weight", (96, 24)), ("blocks.1.norm2.bias", (24,))):
            expected = weights[key]
            for axis, size in enumerate(sizes):
                norms = (
                    weights[key]
                    .double()
                    .transpose(0, axis)
                    .reshape(len(weights[key].movedim(axis, 0)), -1)
                    .norm(order, 1)
                )
                expected = expected.index_select(axis, norms.topk(size).indices.sort().values)
            assert torch.equal(tensors[key], expected)


def test_random_groups_differ_and_depend_on_name_and_seed_alone():
    teacher, student = layout(VIT_B, depth=2), layout(VIT_T, depth=2)
    first, again, other = (plan_of(teacher, student, Choices(element_selection="random", seed=s)) for s in (0, 0, 1))
    assert first.groups == again.groups
    assert all(first.groups[name].kept != other.groups[name].kept for name in first.groups)
    assert first.groups["blocks.0.mlp"].kept != first.groups["blocks.1.mlp"].kept
    assert first.groups["blocks.0.attn"].kept != first.groups["stream"].kept  # both 192 of 768
    backwards = replace(student[0], shapes=dict(reversed(student[0].shapes.items())))
    assert plan_of(teacher, (backwards, None), Choices(element_selection="random")).groups == first.groups


def test_random_inconsistent_draws_for_each_axis_of_each_tensor():
    plan = plan_of(layout(VIT_B, depth=2), layout(VIT_T, depth=2), Choices(element_selection="random_inconsistent"))
    columns = [indices_of(plan, f"blocks.{i}.{key}.weight")[1] for i in (0, 1) for key in ("attn.qkv", "mlp.fc1")]
    rows = [indices_of(plan, f"blocks.{i}.{key}")[0] for i in (0, 1) for key in ("norm1.weight", "norm1.bias")]
    assert {len(kept) for kept in columns + rows} == {192} and len(set(map(tuple, columns + rows))) == 8
    # a group lies on one axis of one tensor
    axes = [(key, axis) for key, source in plan.sources.items() for axis in source.axes if axis]
    assert len(axes) == len({axis for _, axis in axes}) == len(plan.groups)
