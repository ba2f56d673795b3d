"""Transforms and mixup: what an image becomes depends on seeds and indices alone."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import generators, noise, settings
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

from images import transforms as ours
from images.transforms import TransformedImages, build_mixer, eval_transform

REFERENCE = json.loads(Path(__file__).with_name("reference_values.json").read_text())["transforms"]
MEAN, STD = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
RESIZE_32 = "Resize(size=(32, 32), interpolation=bicubic, max_size=None, antialias=True)"


def view(input_size, **changes):
    return replace(settings("--input_size", str(input_size))[0], **changes)


def recipe(input_size):
    return ours.train_transform(*settings("--input_size", str(input_size))[:2])


def training_items(seed=0):
    return TransformedImages(noise(12), recipe(32), seed)


@pytest.mark.parametrize("key", ["train_224", "eval_224", "train_32", "eval_32"])
def test_transforms_equal_the_originals_but_for_the_resize(key):
    kind, size = key.split("_")
    steps = [RESIZE_32] * (size == "32") + REFERENCE[key]
    last = steps.index("ToTensor()")
    mean_and_std = [float(number) for number in re.findall(r"\d\.\d+", steps[last + 1])]
    made = (recipe(int(size)) if kind == "train" else eval_transform(view(size))).transforms
    assert isinstance(made[last], ours.ToNormalizedTensor)
    assert torch.cat((made[last].mean, made[last].std)).flatten().tolist() == pytest.approx(mean_and_std)
    assert [repr(step) for step in made if step is not made[last]] == steps[:last] + steps[last + 2 :]


def test_normalized_tensors_are_those_of_torchvision_bit_for_bit():
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).repeat(1, 1, 3).numpy()  # each level in each channel
    steps = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    result = ours.ToNormalizedTensor(MEAN, STD)(Image.fromarray(levels))
    assert torch.equal(result, transforms.Compose(steps)(Image.fromarray(levels))) and result.is_contiguous()
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    batch = ours.normalized(torch.from_numpy(levels)[None].expand(2, -1, -1, -1), mean, std)
    assert torch.equal(batch, result.expand(2, -1, -1, -1)) and batch.is_contiguous()


def test_evaluation_warps_from_384_px_and_takes_its_options():
    steps = eval_transform(view(384)).transforms
    assert [type(step).__name__ for step in steps] == ["Resize", "ToNormalizedTensor"]
    assert steps[0].size == (384, 384)
    resize, crop = eval_transform(view(224, crop_pct=0.5)).transforms[:2]
    assert (resize.size, crop.size) == (448, (224, 224))
    inception = settings("--imagenet_default_mean_and_std", "false")[0]
    assert inception.mean == inception.std == (0.5, 0.5, 0.5)


def test_item_depends_on_seed_epoch_and_index_alone():
    items = training_items()
    first = items[(3, 5)][0]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    items[(0, 0)]
    assert torch.equal(items[(3, 5)][0], first)
    assert not torch.equal(items[(4, 5)][0], first)
    assert not torch.equal(training_items(seed=1)[(3, 5)][0], first)
    items.images = items.images.subset(np.array([5] * 12))  # the same image at every index
    assert torch.equal(items[(3, 5)][0], first) and not torch.equal(items[(3, 6)][0], first)


def mixer(**changes):
    return build_mixer(replace(settings()[1], **changes), num_classes=3)


def mixed(key, **changes):
    images = torch.arange(4 * 3 * 8 * 8, dtype=torch.float32).view(4, 3, 8, 8)
    return mixer(**changes)(images, torch.tensor([0, 1, 2, 0]), key)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixing_depends_on_seed_step_and_chunk_alone(mode):
    images, targets = mixed((7, 1), mixup_mode=mode)
    np.random.seed(99)
    before = generators()
    again = mixed((7, 1), mixup_mode=mode)
    assert generators() == before
    assert torch.equal(images, again[0]) and torch.equal(targets, again[1])
    assert torch.allclose(targets.sum(1), torch.ones(4))
    for key, changes in (((7, 2), {}), ((8, 1), {}), ((7, 1), {"seed": 1})):
        assert not torch.equal(images, mixed(key, mixup_mode=mode, **changes)[0])


def test_mixer_is_none_only_when_all_three_are_off():
    assert mixer(mixup=0.0, cutmix=0.0) is None
    for changes in ({"mixup": 0.0, "cutmix": 0.0, "cutmix_minmax": [0.2, 0.8]}, {"mixup": 0.0}, {"cutmix": 0.0}):
        assert mixer(**changes) is not None
