"""Data sets by name: images without transforms, each set's own splits and classes."""

import argparse
import functools
import logging
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import timm.data
import torchvision.datasets as tv
from PIL import Image

from images.images import Images, printable
from training import distributed
from utils import Stream, UserError, permutation

log = logging.getLogger("images")  # not "datasets", to which Hugging Face's package adds a handler: all twice

# name: class, its parts for training, its part for evaluation, the number of classes where it does not name them all
_TORCHVISION = {
    "CIFAR10": (tv.CIFAR10, [True], False, None),
    "CIFAR100": (tv.CIFAR100, [True], False, None),
    "flowers": (tv.Flowers102, ["train", "val"], "test", 102),
    "pets": (tv.OxfordIIITPet, ["trainval"], "test", 37),
    "stl10": (tv.STL10, ["train"], "test", 10),
    "food101": (tv.Food101, ["train"], "test", None),
    "dtd": (tv.DTD, ["train", "val"], "test", None),
    "svhn": (tv.SVHN, ["train"], "test", 10),
    "fashion_mnist": (tv.FashionMNIST, [True], False, None),
}
_LIST_PATHS = (tv.Flowers102, tv.Food101, tv.DTD)  # with loader=str their items are (path, label), nothing decoded
_FOLDERS = ("IMNET", "image_folder")
NAMES = (*_TORCHVISION, *_FOLDERS, "eurosat", "digits", "torch/NAME", "hfds/NAME")


def load_images(
    name: str, data_path: str, train: bool, *, eval_data_path: str | None = None, download: bool = False,
    split: str | None = None, input_key: str | None = None, target_key: str | None = None
) -> Images:  # fmt: skip
    """The training or the evaluation images of the set `name`; UserError for whatever is missing.

    `eval_data_path` replaces `data_path` in evaluation. `split`, and for hfds/ the keys, are for timm's readers.
    """
    if name in _FOLDERS:
        return _folder(name, _folder_root(data_path, train, eval_data_path))
    if name.startswith(("hfids/", "tfds/", "wds/")):
        raise UserError(f"--data_set {name} is a stream; exact shares and resuming need a map-style set, as hfds/ has")
    if name not in NAMES and not name.startswith(("torch/", "hfds/")):
        raise UserError(f"--data_set {name} is unknown; wanted one of {', '.join(NAMES)}")
    root = data_path if train or not eval_data_path else eval_data_path
    split = split or ("train" if train else "validation")
    with _explained(name, root, download):
        if name.startswith("torch/"):
            return _listed(name, [timm.data.create_dataset(name, root=root, split=split, download=download)])
        if name.startswith("hfds/"):
            return _huggingface_images(name, root, split, input_key, target_key)
        if name in _TORCHVISION:
            build, train_parts, eval_part, classes = _TORCHVISION[name]
            build = functools.partial(build, loader=str) if build in _LIST_PATHS else build
            parts = [build(root, part, download=download) for part in (train_parts if train else [eval_part])]
            return _listed(name, parts, classes)
        images = _digits() if name == "digits" else _listed(name, [tv.EuroSAT(root, download=download)])
        return images.subset(_fixed_split(len(images), train))


def check_same_classes(train: Images, val: Images) -> None:
    """UserError with the class names that only one of the two sets has."""
    if train.class_names and val.class_names and train.class_names != val.class_names:
        only_train = _some(sorted(set(train.class_names) - set(val.class_names)))
        only_val = _some(sorted(set(val.class_names) - set(train.class_names)))
        found = f"only in training: {only_train}; only in evaluation: {only_val}"
        raise UserError(f"--data_set {train.name}: classes differ between training and evaluation ({found})")


def fraction(images: Images, share: float, seed: int) -> Images:
    """A seeded share in (0, 1]: of each class round(share * count) images, at least 1, in ascending order."""
    labels, kept = images.targets(), []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = permutation(len(members), Stream.FRACTION, seed, int(label))
        kept.append(members[order[: max(1, round(share * len(members)))]])
    return images.subset(np.sort(np.concatenate(kept)))


def _some(names: list[str], most: int = 5) -> str:
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


def _fixed_split(count: int, train: bool) -> np.ndarray:
    """Ascending indices of the 80 % for training or the 20 % for evaluation, the same whatever the run's seed."""
    order, cut = permutation(count, Stream.SPLIT), count * 4 // 5
    return np.sort(order[:cut] if train else order[cut:])


@contextmanager
def _explained(name: str, root: str | Path, download: bool = False, wanted: str = "INSTALL.md gives the layout"):
    """Whatever a third party's reader raises over missing or broken data, as one line for the user."""
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


def _folder_root(data_path: str, train: bool, eval_data_path: str | None) -> Path:
    if not train:
        return Path(eval_data_path) if eval_data_path else Path(data_path, "val")
    root = Path(data_path, "train")
    # as the original's image_folder: the path itself, where the evaluation images have a path of their own
    return Path(data_path) if eval_data_path and not root.is_dir() and Path(data_path).is_dir() else root


def _folder(name: str, root: Path) -> Images:
    wanted = "wanted: train/CLASS/IMAGE and val/CLASS/IMAGE in --data_path, or CLASS/IMAGE in --eval_data_path"
    if not root.is_dir():
        raise UserError(f"--data_set {name}: no folder {root if root.parent.is_dir() else root.parent}; {wanted}")
    with _explained(name, root, wanted=wanted):
        return _folder_images(name, str(root))


def _folder_images(name: str, root: str) -> Images:
    """What torchvision's ImageFolder lists, in its order."""
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


