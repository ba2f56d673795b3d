"""Writers of tiny data sets, a few images each, in the format that each set has on disk."""

import io
import json
import pickle
import struct

import numpy as np
from PIL import Image
from scipy.io import savemat


def colour(label):
    """A colour for each label of up to 102 classes, its channels all different."""
    return 20 + 2 * label, 250 - 2 * label, 128


def pixels(label, size):
    """A flat picture of the label's colour, uint8 [size, size, 3]."""
    return np.full((size, size, 3), colour(label), dtype=np.uint8)


def made(path):
    """Create the folders above `path`; return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_image(path, label, size=24):
    Image.fromarray(pixels(label, size)).save(made(path))


def write_text(path, lines):
    made(path).write_text("\n".join(lines) + "\n")


def write_cifar(folder, batches, label_key, meta, name_key, classes):
    for file, labels in batches.items():
        rows = np.stack([pixels(label, 32).transpose(2, 0, 1).reshape(-1) for label in labels])
        made(folder / file).write_bytes(pickle.dumps({"data": rows, label_key: labels}))
    (folder / meta).write_bytes(pickle.dumps({name_key: [f"class{n}" for n in range(classes)]}))


def write_cifar10(root):
    batches = {f"data_batch_{n}": [n, n + 1] for n in range(1, 6)} | {"test_batch": [9, 0, 3]}
    write_cifar(root / "cifar-10-batches-py", batches, "labels", "batches.meta", "label_names", 10)


def write_cifar100(root):
    batches = {"train": [0, 99, 42, 7], "test": [5, 98]}
    write_cifar(root / "cifar-100-python", batches, "fine_labels", "meta", "fine_label_names", 100)


def write_flowers(root):
    labels = np.array([77, 1, 102, 50, 13, 2])  # of images 1 to 6, counted from 1
    for number, label in enumerate(labels, 1):
        write_image(root / "flowers-102" / "jpg" / f"image_{number:05d}.jpg", label - 1)
    savemat(root / "flowers-102" / "imagelabels.mat", {"labels": labels[None]})
    savemat(root / "flowers-102" / "setid.mat", {"trnid": [[4, 1]], "valid": [[2, 6]], "tstid": [[3, 5]]})


def write_pets(root):
    lines = {"trainval": ["Abyssinian_1 1 1 1", "yorkshire_terrier_12 37 2 25"], "test": ["american_bulldog_3 2 2 1"]}
    for part, rows in lines.items():
        write_text(root / "oxford-iiit-pet" / "annotations" / f"{part}.txt", rows)
        for name, label, _, _ in map(str.split, rows):
            write_image(root / "oxford-iiit-pet" / "images" / f"{name}.jpg", int(label) - 1)


def write_stl10(root):
    folder = root / "stl10_binary"
    write_text(folder / "class_names.txt", [f"thing{n}" for n in range(10)])
    for part, labels in {"train": [0, 9, 4], "test": [2, 1]}.items():
        planes = [pixels(label, 96).transpose(2, 1, 0) for label in labels]  # column by column
        np.stack(planes).tofile(folder / f"{part}_X.bin")
        (np.array(labels, dtype=np.uint8) + 1).tofile(folder / f"{part}_y.bin")
    (folder / "unlabeled_X.bin").touch()


def write_food101(root):
    listing = {"train": {"beignets": [7], "apple_pie": [1, 2]}, "test": {"apple_pie": [3], "beignets": [8]}}
    for part, classes in listing.items():
        files = {name: [f"{name}/{number}" for number in numbers] for name, numbers in classes.items()}
        write_text(root / "food-101" / "meta" / f"{part}.json", [json.dumps(files)])
        for label, name in enumerate(("apple_pie", "beignets")):
            for file in files[name]:
                write_image(root / "food-101" / "images" / f"{file}.jpg", label)


def write_dtd(root):
    for number, part in enumerate(("train", "val", "test")):
        names = [f"{texture}/{texture}_{number:04d}.jpg" for texture in ("banded", "woven")]
        write_text(root / "dtd" / "dtd" / "labels" / f"{part}1.txt", names)
        for label, name in enumerate(names):
            write_image(root / "dtd" / "dtd" / "images" / name, label)


def write_svhn(root):
    for part, labels in {"train": [1, 0, 9], "test": [0, 5]}.items():
        stack = np.stack([pixels(label, 32) for label in labels], axis=-1)  # [32, 32, 3, N]
        marks = np.array([[label or 10] for label in labels], dtype=np.uint8)  # a 0 is written as 10
        savemat(root / f"{part}_32x32.mat", {"X": stack, "y": marks})


def write_idx(path, array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    made(path).write_bytes(header + array.tobytes())


def write_fashion_mnist(root, folder="FashionMNIST"):
    for part, labels in {"train": [3, 0, 9, 1], "t10k": [7, 2]}.items():
        grey = np.stack([np.full((28, 28), 10 * label, dtype=np.uint8) for label in labels])
        write_idx(root / folder / "raw" / f"{part}-images-idx3-ubyte", grey)
        write_idx(root / folder / "raw" / f"{part}-labels-idx1-ubyte", np.array(labels, dtype=np.uint8))


def write_folder(root, counts=(("train", 3), ("val", 2)), classes=("cat", "dog")):
    for part, count in dict(counts).items():
        for label, name in enumerate(classes):
            for number in range(count):
                write_image(root / part / name / f"{number}.png", label)


def write_parquet(folder, label_column="label", broken=(), contents=()):
    """Five images, labels 0 to 4, in a table as Hugging Face's sets have them.

    Of `broken` only 20 bytes are kept; `contents` replaces the first files.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    streams = [io.BytesIO() for label in range(5)]
    for label, stream in enumerate(streams):
        Image.fromarray(pixels(label, 16)).save(stream, "PNG")
        stream.truncate(20 if label in broken else None)
    files = [*contents, *(stream.getvalue() for stream in streams[len(contents) :])]
    encoded = [{"bytes": content, "path": None} for content in files]
    labels = {"names": ["a", "b", "c", "d", "e"], "_type": "ClassLabel"}
    info = {"info": {"features": {"image": {"_type": "Image"}, label_column: labels}}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), (label_column, pa.int64())], metadata={"huggingface": json.dumps(info)})
    table = pa.Table.from_pydict({"image": encoded, label_column: list(range(5))}, schema=schema)
    pq.write_table(table, made(folder / "train-00000-of-00001.parquet"))
    pq.write_table(table.slice(0, 2), folder / "validation-00000-of-00001.parquet")


def write_eurosat(root):
    write_folder(root / "eurosat", {"2750": 10}, ("AnnualCrop", "Forest"))


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
