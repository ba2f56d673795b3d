"""Intact files of every kind for bench.fuzz, the project's readers of each, and the plain library's."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from timm.models import vision_transformer

import models
import weight_selection
from bench import mutations
from training import checkpoint
from utils import UserError
from weightfiles import lazy, read
from weightfiles.initialization import read_initialization, write_initialization

NAME = "vit_tiny_patch16_224"
TEACHER = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 4, "num_classes": 5}
STUDENT = {**TEACHER, "embed_dim": 12, "depth": 2, "num_heads": 3}
MODELS = [models.create(NAME, kwargs) for kwargs in (TEACHER, STUDENT)]
PAIR = [models.ModelSpec(NAME, kwargs) for kwargs in (TEACHER, STUDENT)]

Tensors = dict[str, torch.Tensor]


class Reader(NamedTuple):
    """One of the project's readers, and what it must find if the file holds the given tensors."""

    name: str
    read: Callable[[Path], Tensors]
    expected: Callable[[Tensors], Tensors] = lambda tensors: tensors


class Sample(NamedTuple):
    """An intact file, the one that the user names first, with the files that belong to it."""

    files: dict[str, bytes]
    readers: list[Reader]
    reference: Callable[[Path], Tensors]  # the plain library
    intact: Tensors | None = None  # what it holds, if its checksums promise that


# ---- the project's readers ----


def by_read_weights(path: Path) -> Tensors:
    return read.read_weights(path)


def by_open_weights(path: Path) -> Tensors:
    return dict(lazy.open_weights(path))


def by_initialize(path: Path) -> Tensors:
    """As main.py takes `--initialize`: read, then copied into a model, whose head may have other classes."""
    tensors, source = read_initialization(str(path), "vit")
    json.dumps(source)  # it goes into config.json and every checkpoint
    torch.save(source, io.BytesIO())
    if source["family"] not in (None, "vit"):
        raise UserError(f"--initialize {path} is of another family")
    width = tensors["norm.weight"].shape if "norm.weight" in tensors else ()
    model = MODELS[width == (STUDENT["embed_dim"],)]
    models.inherit(model, tensors, f"--initialize {path} does not fit --model {NAME}")
    for key, value in model.state_dict().items():
        same = key not in tensors or key.startswith("head.") or torch.equal(value, tensors[key].to(value.dtype))
        assert same and value.isfinite().all(), f"the model did not get the values of {key}"
    return tensors


def by_selection(path: Path) -> Tensors:
    """As weight_selection.py takes `--pretrained_path`."""
    tensors, _ = weight_selection.select_weights(*PAIR, pretrained_path=str(path))
    assert all(tensor.isfinite().all() for tensor in tensors.values()), "a value is not finite"
    return tensors


def by_read_checkpoint(path: Path) -> Tensors:
    return flat(checkpoint.read_checkpoint(path))


