"""What `--augment device` draws, against timm and torchvision: policies, operations, magnitudes, crops, erased boxes."""

import collections
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import settings
from scipy import stats
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from images.augment import DeviceAugment
from images.draws import OPERATIONS, Draws, Policy, crop_boxes, draw_layer, erase_boxes, parse_policy
from utils import UserError, seed_all

RECIPE = "rand-m9-mstd0.5-inc1"


def timm_records(aa, images):
    """(operation or none, magnitude) of each layer that timm applies, `images` times."""
    policy = auto_augment.rand_augment_transform(aa, {"img_mean": (0, 0, 0)})
    records = []
    for op in policy.ops:
        op.level_fn = lambda level, _, name=op.name: records.append((name, level)) or ()
        op.aug_fn = lambda image, **_: image
    for _ in range(images):
        before = len(records)
        policy(None)
        records += [("none", None)] * (before + policy.num_layers - len(records))
    return records


DRAWN = f"{RECIPE} rand-m7-p0.8-inc1 rand-m9-mstd101-inc1 rand-m15-n3-mstd2-mmax20-inc1 rand-m4-mstd4-inc1".split()


@pytest.mark.parametrize("aa", DRAWN)
def test_operations_and_magnitudes_are_distributed_as_timms(aa):
    seed_all(1)
    expected, policy, draws = timm_records(aa, 4000), parse_policy(aa), Draws(7, np.arange(20000))
    layers = [draw_layer(policy, draws.uniforms(layer, 5)) for layer in range(policy.layers)]
    counts = collections.Counter(name for name, _ in expected)
    codes = np.concatenate([layer.operation for layer in layers])
    table = [np.bincount(codes, minlength=len(OPERATIONS) + 1), [counts[name] for name in (*OPERATIONS, "none")]]
    assert sum(table[1]) == 4000 * policy.layers
    assert stats.chi2_contingency(table).pvalue > 0.01
    magnitudes = np.concatenate([layer.magnitude[layer.operation < len(OPERATIONS)] for layer in layers])
    theirs = np.array([level for _, level in expected if level is not None])
    for edge in (0, policy.limit):  # the clipping bounds
        assert abs(np.mean(magnitudes == edge) - np.mean(theirs == edge)) < 0.02
    assert stats.ks_2samp(magnitudes, theirs).pvalue > 0.01
    bins = np.quantile(magnitudes, np.linspace(0, 1, 11))
    if len(np.unique(bins)) == 11:
        table = [np.histogram(values, bins)[0] for values in (magnitudes, theirs.clip(bins[0], bins[-1]))]
        assert stats.chi2_contingency(table).pvalue > 0.01


