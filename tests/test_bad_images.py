"""Odd and unreadable images: each is read as torchvision reads it, or named in an error, or skipped."""

import errno
import io
import os
import pickle
import re
import shutil
import signal
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_equal_weights, in_two_processes, read_log, weights_of, write_images
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets.folder import default_loader

import datasets
import main as script
from images import images as images_module
from images.images import BadImage, Images, bad_of_all_ranks

NOISE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
RGB = Image.fromarray(NOISE)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: turn by 90 degrees


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def frames(kind):
    return encoded(RGB, kind, save_all=True, append_images=[RGB.rotate(90), RGB.rotate(180)], duration=40)


# file name: content, all of which torchvision's loader opens; for more bits see test_opening.py
OPENED = {
    "gif that moves.png": frames("GIF"),
    "webp that moves.webp": frames("WEBP"),
    "two pictures.jpg": frames("MPO"),
    "palette with transparency.png": encoded(RGB.convert("P"), "PNG", transparency=bytes(range(256))),
    "alpha.png": encoded(RGB.convert("RGBA"), "PNG"),
    "cmyk.jpg": encoded(RGB.convert("CMYK"), "JPEG"),
    "lab.tiff": encoded(RGB.convert("LAB"), "TIFF"),
    "plain.ppm": encoded(RGB, "PPM"),
    "turned by exif.jpg": encoded(RGB, "JPEG", exif=TURNED),
    "line\nbreak.jpg": encoded(RGB, "JPEG"),
    "no text \udcff\udcfe.jpg": encoded(RGB, "JPEG"),
    "jpeg with bytes behind it.jpg": encoded(RGB, "JPEG") + bytes(1000),
}
BROKEN = {
    "empty.jpg": b"",
    "page.jpg": b"<html>\nnot found",
    **{f"half.{kind.lower()}": encoded(RGB, kind)[:800] for kind in ("JPEG", "PNG", "TIFF")},
    "half.webp": encoded(RGB, "WEBP", lossless=True)[:800],
    "header.jpg": encoded(RGB, "JPEG")[:20],
    "flipped.png": encoded(RGB, "PNG")[:60] + bytes(40) + encoded(RGB, "PNG")[100:],
    "no width.ppm": b"P6 0 5 255\n",
    "line\nbreak.jpg": b"",
    "no text \udcff\udcfe.jpg": b"",
}
NO_FILES = {
    "pipe.jpg": os.mkfifo,
    "device.jpg": lambda path: path.symlink_to("/dev/zero"),
    "loop.jpg": lambda path: path.symlink_to(path),
    "to nowhere.jpg": lambda path: path.symlink_to("nowhere"),
    "folder.jpg": lambda path: path.mkdir(),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", OPENED, ids=ascii)
def test_what_torchvision_opens_is_read_alike(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(OPENED[name])
    expected, (image, _) = default_loader(str(path)), Images("x", [0], paths=[path])[0]
    assert (image.mode, image.size) == ("RGB", (40, 30)) and image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", [*BROKEN, *NO_FILES], ids=ascii)
def test_what_is_no_image_is_named_and_not_waited_for(name, tmp_path):
    path = tmp_path / name
    NO_FILES.get(name, lambda path: path.write_bytes(BROKEN[name]))(path)
    signal.alarm(60)  # kills the tests if this one waits for ever
    with pytest.raises(BadImage) as error:
        Images("x", [0], paths=[path])[0]
    signal.alarm(0)
    shown, message = str(path) if str(path).isprintable() else repr(str(path)), str(error.value)
    assert message.startswith(f"cannot read {shown} (") and message.isprintable()


BAD = [3, 4, 19, 39]  # two neighbours, the last of a class, the last of all
STAND_IN = {3: 5, 4: 5, 19: 20, 39: 0}


@pytest.fixture
def damaged(tmp_path):
    """Two classes of 20 images. Those in BAD are broken, each in its own way, and skipped."""
    write_images(tmp_path, "train", {"dark": 20, "light": 20}, size=48)
    images = datasets.load_images("image_folder", str(tmp_path), True)
    for index, broken in zip(BAD, ("empty.jpg", "page.jpg", "half.jpeg", "header.jpg"), strict=True):
        Path(images.describe(index)).write_bytes(BROKEN[broken])
    return images.skipping_bad()


def test_next_image_stands_in_and_each_bad_one_is_reported_once(damaged, caplog):
    for index in (*range(40), *range(40)):
        (image, label), (expected, wanted) = damaged[index], damaged[STAND_IN.get(index, index)]
        assert image.tobytes() == expected.tobytes() and label == wanted
    assert (damaged.targets()[19], damaged[19][1], damaged.bad_images()) == (0, 1, BAD)
    # as errors, because ranks other than 0 log nothing less severe
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 4
    for record, index in zip(caplog.records, BAD, strict=True):
        assert record.getMessage().startswith(f"cannot read {damaged.describe(index)} (")


def test_subset_counts_what_it_met_in_its_own_numbers(damaged):
    part = damaged.subset(np.array([10, 19, 4, 7]))
    assert [part[index][1] for index in (1, 2)] == [0, 0]  # the next of the part: 7 for 4, and for 19
    assert (part.bad_images(), damaged.bad_images()) == ([1, 2], [4, 19])


def test_what_any_rank_found_is_skipped_without_a_try(damaged, monkeypatch, caplog):
    monkeypatch.setattr(images_module, "of_all_ranks", lambda own: [own, [7, 39], BAD])
    assert bad_of_all_ranks(damaged) == damaged.bad_images() == [3, 4, 7, 19, 39]
    assert damaged[7][0].tobytes() == damaged[8][0].tobytes() and damaged[39][1] == 0
    assert not caplog.records


def test_marks_are_shared_with_workers_both_ways(damaged):
    damaged.mark_bad([0])
    loader = DataLoader(damaged, batch_size=None, num_workers=1, persistent_workers=True)
    assert [label for _, label in loader] == [0] * 19 + [1] * 20 + [0]
    assert damaged.bad_images() == [0, *BAD]
    damaged.mark_bad([18])  # the worker has already started
    assert [label for _, label in loader] == [0] * 18 + [1] * 21 + [0]
    spawned = pickle.loads(ForkingPickler.dumps(damaged))  # as a spawned worker gets it
    spawned.mark_bad([7])
    assert damaged.bad_images() == [0, 3, 4, 7, 18, 19, 39]


def test_many_bad_images_in_a_row_are_an_error(damaged, monkeypatch):
    monkeypatch.setattr(images_module, "BAD_IN_A_ROW", 2)
    which = f"({damaged.describe(3)} to {damaged.describe(4)})"
    with pytest.raises(BadImage, match=re.escape(f"2 consecutive images could not be read {which}")):
        damaged[3]
    assert damaged[4][1] == 0
    with pytest.raises(BadImage, match="1 consecutive images"):
        damaged.subset(np.array([39]))[0]


@pytest.mark.parametrize("shortage", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_shortage_of_the_machine_is_not_the_images_fault(shortage, damaged):
    def decode(_):
        raise shortage

    with pytest.raises(BadImage, match="cannot read"):
        damaged.read(0, decode)
    assert damaged.bad_images() == []


def test_images_that_are_not_files_are_skipped_too():
    rows = [(Image.open(io.BytesIO(encoded(RGB, "PNG")[:size])),) for size in (None, 60, None)]
    images = Images("hfds/x", [0, 1, 2], source=rows).skipping_bad()
    assert images[1][1] == 2 and images.bad_images() == [1]


# two of one epoch's images and one for evaluation, none of them the last of its class
BAD_FILES = ("train/dark/003.jpg", "train/light/001.jpg", "val/grey/000.jpg")
WAYS = [("timm", "none"), ("timm", "ram"), ("device", "none"), ("device", "ram"), ("device", "device")]


@pytest.fixture
def folders(image_folder, tmp_path):
    """Write a data set with broken images, and a copy that has their neighbours in their place."""
    damaged, meant = (shutil.copytree(image_folder, tmp_path / name) for name in ("damaged", "meant"))
    for name in BAD_FILES:
        (damaged / name).write_bytes(b"no image")
        following = f"{int(name[-7:-4]) + 1:03}.jpg"
        shutil.copy(meant / Path(name).with_name(following), meant / name)
    return damaged, meant


def counts(run):
    return [(line["train_bad_images"], line["test_bad_images"]) for line in read_log(run)]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_skipping_run_equals_one_on_the_stand_ins(way, num_workers, folders, tiny_run, tmp_path, caplog):
    options = ["--augment", way[0], "--cache", way[1], "--num_workers", num_workers, "--bad_images", "skip"]
    runs = [tmp_path / f"run of {root.name}" for root in folders]
    for root, run in zip(folders, runs, strict=True):
        script.main(tiny_run("--data_path", root, *options, output_dir=run))
    losses = [[(line["train_loss"], line["test_loss"]) for line in read_log(run)] for run in runs]
    assert losses[0] == losses[1]
    assert_equal_weights(*map(weights_of, runs))
    assert [counts(run) for run in runs] == [[(2, 1)] * 2, [(0, 0)] * 2]
    if not num_workers:  # the workers' log lines are not captured
        assert [sum(name in record.getMessage() for record in caplog.records) for name in BAD_FILES] == [1, 1, 1]


def test_two_processes_and_a_resumed_run_count_the_same(folders, tiny_run, tmp_path):
    run, options = tmp_path / "run", ["--data_path", folders[0], "--bad_images", "skip", "--batch_size", 4]
    argv = tiny_run(*options, "--save_ckpt_steps", 1, "--save_ckpt_num", 20)
    assert in_two_processes(argv, tmp_path / "said.txt")[0] == [0, 0]
    assert counts(run) == [(2, 1)] * 2
    weights = weights_of(run)
    for path in run.glob("checkpoint-*.pth"):
        if path.name not in ("checkpoint-0.pth", "checkpoint-1-9.pth"):  # the next-to-last update
            path.unlink()
    assert in_two_processes(argv, tmp_path / "said.txt")[0] == [0, 0]
    assert counts(run) == [(2, 1)] * 2
    assert_equal_weights(weights_of(run), weights)


def test_run_fails_by_default_and_may_be_resumed_with_skip(folders, tiny_run, image_folder, tmp_path):
    script.main(tiny_run("--data_path", image_folder))
    for name in ("checkpoint-1.pth", "checkpoint-best.pth"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    with pytest.raises(BadImage, match="cannot read .*damaged"):
        script.main(tiny_run("--data_path", folders[0]))
    script.main(tiny_run("--data_path", folders[0], "--bad_images", "skip"))
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [0, 1]
