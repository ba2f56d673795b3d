"""Every data set by name, read by its real reader from a few images written in that set's own format."""

import io
import json
import pickle
import struct
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torchvision.datasets.utils
from PIL import Image
from scipy.io import savemat
from torch.utils.data import BatchSampler

import datasets
from images.images import BadImage
from images.transforms import TransformedImages, eval_transform
from images.workers import WorkerBatches
from utils import UserError


def colour(label):
    """A colour for each label of up to 102 classes, its channels all different."""
    return 20 + 2 * label, 250 - 2 * label, 128


def pixels(label, size):
    """A flat picture of the label's colour, uint8 [size, size, 3]."""
    return np.full((size, size, 3), colour(label), dtype=np.uint8)


def write_image(path, label, size=24):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(label, size)).save(path)


def cifar_rows(labels):
    return np.stack([pixels(label, 32).transpose(2, 0, 1).reshape(-1) for label in labels])


def write_cifar10(root):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    batches = {f"data_batch_{n}": [n, n + 1] for n in range(1, 6)} | {"test_batch": [9, 0, 3]}
    for file, labels in batches.items():
        (folder / file).write_bytes(pickle.dumps({"data": cifar_rows(labels), "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{n}" for n in range(10)]}))


def write_cifar100(root):
    folder = root / "cifar-100-python"
    folder.mkdir()
    for file, labels in {"train": [0, 99, 42, 7], "test": [5, 98]}.items():
        (folder / file).write_bytes(pickle.dumps({"data": cifar_rows(labels), "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"fine{n}" for n in range(100)]}))


def write_flowers(root):
    folder = root / "flowers-102"
    labels = np.array([77, 1, 102, 50, 13, 2])  # of images 1 to 6, counted from 1
    for number, label in enumerate(labels, 1):
        write_image(folder / "jpg" / f"image_{number:05d}.jpg", label - 1)
    savemat(folder / "imagelabels.mat", {"labels": labels[None]})
    savemat(folder / "setid.mat", {"trnid": [[4, 1]], "valid": [[2, 6]], "tstid": [[3, 5]]})


def write_pets(root):
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    lines = {"trainval": ["Abyssinian_1 1 1 1", "yorkshire_terrier_12 37 2 25"], "test": ["american_bulldog_3 2 2 1"]}
    for part, rows in lines.items():
        (folder / "annotations" / f"{part}.txt").write_text("\n".join(rows) + "\n")
        for row in rows:
            name, label, _, _ = row.split()
            write_image(folder / "images" / f"{name}.jpg", int(label) - 1)


def write_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir()
    for part, labels in {"train": [0, 9, 4], "test": [2, 1]}.items():
        planes = [pixels(label, 96).transpose(2, 1, 0) for label in labels]  # column by column
        np.stack(planes).tofile(folder / f"{part}_X.bin")
        (np.array(labels, dtype=np.uint8) + 1).tofile(folder / f"{part}_y.bin")
    (folder / "unlabeled_X.bin").touch()
    (folder / "class_names.txt").write_text("\n".join(f"thing{n}" for n in range(10)) + "\n")


def write_food101(root):
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    listing = {"train": {"beignets": ["beignets/7"], "apple_pie": ["apple_pie/1", "apple_pie/2"]}}
    listing["test"] = {"apple_pie": ["apple_pie/3"], "beignets": ["beignets/8"]}
    for part, classes in listing.items():
        (folder / "meta" / f"{part}.json").write_text(json.dumps(classes))
        for name, files in classes.items():
            for file in files:
                write_image(folder / "images" / f"{file}.jpg", sorted(classes).index(name))


def write_dtd(root):
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for number, part in enumerate(("train", "val", "test")):
        names = [f"{texture}/{texture}_{number:04d}.jpg" for texture in ("banded", "woven")]
        (folder / "labels" / f"{part}1.txt").write_text("\n".join(names) + "\n")
        for label, name in enumerate(names):
            write_image(folder / "images" / name, label)


def write_svhn(root):
    for part, labels in {"train": [1, 0, 9], "test": [0, 5]}.items():
        stack = np.stack([pixels(label, 32) for label in labels], axis=-1)  # [32, 32, 3, N]
        marks = np.array([[label or 10] for label in labels], dtype=np.uint8)  # a 0 is written as 10
        savemat(root / f"{part}_32x32.mat", {"X": stack, "y": marks})


def write_idx(path, array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


def write_fashion_mnist(root, folder="FashionMNIST"):
    folder = root / folder / "raw"
    folder.mkdir(parents=True)
    for part, labels in {"train": [3, 0, 9, 1], "t10k": [7, 2]}.items():
        grey = np.stack([np.full((28, 28), 10 * label, dtype=np.uint8) for label in labels])
        write_idx(folder / f"{part}-images-idx3-ubyte", grey)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.array(labels, dtype=np.uint8))


def write_folder(root, counts=None):
    for part, count in (counts or {"train": 3, "val": 2}).items():
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                write_image(root / part / name / f"{number}.png", label)


def write_eurosat(root):
    for label, name in enumerate(("AnnualCrop", "Forest")):
        for number in range(10):
            write_image(root / "eurosat" / "2750" / name / f"{name}_{number}.jpg", label)


# name: writer, training labels, evaluation labels, number of classes, size of an image
FORMATS = {
    "CIFAR10": (write_cifar10, [1, 2, 2, 3, 3, 4, 4, 5, 5, 6], [9, 0, 3], 10, 32),
    "CIFAR100": (write_cifar100, [0, 99, 42, 7], [5, 98], 100, 32),
    "flowers": (write_flowers, [49, 76, 0, 1], [101, 12], 102, 24),  # train, then val
    "pets": (write_pets, [0, 36], [1], 37, 24),
    "stl10": (write_stl10, [0, 9, 4], [2, 1], 10, 96),
    "food101": (write_food101, [1, 0, 0], [0, 1], 2, 24),
    "dtd": (write_dtd, [0, 1, 0, 1], [0, 1], 2, 24),  # train, then val
    "svhn": (write_svhn, [1, 0, 9], [0, 5], 10, 32),
    "image_folder": (write_folder, [0, 0, 0, 1, 1, 1], [0, 0, 1, 1], 2, 24),
    "IMNET": (write_folder, [0, 0, 0, 1, 1, 1], [0, 0, 1, 1], 2, 24),
}


@pytest.fixture(autouse=True)
def _no_checksums(monkeypatch):
    monkeypatch.setattr(torchvision.datasets.utils, "check_md5", lambda path, md5, **_: True)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("train", [True, False])
def test_set_gives_its_images_and_labels(name, train, tmp_path):
    write, train_labels, eval_labels, classes, size = FORMATS[name]
    write(tmp_path)
    images = datasets.load_images(name, str(tmp_path), train)
    labels = train_labels if train else eval_labels
    assert images.classes == classes
    assert len(images) == len(labels)
    assert images.targets().tolist() == labels
    assert images.targets().dtype == np.int64
    for index, label in enumerate(labels):
        image, target = images[index]
        assert (image.mode, image.size, target) == ("RGB", (size, size), label)
        assert np.abs(np.asarray(image, int) - colour(label)).max() <= 4  # JPEG's rounding


@pytest.mark.parametrize("name", FORMATS)
def test_complete_copy_is_read_without_network_when_download_is_on(name, tmp_path, no_network):
    FORMATS[name][0](tmp_path)
    assert len(datasets.load_images(name, str(tmp_path), True, download=True)) == len(FORMATS[name][1])


@pytest.mark.parametrize(("name", "folder"), [("fashion_mnist", "FashionMNIST"), ("torch/mnist", "MNIST")])
def test_grey_sets_become_rgb(name, folder, tmp_path):
    write_fashion_mnist(tmp_path, folder)
    for train, labels in ((True, [3, 0, 9, 1]), (False, [7, 2])):
        images = datasets.load_images(name, str(tmp_path), train)
        assert (images.classes, images.targets().tolist()) == (10, labels)
        image, label = images[0]
        assert (image.mode, image.size, label) == ("RGB", (28, 28), labels[0])
        assert np.unique(np.asarray(image)).tolist() == [10 * labels[0]]


def test_eurosat_is_split_80_to_20_without_overlap(tmp_path):
    write_eurosat(tmp_path)
    train, val = (datasets.load_images("eurosat", str(tmp_path), part) for part in (True, False))
    assert (len(train), len(val), train.classes) == (16, 4, 2)
    paths = {images.describe(index) for images in (train, val) for index in range(len(images))}
    assert len(paths) == 20
    image, label = val[3]
    assert label == ("Forest" in val.describe(3))
    assert np.abs(np.asarray(image, int) - colour(label)).max() <= 4


def test_digits_are_split_1437_to_360_and_scaled_to_255():
    train, val = (datasets.load_images("digits", "", part) for part in (True, False))
    assert (len(train), len(val), train.classes, val.classes) == (1437, 360, 10, 10)
    image, label = train[0]
    assert (image.mode, image.size, label) == ("RGB", (8, 8), train.targets()[0])
    assert max(np.asarray(train[index][0]).max() for index in range(20)) == 255  # 16 of 16
    numbers = {images.describe(index) for images in (train, val) for index in range(len(images))}
    assert len(numbers) == 1797


def test_fixed_split_stays_what_it_is():
    # A pin, not a derived value: with another split no figure on digits or EuroSAT could be compared with older ones.
    val = datasets.load_images("digits", "", False)
    assert [val.describe(index) for index in range(6)] == [f"image {n} of digits" for n in (4, 6, 9, 18, 22, 32)]


def test_stl10_without_its_file_of_names_has_ten_classes(tmp_path):
    write_stl10(tmp_path)
    (tmp_path / "stl10_binary" / "class_names.txt").unlink()
    images = datasets.load_images("stl10", str(tmp_path), True)
    assert (images.classes, images.class_names) == (10, None)


@pytest.mark.parametrize("name", ["CIFAR10", "flowers", "fashion_mnist"])
def test_eval_data_path_replaces_the_evaluation_root(name, tmp_path):
    writer, labels = {**FORMATS, "fashion_mnist": (write_fashion_mnist, 0, [7, 2])}[name][0:3:2]
    writer(tmp_path)
    images = datasets.load_images(name, "/nowhere", False, eval_data_path=str(tmp_path))
    assert images.targets().tolist() == labels


def test_eval_data_path_of_folders_is_the_folder_of_classes(tmp_path):
    write_folder(tmp_path, {"train": 2, "other": 1})
    images = datasets.load_images("image_folder", str(tmp_path), False, eval_data_path=str(tmp_path / "other"))
    assert images.describe(1) == str(tmp_path / "other" / "dog" / "0.png")


def test_training_folder_may_be_the_data_path_itself_where_evaluation_has_its_own(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 1})
    paths = {"data_path": str(tmp_path / "a"), "eval_data_path": str(tmp_path / "b")}
    assert len(datasets.load_images("image_folder", train=True, **paths)) == 4
    assert len(datasets.load_images("image_folder", train=False, **paths)) == 2


def test_torch_names_go_through_timm(tmp_path):
    write_folder(tmp_path, {"train": 2, "val": 1})
    assert len(datasets.load_images("torch/image_folder", str(tmp_path), True)) == 4
    assert len(datasets.load_images("torch/image_folder", str(tmp_path), False, split="train")) == 4
    images = datasets.load_images("torch/image_folder", str(tmp_path), False)
    assert (images.class_names, images[1][1]) == (["cat", "dog"], 1)


def test_describe_gives_the_path_or_the_number_in_the_set(tmp_path):
    write_folder(tmp_path)
    write_cifar100(tmp_path)
    folder = datasets.load_images("image_folder", str(tmp_path), True)
    cifar = datasets.load_images("CIFAR100", str(tmp_path), True)
    assert folder.describe(4) == str(tmp_path / "train" / "dog" / "1.png")
    assert cifar.subset(np.array([3])).describe(0) == "image 3 of CIFAR100"


def write_parquet(folder, label_column="label", broken=()):
    """Five images, labels 0 to 4, in a table as Hugging Face's sets have them; of `broken` only 20 bytes are kept."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    encoded = []
    for label in range(5):
        stream = io.BytesIO()
        Image.fromarray(pixels(label, 16)).save(stream, "PNG")
        encoded.append({"bytes": stream.getvalue()[: 20 if label in broken else None], "path": None})
    features = {
        "image": {"_type": "Image"},
        label_column: {"names": ["a", "b", "c", "d", "e"], "_type": "ClassLabel"},
    }
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), (label_column, pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    table = pa.Table.from_pydict({"image": encoded, label_column: list(range(5))}, schema=schema)
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    pq.write_table(table.slice(0, 2), folder / "validation-00000-of-00001.parquet")


def test_hugging_face_set_decodes_in_this_process_and_in_workers(tmp_path):
    write_parquet(tmp_path / "set")
    ours = sys.modules["datasets"]
    train, val = (
        datasets.load_images(f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache"), part) for part in (True, False)
    )
    assert (len(train), len(val), train.class_names) == (5, 2, ["a", "b", "c", "d", "e"])
    assert train.targets().tolist() == [0, 1, 2, 3, 4]
    image, label = train[3]
    assert (image.mode, image.size, label, image.getpixel((0, 0))) == ("RGB", (16, 16), 3, colour(3))

    eye = eval_transform(16, mean=(0, 0, 0), std=(1, 1, 1))
    order, items = BatchSampler(range(5), 2, False), TransformedImages(train, eye)
    passes = [
        [
            (images.clone(), labels)
            for images, labels in WorkerBatches(items, order, (3, 16, 16), num_workers=count, pin_memory=False)
        ]
        for count in (0, 2)
    ]
    for (images0, labels0), (images2, labels2) in zip(*passes, strict=True):
        assert labels0.equal(labels2)
        assert images0.equal(images2)
    assert sys.modules["datasets"] is ours is datasets


def test_hugging_face_set_can_be_sent_to_a_spawned_worker(tmp_path):
    write_parquet(tmp_path / "set")
    images = datasets.load_images(f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache"), True)
    copied = pickle.loads(pickle.dumps(images))
    assert copied[4][1] == 4
    assert copied[4][0].getpixel((0, 0)) == colour(4)
    assert sys.modules["datasets"] is datasets


class Spy:
    """A reader that notes which module `import datasets` gives when it is read and when it is unpickled."""

    seen = ()

    def __getitem__(self, index):
        Spy.seen += (sys.modules["datasets"],)
        stream = io.BytesIO()
        Image.fromarray(pixels(0, 4)).save(stream, "PNG")
        return stream, 0

    def __setstate__(self, state):
        Spy.seen += (sys.modules["datasets"],)

    def __getstate__(self):
        return {"any": 1}


def test_import_datasets_gives_hugging_faces_package_while_a_row_is_read_or_unpickled(tmp_path):
    write_parquet(tmp_path / "set")
    datasets.load_images(f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache"), True)
    rows = pickle.loads(pickle.dumps(datasets._HuggingFaceRows(Spy())))
    rows[0]
    assert [hasattr(module, "load_dataset") for module in Spy.seen] == [True, True]
    assert sys.modules["datasets"] is datasets


def test_hugging_face_set_of_plain_image_files_is_read(tmp_path):
    write_folder(tmp_path / "set", {"train": 2, "validation": 1})
    for train, labels in ((True, [0, 0, 1, 1]), (False, [0, 1])):
        images = datasets.load_images(f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache"), train)
        assert (images.class_names, images.targets().tolist()) == (["cat", "dog"], labels)
        assert images[-1][0].getpixel((0, 0)) == colour(1)


def test_hugging_face_keys_and_splits_are_passed_on(tmp_path):
    write_parquet(tmp_path / "set", label_column="kind")
    name, cache = f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache")
    assert len(datasets.load_images(name, cache, False, split="train[:3]", target_key="kind", input_key="image")) == 3
    with pytest.raises(UserError, match="has no column label for --target_key; it has image, kind"):
        datasets.load_images(name, cache, True)
    with pytest.raises(UserError, match="has no column picture for --input_key") as error:
        datasets.load_images(name, cache, True, target_key="kind", input_key="picture")
    one_line(error)
    with pytest.raises(UserError, match="other"):
        datasets.load_images(name, cache, True, split="other", target_key="kind")
    with pytest.raises(UserError, match="column image for --target_key holds no class indices"):
        datasets.load_images(name, cache, True, target_key="image")


def test_broken_image_of_a_hugging_face_set_is_named_and_not_replaced_by_its_neighbour(tmp_path):
    write_parquet(tmp_path / "set", broken=[2])
    images = datasets.load_images(f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache"), True)
    with pytest.raises(BadImage, match="image 2 of hfds/"):
        images[2]


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", [*(n for n in FORMATS if n not in ("IMNET", "image_folder")), "fashion_mnist"])
def test_missing_set_without_network_is_one_line_with_the_path(name, tmp_path, no_network):
    for download in (False, True):
        with pytest.raises(UserError) as error:
            datasets.load_images(name, str(tmp_path), True, download=download)
        message = one_line(error)
        assert all(part in message for part in (name, str(tmp_path), "INSTALL.md"))


def test_eurosat_missing_is_one_line(tmp_path, no_network):
    with pytest.raises(UserError, match=r"eurosat.*INSTALL\.md") as error:
        datasets.load_images("eurosat", str(tmp_path), True, download=True)
    one_line(error)


@pytest.mark.parametrize("name", ["IMNET", "image_folder"])
@pytest.mark.parametrize(
    ("made", "train", "missing"), [("", True, ""), ("val", True, "train"), ("train", False, "val")]
)
def test_missing_folder_is_named_with_the_layout(name, made, train, missing, tmp_path):
    root = tmp_path / "images"
    if made:
        write_folder(root, {made: 1})
    with pytest.raises(UserError, match="train/CLASS/IMAGE") as error:
        datasets.load_images(name, str(root), train)
    assert f"no folder {root / missing};" in one_line(error)


def test_folder_without_classes_or_images_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="class folder") as error:
        datasets.load_images("image_folder", str(tmp_path), True)
    assert str(tmp_path / "train") in one_line(error)
    write_folder(tmp_path, {"train": 1})
    (tmp_path / "train" / "bird").mkdir()
    with pytest.raises(UserError, match=r"bird.*train/CLASS/IMAGE") as error:
        datasets.load_images("image_folder", str(tmp_path), True)
    one_line(error)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("svhn", "scipy", "scipy"), ("digits", "sklearn", "scikit-learn"), ("hfds/x", "datasets", "datasets")],
)
def test_missing_package_is_named_with_the_command(name, module, package, tmp_path, monkeypatch):
    write_svhn(tmp_path)
    for loaded in [key for key in sys.modules if key == module or key.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    if module == "datasets":  # ours has to stay; without entries on the path Hugging Face's cannot be found
        monkeypatch.setitem(sys.modules, "datasets", datasets)
        monkeypatch.setattr(datasets, "_huggingface_module", {})
        monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    else:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"{name} needs the Python package {package}: pip install {package}"):
        datasets.load_images(name, str(tmp_path), True)


@pytest.mark.parametrize("name", ["wds/x", "tfds/x", "hfids/x"])
def test_streams_are_refused_with_the_reason(name):
    with pytest.raises(UserError, match=rf"{name} is a stream.*map-style"):
        datasets.load_images(name, "", True)


@pytest.mark.parametrize("name", ["cifar", "torch/nothing"])
def test_unknown_set_is_named(name, tmp_path):
    with pytest.raises(UserError, match=name) as error:
        datasets.load_images(name, str(tmp_path), True)
    one_line(error)


def test_label_outside_the_classes_is_named(tmp_path):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": cifar_rows([0, 1]), "labels": [0, 10]}))
    with pytest.raises(UserError, match="image 1 of CIFAR10 has label 10, outside 0 to 9"):
        datasets.load_images("CIFAR10", str(tmp_path), True)


def test_different_classes_in_training_and_evaluation_are_named(tmp_path):
    write_folder(tmp_path)
    write_image(tmp_path / "train" / "bird" / "0.png", 2)
    write_image(tmp_path / "val" / "fish" / "0.png", 2)
    train, val = (datasets.load_images("image_folder", str(tmp_path), part) for part in (True, False))
    with pytest.raises(UserError, match="only in training: bird; only in evaluation: fish"):
        datasets.check_same_classes(train, val)
    datasets.check_same_classes(train, train)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "missing"])
def test_broken_image_is_named_on_one_line(damage, tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "train" / "dog" / "1.png"
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    images = datasets.load_images("image_folder", str(tmp_path), True)
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"<html>\nnot found"}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    with pytest.raises(BadImage) as error:
        images[4]
    assert str(path) in one_line(error)
    assert isinstance(error.value, UserError)


def test_broken_image_in_a_worker_is_the_same_one_line(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "train" / "dog" / "1.png"
    images = datasets.load_images("image_folder", str(tmp_path), True)
    path.write_bytes(b"")
    with pytest.raises(BadImage) as here:
        images[4]
    eye = eval_transform(16, mean=(0, 0, 0), std=(1, 1, 1))
    items, order = TransformedImages(images, eye), BatchSampler(range(len(images)), 3, False)
    batches = WorkerBatches(items, order, (3, 16, 16), num_workers=1, pin_memory=False)
    with pytest.raises(BadImage) as there:
        list(batches)
    assert one_line(there) == str(here.value)
