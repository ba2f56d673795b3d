"""Make the demo's subset of Fashion-MNIST: 12,000 training and 2,000 test images, equally many of each class.

    python demo/make_subset.py FOLDER [--output_dir demo/data]

FOLDER holds the four files of the whole set (train-images-idx3-ubyte.gz, ...). The subset keeps their names and format.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

PER_CLASS = {"train": 1200, "t10k": 200}
SEED = 20240507


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of bytes as uint8 [items, ...]; ValueError if it is another file."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: not an idx file of bytes (starts with {raw[:4].hex()}, expected 000008..)")
    shape = np.frombuffer(raw, ">i4", dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write uint8 `array` as a gzipped idx file whose bytes depend only on the array and zlib."""
    header = b"\x00\x00\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0))


def pick(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Return the indices of `per_class` random items of each class, in the order of the whole set; int64, ascending."""
    random = np.random.RandomState(seed)  # numpy promises never to change its stream, unlike default_rng's
    chosen = [random.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(10)]
    return np.sort(np.concatenate(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the four .gz files of Fashion-MNIST")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "data")
    options = parser.parse_args()
    raw = options.output_dir / "FashionMNIST" / "raw"  # where torchvision looks, below the data folder
    raw.mkdir(parents=True, exist_ok=True)
    for split, per_class in PER_CLASS.items():
        labels = read_idx(options.folder / f"{split}-labels-idx1-ubyte.gz")
        images = read_idx(options.folder / f"{split}-images-idx3-ubyte.gz")
        kept = pick(labels, per_class, SEED)
        write_idx(raw / f"{split}-labels-idx1-ubyte.gz", labels[kept])
        write_idx(raw / f"{split}-images-idx3-ubyte.gz", images[kept])
        print(f"{split}: {len(kept)} of {len(labels)} images")


if __name__ == "__main__":
    main()
