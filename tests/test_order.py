"""The order of training images, each rank's share of the evaluation, and --data_fraction."""

import numpy as np
import pytest
from conftest import error_of
from PIL import Image

import datasets
import main
from images.images import Images
from images.order import TrainBatches, check_batches, shard
from utils import UserError


def sampler(num_images, batch_size, update_freq=1, world_size=1, rank=0, seed=0):
    shape = {"batch_size": batch_size, "update_freq": update_freq, "world_size": world_size}
    return TrainBatches(num_images, **shape, rank=rank, seed=seed)


def test_one_epoch_takes_every_image_once_but_for_the_remainder():
    batches = list(sampler(50, 4, update_freq=3))
    indices = {index for batch in batches for _, index in batch}
    assert len(batches) == 12  # 50 // 12 = 4 steps of 3
    assert sum(map(len, batches)) == len(indices) == 48 and indices <= set(range(50))


def global_order(num_images, batch_size, update_freq, world_size, epoch=2):
    """The images of each update, rank by rank within each micro-step."""
    ranks = [sampler(num_images, batch_size, update_freq, world_size, rank) for rank in range(world_size)]
    for each in ranks:
        each.set_epoch(epoch)
    chunks = [chunk for micro_step in zip(*ranks, strict=True) for chunk in micro_step]
    per_update = update_freq * world_size
    return [chunks[start : start + per_update] for start in range(0, len(chunks), per_update)]


def test_1_2_and_4_processes_take_one_order_at_equal_batch():
    one = global_order(101, 5, 4, 1)
    assert len(one) == 5 and one == global_order(101, 5, 2, 2) == global_order(101, 5, 1, 4)


def test_order_changes_with_epoch_and_seed_and_is_repeatable():
    batches, passes = sampler(40, 4), []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        passes.append(list(batches))
    first, second, again = passes
    assert again == first != list(sampler(40, 4, seed=1))
    assert [i for b in second for _, i in b] != [i for b in first for _, i in b]
    assert {epoch for batch in second for epoch, _ in batch} == {1}


def test_first_step_continues_within_the_epoch():
    batches = sampler(60, 4, update_freq=3)
    whole = list(batches)
    assert (batches.steps_per_epoch, len(batches), len(whole)) == (5, 15, 15)
    batches.set_epoch(0, first_step=2)
    assert len(batches) == 9 and list(batches) == whole[6:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 13])
def test_shards_hold_every_image_exactly_once(world_size):
    shards = [list(shard(11, rank, world_size)) for rank in range(world_size)]
    assert sorted(index for shard in shards for index in shard) == list(range(11))
    assert shards[1 % world_size][:1] == [1 % world_size]


def labelled(*counts):
    labels = np.concatenate([np.full(count, label) for label, count in enumerate(counts)])
    shuffled = np.random.RandomState(1).permutation(labels)
    return Images("labelled", shuffled, source=[(Image.new("RGB", (8, 8)),)] * len(labels))


def test_fraction_keeps_the_share_of_each_class_and_at_least_one():
    shares = [datasets.fraction(labelled(100, 20, 3), 0.1, seed) for seed in (0, 0, 1)]
    assert np.bincount(shares[0].targets()).tolist() == [10, 2, 1]  # 0.3 of the last class is raised to 1
    numbers = [[int(share.describe(i).split()[1]) for i in range(len(share))] for share in shares]
    assert numbers[0] == numbers[1] == sorted(numbers[0]) != numbers[2]
    assert shares[0].classes == 3


MENDS = {
    (64, 1, 1): "--batch_size can be 60 at most",
    (16, 8, 1): "--update_freq can be 3 at most",
    (16, 1, 4): "there can be 3 processes at most",
}


@pytest.mark.parametrize(("numbers", "mend"), MENDS.items())
def test_update_larger_than_the_data_says_which_number_to_lower(numbers, mend):
    with pytest.raises(UserError, match=mend) as error:
        check_batches(60, *numbers)
    assert f"= {numbers[0] * numbers[1] * numbers[2]} images per update, but the training set has 60" in str(
        error.value
    )


def test_updates_of_a_slip_are_refused_before_the_schedules():
    check_batches(60, 4, 3, 1, epochs=20_000_000)  # 5 updates each: 1e8
    with pytest.raises(UserError, match="of 5 updates are 100000005, more than .*: give at most --epochs 20000000"):
        check_batches(60, 4, 3, 1, epochs=20_000_001)


def test_run_of_too_many_updates_ends_before_the_model_is_built(tiny_run):
    message = error_of(main, *tiny_run("--epochs 1000000000"))
    assert message.startswith("--epochs 1000000000 of 5 updates are 5000000000, more than 100000000 updates")
