"""The refit: a student's layers fitted to give the teacher's values, by one algorithm for all families."""

import copy
import errno
import math
import os

import pytest
import torch
from small_models import PAIRS, VIT_T
from torch import nn

import models
from selection.activations.alignment import Alignment
from selection.activations.regression import Regression
from selection.activations.scratch import Calibration
from selection.activations.segments import IMAGES, Segments
from selection.activations.targets import Targets
from selection.activations.trace import Trace
from selection.families import FAMILIES
from selection.family import Layout
from selection.match import match
from selection.plan import Group, Plan, Source, choose
from selection.refit import Refit, refit
from selection.rules import Choices
from selection.tensors import select
from utils import UserError

# ---- a linear residual network whose function is known ----


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.fc2(self.fc1(x))


class Linear(nn.Module):
    """Images of 1 px, with three channels, to `width` channels and through blocks without an activation."""

    def __init__(self, width, hidden, depth=2):
        super().__init__()
        self.stem = nn.Linear(3, width)
        self.blocks = nn.Sequential(*(Block(width, hidden) for _ in range(depth)))

    def forward(self, x):
        return self.blocks(self.stem(x.flatten(1)))


WIDTHS = {"stream": Group(8, [0, 2, 3, 5]), "hidden": Group(6, [1, 2, 4])}


def linear_plan(layers=((2, [0, 1]),)):
    """The plan of Linear(8, 6) to Linear(4, 3)."""
    stage = Group(*layers[0])
    sources = {"stem.weight": ("stem.weight", "stream", None), "stem.bias": ("stem.bias", "stream")}
    for block, other in enumerate(stage.kept):
        for name, *axes in (("fc1.weight", "hidden", "stream"), ("fc1.bias", "hidden")):
            sources[f"blocks.{block}.{name}"] = (f"blocks.{other}.{name}", *axes)
        for name, *axes in (("fc2.weight", "stream", "hidden"), ("fc2.bias", "stream")):
            sources[f"blocks.{block}.{name}"] = (f"blocks.{other}.{name}", *axes)
    sources = {key: Source(other, tuple(axis and (axis,) for axis in axes)) for key, (other, *axes) in sources.items()}
    return Plan(WIDTHS, sources, {"blocks": stage}, None, {})


def redundant_teacher(depth=2):
    """A teacher whose channels and hidden units that are not kept are linear functions of the kept ones."""
    torch.manual_seed(0)
    teacher = Linear(8, 6, depth)
    for group, writers in (("stream", ["stem", *(f"blocks.{n}.fc2" for n in range(depth))]),
                           ("hidden", [f"blocks.{n}.fc1" for n in range(depth)])):  # fmt: skip
        kept = WIDTHS[group].kept
        others = [row for row in range(WIDTHS[group].size) if row not in kept]
        mixing = torch.randn(len(others), len(kept))
        for layer in map(teacher.get_submodule, writers):
            layer.weight.data[others] = mixing @ layer.weight.data[kept]
            layer.bias.data[others] = mixing @ layer.bias.data[kept]
    return teacher


def images(count, *shape, seed=1, folder):
    values = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    return Calibration(values.split(20), count, folder)


def refit_linear(teacher, folder, *, plan=None, given=None, to_stage_end=False, **settings):
    """Refit Linear(4, 3) from a Linear teacher; return it, as selected and refitted, and the report."""
    plan = plan or linear_plan()
    depth = len(plan.layers["blocks"].kept)
    selected = Linear(4, 3, depth)
    selected.load_state_dict(select(teacher.state_dict(), plan))
    student = copy.deepcopy(selected)
    parts = [
        Segments(model, r"(blocks)\.(\d+)\.", (3, 1, 1), "model")
        for model in (teacher, student, copy.deepcopy(selected))
    ]
    given = given or images(60, 3, 1, 1, folder=folder)
    layers = r"(blocks)\.(\d+)\."
    report = refit(
        parts[0], tuple(parts[1:]), plan, layers, given, settings=Refit(**settings), to_stage_end=to_stage_end
    )
    refitted = Linear(4, 3, depth)
    refitted.load_state_dict(student.state_dict())  # the student itself is cut into segments now
    return selected, refitted, report