def _files(folder: str, above: tuple = ()) -> Iterator[tuple[str, str]]:
    """(folder, name) of all files below a folder, links followed; UserError for a link that leads back up."""
    status = os.stat(folder)
    here = status.st_dev, status.st_ino
    if here in above:
        raise UserError(f"{printable(folder)} is a link to a folder that it is in")
    with os.scandir(folder) as entries:
        for entry in entries:
            # of a link, is_dir would raise where it leads nowhere: such a name is a file that cannot be read
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                yield from _files(entry.path, (*above, here))
            else:
                yield folder, entry.name


def _listed(name: str, parts: list, classes: int | None = None) -> Images:
    """One set of one or more parts by torchvision; more than one part only where files are listed."""
    labels, paths = zip(*map(_listing, parts), strict=True)
    names = getattr(parts[0], "classes", None)
    if any(getattr(part, "classes", None) != names for part in parts):
        raise UserError(f"--data_set {name}: its {len(parts)} training parts have different classes")
    if names and classes and len(names) != classes:
        names = None  # a partial copy, whose list does not name the labels
    paths = None if paths[0] is None else [path for part in paths for path in part]
    return Images(name, np.concatenate(labels), source=parts[0], paths=paths, class_names=names, classes=classes)


def _listing(dataset) -> tuple[np.ndarray, Sequence | None]:
    """(labels, paths or None) of a set by torchvision; no image is decoded."""
    paths = None
    if hasattr(dataset, "samples") or hasattr(dataset, "imgs"):
        items = dataset.samples if hasattr(dataset, "samples") else dataset.imgs
        paths, labels = [path for path, _ in items], [label for _, label in items]
    elif isinstance(dataset, _LIST_PATHS):
        items = [dataset[index] for index in range(len(dataset))]
        paths, labels = [path for path, _ in items], [label for _, label in items]
    elif isinstance(dataset, tv.OxfordIIITPet):  # has neither loader= nor a public list
        paths, labels = dataset._images, dataset._labels
    elif isinstance(dataset, tv.INaturalist):
        labels = [category for category, _ in dataset.index]
    else:
        labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    labels = np.asarray(labels, dtype=np.int64)
    return (labels if labels.ndim == 1 else labels[:, 0]), paths  # QMNIST: the class is the first of 8 columns


def _digits() -> Images:
    """scikit-learn's 1,797 handwritten digits: 8 x 8 pixels of 0 to 16, here grey values of 0 to 255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return Images("digits", digits.target, source=[(Image.fromarray(p),) for p in pixels], class_names="0123456789")


_huggingface_module: dict[str, ModuleType] = {}


@contextmanager
def _huggingface() -> Iterator[None]:
    """Inside, `import datasets` means Hugging Face's package; outside, this file, which has the same name."""
    ours, search_path = sys.modules.pop("datasets", None), list(sys.path)
    if _huggingface_module:
        sys.modules.update(_huggingface_module)
    else:
        here = Path(__file__).resolve().parent
        sys.path[:] = [entry for entry in search_path if Path(entry).resolve() != here]
    try:
        yield
        _huggingface_module["datasets"] = sys.modules["datasets"]
    finally:
        sys.path[:] = search_path
        sys.modules.pop("datasets", None)
        if ours is not None:
            sys.modules["datasets"] = ours


class _HuggingFaceRows:
    """timm's reader of a Hugging Face set; every use of it, pickling too, happens inside `_huggingface()`."""

    def __init__(self, reader):
        self.reader = reader

    def __getitem__(self, index: int) -> tuple[Image.Image]:
        # not through timm's ImageDataset, which replaces an image that does not decode by its neighbour
        with _huggingface():
            file, _ = self.reader[index]
        with file, Image.open(file) as image:
            return (image.convert("RGB"),)

    def __getstate__(self) -> bytes:
        with _huggingface():
            return pickle.dumps(self.reader)

    def __setstate__(self, state: bytes) -> None:
        with _huggingface():
            self.reader = pickle.loads(state)


def _huggingface_images(name: str, root: str, split: str, input_key: str | None, target_key: str | None) -> Images:
    keys = {"input_key": input_key or "image", "target_key": target_key or "label"}
    label_key = keys["target_key"]
    with _huggingface():
        reader = timm.data.create_dataset(name, root=root, split=split, **keys).reader
        # the reader adds a column of nothing for an input_key that the set lacks
        columns = [column for column, first in reader.dataset[:1].items() if first != [None]]
        for option, key in keys.items():
            if key not in columns:
                raise UserError(f"--data_set {name} has no column {key} for --{option}; it has {', '.join(columns)}")
        labels = np.asarray(reader.dataset.select_columns([label_key]).with_format("numpy")[:][label_key])
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"--data_set {name}: column {label_key} for --target_key holds no class indices")
    return Images(name, labels, source=_HuggingFaceRows(reader), class_names=list(reader.class_to_idx) or None)


def load_data(options: argparse.Namespace) -> tuple[Images | None, Images | None, int]:
    """The images to train on and to evaluate on (None where not needed) and their number of classes."""

    def load(train: bool) -> Images:
        images = load_images(
            options.data_set,
            options.data_path,
            train,
            eval_data_path=options.eval_data_path,
            download=distributed.is_main(),
            split=options.train_split if train else options.val_split,
            input_key=options.input_key,
            target_key=options.target_key,
        )
        return images.skipping_bad() if options.bad_images == "skip" else images

    with distributed.main_first():
        train_images = None if options.eval else load(True)
        val_images = None if options.disable_eval else load(False)
    if train_images and val_images:
        check_same_classes(train_images, val_images)
    num_classes = (train_images or val_images).classes
    if options.nb_classes not in (None, num_classes):
        raise UserError(f"--nb_classes {options.nb_classes}, but --data_set {options.data_set} has {num_classes}")
    if train_images and options.data_fraction < 1:
        train_images = fraction(train_images, options.data_fraction, options.seed)
    return train_images, val_images, num_classes
