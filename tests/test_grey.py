"""A model of one channel sees grey images, in every way that images reach it; and teachers of other channels."""

import math

import numpy as np
import pytest
import torch
from conftest import noise, settings, weights_of
from PIL import Image
from torch import nn

import main as script
from images.batches import eval_batches, train_batches
from images.order import TrainBatches
from images.transforms import ToNormalizedTensor, normalized
from models.pixels import Renormalize, for_channels, image_channels, mean_and_std
from training.teacher import Teacher
from utils import UserError

GREY = ("--model_kwargs", "in_chans=1", "--input_size", "32")
PLAIN = ("--reprob", "0", "--mixup", "0", "--cutmix", "0")
MEAN, STD = (0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3  # of ImageNet's colours


def grey_levels(batch, view):
    """Pillow's grey levels of images [batch, 3, H, W] that are normalized as colours."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in view.colours)
    levels = (255 * (batch * std + mean)).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in levels])


def as_seen(levels):
    """Grey levels [batch, H, W] as the model sees them."""
    return ((torch.from_numpy(levels.astype(np.float32)) / 255 - MEAN) / STD).unsqueeze(1)


def test_grey_is_pillows_and_normalized_by_the_mean_of_the_means():
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = as_seen(np.asarray(Image.fromarray(pixels).convert("L"))[None])
    view = settings(*GREY)[0]
    assert (view.mean, view.std) == ((pytest.approx(MEAN),), (pytest.approx(STD),))
    torch.testing.assert_close(ToNormalizedTensor(view.mean, view.std)(Image.fromarray(pixels))[None], expected)
    batch = torch.from_numpy(pixels)[None].expand(2, -1, -1, -1)
    mean, std = (torch.tensor(each).view(1, 1, 1) for each in (view.mean, view.std))
    torch.testing.assert_close(normalized(batch, mean, std), expected.expand(2, -1, -1, -1))


@pytest.mark.parametrize("way", ["--augment timm", "--augment timm --cache ram", "--augment device", "--augment device --cache device"])  # fmt: skip
def test_training_images_are_the_grey_of_those_in_colour(way):
    batches = []
    for more in ((), GREY[:2]):
        view, augmentation, loading = settings(*GREY[2:], *PLAIN, *way.split(), *more)
        order = TrainBatches(6, batch_size=6, update_freq=1, world_size=1, rank=0, seed=0)
        batches += [images for images, _ in train_batches(noise(6), order, view, augmentation, loading)]
    colour, grey = batches
    assert grey.shape == (6, 1, 32, 32)
    torch.testing.assert_close(grey, as_seen(grey_levels(colour, view)), rtol=1e-4, atol=1e-5)


def test_evaluation_images_do_not_depend_on_the_cache():
    seen = []
    for cache in ("none", "ram", "device"):
        view, _, loading = settings(*GREY, "--augment", "device", "--cache", cache)
        seen += [images for images, _ in eval_batches(noise(5), range(5), 5, view, loading)]
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    images = np.stack([np.asarray(noise(5)[index][0].convert("L")) for index in range(5)])
    torch.testing.assert_close(seen[0], as_seen(images))


@pytest.mark.parametrize("remode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("augment", ["timm", "device"])
def test_grey_images_are_erased_and_mixed(remode, augment, tiny_run):
    argv = tiny_run("--epochs 1 --model_kwargs in_chans=1 --reprob 1 --remode", remode, "--augment", augment)
    assert math.isfinite(script.main(argv)["train_loss"])


# ---- teachers ----


def test_images_for_another_model_are_those_worked_out_by_hand():
    colour, grey = ((0.5, 0.4, 0.3), (0.1, 0.2, 0.4)), ((0.4,), (0.2,))
    levels = torch.tensor([0.2, 0.6, 0.9]).view(1, 3, 1, 1)
    given = (levels - torch.tensor(colour[0]).view(3, 1, 1)) / torch.tensor(colour[1]).view(3, 1, 1)
    luma = 0.299 * 0.2 + 0.587 * 0.6 + 0.114 * 0.9
    assert Renormalize(colour, grey)(given).flatten().tolist() == pytest.approx([(luma - 0.4) / 0.2], abs=1e-4)
    seen = Renormalize(grey, colour)(torch.full((1, 1, 1, 1), (0.7 - 0.4) / 0.2))
    assert seen.flatten().tolist() == pytest.approx([(0.7 - 0.5) / 0.1, (0.7 - 0.4) / 0.2, (0.7 - 0.3) / 0.4])
    assert Renormalize(colour, colour)(given) is given
    assert for_channels(colour, 1) == ((pytest.approx(0.4),), (pytest.approx(0.7 / 3),))


@pytest.mark.parametrize(("teachers", "students"), [(3, 1), (1, 3), (1, 1)])
def test_teacher_sees_grey_images_as_grey(teachers, students):
    """Whatever the channels of both: a grey level is the same light for teacher and student."""
    model = nn.Flatten()
    model.weight = nn.Parameter(torch.zeros(1))
    given, own = (mean_and_std(imagenet, channels) for imagenet, channels in ((True, students), (False, teachers)))
    images = (torch.full((2, students, 1, 1), 0.6) - torch.tensor(given[0]).view(-1, 1, 1)) / torch.tensor(
        given[1]
    ).view(-1, 1, 1)
    outputs = Teacher(model, teachers, {}, own, given)(images)
    torch.testing.assert_close(outputs, torch.full((2, teachers), (0.6 - 0.5) / 0.5))


@pytest.mark.parametrize(("teachers", "students"), [(3, 1), (1, 3)])
@pytest.mark.parametrize("kind", ["logits", "features"])
def test_students_learn_from_teachers_of_other_channels(kind, teachers, students, train, tmp_path, caplog):
    train(f"--epochs 1 --model_kwargs in_chans={teachers}", to="teacher")
    words = f"--epochs 1 --distillation {kind} --teacher_path {tmp_path}/teacher --model_kwargs in_chans={students}"
    assert train(words)["train_distillation_loss"] > 0
    assert weights_of(tmp_path / "run", "checkpoint-0.pth")["patch_embed.proj.weight"].shape[1] == students
    assert ("in three equal channels" if teachers == 3 else "it sees the images in grey") in caplog.text


@pytest.mark.parametrize("channels", [2, 4, 0, "three"])
def test_other_channels_are_refused(channels):
    with pytest.raises(UserError, match=f"--teacher_kwargs in_chans={channels}: images have 3 channels or, in grey, 1"):
        image_channels({"in_chans": channels}, "--teacher_kwargs")
