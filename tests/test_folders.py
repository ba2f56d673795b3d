"""Data that is not what it seems: hidden files, one class, folders a level off, mistyped paths and names."""

import logging
import shutil
import urllib.error
import urllib.request

import numpy as np
import pytest
import timm
import tiny_sets
import torchvision.datasets as tv
from conftest import error_of
from tiny_sets import write_folder, write_image

import datasets
import main as script
from images.images import Images
from images.torchvision_sets import OF_TIMM
from options.training import training_options, unknown_data_set
from utils import UserError, nearest

HIDDEN = [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", "$RECYCLE.BIN"]


@pytest.fixture
def logged(caplog):
    """Return a function: the lines logged so far, which it forgets."""
    caplog.set_level(logging.INFO)

    def lines():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return lines


def load(name, root, *words):
    return datasets.load_data(training_options(["--data_set", name, "--data_path", str(root), *map(str, words)]))


def refused(name, root, *words):
    with pytest.raises(UserError) as error:
        load(name, root, *words)
    return str(error.value)


# ---- hidden files and folders ----


@pytest.mark.parametrize("name", ["image_folder", "torch/image_folder", "eurosat"])
def test_hidden_folders_and_files_are_left_out_and_named(name, tmp_path, logged):
    root = tmp_path / ("eurosat" if name == "eurosat" else "train")
    place = root / "2750" if name == "eurosat" else root
    write_folder(root, {"2750" if name == "eurosat" else "": 5})
    before = datasets.load_images(name, str(tmp_path), True)
    assert not logged()
    files = [place / hidden / "0.png" for hidden in HIDDEN] + [place / "cat" / HIDDEN[0] / "0-checkpoint.png"]
    files += [place / "dog" / "._0.png", place / "dog" / "Thumbs.db", place / ".DS_Store"]
    for file in files:
        write_image(file.with_suffix(".png"), 0)
        file.with_suffix(".png").rename(file)
    if name != "eurosat":
        (root / "#recycle").mkdir()  # without images it would end the run
    images = datasets.load_images(name, str(tmp_path), True)
    assert [images.describe(i) for i in range(len(images))] == [before.describe(i) for i in range(len(before))]
    assert images.class_names == before.class_names == ["cat", "dog"]
    (line,) = logged()
    assert line.startswith("left out: ") and line.endswith(" more (hidden)")
    assert f"{place / HIDDEN[4]}, " in line and "0.png" not in line  # a folder is named, not what it holds


def test_files_in_no_class_folder_are_named(tmp_path, logged):
    write_folder(tmp_path, {"train": 1})
    write_image(tmp_path / "train" / "stray.png", 0)
    (tmp_path / "train" / "cat" / "notes.txt").touch()
    assert len(datasets.load_images("image_folder", str(tmp_path), True)) == 2
    (line,) = logged()
    assert f"{tmp_path}/train/cat/notes.txt (not ending in .jpg" in line
    assert f"{tmp_path}/train/stray.png (in no class folder)" in line


def test_images_without_labels_leave_out_and_name_the_same(tmp_path, logged):
    write_folder(tmp_path, {"train": 2})
    write_image(tmp_path / "train" / "cat" / ".ipynb_checkpoints" / "0.png", 0)
    assert len(datasets.load_unlabelled("image_folder", str(tmp_path))) == 4
    assert logged() == [f"left out: {tmp_path}/train/cat/.ipynb_checkpoints (hidden)"]


# ---- counts and classes ----


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "60 training and 4 evaluation images of 2 classes"),
        ("--data_fraction 0.1", "6 training and 4 evaluation images of 2 classes"),
        ("--eval true", "4 evaluation images of 2 classes"),
        ("--disable_eval true", "60 training images of 2 classes"),
    ],
)
def test_images_and_classes_are_counted(words, line, tmp_path, logged):
    write_folder(tmp_path, {"train": 30, "val": 2})
    load("image_folder", tmp_path, *words.split())
    assert logged() == [line]


def test_large_counts_are_readable(monkeypatch, logged):
    images = Images("x", [0, 1] * 1000, paths=["a.png"] * 2000)
    monkeypatch.setattr(
        datasets, "load_images", lambda *_, train, **__: images if train else images.subset(np.arange(500))
    )
    load("CIFAR10", "")
    assert logged() == ["2,000 training and 500 evaluation images of 2 classes"]


@pytest.mark.parametrize("name", ["image_folder", "torch/image_folder"])
@pytest.mark.parametrize("words", ["", "--eval true"])
def test_one_class_in_folders_is_refused(name, words, tmp_path):
    write_folder(tmp_path, {"train": 2, "val": 2}, ["cat"])
    part = "evaluation" if words else "training"
    assert refused(name, tmp_path, *words.split()).endswith(f"all 2 {part} images are of one class, cat")


def test_evaluation_of_one_class_names_those_that_are_missing(tmp_path):
    write_folder(tmp_path, {"train": 2})
    write_folder(tmp_path, {"val": 2}, ["cat"])
    assert refused("image_folder", tmp_path).endswith("(only in training: dog; only in evaluation: none)")


