"""study/make_data.py lays out the public sets as folders of classes, whole or not at all."""

import hashlib
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

import make_data

CLASSES = [f"kind{number}" for number in range(10)]
GREY = 100


def write_cifar10(downloads):
    """CIFAR-10 in its own format, a grey image of each label."""
    folder = downloads / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))
    parts = {f"data_batch_{number}": [number, 3] for number in range(1, 6)} | {"test_batch": [9, 0]}
    for file, labels in parts.items():
        rows = np.full((2, 3072), GREY, dtype=np.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": rows, "labels": labels}))


def write_tiny_imagenet(downloads):
    """A zip laid out as Tiny-ImageNet-200's, whose images are bytes that tell where they were; returns its MD5 sum."""
    with zipfile.ZipFile(downloads / "tiny-imagenet-200.zip", "w") as archive:
        for name in ("n01", "n02"):
            archive.writestr(f"tiny-imagenet-200/train/{name}/{name}_boxes.txt", "0")
            for number in range(2):
                archive.writestr(f"tiny-imagenet-200/train/{name}/images/{name}_{number}.JPEG", f"{name} {number}")
        archive.writestr("tiny-imagenet-200/val/images/val_0.JPEG", "first")
        archive.writestr("tiny-imagenet-200/val/images/val_1.JPEG", "second")
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "val_0.JPEG\tn02\t0\t0\nval_1.JPEG\tn01\t0\t0\n")
        archive.writestr("tiny-imagenet-200/test/images/test_0.JPEG", "not used")
    return hashlib.md5((downloads / "tiny-imagenet-200.zip").read_bytes()).hexdigest()


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """A folder whose downloads/ hold both sets, so that nothing is fetched."""
    write_cifar10(tmp_path / "downloads")
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    monkeypatch.setattr(make_data, "TINY_IMAGENET_MD5", write_tiny_imagenet(tmp_path / "downloads"))
    return tmp_path


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_both_sets_become_folders_of_classes(downloaded, capsys):
    assert make_data.main([str(downloaded)]) == 0
    cifar, tiny = downloaded / "cifar10-jpeg", downloaded / "tiny-imagenet-200"
    labels = [1, 2, 3, 3, 3, 3, 3, 3, 4, 5]
    assert files(cifar) == [
        *(f"train/kind{label}/{labels[:place].count(label):04}.jpg" for place, label in enumerate(labels)),
        "val/kind0/0000.jpg",
        "val/kind9/0000.jpg",
    ]
    assert {path.name for path in (cifar / "val").iterdir()} == set(CLASSES)
    with Image.open(cifar / "val/kind9/0000.jpg") as image:
        assert (image.format, image.size, image.getpixel((3, 3))) == ("JPEG", (32, 32), (GREY,) * 3)
    assert {name: (tiny / name).read_text() for name in files(tiny)} == {
        "train/n01/n01_0.JPEG": "n01 0",
        "train/n01/n01_1.JPEG": "n01 1",
        "train/n02/n02_0.JPEG": "n02 0",
        "train/n02/n02_1.JPEG": "n02 1",
        "val/n01/val_1.JPEG": "second",
        "val/n02/val_0.JPEG": "first",
    }
    assert "12 images" in capsys.readouterr().out


def test_a_set_that_is_there_is_left_and_an_unfinished_one_is_made_anew(downloaded):
    (downloaded / "cifar10-jpeg").mkdir()
    (downloaded / "tiny-imagenet-200.tmp" / "train" / "n09").mkdir(parents=True)
    assert make_data.main([str(downloaded)]) == 0
    assert not files(downloaded / "cifar10-jpeg")
    assert not (downloaded / "tiny-imagenet-200" / "train" / "n09").exists()
    assert len(files(downloaded / "tiny-imagenet-200")) == 6


def test_a_download_that_fails_is_one_line_and_leaves_no_set(downloaded, monkeypatch, capsys):
    def refused(*_, **__):
        raise OSError("no route to the host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", refused)
    assert make_data.main([str(downloaded)]) == 1
    assert capsys.readouterr().err == "study/make_data.py: error: no route to the host\n"
    assert (downloaded / "cifar10-jpeg").exists() and not (downloaded / "tiny-imagenet-200").exists()