def test_linear_teacher_with_redundant_channels_is_reproduced(tmp_path):
    teacher = redundant_teacher()
    selected, student, report = refit_linear(copy.deepcopy(teacher), tmp_path, ridge=0.0)
    x = torch.randn(7, 3)
    wanted = teacher(x)[:, WIDTHS["stream"].kept]
    assert (selected(x) - wanted).abs().max() > 0.1  # the selection alone loses what the other channels carry
    torch.testing.assert_close(student(x), wanted, rtol=0, atol=1e-5)
    assert report.closeness.explained_variance["blocks.1"] == pytest.approx(1, abs=1e-9)
    assert report.selected.explained_variance["blocks.1"] < 0.9


def test_infinite_ridge_leaves_everything_as_selected(tmp_path):
    selected, student, report = refit_linear(redundant_teacher(), tmp_path, ridge=math.inf)
    assert all(map(torch.equal, selected.state_dict().values(), student.state_dict().values()))
    assert report.refitted == [] and len(report.left) == 5
    assert report.closeness == report.selected


def test_larger_ridge_stays_nearer_to_the_selected_weights(tmp_path):
    moved = []
    for ridge in (0.0, 0.1, 10.0):
        selected, student, _ = refit_linear(redundant_teacher(), tmp_path, ridge=ridge)
        moved.append((student.blocks[0].fc1.weight - selected.blocks[0].fc1.weight).norm().item())
    assert moved[0] > moved[1] > moved[2] > 0


@pytest.mark.parametrize("pixels", [torch.zeros(40, 3, 1, 1), torch.randn(40, 1, 1, 1).expand(-1, 3, -1, -1)])
def test_channels_that_are_constant_or_equal_stay_finite(pixels, tmp_path):
    given = Calibration(pixels.contiguous().split(20), 40, tmp_path)
    _, student, _ = refit_linear(redundant_teacher(), tmp_path, ridge=0.0, given=given)
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    assert max(tensor.abs().max() for tensor in student.state_dict().values()) < 100


