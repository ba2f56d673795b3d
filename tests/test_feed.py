"""The ways of images to the device: the same crops by each, the same run again, nothing left out."""

import pickle

import numpy as np
import pytest
import torch
from conftest import read_log
from PIL import Image

import datasets
import main as script
from images import batches as feed
from images.augment import DeviceAugment
from images.cache import Shrink, cache_images
from images.order import TrainBatches
from images.transforms import mean_and_std
from utils import UserError

MEAN, STD = mean_and_std(True)
PLAIN = {"hflip": 0.5, "color_jitter": None, "aa": "none", "train_interpolation": "bicubic", "reprob": 0.0,
    "remode": "pixel", "recount": 1}  # fmt: skip
CPU = {"device": torch.device("cpu"), "workers": {"num_workers": 0, "pin_memory": False}}


def smooth(height, width, seed=0):
    """A picture without sharp edges, [height, width, 3] uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def pictures(tmp_path):
    """Eight JPEG files of one size, larger than what they are trained at."""
    for number in range(8):
        folder = tmp_path / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth(160, 200, number)).save(folder / f"{number}.jpg", quality=95)
    return datasets.load_images("image_folder", str(tmp_path), True)


def batches(images, *, augment="device", cache="none", cache_size=None, input_size=48, augmentation=PLAIN, epoch=0):
    order = TrainBatches(len(images), batch_size=2, update_freq=2, world_size=1, rank=0, seed=0)
    order.set_epoch(epoch)
    passes = feed.train_batches(images, order, augment=augment, cache=cache, cache_size=cache_size, seed=0, mean=MEAN,
        std=STD, input_size=input_size, augmentation=augmentation, **CPU)  # fmt: skip
    return [(images.clone(), targets) for images, targets in passes]


def _train(images, input_size):
    order = TrainBatches(len(images), batch_size=2, update_freq=1, world_size=1, rank=0, seed=0)
    return feed.train_batches(images, order, augment="device", cache="ram", cache_size=None, seed=0, mean=MEAN, std=STD,
        input_size=input_size, augmentation=PLAIN, **CPU)  # fmt: skip


def levels(images):
    """Normalized images as levels from 0 to 255."""
    return 255 * (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))


@pytest.mark.parametrize("input_size", [32, 48])
def test_crops_of_workers_are_the_crops_of_the_device(input_size, pictures):
    by_workers = batches(pictures, input_size=input_size)
    on_device = batches(pictures, input_size=input_size, cache="device")
    assert len(by_workers) == len(on_device) == 4
    for (images, targets), (others, labels) in zip(by_workers, on_device, strict=True):
        assert images.shape == (2, 3, input_size, input_size) and torch.equal(targets, labels)
        # up to 32 px the whole image is shrunk to a fifth, and the decoder's own down-scaling has part in it
        assert (levels(images) - levels(others)).abs().mean() < 2


def test_cache_on_the_device_gives_what_memory_gives(pictures):
    for (images, targets), (others, labels) in zip(
        batches(pictures, input_size=112, cache="ram"), batches(pictures, input_size=112, cache="device"), strict=True
    ):
        assert torch.equal(images, others) and torch.equal(targets, labels)


def test_images_far_larger_than_the_input_are_cropped_by_workers_from_memory(pictures):
    assert isinstance(_train(pictures, 112).pixels, feed.Resident)
    assert not isinstance(_train(pictures, 48).pixels, feed.Resident)
    for (images, targets), (others, labels) in zip(batches(pictures, cache="ram"), batches(pictures), strict=True):
        assert (levels(images) - levels(others)).abs().mean() < 2 and torch.equal(targets, labels)


def test_augmentation_goes_to_a_worker_without_what_lies_on_the_device():
    augment = DeviceAugment(input_size=48, mean=MEAN, std=STD, seed=0, device=CPU["device"], crop=False, **PLAIN)
    sent = pickle.loads(pickle.dumps(augment))
    assert not any(isinstance(value, torch.Tensor) for value in vars(sent).values())
    picture = Image.fromarray(smooth(60, 80))
    assert (sent.cropped(picture, 1, 2) == augment.cropped(picture, 1, 2)).all()


def test_stretched_images_are_cropped_in_their_own_shape(pictures):
    cached = cache_images(pictures, prepare=Shrink(160, square=True))
    shared = {"input_size": 48, "mean": MEAN, "std": STD, "seed": 0, "device": CPU["device"], **PLAIN}
    stretched = DeviceAugment(**shared, shapes=cached.shapes)
    plain = DeviceAugment(**shared)
    indices = np.arange(8)
    whole = torch.stack([torch.from_numpy(np.array(pictures[i][0])) for i in range(8)]).permute(0, 3, 1, 2)
    images = stretched(cached.stacked().permute(0, 3, 1, 2), 0, indices, (0, 0))
    assert (levels(images) - levels(plain(whole, 0, indices, (0, 0)))).abs().mean() < 3


def test_images_of_several_sizes_are_cropped_by_workers_from_memory(tmp_path):
    for number, (height, width) in enumerate([(60, 80), (80, 60)] * 2):
        folder = tmp_path / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth(height, width, number)).save(folder / f"{number}.png")
    images = datasets.load_images("image_folder", str(tmp_path), True)
    cached, plain = batches(images, cache="ram"), batches(images)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(cached, plain, strict=True))


def test_jpeg_is_decoded_small_only_where_the_crop_allows_it(tmp_path, monkeypatch):
    Image.fromarray(smooth(400, 400)).save(tmp_path / "x.jpg")
    augment = DeviceAugment(input_size=48, mean=MEAN, std=STD, seed=0, device=CPU["device"], crop=False, **PLAIN)
    for down, decoded in ((400, (50, 50)), (200, (100, 100)), (100, (200, 200)), (90, (400, 400))):
        box = np.array([[0, 0, down, down, 0, 0, 0, 1]], dtype=float)
        monkeypatch.setattr(DeviceAugment, "_boxes", lambda *_, box=box: box.copy())
        with Image.open(tmp_path / "x.jpg") as image:
            pixels = augment.cropped(image, 0, 0)
            assert image.size == decoded and pixels.shape == (48, 48, 3)
        with Image.open(tmp_path / "x.jpg") as image:
            whole = image.convert("RGB").crop((0, 0, down, down)).resize((48, 48), Image.Resampling.BICUBIC)
        assert np.abs(pixels.astype(int) - np.asarray(whole)).mean() < 2


@pytest.mark.parametrize("words", [[], ["--cache", "ram"], ["--cache", "device"], ["--num_workers", "2"]])
def test_resumed_run_on_the_device_way_equals_the_uninterrupted_one(words, tiny_run, tmp_path):
    more = ["--augment", "device", "--update_freq", "2", *words]
    script.main(tiny_run(*more, output_dir=tmp_path / "whole"))
    script.main(tiny_run(*more, "--save_ckpt_freq", "1", output_dir=tmp_path / "parts"))
    (tmp_path / "parts" / "checkpoint-1.pth").unlink()
    (tmp_path / "parts" / "checkpoint-best.pth").unlink(missing_ok=True)
    script.main(tiny_run(*more, output_dir=tmp_path / "parts"))
    first, second = (
        torch.load(tmp_path / name / "checkpoint-1.pth", weights_only=True)["model"] for name in ("whole", "parts")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert len(read_log(tmp_path / "parts")) == 2


def test_device_way_draws_anew_each_epoch(pictures):
    first, second = batches(pictures), batches(pictures, epoch=1)
    assert not torch.equal(first[0][0], second[0][0])


def test_device_way_refuses_policies_that_it_does_not_have(tiny_run):
    with pytest.raises(UserError, match="--augment device does not offer --aa 'augmix-m5'"):
        script.main(tiny_run("--augment", "device", "--aa", "augmix-m5"))


def test_batches_of_pixels_know_the_chunk_that_they_are(pictures):
    keys = []

    def augment(images, epoch, indices, key):
        keys.append((epoch, key))
        return images.float()

    order = TrainBatches(8, batch_size=1, update_freq=2, world_size=2, rank=1, seed=0)
    order.set_epoch(3, first_step=1)
    resident = feed.resident_on(cache_images(pictures), None, False)
    assert len(list(feed.AugmentedBatches(order, resident, augment, torch.device("cpu")))) == 2
    assert keys == [(3, (3, 5)), (3, (3, 7))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_on_the_card_are_gathered_without_a_wait():
    pixels, labels = torch.randint(256, (20, 8, 8, 3), dtype=torch.uint8), np.arange(20)
    resident, wanted = feed.Resident(pixels.to("cuda"), labels), np.array([3, 1, 19])
    resident.batch(wanted)  # libraries set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, targets = resident.batch(wanted)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(images.cpu(), pixels[wanted]) and targets.tolist() == [3, 1, 19]
