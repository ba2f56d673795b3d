"""Transforms and mixup: what an image becomes depends on seeds and indices alone."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import settings
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

from images.images import Images
from images.transforms import (
    ToNormalizedTensor,
    TransformedImages,
    build_mixer,
    eval_transform,
    normalized,
    train_transform,
)

REFERENCE = json.loads(Path(__file__).with_name("reference_values.json").read_text())["transforms"]
MEAN, STD = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
RESIZE_32 = "Resize(size=(32, 32), interpolation=bicubic, max_size=None, antialias=True)"


def view(input_size, **changes):
    return replace(settings("--input_size", str(input_size))[0], **changes)


def recipe(input_size):
    return train_transform(*settings("--input_size", str(input_size))[:2])


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
        ("eval_224", eval_transform(view(224)), []),
        ("train_32", recipe(32), [RESIZE_32]),
        ("eval_32", eval_transform(view(32)), [RESIZE_32]),
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
    transform = eval_transform(view(32, mean=(0, 0, 0), std=(1, 1, 1)))
    assert torch.allclose(transform(image), expected, atol=1e-6)  # one float32 division apart


@pytest.mark.parametrize("stored", [(8, 8), (28, 28), (64, 64), (40, 20)])
def test_images_of_any_size_come_out_at_32_px(stored):
    image = Image.new("RGB", stored)
    assert recipe(32)(image).shape == (3, 32, 32)
    assert eval_transform(view(32))(image).shape == (3, 32, 32)


def test_evaluation_from_384_px_warps_the_whole_image():
    steps = eval_transform(view(384)).transforms
    assert [type(step).__name__ for step in steps] == ["Resize", "ToNormalizedTensor"]
    assert steps[0].size == (384, 384)


def test_crop_pct_sets_the_short_side():
    resize, crop = eval_transform(view(224, crop_pct=0.5)).transforms[:2]
    assert (resize.size, crop.size) == (448, (224, 224))


def test_inception_constants_are_one_half():
    inception = settings("--imagenet_default_mean_and_std", "false")[0]
    assert inception.mean == inception.std == (0.5, 0.5, 0.5)


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


# --- mixup


def mixer(**changes):
    return build_mixer(replace(settings()[1], **changes), num_classes=3)


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