def test_layer_stands_for_those_that_are_left_out_behind_it(tmp_path):
    """Without activations, the blocks 0 and 2 of four can do what all up to block 3 do, if the last stands for it."""
    teacher = redundant_teacher(depth=4)
    plan = linear_plan(((4, [0, 2]),))
    _, student, _ = refit_linear(copy.deepcopy(teacher), tmp_path, ridge=0.0, plan=plan, to_stage_end=True)
    x = torch.randn(7, 3)
    torch.testing.assert_close(student(x), teacher(x)[:, WIDTHS["stream"].kept], rtol=0, atol=1e-5)
    parts = (
        Segments(teacher, r"(blocks)\.(\d+)\.", (3, 1, 1), "m"),
        Segments(Linear(4, 3), r"(blocks)\.(\d+)\.", (3, 1, 1), "m"),
    )
    targets = Targets(*parts, plan, r"(blocks)\.(\d+)\.", own_outputs=False)
    assert targets.ends(to_stage_end=False) == [1, 2]
    assert targets.ends(to_stage_end=True) == [1, 3]


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"3 MiB are needed for images and activations: No space left on device"):
        Calibration([torch.zeros(20, 3, 128, 128)], 16, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_in_the_folder(tmp_path):
    refit_linear(redundant_teacher(), tmp_path, ridge=0.01)
    assert list(tmp_path.iterdir()) == []  # the files have no names, so a kill leaves nothing either


def test_with_own_outputs_as_targets_nothing_is_made_up_for(tmp_path):
    """The block in between is left out: only the stream as a target brings the student there."""
    plan, shares = linear_plan(((3, [0, 2]),)), []
    for target in ("stream", "outputs"):
        teacher = redundant_teacher(depth=3)
        *_, report = refit_linear(teacher, tmp_path, ridge=0.0, plan=plan, target=target)
        shares.append(report.closeness.explained_variance["blocks.0"])
    assert shares[0] == pytest.approx(1, abs=1e-6) and shares[1] < 0.99


# ---- timm's models ----


def pair(kind, *, same=False, seed=0, with_head=True):
    """A pair of small models with values and their plan, the student as large as the teacher if `same`."""
    teacher_name, teacher_kwargs, name, kwargs = PAIRS[kind]
    if same:
        name, kwargs = teacher_name, teacher_kwargs
    torch.manual_seed(seed)
    teacher, student = models.create(teacher_name, teacher_kwargs), models.create(name, kwargs)
    for tensor in teacher.parameters():
        tensor.data += 0.1 * torch.randn(tensor.shape)
    family = FAMILIES[models.family_of(teacher)]
    left_out = () if with_head else models.head_prefixes(teacher)
    layouts = (Layout.of(model, family, left_out) for model in (teacher, student))
    choices = Choices()
    return teacher, student, choose(match(family, *layouts, choices), choices), family


def refit_pair(kind, folder, *, ridge=0.01, same=False, count=40, with_head=True, size=None, made=None):
    """Refit a small pair on noise; return the selected tensors, the student, the report, the plan."""
    teacher, student, plan, family = made or pair(kind, same=same, with_head=with_head)
    tensors = select(teacher.state_dict(), plan)
    student.load_state_dict(tensors, strict=with_head)
    size = size or PAIRS[kind][3].get("img_size", 32)
    given = images(count, 3, size, size, folder=folder)
    parts = [
        Segments(model, family.layers, given.shape, "model") for model in (teacher, student, copy.deepcopy(student))
    ]
    report = refit(parts[0], tuple(parts[1:]), plan, family.layers, given, settings=Refit(ridge))
    return tensors, student, report, plan


@pytest.mark.parametrize("kind", PAIRS)
def test_every_layer_of_every_family_is_refitted(kind, tmp_path):
    tensors, student, report, plan = refit_pair(kind, tmp_path, ridge=1.0, count=100)
    layers = {
        f"{name}.weight" if not isinstance(module, nn.BatchNorm2d) else f"{name}.running_mean"
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d)
    }
    assert set(report.refitted) == layers and report.left == {}
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    changed = {key for key, tensor in student.state_dict().items() if not torch.equal(tensor, tensors[key])}
    smaller = {name for name, group in plan.groups.items() if len(group.kept) < group.size}
    inputs = {key: plan.sources[key].axes[1:2] for key in layers}
    cut = {key for key, axes in inputs.items() if axes and axes[0] and smaller.intersection(axes[0])}
    assert cut - changed <= {"attn_pool.q.weight"}  # its input is the same for all images: only its bias is fitted
    before, after = (list(each.explained_variance.values()) for each in (report.selected, report.closeness))
    assert sum(after) > sum(before)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_student_of_the_teachers_size_stays_as_it_is(kind, ridge, tmp_path):
    tensors, student, report, _ = refit_pair(kind, tmp_path, ridge=ridge, same=True, count=20)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in student.state_dict().items())
    assert set(report.closeness.explained_variance.values()) == {1.0} and report.closeness.top1_agreement == 1


@pytest.mark.parametrize("kind, scale", [("dinov2", "blocks.0.ls1.gamma"), ("resnet basic", "layer1.0.bn2.weight")])
def test_branch_that_is_scaled_by_zero_stays_as_selected(kind, scale, tmp_path):
    teacher, *_ = made = pair(kind)
    teacher.get_parameter(scale).data.zero_()
    _, student, *_ = refit_pair(kind, tmp_path, count=40, made=made)
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())


