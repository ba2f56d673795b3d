"""Images that are odd and images that cannot be read: each is what the original makes of it, or is named, or is skipped."""

import errno
import io
import logging
import os
import pickle
import shutil
import signal
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from conftest import assert_equal_weights, read_log, weights_of, write_images
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets.folder import default_loader

import datasets
import engine
import main as script
from images import batches as feed
from images.images import BadImage, Images
from images.order import TrainBatches
from images.transforms import mean_and_std
from options import training_options
from utils import UserError

MEAN, STD = mean_and_std(True)
CPU = torch.device("cpu")
NOISE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
RGB = Image.fromarray(NOISE)
DEEP = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 250)


@pytest.fixture(autouse=True)
def _ends_soon():
    """A pipe that is waited for ends the test after a minute, not never."""

    def hangs(*_):
        pytest.fail("it hangs")  # no Exception, or it would pass for a decoder's

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def see_through():
    image = RGB.convert("P")
    image.info["transparency"] = bytes(range(256))
    return encoded(image, "PNG")


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    return encoded(RGB, "JPEG", exif=exif)


def frames(kind):
    return encoded(RGB, kind, save_all=True, append_images=[RGB.rotate(90), RGB.rotate(180)], duration=40)


# file name: content, all of which torchvision's loader opens
OPENED = {
    "plain.jpg": encoded(RGB, "JPEG"),
    "upper case.JPEG": encoded(RGB, "JPEG"),
    "png by content.jpg": encoded(RGB, "PNG"),
    "gif by content.png": encoded(RGB, "GIF"),
    "gif that moves.png": frames("GIF"),
    "webp that moves.webp": frames("WEBP"),
    "two pictures.jpg": frames("MPO"),
    "palette with transparency.png": see_through(),
    "grey with alpha.png": encoded(RGB.convert("LA"), "PNG"),
    "alpha.png": encoded(RGB.convert("RGBA"), "PNG"),
    "cmyk.jpg": encoded(RGB.convert("CMYK"), "JPEG"),
    "cmyk.tif": encoded(RGB.convert("CMYK"), "TIFF"),
    "lab.tiff": encoded(RGB.convert("LAB"), "TIFF"),
    "16 bits.png": encoded(DEEP, "PNG"),
    "16 bits.pgm": encoded(DEEP, "PPM"),
    "floats.tif": encoded(RGB.convert("F"), "TIFF"),
    "1 bit.png": encoded(RGB.convert("1"), "PNG"),
    "bitmap.bmp": encoded(RGB, "BMP"),
    "plain.ppm": encoded(RGB, "PPM"),
    "turned by exif.jpg": turned(),
    "line\nbreak.jpg": encoded(RGB, "JPEG"),
    "no text \udcff\udcfe.jpg": encoded(RGB, "JPEG"),
    "jpeg with bytes behind it.jpg": encoded(RGB, "JPEG") + bytes(1000),
}
BROKEN = {
    "empty.jpg": b"",
    "page.jpg": b"<html>\nnot found",
    "half.jpg": encoded(RGB, "JPEG")[:800],
    "half.png": encoded(RGB, "PNG")[:800],
    "half.bmp": encoded(RGB, "BMP")[:800],
    "half.tif": encoded(RGB, "TIFF")[:800],
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
}


def one(path):
    """The set of this image alone."""
    return Images("image_folder", [0], paths=[str(path)])


