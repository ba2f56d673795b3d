"""Weight files for tests: write them in every format, damage them, repack them, expect a refusal."""

import zipfile

import pytest
import safetensors.torch
import torch

from bench.fuzz_samples import save_index
from utils import UserError
from weightfiles.lazy import open_weights
from weightfiles.read import read_file

TENSORS = {
    "norm.weight": torch.arange(6.0),
    "norm.bias": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "head.weight": torch.arange(1000.0, 1040.0).reshape(5, 8),
    "step": torch.tensor(7),
    "mask": torch.tensor([True, False, True]),
}


def save(path, tensors=TENSORS):
    """Write `tensors` in the format of the file's suffix."""
    if path.name.endswith(".index.json"):
        save_index(tensors, path)
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        nested = {"state_dict": tensors, "epoch": 3, "optimizer": {"moments": [torch.ones(6), torch.zeros(6)]}}
        content = nested if path.stem == "nested" else tensors
        torch.save(content, path, _use_new_zipfile_serialization=path.stem != "old")
    return path


def flip(path, tensor):
    """Change one bit of a tensor's values in its file."""
    content = bytearray(path.read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)


def repack(path, compression=zipfile.ZIP_STORED, change=lambda name, content: content, more=()):
    """Rewrite an archive's entries with another writer than torch's."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in [*entries, *more]:
            archive.writestr(name, change(name, content))


def assert_equal(weights, tensors):
    assert weights.keys() == tensors.keys()
    assert weights.shapes == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        assert weights[key].dtype == tensor.dtype and torch.equal(weights[key], tensor), key


def assert_refused(path, message, readers=(read_file, open_weights)):
    """Check that both readers refuse with one line that names the file and does not advise unsafe loading; return the lines."""
    lines = []
    for read in readers:
        with pytest.raises(UserError, match=message) as caught:
            dict(read(path))
        lines.append(str(caught.value))
        assert path.name in lines[-1] and lines[-1].isprintable()
        assert "weights_only" not in lines[-1].partition("; if you trust the file, ")[0]
    return lines
