"""Images decoded once: what comes out of a cache, what it costs, who shares it, and what is refused."""

import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import read_log
from PIL import Image

import datasets
import main as script
from images import batches as feed
from images import cache
from images.cache import CachedImages, Shrink, cache_images
from images.order import TrainBatches
from images.transforms import mean_and_std
from utils import UserError

MEAN, STD = mean_and_std(True)


@pytest.fixture
def images(image_folder):
    return datasets.load_images("image_folder", str(image_folder), True)


@pytest.fixture
def mixed(tmp_path):
    """Six images of three sizes and two classes."""
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate([(40, 20), (20, 40), (30, 30)] * 2):
        folder = tmp_path / "mixed" / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return datasets.load_images("image_folder", str(tmp_path / "mixed"), True)


def pixels(images, index):
    return np.asarray(images[index][0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_cached_images_are_the_images(num_workers, mixed):
    cached = cache_images(mixed, num_workers=num_workers)
    assert len(cached) == 6 and not cached.is_uniform and cached.classes == 2
    assert (cached.targets() == mixed.targets()).all()
    for index in range(6):
        assert (pixels(cached, index) == pixels(mixed, index)).all()
        assert cached[index][1] == mixed[index][1]


def test_images_of_one_size_are_one_array(images):
    cached = cache_images(images)
    assert cached.is_uniform and cached.stacked().shape == (40, 32, 32, 3)
    assert (cached.stacked()[7].numpy() == pixels(images, 7)).all()


def test_cache_size_shrinks_the_short_side_and_keeps_the_aspect(mixed):
    cached = cache_images(mixed, prepare=Shrink(15, square=False))
    assert cached.sizes.tolist() == [[30, 15], [15, 15], [15, 30], [15, 15], [30, 15], [15, 30]] or {
        tuple(size) for size in cached.sizes.tolist()
    } == {(15, 30), (30, 15), (15, 15)}
    assert {tuple(shape) for shape in cached.shapes.tolist()} == {(20, 40), (40, 20), (30, 30)}
    assert (cache_images(mixed, prepare=Shrink(64, square=False)).sizes == cached.shapes).all()


def test_squares_remember_the_shape_of_their_image(mixed):
    cached = cache_images(mixed, prepare=Shrink(16, square=True))
    assert cached.is_uniform and cached.stacked().shape == (6, 16, 16, 3)
    assert {tuple(shape) for shape in cached.shapes.tolist()} == {(20, 40), (40, 20), (30, 30)}


def test_another_process_maps_the_memory_and_does_not_copy_it(images):
    cached = cache_images(images)
    sent = pickle.dumps(cached)
    assert len(sent) < cached.stacked().numel()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_first_pixels, (sent,)) == cached.stacked()[0].sum().item()


def _first_pixels(sent):
    return pickle.loads(sent).stacked()[0].sum().item()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="reads /proc")
def test_workers_cost_no_memory_of_their_own(images):
    cached = cache_images(images)
    cached.memory_of_40_mb = cache.SharedMemory.new()
    cached.memory_of_40_mb.write(bytes(40 * 2**20))
    cached.memory_of_40_mb.mapped()
    dataset = _PrivateMemory(cached)
    batches = torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=2, sampler=[0, 1])
    for grown in batches:
        assert grown.item() < 10 * 2**20


class _PrivateMemory(torch.utils.data.Dataset):
    """How much private memory a worker takes to read 40 MB of the cache's memory."""

    def __init__(self, cached):
        self.cached = cached

    def __len__(self):
        return 2

    def __getitem__(self, _):
        before = _private()
        assert self.cached.memory_of_40_mb.bytes.sum() == 0
        return _private() - before


def _private():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def test_set_that_does_not_fit_is_refused_with_both_sizes(images, monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda *_: 100_000)
    # 40 x 32 x 32 x 3 bytes = 0.000114 GiB; 100,000 bytes = 0.0000931 GiB
    with pytest.raises(
        UserError, match=r"--cache: the 40 images of .* take about 0\.000114 GiB of memory, and 9\.31e-05 GiB are free"
    ):
        cache_images(images)


