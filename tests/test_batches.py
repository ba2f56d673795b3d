"""Three ways to bring images to the device: workers and device crop alike, and a run repeats exactly."""

import numpy as np
import pytest
import torch
from conftest import assert_equal_weights, read_log, settings, smooth, weights_of, write_smooth
from PIL import Image

import datasets
import main as script
from images.augment import DeviceAugment
from images.batches import AugmentedBatches, Resident, resident_on, train_batches
from images.cache import Shrink, cache_images
from images.crop import RandomCrop
from images.order import TrainBatches

PLAIN = ["--augment", "device", "--aa", "none", "--color_jitter", "0", "--reprob", "0"]


def load(root):
    return datasets.load_images("image_folder", str(root), True)


@pytest.fixture
def pictures(tmp_path):
    """Eight JPEG files of one size, larger than the training size."""
    return load(write_smooth(tmp_path, [(160, 200)] * 8, suffix=".jpg"))


def train_loader(images, *words, input_size=48, update_freq=1):
    order = TrainBatches(len(images), batch_size=2, update_freq=update_freq, world_size=1, rank=0, seed=0)
    return train_batches(images, order, *settings(*PLAIN, "--input_size", str(input_size), *words))


def batches(images, *words, input_size=48, epoch=0):
    loader = train_loader(images, *words, input_size=input_size, update_freq=2)
    loader.batch_sampler.set_epoch(epoch)
    return [(images.clone(), targets) for images, targets in loader]


def augmented(images, shapes):
    """Augment images, uint8 [N, 3, H, W], on the device at 48 px."""
    view, augmentation, loading = settings(*PLAIN, "--input_size", "48")
    return DeviceAugment(view, augmentation, loading.device)(images, 0, np.arange(len(images)), (0, 0), shapes)


def levels(images):
    """Normalized images as levels from 0 to 255."""
    view = settings()[0]
    return 255 * (images * torch.tensor(view.std).view(3, 1, 1) + torch.tensor(view.mean).view(3, 1, 1))


@pytest.mark.parametrize("input_size", [32, 48])
def test_crops_of_workers_are_the_crops_of_the_device(input_size, pictures):
    by_workers = batches(pictures, input_size=input_size, epoch=1)
    on_device = batches(pictures, "--cache", "device", input_size=input_size, epoch=1)
    assert len(by_workers) == len(on_device) == 4
    for (images, targets), (others, labels) in zip(by_workers, on_device, strict=True):
        assert images.shape == (2, 3, input_size, input_size) and torch.equal(targets, labels)
        # up to 32 px the whole image shrinks to a fifth, partly in the JPEG decoder's own down-scaling
        assert (levels(images) - levels(others)).abs().mean() < 2


def test_cache_on_the_device_gives_what_memory_gives(pictures):
    ram, device = (batches(pictures, "--cache", kind, input_size=112) for kind in ("ram", "device"))
    for (images, targets), (others, labels) in zip(ram, device, strict=True):
        assert torch.equal(images, others) and torch.equal(targets, labels)


def test_workers_crop_cached_images_far_larger_than_the_input(pictures):
    assert isinstance(train_loader(pictures, "--cache", "ram", input_size=112).pixels, Resident)
    assert not isinstance(train_loader(pictures, "--cache", "ram", input_size=48).pixels, Resident)
    for (images, targets), (others, labels) in zip(batches(pictures, "--cache", "ram"), batches(pictures), strict=True):
        assert (levels(images) - levels(others)).abs().mean() < 2 and torch.equal(targets, labels)


def test_stretched_images_are_cropped_in_their_own_shape(pictures):
    cached = cache_images(pictures, prepare=Shrink(160, square=True))
    whole = torch.stack([torch.from_numpy(np.array(pictures[i][0])) for i in range(8)]).permute(0, 3, 1, 2)
    stretched = augmented(cached.stacked().permute(0, 3, 1, 2), cached.shapes)
    assert (levels(stretched) - levels(augmented(whole, cached.shapes))).abs().mean() < 3


def test_workers_crop_cached_images_of_several_sizes(tmp_path):
    images = load(write_smooth(tmp_path, [(60, 80), (80, 60)] * 2))
    for (cached, _), (plain, _) in zip(batches(images, "--cache", "ram"), batches(images), strict=True):
        assert torch.equal(cached, plain)


def test_jpeg_is_decoded_small_only_where_the_crop_allows_it(tmp_path, monkeypatch):
    Image.fromarray(smooth(400, 400)).save(tmp_path / "x.jpg")
    crop = RandomCrop(*settings(*PLAIN, "--input_size", "48")[:2])
    for down, decoded in ((400, (50, 50)), (200, (100, 100)), (100, (200, 200)), (90, (400, 400))):
        box = np.array([[0, 0, down, down, 0, 0, 0, 1]], dtype=float)
        monkeypatch.setattr(RandomCrop, "boxes", lambda *_, box=box: box.copy())
        with Image.open(tmp_path / "x.jpg") as image:
            pixels = np.asarray(crop.cut(image, 0, 0))
            assert image.size == decoded and pixels.shape == (48, 48, 3)
        with Image.open(tmp_path / "x.jpg") as image:
            whole = image.convert("RGB").crop((0, 0, down, down)).resize((48, 48), Image.Resampling.BICUBIC)
        assert np.abs(pixels.astype(int) - np.asarray(whole)).mean() < 2


@pytest.mark.parametrize("words", [[], ["--cache", "ram"], ["--cache", "device"], ["--num_workers", "2"]])
def test_resumed_device_way_equals_the_uninterrupted_one(words, tiny_run, tmp_path):
    more = ["--augment", "device", "--update_freq", "2", *words]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    script.main(tiny_run(*more, output_dir=whole))
    script.main(tiny_run(*more, "--save_ckpt_freq", "1", output_dir=parts))
    (parts / "checkpoint-1.pth").unlink()
    (parts / "checkpoint-best.pth").unlink(missing_ok=True)
    script.main(tiny_run(*more, output_dir=parts))
    assert_equal_weights(weights_of(whole), weights_of(parts))
    assert len(read_log(parts)) == 2


def test_batches_of_pixels_know_the_chunk_that_they_are(pictures):
    keys = []

    def augment(images, epoch, indices, key, shapes):
        keys.append((epoch, key))
        return images.float()

    order = TrainBatches(8, batch_size=1, update_freq=2, world_size=2, rank=1, seed=0)
    order.set_epoch(3, first_step=1)
    resident = resident_on(cache_images(pictures), None, False)
    assert len(list(AugmentedBatches(order, resident, augment, torch.device("cpu"), None))) == 2
    assert keys == [(3, (3, 5)), (3, (3, 7))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_on_the_card_are_gathered_without_a_wait():
    pixels, labels = torch.randint(256, (20, 8, 8, 3), dtype=torch.uint8), np.arange(20)
    resident, wanted = Resident(pixels.to("cuda"), labels), np.array([3, 1, 19])
    resident.batch(wanted)  # warm-up: libraries initialize themselves
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, targets = resident.batch(wanted)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(images.cpu(), pixels[wanted]) and targets.tolist() == [3, 1, 19]
