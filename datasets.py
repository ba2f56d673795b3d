"""Data sets by name: images without transforms, each set's own splits and classes."""

import argparse
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from images.folders import LAYOUT, PARTS, class_root, list_classes, list_unlabelled, parts_as_classes, too_deep
from images.huggingface import load_hugging_face
from images.images import Images
from images.torchvision_sets import load_row, load_torch
from options.training import unknown_data_set
from training import distributed
from utils import Stream, UserError, few, permutation

log = logging.getLogger("images")  # Hugging Face's package has a handler on "datasets", which would repeat each line

FOLDERS = ("IMNET", "image_folder")


def load_data(options: argparse.Namespace) -> tuple[Images | None, Images | None, int]:
    """Load the images to train on and to evaluate on (None for a part that is not used) and count their classes."""
    name, eval_data_path = options.data_set, options.eval_data_path
    load = functools.partial(
        load_images,
        name,
        options.data_path,
        eval_data_path=eval_data_path,
        download=distributed.is_main(),
        input_key=options.input_key,
        target_key=options.target_key,
    )
    with distributed.main_first():
        train_images = None if options.eval else load(train=True, split=options.train_split)
        val_images = None if options.disable_eval else load(train=False, split=options.val_split)
    for images, train in ((train_images, True), (val_images, False)):
        if images:
            root = class_root(name, options.data_path, train, eval_data_path) if name in FOLDERS else None
            check_classes(images, train, root, trained_on=None if train else train_images)
    if train_images and val_images:
        check_same_classes(train_images, val_images)
    num_classes = (train_images or val_images).classes
    if options.nb_classes not in (None, num_classes):
        raise UserError(f"--nb_classes {options.nb_classes}, but --data_set {name} has {num_classes}")
    if train_images and options.data_fraction < 1:
        train_images = fraction(train_images, options.data_fraction, options.seed)
    counts = {"training": train_images, "evaluation": val_images}
    counted = " and ".join(f"{len(images):,} {use}" for use, images in counts.items() if images)
    log.info("%s images of %d classes", counted, num_classes)
    if options.exif:
        train_images, val_images = (images and images.upright() for images in (train_images, val_images))
    if options.bad_images == "skip":
        train_images, val_images = (images and images.skipping_bad() for images in (train_images, val_images))
    return train_images, val_images, num_classes


def describe_data(train_images: Images | None, val_images: Images | None) -> dict:
    """Describe the images as a checkpoint does, as plain values; None for a part that is not used.

    The lists are digests (see `Images.digest`), so they differ wherever names, order, labels or counts do.
    """
    images = train_images or val_images
    return {
        "classes": images.class_names or images.classes,
        "training images": train_images and len(train_images),
        "evaluation images": val_images and len(val_images),
        "list of training images": train_images and train_images.digest(),
        "list of evaluation images": val_images and val_images.digest(),
    }


def counts(num_classes: int, about_data: dict) -> dict[str, int | None]:
    """Return the counts for config.json, by which compare.py tells data sets of the same name apart."""
    images = {f"{part}_images": about_data[f"{part} images"] for part in ("training", "evaluation")}
    return {"classes": num_classes} | images


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
    if problem := unknown_data_set(name):
        raise UserError(problem)
    root = data_path if train or not eval_data_path else eval_data_path
    split = split or ("train" if train else "validation")
    if name in FOLDERS:
        root = class_root(name, data_path, train, eval_data_path)
        with _explained(name, root, wanted=LAYOUT):
            return list_classes(name, root)
    with _explained(name, root, download):
        if name.startswith("hfds/"):
            return load_hugging_face(name, root, split, input_key or "image", target_key or "label")
        if name.startswith("torch/"):
            return load_torch(name, root, split, download)
        return load_row(name, root, train, download)


def load_unlabelled(name: str, data_path: str) -> Images:
    """Load the training images of a set for their pixels alone: of a folder, all images in train/ or else in itself."""
    if name not in FOLDERS:
        return load_images(name, data_path, True, download=True)
    with _explained(name, data_path, wanted="wanted images in it or in its train/"):
        return list_unlabelled(name, data_path)


def check_classes(images: Images, train: bool, root: Path | None = None, trained_on: Images | None = None) -> None:
    """Raise UserError unless there are classes to tell apart, which are those of the images `trained_on`.

    `root` holds the class folders, if the set has such.
    """
    names = images.class_names or [f"number {label}" for label in range(images.classes)]
    if {class_name.lower() for class_name in names} <= PARTS:
        where, meant = (f" in {root}", parts_as_classes(root, train)) if root else ("", "")
        problem = f"the classes{where} would be {few(names)}: one level too high{meant}"
        raise UserError(f"--data_set {images.name}: {problem}")
    present = np.unique(images.targets())
    if images.classes == 1 or (train and len(present) == 1):
        hint = too_deep(root, train) if root and images.classes == 1 else ""
        if trained_on and not hint:  # the better reason
            check_same_classes(trained_on, images)
        count, use = f"{len(images):,}", "training" if train else "evaluation"
        problem = f"all {count} {use} images are of one class, {names[present[0]]}{hint}"
        raise UserError(f"--data_set {images.name}: {problem}")
    missing = np.setdiff1d(np.arange(images.classes), present)
    if train and len(missing):
        listed = few(names[label] for label in missing)
        log.warning("%d of %d classes have no training images: %s", len(missing), images.classes, listed)


def check_same_classes(train: Images, val: Images) -> None:
    """Raise UserError with the class names that only one of the two sets has."""
    if train.class_names and val.class_names and train.class_names != val.class_names:
        only_train = few(sorted(set(train.class_names) - set(val.class_names)))
        only_val = few(sorted(set(val.class_names) - set(train.class_names)))
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


@contextmanager
def _explained(
    name: str, root: str | Path, download: bool = False, wanted: str = "INSTALL.md gives the layout"
) -> Iterator[None]:
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
