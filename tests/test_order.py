"""The order of training, each rank's share of the evaluation, and shares of the data."""

import numpy as np
import pytest
from PIL import Image

import datasets
from images.images import Images
from images.order import TrainBatches, check_batches, shard
from utils import UserError

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
    return Images("labelled", shuffled, source=[(Image.new("RGB", (8, 8)),)] * len(labels))


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
    assert f"= {numbers[0] * numbers[1] * numbers[2]} images per update, but the training set has 60" in str(
        error.value
    )