def test_statistics_of_values_that_hardly_vary_stay(tmp_path, monkeypatch):
    """Images nearly alike say nothing of variances: the ratio of two tiny ones would scale channels many times."""
    grey = 0.3 + 1e-3 * torch.randn(40, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 8, 8)
    monkeypatch.setitem(globals(), "images", lambda *_, folder: Calibration(grey.split(20), 40, folder))
    tensors, student, *_ = refit_pair("resnet basic", tmp_path, size=8)
    for key, tensor in student.state_dict().items():
        if key.startswith("layer4") and key.endswith("running_var"):  # behind all strides: one place of each image
            torch.testing.assert_close(tensor, tensors[key], rtol=0.01, atol=0)


def test_tokens_are_found_at_another_size_of_images(tmp_path):
    """Two of DINOv3's four registers are left out, on images of 32 px; both models are made for 16 px."""
    _, _, report, _ = refit_pair("dinov3", tmp_path, count=20, size=32)
    assert report.left == {} and report.closeness.explained_variance["blocks.1"] > 0


def test_places_that_differ_are_refused(tmp_path, monkeypatch):
    name, teacher, _, student = PAIRS["resnet basic"]
    monkeypatch.setitem(PAIRS, "coarser", (name, teacher, name, {**student, "output_stride": 8}))
    with pytest.raises(
        UserError, match=r"layer3.0: teacher and student differ in places, \[16, 2, 2\] and \[9, 4, 4\]"
    ):
        refit_pair("coarser", tmp_path, count=20)


def test_without_a_head_no_classes_are_compared(tmp_path):
    """SigLIP pools by layers of its own, which run behind the last block, as a head does."""
    _, _, report, _ = refit_pair("siglip", tmp_path, count=20, with_head=False)
    assert report.closeness.top1_agreement is None and report.selected.top1_agreement is None


class Watch:
    """A visitor that notes what runs and what writes to the stream."""

    def __init__(self):
        self.ran_keys, self.writes = [], {}

    def ran(self, call):
        self.ran_keys.append(call.key)

    def wrote(self, call, write):
        self.writes[call.key] = call, write


def test_channels_that_layer_scale_nearly_removes_stay(tmp_path):
    """DINOv2's student has a LayerScale of its own: what it divides by ten thousand could only fit noise."""
    teacher, student, plan, family = pair("dinov2")
    for block in teacher.blocks:
        block.ls1.gamma.data[plan.groups["stream"].kept[3]] = 1e-5
    tensors = select(teacher.state_dict(), plan)
    student.load_state_dict(tensors)
    given = images(40, 3, 16, 16, folder=tmp_path)
    parts = [Segments(model, family.layers, given.shape, "m") for model in (teacher, student, copy.deepcopy(student))]
    refit(parts[0], tuple(parts[1:]), plan, family.layers, given, settings=Refit(0.01))
    for key in ("blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias"):
        moved = (student.state_dict()[key] - tensors[key]).abs().reshape(12, -1).amax(1)
        assert moved[3] == 0 and (moved > 0).sum() == 11


@pytest.mark.parametrize(
    "kind, weight, scale",
    [
        ("convnext", "stages.1.blocks.0.mlp.fc2.weight", "stages.1.blocks.0.gamma"),
        ("dinov2", "blocks.0.attn.proj.weight", "blocks.0.ls1.gamma"),
    ],
)
def test_fitted_rows_leave_their_growth_to_the_layer_scale(kind, weight, scale, tmp_path, monkeypatch):
    def tensors_and_output(folder):
        folder.mkdir()
        made = pair(kind)
        made[0].get_parameter(scale).data.mul_(0.05)
        tensors, student, *_ = refit_pair(kind, folder, count=60, made=made)
        whole = models.create(*PAIRS[kind][2:]).eval()
        whole.load_state_dict(student.state_dict())
        size = PAIRS[kind][3].get("img_size", 32)
        noise = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(5))
        return tensors, student.state_dict(), whole(noise)

    selected, fitted, output = tensors_and_output(tmp_path / "restored")
    norms = [each[weight].flatten(1).norm(dim=1) for each in (selected, fitted)]
    torch.testing.assert_close(norms[1], norms[0])
    monkeypatch.setattr(Regression, "_restore_norms", lambda *_: None)
    _, grown, same = tensors_and_output(tmp_path / "grown")
    torch.testing.assert_close(output, same, rtol=1e-4, atol=1e-4)
    growth = grown[weight].flatten(1).norm(dim=1) / norms[0]
    assert growth.max() > 2 and torch.equal(grown[scale], selected[scale])
    torch.testing.assert_close(fitted[scale].flatten() / selected[scale].flatten(), growth)


