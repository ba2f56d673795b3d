"""The policies of --aa: all of timm's run on today's Pillow, with timm's own draws."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from conftest import generators, settings
from PIL import Image
from timm.data import auto_augment, create_transform

from images import transforms
from utils import UserError, seed_all

RECIPE = "rand-m9-mstd0.5-inc1"
POLICIES = f"""
    {RECIPE} rand-m9-mstd0.5 rand-m0 rand-m10-inc1 rand-m9-mstd101-inc1 rand-m9-mstd101 rand-m15-mmax20-inc1
    rand-m9-inc1-tweights rand-m9-inc1-t3a rand-m9-n3-mstd1-t3aw
    v0 v0r original originalr 3a v0-mstd0.5 originalr-mstd5
    augmix augmix-m10 augmix-m5-w4-d2 augmix-m10-b1 augmix-m10-mstd0.5
""".split()


def train_transform(aa, input_size=32):
    return transforms.train_transform(*settings("--aa", aa, "--input_size", str(input_size))[:2])


def operations(part):
    if isinstance(part, auto_augment.AugmentOp):
        return [part]
    inner = part if isinstance(part, list | tuple) else [getattr(part, a, ()) for a in ("transforms", "ops", "policy")]
    return [op for held in inner for op in operations(held)]


PICTURE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8))


def surely(op, magnitude):
    """A copy of an operation that is always applied, with this magnitude."""
    sure = copy.copy(op)
    sure.prob, sure.magnitude, sure.magnitude_std = 1.0, magnitude, 0
    return sure


@pytest.mark.parametrize("aa", POLICIES)
def test_every_policy_runs_at_every_magnitude_and_as_a_whole(aa):
    transform = train_transform(aa)
    distinct = {op.name: op for op in operations(transform)}
    assert distinct
    for op, magnitude in itertools.product(distinct.values(), range(11)):
        assert surely(op, magnitude)(PICTURE).size == (32, 32), (op, magnitude)
    for seed in range(40):
        seed_all(seed)
        assert transform(PICTURE).shape == (3, 32, 32)


ZERO_BITS = [(RECIPE, 10), ("rand-m9", 0), ("rand-m9", 2), ("v0", 2), ("augmix", 10)]


# 20: 4 - 8 bits
@pytest.mark.parametrize(("aa", "magnitude"), [*ZERO_BITS, ("rand-m20-mmax20-inc1", 20)])
def test_zero_bits_give_black_in_a_spawned_worker_too(aa, magnitude):
    transform = train_transform(aa)
    for sent in (transform, pickle.loads(pickle.dumps(transform))):
        op = next(op for op in operations(sent) if op.name.startswith("Posterize"))
        assert np.asarray(surely(op, magnitude)(PICTURE)).max() == 0


@pytest.mark.parametrize("aa", [RECIPE, "v0", "augmix-m9-mstd0.5"])
def test_draws_are_those_of_timm_unwrapped(aa):
    ours = train_transform(aa, 48)
    erasing = {"re_prob": 0.25, "re_mode": "pixel"}
    timms = create_transform(48, is_training=True, auto_augment=aa, interpolation="bicubic", **erasing)
    compared = 0
    for seed in range(150):
        seed_all(seed)
        try:
            expected = timms(PICTURE)
        except ValueError:  # 0 bits, which Pillow refuses
            continue
        after = generators()
        seed_all(seed)
        assert torch.equal(ours(PICTURE), expected)
        assert generators() == after
        compared += 1
    assert compared > 100


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
