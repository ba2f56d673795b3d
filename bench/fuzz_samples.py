"""Intact files of every kind for bench.fuzz, the project's readers of each, and the plain library's."""

import itertools
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch

import models
import weight_selection
from training import checkpoint
from weightfiles import initialization, lazy

NAME = "vit_tiny_patch16_224"
TEACHER = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 4, "num_classes": 5}
STUDENT = {**TEACHER, "embed_dim": 12, "depth": 2, "num_heads": 3}
MODELS = [models.create(NAME, kwargs) for kwargs in (TEACHER, STUDENT)]
PAIR = [models.ModelSpec(NAME, kwargs) for kwargs in (TEACHER, STUDENT)]
Tensors = Mapping[str, torch.Tensor]


class Sample(NamedTuple):
    """An intact file, the one that the user names first, with the files that belong to it, and who reads it."""

    files: dict[str, bytes]
    readers: list[Callable[[Path], Tensors]]
    reference: Callable[[Path], Tensors]  # the plain library
    intact: Tensors | None = None  # what it holds, if its checksums promise that


def initialize(path: Path) -> Tensors:
    """As main.py takes `--initialize`: read, then copied into a model, whose head may have other classes."""
    model = MODELS[path.stem == "vit"]
    tensors, source = initialization.read_initialization(str(path), model, NAME)
    json.dumps(source)  # it goes into config.json
    models.inherit(model, tensors, f"--initialize {path} does not fit --model {NAME}")
    return tensors


def select(path: Path) -> Tensors:
    """As weight_selection.py takes `--pretrained_path`."""
    tensors, _ = weight_selection.select_weights(*PAIR, pretrained_path=str(path))
    assert all(tensor.isfinite().all() for tensor in tensors.values()), "a value is not finite"
    return tensors


def read_checkpoint(path: Path) -> Tensors:
    return flat(checkpoint.read_checkpoint(path))


def flat(value: object, name: str = "") -> Tensors:
    """The tensors in a training state by their places; all other values become a part of a name."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if not isinstance(value, dict | list | tuple):
        return {f"{name}={value!r}": torch.zeros(0)}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return dict(itertools.chain.from_iterable(flat(each, f"{name}/{key}").items() for key, each in items))


# ---- the plain library's readers ----


def torch_load(path: Path) -> Tensors:
    """The tensors under strings, of the first of the parts that open_weights looks for."""
    tensors = nested(torch.load(path, map_location="cpu", weights_only=True))
    starts = [start for start in ("model.", "module.", "state_dict.") if any(key.startswith(start) for key in tensors)]
    start = [*starts, ""][0]
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def nested(value: object, name: str = "") -> Tensors:
    """The tensors in nested mappings under strings, by the path of these."""
    if isinstance(value, torch.Tensor):
        return {name[1:]: value}
    items = value.items() if isinstance(value, Mapping) else ()
    inner = [nested(each, f"{name}.{key}") for key, each in items if isinstance(key, str)]
    return dict(itertools.chain.from_iterable(each.items() for each in inner))


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


def arrays() -> dict[str, np.ndarray]:
    """Random values in the arrays of a ViT's first release."""
    width, random = TEACHER["embed_dim"], np.random.default_rng(0)
    layers, norms = {"embedding": (4, 4, 3, width), "head": (width, 5)}, ["Transformer/encoder_norm"]
    for block in (f"Transformer/encoderblock_{number}" for number in range(TEACHER["depth"])):
        attention = [f"{block}/MultiHeadDotProductAttention_1/{name}" for name in ("query", "key", "value", "out")]
        layers |= dict.fromkeys(attention, (width, width))
        layers |= {f"{block}/MlpBlock_3/Dense_0": (width, 4 * width), f"{block}/MlpBlock_3/Dense_1": (4 * width, width)}
        norms += [f"{block}/LayerNorm_0", f"{block}/LayerNorm_2"]
    shapes = {"cls": (1, 1, width), "Transformer/posembed_input/pos_embedding": (1, 17, width)}
    shapes |= {f"{name}/kernel": shape for name, shape in layers.items()}
    shapes |= {f"{name}/bias": shape[-1:] for name, shape in layers.items()}
    shapes |= {f"{name}/{part}": (width,) for name in norms for part in ("scale", "bias")}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def save_old(tensors: Tensors, path: Path) -> None:
    """Write torch's old format with one storage, named by a number, not its address, so that a mutant can be repeated."""
    values = torch.cat([tensor.flatten() for tensor in tensors.values()])
    parts = values.split([tensor.numel() for tensor in tensors.values()])
    views = {key: part.view(tensor.shape) for (key, tensor), part in zip(tensors.items(), parts, strict=True)}
    torch.save(views, path, _use_new_zipfile_serialization=False)
    address = str(values.untyped_storage()._cdata).encode()
    path.write_bytes(path.read_bytes().replace(address, b"7" * len(address)))


