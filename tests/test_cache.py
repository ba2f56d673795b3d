"""Images decoded once: what a cache holds, what memory it takes, who shares it, and what is refused."""

import multiprocessing
import os
import pickle
import sys

import numpy as np
import pytest
import torch
from conftest import assert_equal_weights, read_log, weights_of
from PIL import Image

import datasets
import main as script
from images import cache
from images.cache import Shrink, cache_images
from utils import UserError

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def load(root):
    return datasets.load_images("image_folder", str(root), True)


@pytest.fixture
def images(image_folder):
    return load(image_folder)


@pytest.fixture
def mixed(tmp_path):
    """A folder with six images of three sizes and two classes, for training and for evaluation."""
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate([(40, 20), (20, 40), (30, 30)] * 2):
        for part in ("train", "val"):
            folder = tmp_path / "mixed" / part / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{number}.png")
    return tmp_path / "mixed"


def pixels(images, index):
    return np.asarray(images[index][0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_cached_images_are_the_images(num_workers, mixed):
    images = load(mixed)
    cached = cache_images(images, num_workers=num_workers)
    assert (len(cached), cached.is_uniform, cached.classes) == (6, False, 2)
    assert (cached.targets() == images.targets()).all()
    for index in range(6):
        assert (pixels(cached, index) == pixels(images, index)).all()
        assert cached[index][1] == images[index][1]


def test_images_of_one_size_are_one_array(images):
    cached = cache_images(images)
    assert cached.is_uniform and cached.stacked().shape == (40, 32, 32, 3)
    assert (cached.stacked()[7].numpy() == pixels(images, 7)).all()


def test_cache_size_shrinks_the_short_side_and_keeps_the_aspect(mixed):
    cached = cache_images(load(mixed), prepare=Shrink(15, square=False))
    # by class: images 0, 2, 4, then 1, 3, 5
    assert cached.shapes.tolist() == [[20, 40], [30, 30], [40, 20], [40, 20], [20, 40], [30, 30]]
    assert cached.sizes.tolist() == [[15, 30], [15, 15], [30, 15], [30, 15], [15, 30], [15, 15]]
    assert (cache_images(load(mixed), prepare=Shrink(64, square=False)).sizes == cached.shapes).all()


def test_squares_remember_the_shape_of_their_image(mixed):
    cached = cache_images(load(mixed), prepare=Shrink(16, square=True))
    assert cached.is_uniform and cached.stacked().shape == (6, 16, 16, 3)
    assert cached.shapes.tolist() == [[20, 40], [30, 30], [40, 20], [40, 20], [20, 40], [30, 30]]


def test_another_process_maps_the_memory(images):
    cached = cache_images(images)
    sent = pickle.dumps(cached)
    assert len(sent) < cached.stacked().numel()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_first_pixels, (sent,)) == cached.stacked()[0].sum().item()


def _first_pixels(sent):
    return pickle.loads(sent).stacked()[0].sum().item()


@linux_only
def test_workers_cost_no_memory_of_their_own(images):
    cached = cache_images(images)
    file = cache.memory_file()
    file.write(bytes(40 * 2**20))
    cached.memory_of_40_mb = cache.SharedMemory(file)
    dataset = _PrivateMemory(cached)
    batches = torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=2, sampler=[0, 1])
    for grown in batches:
        assert grown.item() < 10 * 2**20


class _PrivateMemory(torch.utils.data.Dataset):
    """The private memory that a worker takes to read 40 MB of shared memory."""

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
    message = r"--cache: the 40 images of .* take about 0\.000114 GiB of memory, and 9\.31e-05 GiB are free"
    with pytest.raises(UserError, match=message):
        cache_images(images)


@linux_only
def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "used").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 30000\n")
    monkeypatch.setattr(cache, "CGROUPS", dict.fromkeys(("", "memory"), (tmp_path, "limit", "used")))
    assert cache.free_memory(torch.device("cpu")) == 330_000


def unequal(root):
    """200 images of one class: the first 32 have 64 px, the others 8 px."""
    (root / "train" / "a").mkdir(parents=True)
    for number in range(200):
        side = 64 if number < 32 else 8
        Image.fromarray(np.full((side, side, 3), number, np.uint8)).save(root / "train" / "a" / f"{number:03}.png")
    return load(root)


def test_size_is_judged_by_a_sample_of_the_whole_set(tmp_path, monkeypatch):
    images = unequal(tmp_path)
    needed = 32 * 64 * 64 * 3 + 168 * 8 * 8 * 3  # 425,472 bytes; 200 like the first ones would take 2,457,600
    monkeypatch.setattr(cache, "free_memory", lambda *_: 500_000)
    assert len(cache_images(images)._memory.bytes) == needed
    monkeypatch.setattr(cache, "SAMPLE", 1)  # the first image: too much is expected
    with pytest.raises(UserError, match=r"take about 0\.00229 GiB of memory, and 0\.000466 GiB"):
        cache_images(images)


def test_set_larger_than_its_sample_is_refused_while_decoding(tmp_path, monkeypatch):
    images = unequal(tmp_path)
    monkeypatch.setattr(cache.np, "linspace", lambda *_: np.array([199]))
    monkeypatch.setattr(cache, "free_memory", lambda *_: 300_000)
    with pytest.raises(UserError, match=r"take about 0\.00229 GiB of memory, and 0\.000279 GiB are free"):
        cache_images(images)


def test_broken_image_is_named_while_caching(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read .*x\.png"):
        cache_images(load(tmp_path), num_workers=1)


@pytest.mark.parametrize("size", [["32"], ["48"], ["48", "--crop_pct", "0.5"]])
def test_run_from_a_cache_is_the_same_run(size, mixed, tiny_run, tmp_path):
    runs = [tmp_path / kind for kind in ("none", "ram")]
    for run in runs:
        options = ["--data_path", mixed, "--batch_size", 2, "--input_size", *size, "--cache", run.name]
        script.main(tiny_run(*options, output_dir=run))
    logs = [[(line["train_loss"], line["test_loss"], line["test_acc1"]) for line in read_log(run)] for run in runs]
    assert logs[0] == logs[1]
    assert_equal_weights(*map(weights_of, runs))


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


def test_device_cache_of_several_sizes_asks_for_cache_size(mixed, tiny_run):
    options = ["--data_path", mixed, "--batch_size", 2, "--augment", "device", "--cache", "device"]
    with pytest.raises(UserError, match="--cache device keeps images of one size.*give --cache_size"):
        script.main(tiny_run(*options))


def test_memory_of_a_cache_is_gone_with_it(images):
    cached = cache_images(images)
    name = cached._memory.name
    assert os.path.exists(name)
    del cached
    assert not os.path.exists(name)
