"""Data sets by name: images without transforms, each set's own splits and classes."""

import argparse
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm.data
import torchvision.datasets as tv
from PIL import Image

from images.huggingface import load_hugging_face
from images.images import Images, printable
from options import DATA_SETS
from training import distributed
from utils import Stream, UserError, permutation

log = logging.getLogger("images")  # Hugging Face's package has a handler on "datasets", which would repeat each line


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 px in grey, as torchvision would give them."""

    def __init__(self, root: str, download: bool = False):
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.targets, self.classes = digits.target, list("0123456789")
        self.pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # they come in levels from 0 to 16

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), self.targets[index]


class Row(NamedTuple):
    """How to read a data set.

    `make` is its class in torchvision. `train` and `evaluate` list what that class is given after `root` for the parts
    to train on and to evaluate on; a set without parts is split by us. `classes` is needed if the class lists no names.
    """

    make: Callable
    train: list[str | bool] | None = None
    evaluate: list[str | bool] | None = None
    classes: int | None = None


TABLE = {
    "CIFAR10": Row(tv.CIFAR10, train=[True], evaluate=[False]),
    "CIFAR100": Row(tv.CIFAR100, train=[True], evaluate=[False]),
    "flowers": Row(tv.Flowers102, train=["train", "val"], evaluate=["test"], classes=102),
    "pets": Row(tv.OxfordIIITPet, train=["trainval"], evaluate=["test"], classes=37),
    "stl10": Row(tv.STL10, train=["train"], evaluate=["test"], classes=10),
    "food101": Row(tv.Food101, train=["train"], evaluate=["test"]),
    "dtd": Row(tv.DTD, train=["train", "val"], evaluate=["test"]),
    "svhn": Row(tv.SVHN, train=["train"], evaluate=["test"], classes=10),
    "eurosat": Row(tv.EuroSAT),
    "fashion_mnist": Row(tv.FashionMNIST, train=[True], evaluate=[False]),
    "digits": Row(Digits),
}
FOLDERS = ("IMNET", "image_folder")


def load_data(options: argparse.Namespace) -> tuple[Images | None, Images | None, int]:
    """Load the images to train on and to evaluate on (None for a part that is not used) and count their classes."""
    load = functools.partial(
        load_images,
        options.data_set,
        options.data_path,
        eval_data_path=options.eval_data_path,
        download=distributed.is_main(),
        input_key=options.input_key,
        target_key=options.target_key,
    )
    with distributed.main_first():
        train_images = None if options.eval else load(train=True, split=options.train_split)
        val_images = None if options.disable_eval else load(train=False, split=options.val_split)
    if train_images and val_images:
        check_same_classes(train_images, val_images)
    num_classes = (train_images or val_images).classes
    if options.nb_classes not in (None, num_classes):
        raise UserError(f"--nb_classes {options.nb_classes}, but --data_set {options.data_set} has {num_classes}")
    if options.exif:
        train_images, val_images = (images and images.upright() for images in (train_images, val_images))
    if options.bad_images == "skip":
        train_images, val_images = (images and images.skipping_bad() for images in (train_images, val_images))
    if train_images and options.data_fraction < 1:
        train_images = fraction(train_images, options.data_fraction, options.seed)
    return train_images, val_images, num_classes


def load_images(
    name: str,
    data_path: str,
    train: bool,
    *,
    eval_data_path: str | None = None,
    download: bool = False,
    split: str | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
) -> Images:
    """Load the training or the evaluation images of the set `name`; UserError if anything is missing.

    `eval_data_path` replaces `data_path` in evaluation. `split` is for torch/NAME and hfds/NAME, the keys for hfds/NAME.
    """
    if name in FOLDERS:
        return _load_folder(name, _folder_root(data_path, train, eval_data_path))
    if name not in TABLE and not name.startswith(("torch/", "hfds/")):
        raise UserError(f"--data_set {name} is unknown; wanted one of {', '.join(DATA_SETS)}, torch/NAME, hfds/NAME")
    root = data_path if train or not eval_data_path else eval_data_path
    split = split or ("train" if train else "validation")
    with _explained(name, root, download):
        if name.startswith("hfds/"):
            return load_hugging_face(name, root, split, input_key or "image", target_key or "label")
        if name.startswith("torch/"):
            return _joined(name, [timm.data.create_dataset(name, root=root, split=split, download=download)])
        row = TABLE[name]
        if row.train is None:
            images = _joined(name, [row.make(root, download=download)])
            return images.subset(_fixed_split(len(images), train))
        parts = [row.make(root, part, download=download) for part in (row.train if train else row.evaluate)]
        return _joined(name, parts, row.classes)


def load_unlabelled(name: str, data_path: str) -> Images:
    """Load the training images of a set for their pixels alone: of a folder, all images in train/ or else in itself."""
    if name not in FOLDERS:
        return load_images(name, data_path, True, download=True)
    root = Path(data_path, "train") if Path(data_path, "train").is_dir() else Path(data_path)
    if not root.is_dir():
        raise UserError(f"--data_path {data_path}: no such folder; wanted images in it or in its train/")
    with _explained(name, root):
        files = sorted(os.path.join(*file) for file in _files(str(root)))
    paths = [file for file in files if tv.folder.is_image_file(file)]
    if not paths:
        raise UserError(f"--data_path {data_path}: no file in {root} ends in {', '.join(tv.folder.IMG_EXTENSIONS)}")
    return Images(name, [0] * len(paths), paths=paths)


def check_same_classes(train: Images, val: Images) -> None:
    """Raise UserError with the class names that only one of the two sets has."""
    if train.class_names and val.class_names and train.class_names != val.class_names:
        only_train = _some(sorted(set(train.class_names) - set(val.class_names)))
        only_val = _some(sorted(set(val.class_names) - set(train.class_names)))
        differences = f"only in training: {only_train}; only in evaluation: {only_val}"
        raise UserError(f"--data_set {train.name}: classes differ between training and evaluation ({differences})")


def fraction(images: Images, share: float, seed: int) -> Images:
    """Pick a seeded share in (0, 1]: round(share * count) images of each class, at least 1, in ascending order."""
    labels, kept = images.targets(), []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = permutation(len(members), Stream.FRACTION, seed, int(label))
        kept.append(members[order[: max(1, round(share * len(members)))]])
    return images.subset(np.sort(np.concatenate(kept)))


def _some(names: list[str], most: int = 5) -> str:
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


def _fixed_split(count: int, train: bool) -> np.ndarray:
    """Pick the 80 % to train on or the 20 % to evaluate on, ascending indices that do not depend on --seed."""
    order, cut = permutation(count, Stream.SPLIT), count * 4 // 5
    return np.sort(order[:cut] if train else order[cut:])


@contextmanager
def _explained(name: str, root: str | Path, download: bool = False, wanted: str = "INSTALL.md gives the layout"):
    """Turn any error of a library's reader about missing or broken data into one line for the user."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        missing = (error.name or str(error)).split(".")[0]
        package = {"sklearn": "scikit-learn"}.get(missing, missing)
        raise UserError(f"--data_set {name} needs the Python package {package}: pip install {package}") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = reason.replace("You can use download=True to download it", "").strip()
        failed = "could be neither read nor downloaded" if download else "could not be read"
        raise UserError(f"--data_set {name} {failed}, data path {root} ({reason}); {wanted}") from error


