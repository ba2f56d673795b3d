"""Data sets that torchvision reads, by our names and by timm's `torch/NAME`, and scikit-learn's digits."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm.data
import torchvision.datasets as tv
from PIL import Image

from images.folders import announce_download, list_classes
from images.images import Images
from utils import Stream, UserError, first_line, hint, permutation


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
    `folder` below `root` holds the class folders, if the set has no other list of its images.
    """

    make: Callable
    train: list[str | bool] | None = None
    evaluate: list[str | bool] | None = None
    classes: int | None = None
    folder: str | None = None


TABLE = {
    "CIFAR10": Row(tv.CIFAR10, train=[True], evaluate=[False]),
    "CIFAR100": Row(tv.CIFAR100, train=[True], evaluate=[False]),
    "flowers": Row(tv.Flowers102, train=["train", "val"], evaluate=["test"], classes=102),
    "pets": Row(tv.OxfordIIITPet, train=["trainval"], evaluate=["test"], classes=37),
    "stl10": Row(tv.STL10, train=["train"], evaluate=["test"], classes=10),
    "food101": Row(tv.Food101, train=["train"], evaluate=["test"]),
    "dtd": Row(tv.DTD, train=["train", "val"], evaluate=["test"]),
    "svhn": Row(tv.SVHN, train=["train"], evaluate=["test"], classes=10),
    "eurosat": Row(tv.EuroSAT, folder="eurosat/2750"),
    "fashion_mnist": Row(tv.FashionMNIST, train=[True], evaluate=[False]),
    "digits": Row(Digits),
}
OF_TIMM = "cifar10 cifar100 mnist kmnist fashion_mnist qmnist imagenet places365 inaturalist image_folder".split()


def load_row(name: str, root: str, train: bool, download: bool) -> Images:
    """Load the part of a set of TABLE to train on or to evaluate on."""
    row = TABLE[name]
    if row.train is None:
        whole = _made(name, root, download, functools.partial(row.make, root))
        images = list_classes(name, Path(root, row.folder)) if row.folder else _joined(name, [whole])
        return images.subset(_fixed_split(len(images), train))
    arguments = row.train if train else row.evaluate
    parts = [_made(name, root, download, functools.partial(row.make, root, argument)) for argument in arguments]
    return _joined(name, parts, row.classes)


def load_torch(name: str, root: str, split: str, download: bool) -> Images:
    """Load a split of `torch/NAME`, which timm builds."""
    is_folder = name in ("torch/image_folder", "torch/folder")
    more = {"allow_empty": True} if is_folder else {}  # `list_classes` judges that, because it knows what is hidden
    make = functools.partial(timm.data.create_dataset, name, root=root, split=split, **more)
    try:
        whole = _made(name, root, download, make)
    except AssertionError as error:
        short = name.removeprefix("torch/")
        known = f"the NAME of torch/NAME is one of {', '.join(OF_TIMM)}{hint(short, OF_TIMM)}"
        raise UserError(f"--data_set {name}: {first_line(error)}; {known}") from error
    return list_classes(name, whole.root) if is_folder else _joined(name, [whole])


def _made(name: str, root: str, download: bool, make: Callable):
    """Call `make(download=False)`; if that finds no complete set, say where it will be downloaded to, and do that."""
    try:
        return make(download=False)
    except (RuntimeError, OSError):  # files are missing or broken
        if not download:
            raise
    announce_download(name, root)
    is_new = not Path(root).exists()
    try:
        return make(download=True)
    except Exception:
        if is_new:
            with contextlib.suppress(OSError):  # it has files, or was not made
                Path(root).rmdir()
        raise


def _fixed_split(count: int, train: bool) -> np.ndarray:
    """Pick the 80 % to train on or the 20 % to evaluate on, ascending indices that do not depend on --seed."""
    order, cut = permutation(count, Stream.SPLIT), count * 4 // 5
    return np.sort(order[:cut] if train else order[cut:])


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
