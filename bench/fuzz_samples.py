"""Intact files of every kind for bench/fuzz.py, and the project's readers of each, whose tensors fuzz_reader.py's have to equal."""

import io
import json
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch

import models
import weight_selection
from bench.fuzz_pickles import text
from bench.fuzz_reader import NPZ, TEACHER, flat, read_index, read_npz, read_safetensors, read_state, read_torch
from selection.tensors import select
from training import checkpoint
from utils import UserError
from weightfiles import lazy as selection_read
from weightfiles import read
from weightfiles.initialization import read_initialization, write_initialization

NAME = "vit_tiny_patch16_224"
STUDENT = {**TEACHER, "embed_dim": 12, "depth": 2, "num_heads": 3}
MODELS = [models.create(NAME, kwargs) for kwargs in (TEACHER, STUDENT)]
PAIR = [models.ModelSpec(NAME, kwargs) for kwargs in (TEACHER, STUDENT)]

Files = dict[str, bytes]


class Sample(NamedTuple):
    """An intact file, the one that the user names first, with those that belong to it."""

    files: Files
    truth: Callable[[Path, bool], dict]  # the tensors of a mutant that loads; whether its checksums were written anew
    entries: dict[str, Callable]  # the project's readers: (path, truth) -> number of tensors, all compared


# ---- the project's readers ----


def compare(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> int:
    """The number of tensors, which have to be those of `truth` bit for bit."""
    assert found.keys() == truth.keys(), f"keys differ: {sorted(found.keys() ^ truth.keys())[:3]}"
    for key, tensor in found.items():
        other = truth[key]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), f"{key}: {tensor.dtype} {tensor.shape}"
        here, there = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (tensor, other))
        assert torch.equal(here, there), f"{key} has other values than the file"
    return len(found)


def check_finite(found: dict[str, torch.Tensor]) -> None:
    assert all(tensor.isfinite().all() for tensor in found.values()), "a value is not finite"


def by_read_weights(path: Path, truth: Callable) -> int:
    found = read.read_weights(path)
    return compare(found, truth())


def by_open_weights(path: Path, truth: Callable) -> int:
    found = dict(selection_read.open_weights(path))
    return compare(found, truth())


def by_initialize(path: Path, truth: Callable) -> int:
    """As main.py takes `--initialize`: read, then copied into a model, whose head may have other classes."""
    tensors, source = read_initialization(str(path), "vit")
    json.dumps(source)  # it goes into config.json and every checkpoint
    torch.save(source, io.BytesIO())
    if source["family"] not in (None, "vit"):
        raise UserError(f"--initialize {path} is of another family")
    width = tensors["norm.weight"].shape if "norm.weight" in tensors else ()
    model = MODELS[width == (STUDENT["embed_dim"],)]
    models.inherit(model, tensors, f"--initialize {path} does not fit --model {NAME}")
    check_finite(tensors)
    assert all(torch.equal(value, tensors[key].to(value.dtype)) for key, value in model.state_dict().items()
        if key in tensors and not key.startswith("head.")), "the model did not get the values"  # fmt: skip
    return compare(tensors, truth())


def by_selection(path: Path, truth: Callable) -> int:
    """As weight_selection.py takes `--pretrained_path`: planned, read where needed, cut to the student's shape."""
    tensors, _ = weight_selection.select_weights(*PAIR, pretrained_path=str(path))
    check_finite(tensors)
    teacher, student = MODELS
    known = truth()
    own = {key: value for key, value in teacher.state_dict().items() if not key.startswith("head.")}
    if any(key not in known or known[key].shape != value.shape for key, value in own.items()):
        known = models.FAMILIES["vit"].converter(known, teacher)
    plan = weight_selection.make_plan(teacher, student, weight_selection.PUBLISHED, include_head=False, weights=None)
    return compare(tensors, select(known, plan))


def by_read_checkpoint(path: Path, truth: Callable) -> int:
    return compare(flat(checkpoint.read_checkpoint(path)), truth())


# ---- intact files ----