# ---- sets that torchvision reads ----


def _joined(name: str, parts: list, classes: int | None = None) -> Images:
    """Join the parts of a torchvision set; only sets of image files can have more than one."""
    labels, paths = zip(*map(_labels_and_paths, parts), strict=True)
    names = getattr(parts[0], "classes", None)
    if any(getattr(part, "classes", None) != names for part in parts):
        raise UserError(f"--data_set {name}: its {len(parts)} training parts have different classes")
    if names and classes and len(names) != classes:
        names = None  # a partial copy, whose list does not name the labels
    paths = None if paths[0] is None else [path for part in paths for path in part]
    return Images(name, np.concatenate(labels), source=parts[0], paths=paths, class_names=names, classes=classes)


def _labels_and_paths(dataset) -> tuple[np.ndarray, Sequence | None]:
    """List the labels and the image files (None if there are none) of a torchvision set without decoding an image."""
    paths = None
    if hasattr(dataset, "loader"):
        dataset.loader = str  # instead of the function that opens an image: each item is then (path, label)
        items = [dataset[index] for index in range(len(dataset))]
        paths, labels = [path for path, _ in items], [label for _, label in items]
    elif isinstance(dataset, tv.OxfordIIITPet):  # has neither a loader nor a public list
        paths, labels = dataset._images, dataset._labels
    else:
        labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    labels = np.asarray(labels, dtype=np.int64)
    return (labels if labels.ndim == 1 else labels[:, 0]), paths  # QMNIST: the class is the first of 8 columns


# ---- folders of images ----


def _folder_root(data_path: str, train: bool, eval_data_path: str | None) -> Path:
    if not train:
        return Path(eval_data_path) if eval_data_path else Path(data_path, "val")
    root = Path(data_path, "train")
    # like image_folder in the paper's code: with a path for evaluation, --data_path itself may hold the classes
    return Path(data_path) if eval_data_path and not root.is_dir() and Path(data_path).is_dir() else root


def _load_folder(name: str, root: Path) -> Images:
    wanted = "wanted: train/CLASS/IMAGE and val/CLASS/IMAGE in --data_path, or CLASS/IMAGE in --eval_data_path"
    if not root.is_dir():
        raise UserError(f"--data_set {name}: no folder {root if root.parent.is_dir() else root.parent}; {wanted}")
    with _explained(name, root, wanted=wanted):
        return _list_folder(name, str(root))


def _list_folder(name: str, root: str) -> Images:
    """List what torchvision's ImageFolder lists, in the same order, but warn of files that are left out."""
    endings = ", ".join(tv.folder.IMG_EXTENSIONS)
    classes, _ = tv.folder.find_classes(root)
    paths, labels, left_out = [], [], []
    for label, class_name in enumerate(classes):
        files = [os.path.join(*file) for file in sorted(_files(os.path.join(root, class_name)))]
        images = [file for file in files if tv.folder.is_image_file(file)]
        if not images:
            raise FileNotFoundError(f"no file in folder {printable(class_name)} ends in {endings}")
        paths += images
        labels += [label] * len(images)
        left_out += [printable(file) for file in files if not tv.folder.is_image_file(file)]
    if left_out:
        log.warning("files that do not end in %s are left out: %s", endings, _some(left_out))
    return Images(name, labels, paths=paths, class_names=classes)


def _files(folder: str, parents: tuple = ()) -> Iterator[tuple[str, str]]:
    """Yield (folder, name) of each file below a folder, following links; UserError for a link back to a parent."""
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in parents:
        raise UserError(f"{printable(folder)} is a link to a folder that it is in")
    with os.scandir(folder) as entries:
        for entry in entries:
            # is_dir() raises for a link that cannot be followed; we list it as a file, which then cannot be read
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                yield from _files(entry.path, (*parents, identity))
            else:
                yield folder, entry.name
