"""Every data set by name: its own reader reads a few images written in its own format, and says what is missing."""

import multiprocessing
import pickle
import sys
import urllib.error
import urllib.request
from unittest import mock

import numpy as np
import pytest
import tiny_sets
import torchvision.datasets as tv
from tiny_sets import FORMATS, colour, write_folder, write_image, write_parquet
from torch.utils.data import DataLoader

import datasets
from images import huggingface, torchvision_sets
from images.images import BadImage
from options.table import DATA_SETS
from utils import UserError


@pytest.fixture(autouse=True)
def _no_checksums(monkeypatch):
    monkeypatch.setattr(tv.utils, "check_md5", lambda path, md5, **_: True)


@pytest.fixture
def no_network(monkeypatch):
    no_route = mock.Mock(side_effect=urllib.error.URLError("no route to host"))
    monkeypatch.setattr(urllib.request, "urlopen", no_route)


def load(name, root, train=True, **more):
    return datasets.load_images(name, str(root), train, **more)


def refused(match, name, root, train=True, **more):
    """The message of the UserError, which is one line."""
    with pytest.raises(UserError, match=match) as error:
        load(name, root, train, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def described(images):
    return [images.describe(index) for index in range(len(images))]


def looks_like(image, label):
    return np.abs(np.asarray(image, int) - colour(label)).max() <= 4  # JPEG's rounding


def test_table_and_options_have_the_same_names():
    assert sorted([*torchvision_sets.TABLE, *datasets.FOLDERS]) == sorted(DATA_SETS)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("train", [True, False])
def test_complete_copy_gives_its_images_without_network(name, train, tmp_path, no_network):
    write, train_labels, eval_labels, classes, size = FORMATS[name]
    write(tmp_path)
    images, labels = load(name, tmp_path, train, download=True), train_labels if train else eval_labels
    assert (images.classes, len(images), images.targets().tolist()) == (classes, len(labels), labels)
    assert images.targets().dtype == np.int64
    for index, label in enumerate(labels):
        image, target = images[index]
        assert (image.mode, image.size, target) == ("RGB", (size, size), label)
        assert looks_like(image, label)


@pytest.mark.parametrize(("name", "folder"), [("fashion_mnist", "FashionMNIST"), ("torch/mnist", "MNIST")])
def test_grey_sets_become_rgb(name, folder, tmp_path):
    tiny_sets.write_fashion_mnist(tmp_path, folder)
    for train, labels in ((True, [3, 0, 9, 1]), (False, [7, 2])):
        images = load(name, tmp_path, train)
        assert (images.classes, images.targets().tolist(), images[0][1]) == (10, labels, labels[0])
        assert (np.asarray(images[0][0]) == np.full((28, 28, 3), 10 * labels[0])).all()


def test_eurosat_is_split_80_to_20_without_overlap(tmp_path):
    tiny_sets.write_eurosat(tmp_path)
    train, val = (load("eurosat", tmp_path, part) for part in (True, False))
    assert (len(train), len(val), train.classes) == (16, 4, 2)
    assert len({*described(train), *described(val)}) == 20
    image, label = val[3]
    assert label == ("Forest" in val.describe(3)) and looks_like(image, label)


def test_digits_are_split_1437_to_360_and_scaled_to_255():
    train, val = (load("digits", "", part) for part in (True, False))
    assert (len(train), len(val), train.classes, val.classes) == (1437, 360, 10, 10)
    image, label = train[0]
    assert (image.mode, image.size, label) == ("RGB", (8, 8), train.targets()[0])
    assert max(np.asarray(train[index][0]).max() for index in range(20)) == 255  # 16 of 16
    assert len({*described(train), *described(val)}) == 1797
    # A pin, not a derived value: with another split no figure on digits or EuroSAT could be compared with older ones.
    assert described(val)[:6] == [f"image {n} of digits" for n in (4, 6, 9, 18, 22, 32)]


def test_stl10_without_its_file_of_names_has_ten_classes(tmp_path):
    tiny_sets.write_stl10(tmp_path)
    (tmp_path / "stl10_binary" / "class_names.txt").unlink()
    images = load("stl10", tmp_path)
    assert (images.classes, images.class_names) == (10, None)


def test_eval_data_path_replaces_the_evaluation_root(tmp_path):
    tiny_sets.write_cifar10(tmp_path)
    images = load("CIFAR10", "/nowhere", False, eval_data_path=str(tmp_path))
    assert images.targets().tolist() == [9, 0, 3]
    assert images.subset(np.array([2])).describe(0) == "image 2 of CIFAR10"


def test_folders_at_two_paths_hold_the_classes_themselves(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 1})
    train, val = (load("image_folder", tmp_path / "a", part, eval_data_path=tmp_path / "b") for part in (True, False))
    assert (len(train), len(val), val.describe(1)) == (4, 2, str(tmp_path / "b" / "dog" / "0.png"))


