"""The study's two public sets become folders of classes, whole or not at all; the demo's data is a balanced subset."""

import gzip
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_sets import FORMATS, colour, write_cifar10

from demo import make_subset
from study import make_data
from utils import UserError


def write_tiny_imagenet(path):
    """A zip laid out as Tiny-ImageNet-200's, whose images are bytes that tell where they were; returns its MD5 sum."""
    names = [(name, number) for name in ("n01", "n02") for number in range(2)]
    files = {f"train/{name}/images/{name}_{number}.JPEG": f"{name} {number}" for name, number in names}
    files |= {"train/n01/n01_boxes.txt": "0", "val/images/val_0.JPEG": "first", "val/images/val_1.JPEG": "second"}
    files |= {"val/val_annotations.txt": "val_0.JPEG\tn02\t0\t0\nval_1.JPEG\tn01\t0\t0\n", "test/images/a.JPEG": ""}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", content)
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """A folder whose downloads/ hold both sets, so that nothing is fetched."""
    (tmp_path / "downloads").mkdir()
    write_cifar10(tmp_path / "downloads")
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    md5 = write_tiny_imagenet(tmp_path / "downloads" / "tiny-imagenet-200.zip")
    monkeypatch.setattr(make_data, "TINY_IMAGENET_MD5", md5)
    return tmp_path


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_both_sets_become_folders_of_classes(downloaded, capsys):
    make_data.main([str(downloaded)])
    cifar, tiny = downloaded / "cifar10-jpeg", downloaded / "tiny-imagenet-200"
    _, train, val, *_ = FORMATS["CIFAR10"]
    numbered = [("train", train[:n], label) for n, label in enumerate(train)] + [("val", [], label) for label in val]
    names = (f"{part}/class{label}/{before.count(label):04}.jpg" for part, before, label in numbered)
    assert files(cifar) == sorted(names)
    assert {path.name for path in (cifar / "val").iterdir()} == {f"class{label}" for label in range(10)}
    with Image.open(cifar / "val/class9/0000.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (32, 32))
        assert image.getpixel((3, 3)) == pytest.approx(colour(9), abs=3)  # JPEG's own rounding of colours
    numbers = [(name, number) for name in ("n01", "n02") for number in range(2)]
    expected = {f"train/{name}/{name}_{number}.JPEG": f"{name} {number}" for name, number in numbers}
    expected |= {"val/n01/val_1.JPEG": "second", "val/n02/val_0.JPEG": "first"}
    assert {name: (tiny / name).read_text() for name in files(tiny)} == expected
    assert "13 images" in capsys.readouterr().out


def test_a_whole_set_is_left_and_an_unfinished_one_made_anew(downloaded):
    (downloaded / "cifar10-jpeg").mkdir()
    (downloaded / "tiny-imagenet-200.tmp" / "train" / "n09").mkdir(parents=True)
    make_data.main([str(downloaded)])
    assert not files(downloaded / "cifar10-jpeg")
    assert not (downloaded / "tiny-imagenet-200" / "train" / "n09").exists()
    assert len(files(downloaded / "tiny-imagenet-200")) == 6


def test_a_download_that_fails_is_an_error_and_leaves_no_set(downloaded, monkeypatch):
    def refused(*_, **__):
        raise OSError("no route to the host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", refused)
    with pytest.raises(UserError, match="^no route to the host$"):
        make_data.main([str(downloaded)])
    assert (downloaded / "cifar10-jpeg").exists() and not (downloaded / "tiny-imagenet-200").exists()


def test_demo_data_has_equal_classes_in_the_original_format():
    raw = Path(make_subset.__file__).parent / "data" / "FashionMNIST" / "raw"
    for split, per_class in (("train", 1200), ("t10k", 200)):
        labels = gzip.decompress((raw / f"{split}-labels-idx1-ubyte.gz").read_bytes())
        images = gzip.decompress((raw / f"{split}-images-idx3-ubyte.gz").read_bytes())
        assert labels[:4] == bytes([0, 0, 8, 1]) and images[:4] == bytes([0, 0, 8, 3])
        assert np.bincount(np.frombuffer(labels[8:], np.uint8)).tolist() == [per_class] * 10
        assert np.frombuffer(images[4:16], ">i4").tolist() == [10 * per_class, 28, 28]
        assert len(images) == 16 + 10 * per_class * 28 * 28


def test_subset_is_balanced_ordered_and_repeatable():
    labels = np.arange(200) % 10
    kept = make_subset.pick(labels, 3, seed=1)
    assert np.bincount(labels[kept]).tolist() == [3] * 10
    assert np.all(np.diff(kept) > 0)
    assert np.array_equal(kept, make_subset.pick(labels, 3, seed=1))