def values(model: torch.nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {key: torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()}


def make_samples(folder: Path) -> dict[str, Sample]:
    """An intact file of each kind; `folder` is for the writers, and empty again after."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (values(model, generator) for model in MODELS)

    def written(write: Callable[[Path], object]) -> Files:
        write(folder)
        found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        for name in found:
            (folder / name).unlink()
        return found

    def pair(name: str) -> Files:
        made = written(lambda folder: write_initialization(folder / name, student, describe()))
        return {name: made.pop(name), **made}

    def index(folder: Path) -> None:
        names = list(teacher)
        parts = {f"model-{part + 1:05}-of-00002.safetensors": names[part::2] for part in range(2)}
        for name, keys in parts.items():
            safetensors.torch.save_file({key: teacher[key] for key in keys}, folder / name)
        files = {key: name for name, keys in parts.items() for key in keys}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))

    def arrays(folder: Path) -> None:
        chance = np.random.default_rng(0)
        np.savez(
            folder / "vit.npz", **{key: chance.normal(size=shape).astype(np.float32) for key, shape in NPZ.items()}
        )

    nested = {"state_dict": teacher, "epoch": 3, "optimizer": {"moments": [torch.ones(6), torch.zeros(6)]}}
    state = training_state(student)
    saved = flat({"format": checkpoint.CHECKPOINT_FORMAT, **state})
    initialization = {"read_initialization": by_initialize}
    selecting = {"read_weights": by_read_weights, "open_weights": by_open_weights, "weight_selection": by_selection}
    foreign = {**initialization, **selecting}

    def foreign_truth(read: Callable[[Path], dict]) -> Callable[[Path, bool], dict]:
        return lambda path, rewritten: read(path)

    old = written(lambda folder: torch.save(teacher, folder / "o.pth", _use_new_zipfile_serialization=False))
    return {
        "initialization .pth": Sample(pair("vit.pth"), lambda path, rewritten: student, initialization),
        "initialization .safetensors": Sample(pair("vit.safetensors"), lambda path, rewritten: student, initialization),
        "checkpoint": Sample(
            written(lambda folder: checkpoint.save_checkpoint(folder / "checkpoint-3.pth", state)),
            lambda path, rewritten: read_state(path) if rewritten else saved,
            {"read_checkpoint": by_read_checkpoint},
        ),
        ".pth": Sample(
            written(lambda folder: torch.save(teacher, folder / "w.pth")), foreign_truth(read_torch), foreign
        ),
        ".bin, nested": Sample(
            written(lambda folder: torch.save(nested, folder / "w.bin")), foreign_truth(read_torch), selecting
        ),
        ".pth, old": Sample({"o.pth": with_fixed_keys(old["o.pth"])}, foreign_truth(read_torch), foreign),
        ".safetensors": Sample(
            written(lambda folder: safetensors.torch.save_file(teacher, folder / "w.safetensors")),
            foreign_truth(read_safetensors),
            foreign,
        ),
        ".npz": Sample(written(arrays), foreign_truth(read_npz), {"weight_selection": by_selection}),
        "index": Sample(
            dict(sorted(written(index).items(), key=lambda file: not file[0].endswith(".json"))),
            foreign_truth(read_index),
            {"open_weights": by_open_weights, "weight_selection": by_selection},
        ),
    }


def with_fixed_keys(content: bytes) -> bytes:
    """A file of float32 in torch's old format whose storages are named by their order, not by where in memory they were."""
    file, ends = io.BytesIO(content), []
    for _ in range(5):
        ops = list(pickletools.genops(file))
        ends.append(file.tell())
        if len(ends) == 4:
            names = dict.fromkeys(name for _, name, _ in ops if isinstance(name, str) and name.isdigit())
    tensors = content[ends[2] : ends[3]]
    keys = pickle.loads(content[ends[3] : ends[4]])
    blocks = {}
    for key in keys:
        count = file.read(8)
        blocks[key] = count + file.read(4 * int.from_bytes(count, "little"))
    fixed = {key: f"{number:08}" for number, key in enumerate(names)}
    for key, name in fixed.items():
        tensors = tensors.replace(text(key), text(name))
    listed = pickle.dumps(list(fixed.values()), protocol=2)
    return content[: ends[2]] + tensors + listed + b"".join(blocks[key] for key in fixed)


def describe() -> dict:
    """What weight_selection.py writes beside the weights of this pair."""
    return weight_selection.select_weights(*PAIR, plan_only=True)[1]


def training_state(tensors: dict[str, torch.Tensor]) -> dict:
    """A training state of the kind that main.py saves, of a model that has done one step of AdamW."""
    model = models.create(NAME, STUDENT)
    model.load_state_dict(tensors)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999))
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return {"epoch": 3, "step": 40, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {},
        "metrics": {"train_loss": 2.5, "test_acc1": 41.0}, "best": {"test_acc1": 41.0}, "processes": 1,
        "sums": {"loss": 7.5, "seconds": 3.0}, "skips_in_a_row": 0, "bad_images": [3, 17], "update_freq": 1,
        "options": {"model": NAME, "lr": 1e-3, "aa": None}, "precision": "float32", "data": {"classes": ["a", "b"]}}  # fmt: skip