def refused(path):
    """The message about an image that cannot be read; one line with the path."""
    with pytest.raises(BadImage) as error:
        one(path)[0]
    message = str(error.value)
    shown = str(path) if str(path).isprintable() else repr(str(path))
    assert message.startswith(f"cannot read {shown} (") and message.isprintable()
    return message


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", OPENED, ids=ascii)
def test_what_torchvisions_loader_opens_is_read_alike(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(OPENED[name])
    expected, (image, _) = default_loader(str(path)), one(path)[0]
    assert (image.mode, image.size) == ("RGB", (40, 30)) and image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", BROKEN, ids=ascii)
def test_what_torchvisions_loader_does_not_open_is_named(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    with pytest.raises((OSError, SyntaxError, ValueError)):
        default_loader(str(path))
    refused(path)


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_named_and_not_waited_for(name, tmp_path):
    NO_FILES[name](tmp_path / name)
    refused(tmp_path / name)


def test_image_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "x.jpg").touch(0o000)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read everything: be somebody else
    try:
        assert "PermissionError" in refused(tmp_path / "x.jpg")
    finally:
        os.seteuid(user)


def test_folder_where_an_image_was_is_named(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    assert "IsADirectoryError" in refused(tmp_path / "x.jpg")


def test_pipe_that_is_written_to_is_named(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    writer = os.open(tmp_path / "x.jpg", os.O_RDWR)
    try:
        refused(tmp_path / "x.jpg")
    finally:
        os.close(writer)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_size_limit_is_pillows(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    RGB.save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # of 1200: a warning
    assert one(path)[0][0].tobytes() == RGB.tobytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # more than twice as many
    assert "DecompressionBombError" in refused(path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
def test_truncated_jpeg_is_named_also_where_it_is_decoded_small(share, tmp_path):
    whole = encoded(RGB.resize((400, 300)), "JPEG")
    (tmp_path / "x.jpg").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BadImage):
        one(tmp_path / "x.jpg").read(0, lambda image: image.draft("RGB", (50, 40)) and image.convert("RGB"))


# --- what is listed


def listed(root):
    images = datasets.load_images("image_folder", str(root), True)
    return images, [images.describe(index) for index in range(len(images))]


def test_folders_are_listed_as_torchvision_lists_them(tmp_path, caplog):
    train = tmp_path / "train"
    for name in ("b/2.png", "b/10.PNG", "a/z.jpg", "a/in-side/1.png", "a/in/2.png", "a/in/side/3.png", "a/x.jpg/4.png"):
        (train / name).parent.mkdir(parents=True, exist_ok=True)
        RGB.save(train / name)
    for name in ("a/notes.txt", "b/.DS_Store", "b/x.gif"):
        (train / name).touch()
    (tmp_path / "elsewhere").mkdir()
    RGB.save(tmp_path / "elsewhere" / "5.png")
    (train / "b" / "link").symlink_to(tmp_path / "elsewhere")
    (train / "b" / "same.jpg").symlink_to("2.png")
    (train / "b" / "loop.jpg").symlink_to("loop.jpg")
    (train / "empty.txt").touch()
    expected = tv.ImageFolder(train)
    images, paths = listed(tmp_path)
    assert paths == [path for path, _ in expected.samples]
    assert (images.targets().tolist(), images.class_names) == (expected.targets, expected.classes)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert all(str(train / name) in caplog.text for name in ("a/notes.txt", "b/.DS_Store", "b/x.gif"))


def test_folder_with_other_files_only_is_named_with_the_endings(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "x.gif").touch()
    with pytest.raises(UserError, match=r"no file in folder cat ends in \.jpg, \.jpeg"):
        listed(tmp_path)


@pytest.mark.parametrize(("place", "target"), [("a/back", ".."), ("self", "."), ("a/one", "../b"), ("a/up", "../..")])
def test_link_that_leads_back_is_named(place, target, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        RGB.save(tmp_path / "train" / name / "x.png")
    (tmp_path / "train" / "b" / "two").symlink_to("../a")
    (tmp_path / "train" / place).symlink_to(target)
    with pytest.raises(UserError, match="is a link to a folder that it is in"):
        listed(tmp_path)


# --- skipping

BAD = (3, 4, 19, 39)  # side by side, the last of a class, the last of all


@pytest.fixture
def damaged(tmp_path):
    """20 images of each of two classes, those of BAD broken in one way or another, and the set meant by skipping them."""
    write_images(tmp_path, "train", {"dark": 20, "light": 20}, size=48)
    images, paths = listed(tmp_path)
    for number, index in enumerate(BAD):
        whole = Path(paths[index]).read_bytes()
        Path(paths[index]).write_bytes((b"", b"no image", whole[: len(whole) // 2], whole[:30])[number])
    neighbours = {3: 5, 4: 5, 19: 20, 39: 0}
    stand_ins = [neighbours.get(index, index) for index in range(40)]
    meant = Images("meant", images.targets()[stand_ins], paths=[paths[index] for index in stand_ins])
    return images, meant


def test_next_image_stands_for_a_bad_one_with_its_label(damaged):
    images, meant = damaged[0].skipping_bad(), damaged[1]
    for index in range(40):
        (image, label), (expected, wanted) = images[index], meant[index]
        assert image.tobytes() == expected.tobytes() and label == wanted
    assert (images.targets()[19], images[19][1]) == (0, 1)
    assert images.bad_images() == list(BAD)


WAYS = [("timm", "none"), ("timm", "ram"), ("device", "none"), ("device", "ram"), ("device", "device")]


def epoch(images, way, num_workers):
    order = TrainBatches(len(images), batch_size=5, update_freq=1, world_size=1, rank=0, seed=0)
    augmentation = {"hflip": 0.5, "color_jitter": None, "aa": "rand-m9-mstd0.5-inc1", "train_interpolation": "bicubic",
        "reprob": 0.25, "remode": "pixel", "recount": 1}  # fmt: skip
    shared = {"mean": MEAN, "std": STD, "device": CPU, "input_size": 40, "cache": way[1],
        "workers": {"num_workers": num_workers, "pin_memory": False}}  # fmt: skip
    train = feed.train_batches(
        images, order, augment=way[0], cache_size=None, augmentation=augmentation, seed=0, **shared
    )
    evaluation = feed.eval_batches(images, range(0, 40, 3), 4, crop_pct=None, **shared)
    return tuple([(images.clone(), targets) for images, targets in batches] for batches in (train, evaluation))


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_skipping_gives_the_batches_of_the_set_that_is_meant(way, damaged):
    expected = epoch(damaged[1], way, 0)
    for num_workers in (0, 2):
        images = damaged[0].skipping_bad()
        for batches, wanted in zip(epoch(images, way, num_workers), expected, strict=True):
            for (pixels, labels), (others, targets) in zip(batches, wanted, strict=True):
                assert torch.equal(pixels, others) and torch.equal(labels, targets)
        assert images.bad_images() == list(BAD)


def test_each_bad_image_is_reported_once_with_path_and_reason(damaged, caplog):
    images = damaged[0].skipping_bad()
    for index in (*range(40), *range(40)):
        images[index]
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 4  # of ranks other than 0, too
    for record, index in zip(caplog.records, BAD, strict=True):
        assert record.getMessage().startswith(f"cannot read {images.describe(index)} (")


def test_only_what_was_met_counts_and_subsets_count_in_their_own_numbers(damaged):
    images = damaged[0].skipping_bad()
    part = images.subset(np.array([10, 19, 4, 7]))
    assert [part[index][1] for index in (1, 2)] == [0, 0]  # the next of the part: 7 for 4, and for 19
    assert (part.bad_images(), images.bad_images()) == ([1, 2], [4, 19])


def test_marked_images_are_skipped_without_a_try(damaged, caplog):
    images = damaged[0].skipping_bad()
    images.mark_bad([*BAD, 7])
    assert images[7][0].tobytes() == images[8][0].tobytes()
    images[39]
    assert not caplog.records and images.bad_images() == [3, 4, 7, 19, 39]


def test_marks_are_shared_with_workers_both_ways(damaged):
    images = damaged[0].skipping_bad()
    images.mark_bad([0])
    batches = DataLoader(Labels(images), 8, num_workers=1, persistent_workers=True)
    assert torch.cat(list(batches)).tolist() == [0] * 19 + [1] * 20 + [0]
    assert images.bad_images() == [0, *BAD]
    images.mark_bad([20])
    assert torch.cat(list(batches)).tolist() == [0] * 19 + [1] * 20 + [0]
    assert images.bad_images() == [0, 3, 4, 19, 20, 39]


class Labels(torch.utils.data.Dataset):
    """The labels of images that are decoded for it; the worker knows what was marked after it began."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index][1]


def test_marks_are_shared_with_a_worker_that_is_not_forked(damaged):
    images = damaged[0].skipping_bad()
    sent = pickle.loads(ForkingPickler.dumps(images))  # as a spawned process gets it
    sent[19]
    images.mark_bad([7])
    assert images.bad_images() == sent.bad_images() == [7, 19]


def test_many_bad_images_in_a_row_are_an_error(damaged, monkeypatch):
    images = damaged[0].skipping_bad()
    monkeypatch.setattr("images.images.BAD_IN_A_ROW", 2)
    first, last = images.describe(3), images.describe(4)
    with pytest.raises(BadImage, match="2 images one behind the other cannot be read") as error:
        images[3]
    assert str(error.value).endswith(f"from {first} to {last}")
    assert images[4][1] == 0


def test_set_without_a_readable_image_is_an_error(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jpg").touch()
    images = Images("none", [0, 0], paths=[str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")]).skipping_bad()
    with pytest.raises(BadImage, match="2 images one behind the other"):
        images[1]


@pytest.mark.parametrize("lack", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_what_the_machine_lacks_is_not_the_images_fault(lack, damaged):
    images = damaged[0].skipping_bad()

    def decode(_):
        raise lack

    with pytest.raises(BadImage, match="cannot read"):
        images.read(0, decode)
    assert images.bad_images() == []


def test_what_other_ranks_found_is_known_here_too(damaged, monkeypatch):
    images = damaged[0].skipping_bad()
    images[39]
    monkeypatch.setattr(feed, "of_all_ranks", lambda own: [[5, 39], own, [3]])
    assert feed.bad_of_all_ranks(images) == images.bad_images() == [3, 5, 39]


def test_hugging_face_rows_are_skipped_too():
    class Rows:
        def __getitem__(self, index):
            return (Image.open(io.BytesIO(b"" if index == 1 else encoded(RGB, "PNG"))),)

    images = Images("hfds/x", [0, 1, 2], source=Rows()).skipping_bad()
    assert images[1][1] == 2 and images.bad_images() == [1]


# --- whole runs


@pytest.fixture
def damaged_run(tiny_run, image_folder, tmp_path):
    """The options of a run whose data has one broken image for training and one for evaluation."""
    root = shutil.copytree(image_folder, tmp_path / "data")
    (root / "train" / "grey" / "005.jpg").write_bytes(b"")
    (root / "val" / "dark" / "003.jpg").write_bytes(b"no image")
    return lambda *more, **other: tiny_run("--data_path", root, *more, **other)


def test_run_fails_by_default_and_goes_on_with_skip(damaged_run, tmp_path, caplog):
    with pytest.raises(BadImage, match=r"cannot read .*005\.jpg|cannot read .*003\.jpg"):
        script.main(damaged_run())
    script.main(damaged_run("--bad_images", "skip"))
    assert len(read_log(tmp_path / "run")) == 2
    assert sum("train/grey/005.jpg" in record.getMessage() for record in caplog.records) == 1
    assert sum("val/dark/003.jpg" in record.getMessage() for record in caplog.records) == 1


def test_resumed_run_may_skip_what_it_failed_at(damaged_run, image_folder, tmp_path):
    script.main(damaged_run("--data_path", image_folder))
    for name in ("checkpoint-1.pth", "checkpoint-best.pth"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    with pytest.raises(BadImage):
        script.main(damaged_run())
    script.main(damaged_run("--bad_images", "skip"))
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [0, 1]


def test_other_values_are_usage_errors(capsys):
    with pytest.raises(SystemExit):
        training_options(["--bad_images", "maybe"])
    assert "--bad_images" in capsys.readouterr().err


def test_log_counts_bad_images_the_same_after_a_resume(tiny_run, image_folder, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    for name in ("train/dark/003.jpg", "train/light/001.jpg", "val/grey/000.jpg"):
        (data / name).write_bytes(b"no image")
    options = ["--data_path", data, "--bad_images", "skip", "--save_ckpt_steps", "1", "--num_workers", "1"]
    script.main(tiny_run(*options, output_dir=tmp_path / "whole"))
    real, made = engine._update, iter(range(100))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="plug"):
        patch.setattr(engine, "_update", lambda trainer: real(trainer) if next(made) != 8 else pull_the_plug())
        script.main(tiny_run(*options))
    assert (tmp_path / "run" / "checkpoint-1-8.pth").exists()
    script.main(tiny_run(*options))
    whole, run = (
        [(line["train_bad_images"], line["test_bad_images"]) for line in read_log(tmp_path / name)]
        for name in ("whole", "run")
    )
    assert whole == run == [(2, 1), (2, 1)]
    assert_equal_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "run"))


def pull_the_plug():
    raise RuntimeError("the plug is pulled")
