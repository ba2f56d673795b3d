"""The image cache: its content, its memory, the processes that share it, and what it refuses."""

import multiprocessing
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_equal_weights, read_log, weights_of, write_smooth

import datasets
import main as script
from images import cache
from images.cache import Shrink, cache_images
from images.images import BadImage
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
    for split in ("train", "val"):
        write_smooth(tmp_path / "mixed", [(20, 40), (40, 20), (30, 30)] * 2, split)
    return tmp_path / "mixed"


def pixels(images, index):
    return np.asarray(images[index][0])


SHAPES = [[20, 40], [30, 30], [40, 20], [40, 20], [20, 40], [30, 30]]  # of `mixed`: images 0, 2, 4, then 1, 3, 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_cached_images_are_the_images(num_workers, mixed):
    images = load(mixed)
    cached = cache_images(images, num_workers=num_workers)
    assert (len(cached), cached.is_uniform, cached.classes) == (6, False, 2)
    assert (cached.targets() == images.targets()).all()
    for index in range(6):
        assert (pixels(cached, index) == pixels(images, index)).all() and cached[index][1] == images[index][1]


def test_cache_size_shrinks_but_keeps_the_shape_of_the_original(mixed):
    cached = cache_images(load(mixed), prepare=Shrink(15, square=False))
    assert cached.shapes.tolist() == SHAPES
    assert cached.sizes.tolist() == [[15, 30], [15, 15], [30, 15], [30, 15], [15, 30], [15, 15]]
    assert cache_images(load(mixed), prepare=Shrink(64, square=False)).sizes.tolist() == SHAPES
    squares = cache_images(load(mixed), prepare=Shrink(16, square=True))
    assert squares.is_uniform and squares.stacked().shape == (6, 16, 16, 3)
    assert squares.shapes.tolist() == SHAPES


def test_images_of_one_size_are_an_array_that_others_map(images):
    cached = cache_images(images)
    assert cached.is_uniform and cached.stacked().shape == (40, 32, 32, 3)
    assert (cached.stacked()[7].numpy() == pixels(images, 7)).all()
    sent = pickle.dumps(cached)
    assert len(sent) < cached.stacked().numel()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_first_pixels, (sent,)) == cached.stacked()[0].sum().item()
    name = cached._memory.name
    assert os.path.exists(name)
    del cached
    assert not os.path.exists(name)


def _first_pixels(sent):
    return pickle.loads(sent).stacked()[0].sum().item()


class PrivateMemory(torch.utils.data.Dataset):
    """Measure the private memory of a worker that reads much shared memory."""

    def __init__(self, shared):
        self.shared = shared

    def __getitem__(self, _):
        before = self.now()
        assert self.shared.bytes.sum() == 0
        return self.now() - before

    def now(self):
        return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@linux_only
def test_workers_cost_no_memory_of_their_own():
    file = cache.memory_file()
    file.write(bytes(40 * 2**20))
    dataset = PrivateMemory(cache.SharedMemory(file))
    for grown in torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=2, sampler=[0, 1]):
        assert grown.item() < 10 * 2**20


@linux_only
def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "used").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 30000\n")
    monkeypatch.setattr(cache, "CGROUPS", dict.fromkeys(("", "memory"), (tmp_path, "limit", "used")))
    assert cache.free_memory(torch.device("cpu")) == 330_000


@pytest.fixture
def unequal(tmp_path):
    """200 images of two classes: the first 16 of each have 64 px, the others 8 px."""
    return load(write_smooth(tmp_path, [(64, 64)] * 32 + [(8, 8)] * 168))


def refused(images, needed, free):
    """Check that a set too large to cache is refused with both sizes in GiB."""
    sizes = f"take about {needed} GiB of memory, and {free} GiB are free: give a smaller --cache_size"
    with pytest.raises(UserError, match=f"--cache: the {len(images)} images of .* {sizes}"):
        cache_images(images)


def test_size_is_judged_by_a_sample_of_the_whole_set(unequal, monkeypatch):
    needed = 32 * 64 * 64 * 3 + 168 * 8 * 8 * 3  # 425,472 bytes; 200 like the first ones would take 2,457,600
    monkeypatch.setattr(cache, "free_memory", lambda *_: 500_000)
    assert len(cache_images(unequal)._memory.bytes) == needed
    monkeypatch.setattr(cache, "SAMPLE", 1)  # only the first image is decoded: the estimate is too high
    refused(unequal, "0.00229", "0.000466")


def test_set_larger_than_its_sample_is_refused_while_decoding(unequal, monkeypatch):
    monkeypatch.setattr(cache.np, "linspace", lambda *_: np.array([199]))
    monkeypatch.setattr(cache, "free_memory", lambda *_: 300_000)
    refused(unequal, "0.000599", "0.000279")  # after 128 images: (32 x 12,288 + 96 x 192) / 128 x 200 = 643,200 bytes


def test_broken_image_is_one_line_from_a_worker_too(mixed, monkeypatch):
    monkeypatch.setattr(cache, "SAMPLE", 1)  # this image is not in the sample
    path = mixed / "train" / "class1" / "003.png"
    path.write_bytes(b"<html>\nnot found")
    with pytest.raises(BadImage, match=re.escape(f"cannot read {path} (")) as error:
        cache_images(load(mixed), num_workers=1)
    assert str(error.value).startswith("cannot read") and "\n" not in str(error.value)


@pytest.mark.parametrize("size", ["32", "48", "48 --crop_pct 0.5"])
def test_run_from_a_cache_is_the_same_run(size, mixed, tiny_run, tmp_path):
    runs = [tmp_path / kind for kind in ("none", "ram")]
    for run in runs:
        options = ["--data_path", mixed, "--batch_size", 2, "--input_size", size, "--cache", run.name]
        script.main(tiny_run(*options, output_dir=run))
    logs = [[(line["train_loss"], line["test_loss"], line["test_acc1"]) for line in read_log(run)] for run in runs]
    assert logs[0] == logs[1]
    assert_equal_weights(*map(weights_of, runs))


@pytest.mark.parametrize("message", ["--cache_size 64 is for --cache ram or", "--cache device needs --augment device"])
def test_caches_that_make_no_sense_are_usage_errors(message, tiny_run, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(tiny_run(*message.split()[:2]))
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_device_cache_of_several_sizes_asks_for_cache_size(mixed, tiny_run):
    options = ["--data_path", mixed, "--batch_size", 2, "--augment", "device", "--cache", "device"]
    with pytest.raises(UserError, match="--cache device keeps images of one size.*give --cache_size"):
        script.main(tiny_run(*options))