def selected(tensors: Tensors) -> Tensors:
    """The student's tensors by the paper's rule, after timm has converted a file of another layout."""
    teacher, student = MODELS
    own = {key: value for key, value in teacher.state_dict().items() if not key.startswith("head.")}
    if any(key not in tensors or tensors[key].shape != value.shape for key, value in own.items()):
        tensors = vision_transformer.checkpoint_filter_fn(tensors, teacher)
    found = {}
    for key, value in student.state_dict().items():
        if not key.startswith("head."):
            found[key] = tensors[key]
            for axis, size in enumerate(value.shape):
                had = found[key].shape[axis]
                places = (
                    torch.arange(0, had, had // size) if had % size == 0 else torch.linspace(0, had - 1, size).round()
                )
                found[key] = found[key].index_select(axis, places.long())
    return found


READ = Reader("read_weights", by_read_weights)
OPEN = Reader("open_weights", by_open_weights)
SELECT = Reader("weight_selection", by_selection, selected)
INITIALIZE = Reader("read_initialization", by_initialize)
FOREIGN = [INITIALIZE, READ, OPEN, SELECT]


# ---- the plain library's ----


def flat(value: object, name: str = "") -> Tensors:
    """The tensors in a training state by their places; all other values become a part of a name."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict):
        inner = [flat(each, f"{name}/{key}") for key, each in value.items()]
    elif isinstance(value, list | tuple):
        inner = [flat(each, f"{name}/{number}") for number, each in enumerate(value)]
    else:
        return {f"{name}={value!r}": torch.zeros(0)}
    return {key: each for part in inner for key, each in part.items()}


def torch_load(path: Path) -> Tensors:
    content = torch.load(path, map_location="cpu", weights_only=True)
    return next(
        (content[key] for key in ("model", "module", "state_dict") if isinstance(content.get(key), dict)), content
    )


def load_state(path: Path) -> Tensors:
    return flat(checkpoint.NEWER | torch.load(path, map_location="cpu", weights_only=True))


def load_index(path: Path) -> Tensors:
    files = json.loads(path.read_bytes())["weight_map"]
    return {key: safetensors.torch.load_file(path.with_name(name))[key] for key, name in files.items()}


def load_arrays(path: Path) -> Tensors:
    model = models.create(NAME, TEACHER)
    model.load_pretrained(path)
    return model.state_dict()


# ---- intact files ----


def values(model: torch.nn.Module, generator: torch.Generator) -> Tensors:
    return {key: torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()}


def arrays() -> dict[str, np.ndarray]:
    """Random values in the arrays of a ViT's first release."""
    width, heads, patch, random = (
        TEACHER["embed_dim"],
        TEACHER["num_heads"],
        TEACHER["patch_size"],
        np.random.default_rng(0),
    )
    shapes = {"cls": (1, 1, width), "Transformer/posembed_input/pos_embedding": (1, 17, width)}
    layers = {"embedding": (patch, patch, 3, width), "head": (width, 5)}
    norms = ["Transformer/encoder_norm"]
    for block in (f"Transformer/encoderblock_{number}" for number in range(TEACHER["depth"])):
        attention = f"{block}/MultiHeadDotProductAttention_1"
        layers |= {f"{attention}/{name}": (width, heads, width // heads) for name in ("query", "key", "value")}
        layers |= {f"{attention}/out": (heads, width // heads, width)}
        layers |= {f"{block}/MlpBlock_3/Dense_0": (width, 4 * width), f"{block}/MlpBlock_3/Dense_1": (4 * width, width)}
        norms += [f"{block}/LayerNorm_0", f"{block}/LayerNorm_2"]
    shapes |= {f"{name}/kernel": shape for name, shape in layers.items()}
    shapes |= {
        f"{name}/bias": shape[-2:] if len(shape) == 3 and shape[0] == width else shape[-1:]
        for name, shape in layers.items()
    }
    shapes |= {f"{name}/{part}": (width,) for name in norms for part in ("scale", "bias")}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def save_old(tensors: Tensors, path: Path) -> None:
    """Write torch's old format with storages named by number instead of address, so that a mutant can be repeated."""
    empty = sorted((torch.empty(0) for _ in tensors), key=lambda tensor: str(tensor.untyped_storage()._cdata))
    copies = {
        key: each.resize_(value.shape).copy_(value) for (key, value), each in zip(tensors.items(), empty, strict=True)
    }
    torch.save(copies, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for number, tensor in enumerate(empty):
        address = str(tensor.untyped_storage()._cdata)
        content = content.replace(address.encode(), str(number).zfill(len(address)).encode())
    path.write_bytes(content)


def save_index(tensors: Tensors, path: Path) -> None:
    names = list(tensors)
    parts = {f"model-{part + 1:05}-of-00002.safetensors": names[part::2] for part in range(2)}
    for name, keys in parts.items():
        safetensors.torch.save_file({key: tensors[key] for key in keys}, path.with_name(name))
    files = {key: name for name, keys in parts.items() for key in keys}
    path.write_text(json.dumps({"metadata": {}, "weight_map": files}))


def training_state(tensors: Tensors) -> dict:
    """A training state as main.py saves it, after one step of AdamW."""
    model = models.create(NAME, STUDENT)
    model.load_state_dict(tensors)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999))
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return {
        **{name: kind() for name, kind in checkpoint.STATE.items()},
        **checkpoint.NEWER,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "metrics": {"train_loss": 2.5},
        "bad_images": [3, 17],
        "options": {"model": NAME, "lr": 1e-3, "aa": None},
    }


def make_samples(folder: Path) -> dict[str, Sample]:
    """An intact file of each kind; `folder` is for the writers, and empty again afterwards."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (values(model, generator) for model in MODELS)
    _, description = weight_selection.select_weights(*PAIR, plan_only=True)
    state = training_state(student)
    nested = {"state_dict": teacher, "epoch": 3, "optimizer": {"moments": [torch.ones(6), torch.zeros(6)]}}

    def written(name: str, write: Callable[[Path], object]) -> dict[str, bytes]:
        """The files that `write` makes, the named one first."""
        write(folder / name)
        found = {path.name: path.read_bytes() for path in sorted(folder.iterdir(), key=lambda path: path.name != name)}
        for made in found:
            (folder / made).unlink()
        return found

    def initialization(name: str) -> Sample:
        files = written(name, lambda path: write_initialization(path, student, description))
        return Sample(files, [INITIALIZE], lambda path: student)

    pth = written("w.pth", lambda path: torch.save(teacher, path))
    nested_bin = written("w.bin", lambda path: torch.save(nested, path))
    saved = written("checkpoint-3.pth", lambda path: checkpoint.save_checkpoint(path, state))
    whole = flat({"format": checkpoint.CHECKPOINT_FORMAT, **state})
    plain = written("w.safetensors", lambda path: safetensors.torch.save_file(teacher, path))
    npz = written("vit.npz", lambda path: np.savez(path, **arrays()))
    mutations.write(npz, folder)
    intact_arrays = load_arrays(folder / "vit.npz")
    (folder / "vit.npz").unlink()
    index = written("model.safetensors.index.json", lambda path: save_index(teacher, path))
    return {
        "initialization .pth": initialization("vit.pth"),
        "initialization .safetensors": initialization("vit.safetensors"),
        "checkpoint": Sample(saved, [Reader("read_checkpoint", by_read_checkpoint)], load_state, whole),
        ".pth": Sample(pth, FOREIGN, torch_load, teacher),
        ".bin, nested": Sample(nested_bin, FOREIGN[1:], torch_load, teacher),
        ".pth, old": Sample(written("o.pth", lambda path: save_old(teacher, path)), FOREIGN, torch_load),
        ".safetensors": Sample(plain, FOREIGN, safetensors.torch.load_file),
        ".npz": Sample(npz, [SELECT], load_arrays, intact_arrays),
        "index": Sample(index, [OPEN, SELECT], load_index),
    }
