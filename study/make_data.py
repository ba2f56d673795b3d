"""Lay out the study's two sets of images as folders of classes: CIFAR-10 as JPEG, and Tiny-ImageNet-200.

    python -m study.make_data FOLDER

makes FOLDER/cifar10-jpeg/ and FOLDER/tiny-imagenet-200/, each with train/CLASS/IMAGE and val/CLASS/IMAGE. Downloads the
originals to FOLDER/downloads/ (420 MB) unless they are there, and checks their MD5 sums. Leaves a set that is already
there as it is.
"""

import argparse
import re
import shutil
import sys
import zipfile
from collections import Counter
from pathlib import Path

from options.parser import Parser
from study.arms import STUDENT_DATA, TEACHER_DATA
from utils import UserError, run_script

TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
JPEG_QUALITY = 75


def write_cifar10(downloads: Path, target: Path) -> None:
    """Write CIFAR-10 as JPEG files, numbered within each class in the set's order. Its test images become `val`."""
    from torchvision.datasets import CIFAR10

    for part, is_train in (("train", True), ("val", False)):
        images, count = CIFAR10(str(downloads), train=is_train, download=True), Counter()
        for name in images.classes:
            (target / part / name).mkdir(parents=True)
        for image, label in images:
            name = images.classes[label]
            image.save(target / part / name / f"{count[name]:04}.jpg", quality=JPEG_QUALITY)
            count[name] += 1


def write_tiny_imagenet(downloads: Path, target: Path) -> None:
    """Unpack Tiny-ImageNet's files as they are. Sort its validation images, all in one folder, into their classes."""
    from torchvision.datasets.utils import download_url

    download_url(TINY_IMAGENET, str(downloads), md5=TINY_IMAGENET_MD5)
    with zipfile.ZipFile(downloads / Path(TINY_IMAGENET).name) as archive:
        table = archive.read("tiny-imagenet-200/val/val_annotations.txt").decode()
        classes = dict(line.split("\t")[:2] for line in table.splitlines())
        for member in archive.namelist():
            if match := re.fullmatch(r"tiny-imagenet-200/(train|val)/(?:n\d+/)?images/([^/]+\.JPEG)", member):
                part, file = match.groups()
                name = file.partition("_")[0] if part == "train" else classes[file]
                path = target / part / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(member))


def make(folder: Path) -> None:
    """Make both sets, each whole or not at all. OSError, RuntimeError or BadZipFile if a download fails."""
    for name, write in ((STUDENT_DATA, write_cifar10), (TEACHER_DATA, write_tiny_imagenet)):
        target, unfinished = folder / name, folder / f"{name}.tmp"
        if target.exists():
            print(f"{target} is there")
            continue
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(folder / "downloads", unfinished)
        unfinished.rename(target)
        print(f"{target}: {sum(1 for path in target.rglob('*') if path.is_file()):,} images")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m study.make_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args(argv)
    try:
        make(options.folder)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:  # RuntimeError: torchvision's, for a wrong MD5 sum
        raise UserError(str(error)) from error


if __name__ == "__main__":
    sys.exit(run_script(main))