def test_one_class_in_other_sets_is_refused(tmp_path, monkeypatch, logged):
    tiny_sets.write_parquet(tmp_path / "set")
    name, words = f"hfds/{tmp_path / 'set'}", ["--val_split", "train", "--train_split"]
    assert "all 1 training images are of one class, b" in refused(name, tmp_path / "cache", *words, "train[1:2]")
    monkeypatch.setattr(tv.utils, "check_md5", lambda path, md5, **_: True)
    cifar = tmp_path / "cifar-10-batches-py"
    tiny_sets.write_cifar(
        cifar, {f"data_batch_{n}": [3] for n in range(1, 6)}, "labels", "batches.meta", "label_names", 10
    )
    tiny_sets.write_cifar(cifar, {"test_batch": [3, 4]}, "labels", "batches.meta", "label_names", 10)
    assert "all 5 training images are of one class, class3" in refused("CIFAR10", tmp_path)
    logged()
    load(name, tmp_path / "cache", *words, "train[:4]")
    assert "1 of 5 classes have no training images: e" in logged()


@pytest.mark.parametrize(("part", "between", "levels"), [("train", "images", "one level"), ("val", "a/b", "2 levels")])
def test_classes_that_lie_too_deep_are_named(part, between, levels, tmp_path):
    write_folder(tmp_path, {"train": 2, "val": 2})
    shutil.move(tmp_path / part, tmp_path / "classes")
    (tmp_path / part / "__MACOSX").mkdir(parents=True)
    shutil.move(tmp_path / "classes", tiny_sets.made(tmp_path / part / between))
    message = refused("image_folder", tmp_path)
    assert f"images are of one class, {between[:1]}" in message
    assert f"{tmp_path / part / between} holds 2 folders, cat, dog: if these are the classes" in message
    assert f"they are {levels} too deep: move them up into {tmp_path / part}" in message


def test_folders_within_class_folders_are_said(tmp_path, logged):
    for part in ("train", "val"):
        write_folder(tmp_path / part, {"pets": 1, "fish": 1})
    load("image_folder", tmp_path)
    deepest = tmp_path / "train" / "fish" / "dog" / "0.png"
    assert f"{deepest} is of class fish: folders within a class folder belong to it" in logged()


# ---- the folder that was meant ----


@pytest.mark.parametrize(
    ("path", "words", "hint"),
    [
        ("", "", "{0} is one level too high: did you mean --data_path {0}/birds or {0}/flat or {0}/renamed?"),
        ("far", "", "{0}/far is 2 levels too high: did you mean --data_path {0}/far/off/birds?"),
        ("birds/train/cat", "", "{0}/birds/train/cat is 2 levels too deep: did you mean --data_path {0}/birds?"),
        ("brids/train", "", "no folder {0}/brids/train (did you mean {0}/birds/train?)"),
        ("birds/train", "", "{0}/birds/train is one level too deep: did you mean --data_path {0}/birds?"),
        ("brids", "", "no folder {0}/brids (did you mean {0}/birds?)"),
        ("birds", "--eval_data_path {0}/birds/vla", "no folder {0}/birds/vla (did you mean {0}/birds/val?)"),
        (
            "birds",
            "--eval_data_path {0}/birds",
            "the classes in {0}/birds would be train, val: one level too high: did you mean {0}/birds/val?",
        ),
        (
            "birds",
            "--eval_data_path {0}/birds/val/cat",
            "files such as 0.png (one level too deep: did you mean {0}/birds/val?)",
        ),
        ("birds", "--eval_data_path {0}/birds/val/dog/big", "(2 levels too deep: did you mean {0}/birds/val?)"),
        ("bare/cat", "--eval_data_path {0}/birds/val", "0.png (one level too deep: did you mean {0}/bare?)"),
        ("birds", "--eval_data_path {0}/sets", "{0}/sets is 2 levels too high: did you mean {0}/sets/birds/test?"),
        ("classes", "", "no folder {0}/classes/train (if its 2 folders, cat, dog, are the classes, share them out"),
        ("renamed", "", "no folder {0}/renamed/val (is it {0}/renamed/test? Rename it, or give both parts"),
        ("flat", "", "no class folder in {0}/flat/train, only files such as 0.png"),
        ("no/where", "", "no folder {0}/no/where; wanted: train/CLASS/IMAGE"),
    ],
)
def test_folder_that_was_meant_is_named(path, words, hint, tmp_path):
    write_folder(tmp_path / "birds")
    write_folder(tmp_path, {"classes": 1, "bare": 1})
    write_folder(tmp_path / "sets" / "birds", {"train": 1, "test": 1})
    write_folder(tmp_path / "far" / "off" / "birds")
    write_image(tmp_path / "birds" / "val" / "dog" / "big" / "1.png", 0)
    write_folder(tmp_path / "renamed", {"train": 1, "test": 1})
    write_image(tmp_path / "flat" / "train" / "0.png", 0)
    message = refused("image_folder", tmp_path / path, *words.format(tmp_path).split())
    assert hint.format(tmp_path) in message and "\n" not in message


