"""Make the demo's subset of Fashion-MNIST: 12,000 training and 2,000 test images, equally many of each class.

    python demo/make_subset.py FOLDER [--output_dir demo/data]

FOLDER is torchvision's folder of the whole set, which is downloaded if needed. The subset keeps its file names and format.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

PER_CLASS = {"train": 1200, "t10k": 200}
SEED = 20240507


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
    parser.add_argument("folder", type=Path, help="folder of FashionMNIST/raw/")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "data")
    options = parser.parse_args()
    raw = options.output_dir / "FashionMNIST" / "raw"  # where torchvision looks, below the data folder
    raw.mkdir(parents=True, exist_ok=True)
    for split, per_class in PER_CLASS.items():
        whole = FashionMNIST(options.folder, train=split == "train", download=True)
        labels, images = whole.targets.numpy().astype(np.uint8), whole.data.numpy()
        kept = pick(labels, per_class, SEED)
        write_idx(raw / f"{split}-labels-idx1-ubyte.gz", labels[kept])
        write_idx(raw / f"{split}-images-idx3-ubyte.gz", images[kept])
        print(f"{split}: {len(kept)} of {len(labels)} images")


if __name__ == "__main__":
    main()
