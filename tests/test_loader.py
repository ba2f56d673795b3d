"""Transforms, draws, order, shares, mixup: what an image becomes depends on seeds and indices alone."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import datasets
from images.images import Images
from images.order import TrainBatches, check_batches, shard
from images.transforms import (
    ToNormalizedTensor,
    TransformedImages,
    build_mixer,
    eval_transform,
    mean_and_std,
    normalized,
    train_transform,
)
from utils import UserError

REFERENCE = json.loads(Path(__file__).with_name("reference_values.json").read_text())["transforms"]
MEAN, STD = mean_and_std(True)
RESIZE_32 = "Resize(size=(32, 32), interpolation=bicubic, max_size=None, antialias=True)"


def recipe(input_size):
    return train_transform(
        input_size,
        color_jitter=0.4,
        aa="rand-m9-mstd0.5-inc1",
        hflip=0.5,
        train_interpolation="bicubic",
        reprob=0.25,
        remode="pixel",
        recount=1,
        mean=MEAN,
        std=STD,
    )


def noise(count=12, size=32):
    """`count` different pictures with labels 0, 1, 2, 0, ..."""
    arrays = np.random.RandomState(0).randint(0, 256, (count, size, size, 3), dtype=np.uint8)
    return Images("noise", np.arange(count) % 3, source=[(Image.fromarray(array),) for array in arrays])


def training_items(seed=0, count=12):
    return TransformedImages(noise(count), recipe(32), seed)


def generators():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


# --- transforms


@pytest.mark.parametrize(
    ("key", "transform", "added"),
    [
        ("train_224", recipe(224), []),
        ("eval_224", eval_transform(224, mean=MEAN, std=STD), []),
        ("train_32", recipe(32), [RESIZE_32]),
        ("eval_32", eval_transform(32, mean=MEAN, std=STD), [RESIZE_32]),
    ],
)
def test_printed_transforms_equal_the_originals_but_for_the_added_resize(key, transform, added):
    steps = added + REFERENCE[key]
    last = steps.index("ToTensor()")
    mean_and_std = [float(number) for number in re.findall(r"\d\.\d+", steps[last + 1])]
    ours = transform.transforms[last]
    assert isinstance(ours, ToNormalizedTensor)
    assert torch.cat((ours.mean, ours.std)).flatten().tolist() == pytest.approx(mean_and_std)
    assert [repr(step) for step in transform.transforms if step is not ours] == steps[:last] + steps[last + 2 :]


def test_normalized_tensors_are_those_of_torchvision_bit_for_bit():
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).repeat(1, 1, 3).numpy()  # each level in each channel
    steps = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    result = ToNormalizedTensor(MEAN, STD)(Image.fromarray(levels))
    assert torch.equal(result, transforms.Compose(steps)(Image.fromarray(levels))) and result.is_contiguous()
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    batch = normalized(torch.from_numpy(levels)[None].expand(2, -1, -1, -1), mean, std)
    assert torch.equal(batch, result.expand(2, -1, -1, -1)) and batch.is_contiguous()


def test_added_resize_leaves_32_px_images_untouched():
    image = noise(1)[0][0]
    assert recipe(32).transforms[0](image) is image
    expected = torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1).float()
    transform = eval_transform(32, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.allclose(transform(image), expected, atol=1e-6)  # one float32 division apart


@pytest.mark.parametrize("stored", [(8, 8), (28, 28), (64, 64), (40, 20)])
def test_images_of_any_size_come_out_at_32_px(stored):
    image = Image.new("RGB", stored)
    assert recipe(32)(image).shape == (3, 32, 32)
    assert eval_transform(32, mean=MEAN, std=STD)(image).shape == (3, 32, 32)


def test_evaluation_from_384_px_warps_the_whole_image():
    steps = eval_transform(384, mean=MEAN, std=STD).transforms
    assert [type(step).__name__ for step in steps] == ["Resize", "ToNormalizedTensor"]
    assert steps[0].size == (384, 384)


def test_crop_pct_sets_the_short_side():
    resize, crop = eval_transform(224, crop_pct=0.5, mean=MEAN, std=STD).transforms[:2]
    assert (resize.size, crop.size) == (448, (224, 224))


def test_inception_constants_are_one_half():
    assert mean_and_std(False) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# --- draws of one image


def test_item_depends_on_seed_epoch_and_index_alone():
    items = training_items()
    first = items[(3, 5)][0]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    items[(0, 0)]
    assert torch.equal(items[(3, 5)][0], first)
    assert not torch.equal(items[(4, 5)][0], first)
    assert not torch.equal(training_items(seed=1)[(3, 5)][0], first)


def test_equal_images_at_other_indices_are_drawn_differently():
    same = Images("same", [0, 0], source=[(noise(1)[0][0],)] * 2)
    items = TransformedImages(same, recipe(32), 0)
    assert not torch.equal(items[(0, 0)][0], items[(0, 1)][0])


def test_training_items_leave_the_global_generators_as_they_were():
    before = generators()
    training_items()[(0, 1)]
    assert generators() == before


# --- order of training


def sampler(num_images, batch_size, update_freq=1, world_size=1, rank=0, seed=0):
    shape = {"batch_size": batch_size, "update_freq": update_freq, "world_size": world_size}
    return TrainBatches(num_images, **shape, rank=rank, seed=seed)


def test_one_epoch_takes_every_image_once_but_for_the_remainder():
    batches = list(sampler(50, 4, update_freq=3))
    indices = [index for batch in batches for _, index in batch]
    assert len(batches) == 12  # 50 // 12 = 4 steps of 3
    assert len(indices) == len(set(indices)) == 48
    assert set(indices) <= set(range(50))


def global_order(num_images, batch_size, update_freq, world_size, epoch=2):
    """The images of each update, rank by rank within each micro-step."""
    ranks = [sampler(num_images, batch_size, update_freq, world_size, rank) for rank in range(world_size)]
    for each in ranks:
        each.set_epoch(epoch)
    micro_steps = list(zip(*ranks, strict=True))
    chunks = [chunk for micro_step in micro_steps for chunk in micro_step]
    per_update = update_freq * world_size
    return [chunks[start : start + per_update] for start in range(0, len(chunks), per_update)]


def test_order_is_the_same_for_1_2_and_4_processes_at_equal_total_batch():
    one = global_order(101, 5, 4, 1)
    assert len(one) == 5
    assert one == global_order(101, 5, 2, 2) == global_order(101, 5, 1, 4)


def test_order_changes_with_epoch_and_seed_and_is_repeatable():
    batches = sampler(40, 4)
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    batches.set_epoch(0)
    assert list(batches) == first
    assert [i for b in second for _, i in b] != [i for b in first for _, i in b]
    assert {epoch for batch in second for epoch, _ in batch} == {1}
    assert list(sampler(40, 4, seed=1)) != first


def test_first_step_continues_within_the_epoch():
    batches = sampler(60, 4, update_freq=3)
    assert (batches.steps_per_epoch, len(batches)) == (5, 15)
    whole = list(batches)
    batches.set_epoch(0, first_step=2)
    assert len(batches) == 9
    assert list(batches) == whole[6:]


# --- evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 13])
def test_shards_hold_every_image_exactly_once(world_size):
    shards = [list(shard(11, rank, world_size)) for rank in range(world_size)]
    assert sorted(index for shard in shards for index in shard) == list(range(11))
    assert shards[1 % world_size][:1] == [1 % world_size]


# --- shares of the data


def labelled(*counts):
    labels = np.concatenate([np.full(count, label) for label, count in enumerate(counts)])
    shuffled = np.random.RandomState(1).permutation(labels)
    return Images("labelled", shuffled, source=[(noise(1)[0][0],)] * len(labels))


def test_fraction_keeps_the_share_of_each_class_and_at_least_one():
    some = datasets.fraction(labelled(100, 20, 3), 0.1, seed=0)
    assert np.bincount(some.targets()).tolist() == [10, 2, 1]  # 0.3 of the last class is raised to 1


def test_fraction_is_ascending_seeded_and_keeps_the_number_of_classes():
    images = labelled(50, 50)
    numbers = [[s.describe(i) for i in range(len(s))] for s in (datasets.fraction(images, 0.2, n) for n in (0, 0, 1))]
    assert numbers[0] == numbers[1] != numbers[2]
    positions = [int(text.split()[1]) for text in numbers[0]]
    assert positions == sorted(positions)
    assert datasets.fraction(images, 0.2, 0).classes == 2


def test_fraction_of_one_is_everything():
    images = labelled(5, 7)
    assert datasets.fraction(images, 1.0, 0).targets().tolist() == images.targets().tolist()


# --- batch sizes


@pytest.mark.parametrize(
    ("numbers", "mend"),
    [
        ((64, 1, 1), "--batch_size can be 60 at most"),
        ((16, 8, 1), "--update_freq can be 3 at most"),
        ((16, 1, 4), "there can be 3 processes at most"),
    ],
)
def test_update_larger_than_the_data_says_which_number_to_lower(numbers, mend):
    with pytest.raises(UserError, match=mend) as error:
        check_batches(60, *numbers)
    assert f"= {numbers[0] * numbers[1] * numbers[2]} images an update, but the training set has 60" in str(error.value)


# --- mixup


def mixer(**changes):
    options = {
        "mixup": 0.8,
        "cutmix": 1.0,
        "cutmix_minmax": None,
        "mixup_prob": 1.0,
        "mixup_switch_prob": 0.5,
        "mixup_mode": "batch",
    }
    return build_mixer(**{**options, "smoothing": 0.1, "num_classes": 3, "seed": 0, **changes})


def mixed(key, **changes):
    images = torch.arange(4 * 3 * 8 * 8, dtype=torch.float32).view(4, 3, 8, 8)
    return mixer(**changes)(images, torch.tensor([0, 1, 2, 0]), key)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixing_depends_on_seed_step_and_chunk_alone(mode):
    images, targets = mixed((7, 1), mixup_mode=mode)
    np.random.seed(99)
    again_images, again_targets = mixed((7, 1), mixup_mode=mode)
    assert torch.equal(images, again_images)
    assert torch.equal(targets, again_targets)
    assert torch.allclose(targets.sum(1), torch.ones(4))
    assert not torch.equal(images, mixed((7, 2), mixup_mode=mode)[0])
    assert not torch.equal(images, mixed((8, 1), mixup_mode=mode)[0])
    assert not torch.equal(images, mixed((7, 1), mixup_mode=mode, seed=1)[0])


def test_mixing_leaves_the_global_generators_as_they_were():
    before = generators()
    mixed((0, 0))
    assert generators() == before


def test_mixer_is_none_only_when_all_three_are_off():
    assert mixer(mixup=0.0, cutmix=0.0) is None
    assert mixer(mixup=0.0, cutmix=0.0, cutmix_minmax=[0.2, 0.8]) is not None
    assert mixer(mixup=0.0) is not None
    assert mixer(cutmix=0.0) is not None