def test_mistyped_path_of_images_without_labels_is_named(tmp_path):
    write_folder(tmp_path / "birds")
    with pytest.raises(UserError, match=f"--data_path {tmp_path}/brid: no such folder .did you mean {tmp_path}/birds"):
        datasets.load_unlabelled("image_folder", str(tmp_path / "brid"))


# ---- downloads ----


@pytest.fixture
def asked(monkeypatch, logged):
    """What was logged before each request to the network, all of which fail."""
    lines = []

    def urlopen(*_, **__):
        lines.append(logged())
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return lines


@pytest.mark.parametrize("name", ["CIFAR10", "flowers", "eurosat", "torch/mnist"])
@pytest.mark.parametrize("exists", [True, False])
def test_download_is_said_before_it_starts(name, exists, tmp_path, asked):
    root = tmp_path / "data"
    if exists:
        root.mkdir()
    assert "could be neither read nor downloaded" in refused(name, root)
    new = "" if exists else ", which does not exist yet"
    assert asked[0] == [f"--data_set {name}: downloading what is missing to {root}{new}"]
    assert root.exists() == exists or any(root.iterdir())


@pytest.mark.parametrize("name", ["CIFAR10", "torch/mnist", "hfds/x"])
def test_download_to_a_mistyped_path_is_refused(name, tmp_path, asked):
    message = refused(name, tmp_path / "no" / "data")
    assert message.endswith(
        f"cannot be downloaded to {tmp_path}/no/data: there is no folder {tmp_path}/no; make it first"
    )
    assert not asked and not list(tmp_path.iterdir())


def test_complete_copy_is_not_announced(tmp_path, monkeypatch, logged):
    monkeypatch.setattr(tv.utils, "check_md5", lambda path, md5, **_: True)
    tiny_sets.write_cifar10(tmp_path)
    datasets.load_images("CIFAR10", str(tmp_path), True, download=True)
    assert not logged()


# ---- names ----


@pytest.mark.parametrize(
    ("name", "meant"),
    [("cifar", "CIFAR10, CIFAR100"), ("cifar-10", "CIFAR10, CIFAR100"), ("imagefolder", "image_folder")],
)
def test_nearest_names_of_data_sets_are_given(name, meant, capsys):
    with pytest.raises(SystemExit):
        training_options(["--data_set", name])
    said = capsys.readouterr().err
    assert f"--data_set {name} is none of CIFAR10, " in said and f"; nearest: {meant};" in said
    with pytest.raises(UserError, match=f"; nearest: {meant}$"):
        datasets.load_unlabelled(name, "")


def test_name_like_no_other_has_no_nearest():
    assert unknown_data_set("xyz").endswith("hfds/NAME") and unknown_data_set("torch/mnist") is None
    assert nearest("a", ["bat", "cat"]) == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [("minst", "mnist, qmnist, kmnist"), ("fashion-mnist", "fashion_mnist"), ("places", "places365"), ("xyz", None)],
)
def test_nearest_names_of_timms_sets_are_given(name, meant, tmp_path):
    message = refused(f"torch/{name}", tmp_path)
    known = (
        f"--data_set torch/{name}: Unknown torchvision dataset {name}; the NAME of torch/NAME is one of cifar10, cifar"
    )
    assert message.startswith(known) and message.endswith(f"; nearest: {meant}" if meant else ", image_folder")


@pytest.mark.parametrize("name", OF_TIMM)
def test_timm_knows_the_names_that_are_listed(name, tmp_path):
    with pytest.raises((OSError, RuntimeError)):  # not AssertionError: its files are missing
        timm.data.create_dataset(f"torch/{name}", root=str(tmp_path / "none"), split="train")


def test_nearest_folders_and_downloads_of_hugging_face_are_given(tmp_path):
    tiny_sets.write_parquet(tmp_path / "sets" / "mine")
    message = refused(f"hfds/{tmp_path}/sets/mime", tmp_path / "cache")
    assert message.endswith(f"no folder {tmp_path}/sets/mime (did you mean {tmp_path}/sets/mine?)")
    for folder in ("uoft-cs___cifar100", "x___y", "_locks"):
        (tmp_path / "cache" / folder).mkdir(parents=True)
    message = refused("hfds/cifar100", tmp_path / "cache")
    assert message.endswith(f"; nearest: uoft-cs/cifar100, in {tmp_path}/cache") and "(Couldn't reach" in message


def test_hugging_face_set_without_labels_names_the_other_way(tmp_path, tiny_run):
    write_folder(tmp_path / "set", {"train": 2}, ["cat"])  # Hugging Face's reader gives one class no label
    words = ["--data_set", f"hfds/{tmp_path / 'set'}", "--data_path", tmp_path / "cache"]
    assert "for folders of image files take --data_set image_folder" in error_of(script, *tiny_run(*words))