def save_index(tensors: Tensors, path: Path) -> None:
    """Write the tensors to two `.safetensors` files, in turns, and the index of these."""
    files = {key: f"model-{1 + number % 2:05}-of-00002.safetensors" for number, key in enumerate(tensors)}
    for name in dict.fromkeys(files.values()):
        safetensors.torch.save_file({key: tensors[key] for key in tensors if files[key] == name}, path.with_name(name))
    path.write_text(json.dumps({"metadata": {}, "weight_map": files}))


def make_samples(folder: Path) -> dict[str, Sample]:
    """An intact file of each kind; `folder` is for the writers."""
    random = torch.Generator().manual_seed(0)
    own = [model.state_dict().items() for model in MODELS]
    teacher, student = ({key: torch.randn(value.shape, generator=random) for key, value in items} for items in own)
    _, description = weight_selection.select_weights(*PAIR, plan_only=True)
    state = {name: kind() for name, kind in checkpoint.STATE.items()} | checkpoint.NEWER
    moments = {"step": torch.ones(()), "exp_avg": student["pos_embed"] / 2}
    state |= {"model": student, "optimizer": {"state": {0: moments}, "param_groups": [{"betas": (0.9, 0.999)}]}}
    state |= {"metrics": {"train_loss": 2.5}, "bad_images": [3, 17], "options": {"model": NAME, "lr": 1e-3, "aa": None}}

    def written(name: str, write: Callable[[Path], object]) -> dict[str, bytes]:
        """The files that `write` makes, the named one first."""
        path = Path(tempfile.mkdtemp(dir=folder)) / name
        write(path)
        return {file.name: file.read_bytes() for file in (path, *sorted(path.parent.iterdir()))}

    foreign = [initialize, lazy.open_weights, select]
    wrapped = {"model": teacher, "epoch": 3, "optimizer": {"moments": [torch.ones(6), torch.zeros(6)]}}
    pth = written("w.pth", lambda path: torch.save(wrapped, path))
    old = written("o.pt", lambda path: save_old(teacher, path))
    plain = written("w.safetensors", lambda path: safetensors.torch.save_file(teacher, path))
    index = written("model.safetensors.index.json", lambda path: save_index(teacher, path))
    pair = written("vit.pth", lambda path: initialization.write_initialization(path, student, description))
    saved = written("checkpoint-3.pth", lambda path: path.write_bytes(checkpoint.to_bytes(state)))
    npz = written("vit.npz", lambda path: np.savez(path, **arrays()))
    (folder / "vit.npz").write_bytes(npz["vit.npz"])
    whole_state = flat({"format": checkpoint.CHECKPOINT_FORMAT, **state})
    return {
        "initialization": Sample(pair, [initialize], lambda _: student, student),
        "checkpoint": Sample(saved, [read_checkpoint], load_state, whole_state),
        ".pth": Sample(pth, foreign, torch_load, teacher),
        ".pth, old": Sample(old, foreign, torch_load),
        ".safetensors": Sample(plain, foreign, safetensors.torch.load_file),
        ".npz": Sample(npz, [select], load_arrays, load_arrays(folder / "vit.npz")),
        "index": Sample(index, [lazy.open_weights, select], load_index),
    }