@pytest.mark.parametrize("kind", PAIRS)
def test_tracing_changes_no_value(kind):
    _, student, _, family = pair(kind)
    size = PAIRS[kind][3].get("img_size", 32)
    x = torch.randn(2, 3, size, size)
    part = Segments(student, family.layers, (3, size, size), "model")
    plain = part.run(x, IMAGES, None)
    with Trace(part, Watch()):
        assert torch.equal(part.run(x, IMAGES, None), plain)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov3", "convnext", "swin", "mixer"])
def test_stream_behind_a_layer_comes_in_the_layout_of_its_output(kind):
    """Without what the layer wrote, it is the stream that entered the block, in another order in Swin and Mixer."""
    _, student, _, family = pair(kind)
    size = PAIRS[kind][3].get("img_size", 32)
    part, watch, entered = Segments(student, family.layers, (3, size, size), "model"), Watch(), []
    block = student.get_submodule(part.blocks[0])
    block.register_forward_pre_hook(lambda module, args: entered.append(args[0].clone()))
    with Trace(part, watch):
        part.run(torch.randn(2, 3, size, size), IMAGES, 0)
    (call, write), *_ = watch.writes.values()
    written = call.output if write.scale is None else call.output * write.scale
    before = (write.behind - written).flatten().sort().values
    torch.testing.assert_close(before, entered[0].flatten().sort().values, rtol=1e-4, atol=1e-5)
    assert write.inside.unique().tolist() == [1]


def test_tokens_that_only_one_model_has_are_left_out():
    """A teacher with a class token and four registers, a student with a class token and two of them."""
    teacher, student, plan, family = pair("dinov2")
    plain = models.create(VIT_T, {**PAIRS["vit"][3], "class_token": False, "global_pool": "avg"})
    teacher, student, plain = (Segments(model, family.layers, (3, 16, 16), "m") for model in (teacher, student, plain))
    rows = Alignment(teacher, student, plan).rows((2, 21), (2, 19), torch.arange(12), None)
    kept = plan.groups["registers"].kept
    expected = [0, *(1 + register for register in kept), *range(5, 21)]
    assert rows.teacher.tolist() == expected + [21 + row for row in expected]
    assert rows.student.tolist() == list(range(38))
    rows = Alignment(teacher, plain, plan).rows((1, 21), (1, 16), torch.arange(12), None)
    assert rows.teacher.tolist() == list(range(5, 21)) and rows.student.tolist() == list(range(16))


def test_rows_that_only_fill_up_windows_are_told(tmp_path):
    """Swin pads 6 x 6 patches to two windows of 4 a side: 28 of 64 rows never reach the stream."""
    model = models.create(
        "swin_tiny_patch4_window7_224",
        {"img_size": 12, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1,), "num_heads": (2,)},
    )
    part, watch = Segments(model, FAMILIES["swin"].layers, (3, 12, 12), "model"), Watch()
    with Trace(part, watch):
        part.run(torch.randn(1, 3, 12, 12), IMAGES, 0)
    (_, write), *_ = watch.writes.values()
    assert write.inside[..., 0].sum() == 36 and write.inside[..., 0].numel() == 64