def test_torch_names_go_through_timm(tmp_path):
    write_folder(tmp_path, {"train": 2, "val": 1})
    assert len(load("torch/image_folder", tmp_path)) == 4
    assert len(load("torch/image_folder", tmp_path, False, split="train")) == 4
    images = load("torch/image_folder", tmp_path, False)
    assert (len(images), images.class_names, images[1][1]) == (2, ["cat", "dog"], 1)


def load_hfds(tmp_path, train=True, **more):
    return load(f"hfds/{tmp_path / 'set'}", tmp_path / "cache", train, **more)


def first_item(images):
    """Return what a spawned process reads from a data set that was sent to it."""
    image, label = images[4]
    return image.mode, image.size, image.getpixel((0, 0)), label, sys.modules["datasets"] is datasets


def test_hugging_face_set_is_read_here_and_in_workers(tmp_path):
    write_parquet(tmp_path / "set")
    train, val = (load_hfds(tmp_path, part) for part in (True, False))
    assert (len(train), len(val), train.class_names) == (5, 2, ["a", "b", "c", "d", "e"])
    assert train.targets().tolist() == [0, 1, 2, 3, 4]
    assert first_item(train) == ("RGB", (16, 16), colour(4), 4, True)
    forked = DataLoader(train, batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert [(image.getpixel((0, 0)), label) for image, label in forked] == [(colour(n), n) for n in range(5)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(first_item, (train,)) == first_item(train)


def test_hugging_face_set_of_plain_image_files_is_read(tmp_path):
    write_folder(tmp_path / "set", {"train": 2, "validation": 1})
    images = load_hfds(tmp_path)
    assert (images.class_names, images.targets().tolist()) == (["cat", "dog"], [0, 0, 1, 1])
    assert images[3][0].getpixel((0, 0)) == colour(1)


def test_hugging_face_keys_and_splits_are_passed_on(tmp_path):
    write_parquet(tmp_path / "set", label_column="kind")
    assert len(load_hfds(tmp_path, False, split="train[:3]", target_key="kind", input_key="image")) == 3
    for options, message in (
        ({}, "has no column label for --target_key; it has image, kind"),
        ({"target_key": "kind", "input_key": "picture"}, "has no column picture for --input_key"),
        ({"target_key": "kind", "split": "other"}, "other"),
        ({"target_key": "image"}, "column image for --target_key holds no class indices"),
    ):
        refused(message, f"hfds/{tmp_path / 'set'}", tmp_path / "cache", **options)


def test_broken_hugging_face_image_is_named_and_not_replaced(tmp_path):
    write_parquet(tmp_path / "set", broken=[2])
    with pytest.raises(BadImage, match="image 2 of hfds/"):
        load_hfds(tmp_path)[2]


def test_folders_are_listed_as_torchvision_lists_them(tmp_path, caplog):
    train = tmp_path / "train"
    for name in "b/2.png b/10.PNG a/z.jpg a/in-side/1.png a/in/2.png a/in/side/3.png a/x.jpg/4.png".split():
        write_image(train / name, 0)
    left_out = ("a/notes.txt", "b/.DS_Store", "b/x.gif")
    for name in (*left_out, "empty.txt"):
        (train / name).touch()
    write_image(tmp_path / "elsewhere" / "5.png", 0)
    for name, target in {"link": tmp_path / "elsewhere", "same.jpg": "2.png", "loop.jpg": "loop.jpg"}.items():
        (train / "b" / name).symlink_to(target)
    expected = tv.ImageFolder(train)
    images = load("image_folder", tmp_path)
    assert described(images) == [path for path, _ in expected.samples]
    assert (images.targets().tolist(), images.class_names) == (expected.targets, expected.classes)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert all(str(train / name) in warning for name in (*left_out, "empty.txt"))


@pytest.mark.parametrize(("place", "target"), [("a/back", ".."), ("self", "."), ("a/one", "../b"), ("a/up", "../..")])
def test_link_that_leads_back_is_named(place, target, tmp_path):
    for name in ("a", "b"):
        write_image(tmp_path / "train" / name / "x.png", 0)
    (tmp_path / "train" / "b" / "two").symlink_to("../a")
    (tmp_path / "train" / place).symlink_to(target)
    refused("is a link to a folder that it is in", "image_folder", tmp_path)


@pytest.mark.parametrize("name", [name for name in torchvision_sets.TABLE if name != "digits"])
def test_missing_set_is_one_line_with_the_path(name, tmp_path, no_network):
    for download in (False, True):
        message = refused("INSTALL.md", name, tmp_path, download=download)
        assert name in message and str(tmp_path) in message


@pytest.mark.parametrize(("made", "missing"), [("", ""), ("val", "train"), ("train", "val")])
def test_missing_folder_is_named_with_the_layout(made, missing, tmp_path):
    root = tmp_path / "images"
    if made:
        write_folder(root, {made: 1})
    assert f"no folder {root / missing};" in refused("train/CLASS/IMAGE", "IMNET", root, missing != "val")


def test_unknown_set_is_named(tmp_path):
    for name in ("cifar", "wds/x", "torch/nothing"):
        refused(name, name, tmp_path)


def test_folder_without_classes_or_images_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    assert str(tmp_path / "train") in refused("class folder", "image_folder", tmp_path)
    write_folder(tmp_path, {"train": 1})
    (tmp_path / "train" / "bird").mkdir()
    (tmp_path / "train" / "bird" / "x.gif").touch()
    refused(r"no file in folder bird ends in \.jpg, \.jpeg.*train/CLASS/IMAGE", "image_folder", tmp_path)


@pytest.mark.parametrize(("name", "module"), [("svhn", "scipy"), ("digits", "sklearn"), ("hfds/x", "datasets")])
def test_missing_package_is_named_with_the_command(name, module, tmp_path, monkeypatch):
    tiny_sets.write_svhn(tmp_path)
    if module == "datasets":  # our own stays; without entries on the path Hugging Face's cannot be found
        monkeypatch.setattr(huggingface, "_package", None)
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    else:
        for loaded in [key for key in sys.modules if key.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, module, None)
    package = {"sklearn": "scikit-learn"}.get(module, module)
    refused(f"{name} needs the Python package {package}: pip install {package}", name, tmp_path)
    assert sys.modules["datasets"] is datasets


def test_label_outside_the_classes_is_named(tmp_path):
    tiny_sets.write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | {"labels": [0, 10]}))
    refused("image 1 of CIFAR10 has label 10, outside 0 to 9", "CIFAR10", tmp_path)


def test_different_classes_in_training_and_evaluation_are_named(tmp_path):
    write_folder(tmp_path)
    write_image(tmp_path / "train" / "bird" / "0.png", 2)
    write_image(tmp_path / "val" / "fish" / "0.png", 2)
    train, val = (load("image_folder", tmp_path, part) for part in (True, False))
    with pytest.raises(UserError, match="only in training: bird; only in evaluation: fish"):
        datasets.check_same_classes(train, val)
    datasets.check_same_classes(train, train)
