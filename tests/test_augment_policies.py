"""The policies of --aa: all of timm's run on today's Pillow, with timm's own draws."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from conftest import settings
from PIL import Image
from timm.data import auto_augment, create_transform

from images import transforms
from utils import UserError, seed_all

RECIPE = "rand-m9-mstd0.5-inc1"
POLICIES = [
    RECIPE,
    *("rand-m9-mstd0.5", "rand-m0", "rand-m10-inc1", "rand-m9-mstd101-inc1", "rand-m9-mstd101", "rand-m15-mmax20-inc1"),
    *("rand-m9-inc1-tweights", "rand-m9-inc1-t3a", "rand-m9-n3-mstd1-t3aw"),
    *("v0", "v0r", "original", "originalr", "3a", "v0-mstd0.5", "originalr-mstd5"),
    *("augmix", "augmix-m10", "augmix-m5-w4-d2", "augmix-m10-b1", "augmix-m10-mstd0.5"),
]


def train_transform(aa, input_size=32):
    return transforms.train_transform(*settings("--aa", aa, "--input_size", str(input_size))[:2])


def operations(part):
    if isinstance(part, auto_augment.AugmentOp):
        return [part]
    inner = part if isinstance(part, list | tuple) else [getattr(part, a, ()) for a in ("transforms", "ops", "policy")]
    return [op for held in inner for op in operations(held)]


def picture(size=32):
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize("aa", POLICIES)
def test_every_operation_of_every_policy_runs_at_magnitudes_0_to_10(aa):
    distinct = {op.name: op for op in operations(train_transform(aa))}
    assert distinct
    for op in distinct.values():
        sure = copy.copy(op)
        sure.prob, sure.magnitude_std = 1.0, 0
        for sure.magnitude in range(11):
            assert sure(picture()).size == (32, 32), (op, sure.magnitude)


@pytest.mark.parametrize("aa", POLICIES)
def test_every_policy_runs_as_a_whole(aa):
    transform = train_transform(aa)
    for seed in range(40):
        seed_all(seed)
        assert transform(picture()).shape == (3, 32, 32)


def test_recipe_runs_over_3000_draws():
    transform = train_transform(RECIPE)
    black = 0
    policy = transform.transforms[3]
    for seed in range(3000):
        seed_all(seed)
        black += not np.asarray(policy(picture(8))).any()
    assert black > 0, "no draw came to 0 bits: the loop did not meet what it is for"


@pytest.mark.parametrize(("aa", "magnitude"), [(RECIPE, 10), ("rand-m9", 0), ("rand-m9", 2), ("v0", 2), ("augmix", 10)])
def test_zero_bits_give_a_black_image(aa, magnitude):
    op = next(op for op in operations(train_transform(aa)) if op.name.startswith("Posterize"))
    op.prob, op.magnitude, op.magnitude_std = 1.0, magnitude, 0
    assert np.asarray(op(picture())).max() == 0


def test_fewer_than_zero_bits_give_a_black_image_too():
    op = next(op for op in operations(train_transform("rand-m20-mmax20-inc1")) if op.name == "PosterizeIncreasing")
    op.prob = 1.0
    assert np.asarray(op(picture())).max() == 0  # 4 - 8 bits


def test_posterize_with_bits_left_equals_timm():
    op = next(op for op in operations(train_transform(RECIPE)) if op.name == "PosterizeIncreasing")
    op.prob, op.magnitude, op.magnitude_std = 1.0, 5, 0
    assert np.array_equal(np.asarray(op(picture())), np.asarray(picture()) & 0b11000000)  # 4 - 2 bits kept


@pytest.mark.parametrize("aa", [RECIPE, "v0", "augmix-m9-mstd0.5"])
def test_draws_are_those_of_timm_unwrapped(aa):
    ours = train_transform(aa, 48)
    erasing = {"re_prob": 0.25, "re_mode": "pixel"}
    timms = create_transform(48, is_training=True, auto_augment=aa, interpolation="bicubic", **erasing)
    compared = 0
    for seed in range(150):
        seed_all(seed)
        try:
            expected = timms(picture())
        except ValueError:  # 0 bits, which Pillow refuses
            continue
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        seed_all(seed)
        assert torch.equal(ours(picture()), expected)
        assert random.getstate() == after[0]
        assert np.random.get_state()[1].tolist() == after[1]
        assert torch.equal(torch.get_rng_state(), after[2])
        compared += 1
    assert compared > 100


def test_timms_own_table_is_left_alone():
    before = dict(auto_augment.NAME_TO_OP)
    train_transform(RECIPE)
    assert before == auto_augment.NAME_TO_OP
    fresh = auto_augment.AugmentOp("Posterize")
    assert fresh.aug_fn is auto_augment.posterize


@pytest.mark.parametrize("aa", ["", "none"])
def test_no_policy_leaves_color_jitter(aa):
    transform = train_transform(aa)
    assert not operations(transform)
    assert "ColorJitter(" in repr(transform)


@pytest.mark.parametrize("aa", ["rand-w0", "nonsense", "v0-x9", "augmix-q3"])
def test_unknown_policy_is_one_line_that_names_it(aa):
    with pytest.raises(UserError, match=f"--aa '{aa}'") as caught:
        train_transform(aa)
    assert "\n" not in str(caught.value)


def test_wrapped_transform_can_be_sent_to_a_spawned_worker():
    transform = pickle.loads(pickle.dumps(train_transform(RECIPE)))
    op = next(op for op in operations(transform) if op.name == "PosterizeIncreasing")
    op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0
    assert np.asarray(op(picture())).max() == 0