def unequal(folder):
    """200 images of one class, of which the first 32 in the order of their names are of 64 px, the others of 8 px."""
    folder.mkdir(parents=True)
    for number in range(200):
        side = 64 if number < 32 else 8
        Image.fromarray(np.full((side, side, 3), number, np.uint8)).save(folder / f"{number:03}.png")


def test_set_that_begins_with_its_largest_images_is_judged_by_all(tmp_path, monkeypatch):
    unequal(tmp_path / "train" / "a")
    images = datasets.load_images("image_folder", str(tmp_path), True)
    needed = 32 * 64 * 64 * 3 + 168 * 8 * 8 * 3  # 425,472 bytes; 200 like the first ones would take 2,457,600
    monkeypatch.setattr(cache, "free_memory", lambda *_: 500_000)
    assert len(cache_images(images)._memory.bytes) == needed
    monkeypatch.setattr(cache, "SAMPLE", 1)  # one that begins the set: too much is expected, and said so
    with pytest.raises(UserError, match=r"take about 0\.00229 GiB of memory, and 0\.000466 GiB"):
        cache_images(images)


def test_set_larger_than_its_sample_said_is_refused_once_it_is_too_large(tmp_path, monkeypatch):
    unequal(tmp_path / "train" / "a")
    images = datasets.load_images("image_folder", str(tmp_path), True)
    monkeypatch.setattr(cache.np, "linspace", lambda *_: np.array([199]))
    monkeypatch.setattr(cache, "free_memory", lambda *_: 300_000)
    with pytest.raises(UserError, match=r"take about 0\.00229 GiB of memory, and 0\.000279 GiB are free"):
        cache_images(images)


def test_broken_image_is_named_while_caching(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read .*x\.png"):
        cache_images(datasets.load_images("image_folder", str(tmp_path), True), num_workers=1)


@pytest.mark.parametrize("crop_pct", [None, 0.5])
@pytest.mark.parametrize("input_size", [32, 48])
def test_evaluation_from_a_cache_gives_the_same_tensors(input_size, crop_pct, mixed):
    shared = {"input_size": input_size, "crop_pct": crop_pct, "mean": MEAN, "std": STD, "device": torch.device("cpu")}
    workers = {"num_workers": 0, "pin_memory": False}
    plain, cached = (
        feed.eval_batches(mixed, range(1, 6, 2), 2, cache=kind, workers=workers, **shared) for kind in ("none", "ram")
    )
    assert [len(images) for images, _ in cached] == [2, 1]
    for (images, targets), (expected, labels) in zip(cached, plain, strict=True):
        assert torch.equal(images, expected) and torch.equal(targets, labels)


def test_training_from_a_cache_is_the_same_run(tiny_run, tmp_path):
    for kind in ("none", "ram"):
        script.main(tiny_run("--cache", kind, output_dir=tmp_path / kind))
    plain, cached = read_log(tmp_path / "none"), read_log(tmp_path / "ram")
    for name in ("train_loss", "test_loss", "test_acc1"):
        assert [line[name] for line in plain] == [line[name] for line in cached]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cache_size", "64"], "--cache_size 64 is for --cache ram or device"),
        (["--cache", "device"], "--cache device needs --augment device"),
    ],
)
def test_caches_that_make_no_sense_are_usage_errors(words, message, tiny_run, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(tiny_run(*words))
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_device_cache_of_several_sizes_asks_for_cache_size(mixed):
    order = TrainBatches(6, batch_size=2, update_freq=1, world_size=1, rank=0, seed=0)
    augmentation = {"hflip": 0.5, "color_jitter": None, "aa": "none", "train_interpolation": "bicubic", "reprob": 0.0,
        "remode": "pixel", "recount": 1}  # fmt: skip
    with pytest.raises(UserError, match="--cache device keeps images of one size.*give --cache_size"):
        feed.train_batches(mixed, order, augment="device", cache="device", cache_size=None, input_size=32, mean=MEAN,
            std=STD, augmentation=augmentation, seed=0, device=torch.device("cpu"),
            workers={"num_workers": 0, "pin_memory": False})  # fmt: skip


def test_memory_of_a_cache_is_gone_with_it(images):
    cached = cache_images(images)
    assert isinstance(cached, CachedImages)
    name = cached._memory.name
    assert os.path.exists(name)
    del cached
    assert not os.path.exists(name)