def test_signs_are_even_and_layers_independent():
    draws = Draws(11, np.arange(60000))
    first, second = (draw_layer(Policy(deviation=0.5), draws.uniforms(layer, 5)) for layer in (1, 2))
    assert stats.binomtest(int(np.sum(first.sign > 0)), 60000).pvalue > 0.01
    codes = len(OPERATIONS) + 1
    next_epoch = draw_layer(Policy(), Draws(12, np.arange(60000)).uniforms(1, 5))
    pairs = [(first.operation, other) for other in (second.operation, first.sign > 0, next_epoch.operation)]
    pairs += [(first.sign > 0, second.sign > 0), (first.operation, first.magnitude > 10 - 0.3)]
    for one, other in (*pairs, (first.operation[:-1], first.operation[1:])):  # the last: of one image and the next
        table = np.histogram2d(one, other, bins=[range(codes + 1)] * 2)[0]
        table = table[table.any(1)][:, table.any(0)]
        assert stats.chi2_contingency(table).pvalue > 0.01


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 100), (375, 500), (20, 200), (90, 10)])
def test_crops_are_distributed_as_torchvisions(height, width):
    seed_all(3)
    image = torch.zeros(3, height, width)
    get = transforms.RandomResizedCrop.get_params
    expected = np.array([get(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    boxes = np.stack(crop_boxes(Draws(5, np.arange(20000)).uniforms(0, 22), height, width), axis=1)
    for column in range(4):
        assert stats.ks_2samp(boxes[:, column], expected[:, column]).pvalue > 0.01, column
    assert stats.ks_2samp(boxes[:, 2] * boxes[:, 3], expected[:, 2] * expected[:, 3]).pvalue > 0.01
    assert boxes[:, :2].min() >= 0 and ((boxes[:, :2] + boxes[:, 2:]).max(0) <= (height, width)).all()


@pytest.mark.parametrize(("height", "width"), [(20, 200), (200, 20)])
def test_crop_falls_back_to_torchvisions_box(height, width):
    u = np.ones((22, 1)) - 1e-9  # the whole area never fits
    expected = {(20, 200): (0, 86, 20, 27), (200, 20): (86, 0, 27, 20)}  # 20 * 4 / 3 = 26.7 in the middle
    assert tuple(int(value[0]) for value in crop_boxes(u, height, width)) == expected[height, width]


def erased_sizes(images):
    """Of images [batch, H, W] that are 0 where erased: rows and columns touched, the area, the first row and column."""
    holes = images == 0
    rows, columns = holes.any(2), holes.any(1)
    sizes = (rows.sum(1), columns.sum(1), holes.sum((1, 2)), rows.int().argmax(1), columns.int().argmax(1))
    return np.stack(sizes, axis=1)


@pytest.mark.parametrize(("size", "reprob", "recount"), [(32, 0.25, 1), (40, 0.9, 3)])
def test_erasing_is_distributed_as_timms(size, reprob, recount):
    random.seed(2)
    count = 3000
    white = torch.full((count, 3, size, size), 255, dtype=torch.uint8)
    _, augmentation, _ = settings("--aa", "none", "--color_jitter", "0")
    as_they_are = (0, 0, 0), (1, 1, 1)
    plain = SimpleNamespace(input_size=size, mean=(0, 0, 0), std=(1, 1, 1), colours=as_they_are)
    erases = replace(augmentation, reprob=reprob, recount=recount, remode="const")
    augment = DeviceAugment(plain, erases, "cpu")
    erasing = RandomErasing(reprob, max_count=recount, device="cpu")
    expected = torch.stack([erasing(torch.ones(3, size, size))[0] for _ in range(count)])
    pair = [erased_sizes(augment(white, 0, np.arange(count), (0, 0), None)[:, 0]), erased_sizes(expected)]
    pair = [values[values[:, 2] > 0] for values in pair]
    assert stats.chi2_contingency([[len(hit), count - len(hit)] for hit in pair]).pvalue > 0.01
    for column in range(5):
        assert stats.ks_2samp(*[values[:, column] for values in pair]).pvalue > 0.01, column


def test_erased_boxes_have_timms_areas_and_aspects():
    boxes, fits = erase_boxes(Draws(1, np.arange(5000)).uniforms(0, 22), np.ones(5000), 224)
    _, _, height, width = boxes[fits].T
    share, aspect = height * width / 224**2, height / width
    assert fits.mean() > 0.999 and abs(np.log(aspect).mean()) < 0.05
    assert 0.0195 < share.min() < 0.021 and 0.32 < share.max() < 0.335
    assert 0.29 < aspect.min() < 0.32 and 3.1 < aspect.max() < 3.45


def test_deviates_are_splitmix64s():
    # the first outputs for seed 0, as published with the generator: 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4
    draws = Draws(0, np.arange(1))
    draws.state = np.zeros(1, np.uint64)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert draws.uniforms(0, 2)[:, 0].tolist() == [(value >> 11) / 2**53 for value in expected]


def test_deviates_are_uniform_in_every_place():
    u = Draws(1, np.arange(3000)).uniforms(2, 40)
    assert min(stats.kstest(row, "uniform").pvalue for row in u) > 1e-4
    assert np.abs(np.corrcoef(u) - np.eye(40)).max() < 0.1


READ = "rand-inc1 rand-m3-n4-p0.2-inc1 rand-mstd101-mmax12-inc1 rand-mstd1-mstd2-m5-m6-inc1 rand-n0-inc1"


@pytest.mark.parametrize("aa", [RECIPE, *READ.split()])
def test_policies_are_read_as_timm_does(aa):
    expected = auto_augment.rand_augment_transform(aa, {"img_mean": (0, 0, 0)})
    op, policy = expected.ops[0], parse_policy(aa)
    assert sorted(op.name for op in expected.ops) == sorted(OPERATIONS)
    assert (policy.layers, policy.limit) == (expected.num_layers, op.magnitude_max or 10)
    assert (policy.magnitude, policy.probability, policy.deviation) == (op.magnitude, op.prob, op.magnitude_std)


REFUSED = """
    rand-m9-mstd0.5 rand-m9-inc0 rand-m9-inc1-tweights rand-m9-inc1-w0 rand-m9.5-inc1 rand-m9-inc1-x
    v0 original 3a augmix-m5-w4-d2 randaugment nonsense rand-p0.5.5-inc1
""".split()


@pytest.mark.parametrize("aa", [*REFUSED, "none"])
def test_what_is_not_offered_is_one_line_that_says_what_is(aa):
    with pytest.raises(UserError) as caught:
        DeviceAugment(*settings("--aa", aa)[:2], "cpu")
    refused, mend = f"--aa {aa!r}", "use --augment timm, or a policy like rand-m9-mstd0.5-inc1"
    if aa == "none":
        refused = "--color_jitter 0.4 (as --aa is off)"
        mend = "use --augment timm, --color_jitter 0, or a policy like rand-m9-mstd0.5-inc1"
    assert str(caught.value) == f"--augment device does not offer {refused}: {mend}"
