"""Reads what bench/fuzz.py has changed by code of its own, to have something to compare the project's readers with."""

import collections
import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

# the model of all samples
TEACHER = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 4, "num_classes": 5}

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64", "U16": "uint16", "U32": "uint32", "U64": "uint64"}  # fmt: skip
STORAGES = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64",
    "ComplexDouble": "complex128"}  # fmt: skip


def tensor_of(content: bytes, dtype: str, shape: tuple, stride: tuple | None = None, offset: int = 0) -> torch.Tensor:
    kind = getattr(torch, dtype)
    flat = torch.frombuffer(bytearray(content), dtype=kind) if content else torch.empty(0, dtype=kind)
    if stride is None:
        return flat.reshape(shape)
    if 0 in shape:
        return flat[:0].reshape(shape)
    # the step along an axis of one is never taken, and may be anything
    return flat.as_strided(shape, [step if side > 1 else 1 for side, step in zip(shape, stride, strict=True)], offset)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    found = {}
    for key, entry in header.items():
        first, last = entry["data_offsets"]
        found[key] = tensor_of(content[start + first : start + last], DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return found


def read_index(path: Path) -> dict[str, torch.Tensor]:
    files = json.loads(path.read_bytes())["weight_map"]
    return {key: read_safetensors(path.with_name(name))[key] for key, name in files.items()}


class Ordered(collections.OrderedDict):
    def __setstate__(self, state: object) -> None:
        """A module's versions: not read."""


class Structure(pickle._Unpickler):
    """A pickle of tensors with nothing callable but what puts a tensor together here.

    In Python: the one in C makes a table as long as the highest number of its memo.
    """

    def __init__(self, file, storage: Callable[[str, str], bytes]):
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str):
        known = {"OrderedDict": Ordered, "_rebuild_tensor_v2": self.tensor, "_rebuild_tensor": self.tensor,
            "_rebuild_parameter": lambda tensor, *_: tensor, "Size": torch.Size}  # fmt: skip
        if module.startswith("torch") and name.endswith("Storage"):
            return STORAGES[name.removesuffix("Storage")]
        if module in ("torch", "torch._utils", "collections") and name in known:
            return known[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: tuple):
        _, dtype, key, *_ = pid
        if isinstance(dtype, torch.Tensor):  # torch.load asks what stands for a kind of storage for its dtype alone
            dtype = str(dtype.dtype).removeprefix("torch.")
        return dtype, self.storage(key, dtype)

    def tensor(self, storage: tuple, offset: int, size: tuple, stride: tuple, *_) -> torch.Tensor | None:
        dtype, content = storage
        return None if content is None else tensor_of(content, dtype, size, stride, offset)


def no_storage(key: str, dtype: str) -> bytes:
    raise pickle.UnpicklingError("a storage where none can be")


def read_archive(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1)
        folder = pickled.removesuffix("data.pkl")
        swapped = folder + "byteorder" in archive.namelist() and archive.read(folder + "byteorder") != b"little"

        def storage(key: str, dtype: str) -> bytes | None:
            try:
                content = archive.read(f"{folder}data/{key}")
            except (KeyError, UnicodeDecodeError, zipfile.BadZipFile):
                return None  # right, where a reader did not look at it
            size = getattr(torch, dtype).itemsize
            return np.frombuffer(content, f"V{size}").byteswap().tobytes() if swapped and size > 1 else content

        return Structure(io.BytesIO(archive.read(pickled)), storage).load()


def read_old(path: Path) -> dict:
    file, dtypes = io.BytesIO(path.read_bytes()), {}
    for _ in range(3):
        Structure(
            file, no_storage
        ).load()  # a number, a number, and a dictionary of sizes: mutants that got here are plain
    start = file.tell()

    def note(key: str, dtype: str) -> bytes:
        dtypes[key] = dtype
        return bytes(2**16)  # enough for any tensor of the sample

    Structure(file, note).load()
    contents = {}
    for key in Structure(file, no_storage).load():
        count = int.from_bytes(file.read(8), "little")
        # torch multiplies in 64 bits
        contents[key] = file.read(count * getattr(torch, dtypes[key]).itemsize % 2**64)
    file.seek(start)
    return Structure(file, lambda key, _: contents[key]).load()


def flat(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors in a training state by their places, and all that is not a tensor as the bytes of a text."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict):
        inner = [flat(each, f"{name}/{key}") for key, each in value.items()]
    elif isinstance(value, list | tuple):
        inner = [flat(each, f"{name}/{number}") for number, each in enumerate(value)]
    else:
        return {f"{name}={value!r}": torch.zeros(0)}
    return {key: each for part in inner for key, each in part.items()}


def read_state(path: Path) -> dict[str, torch.Tensor]:
    return flat(read_archive(path))


def read_torch(path: Path) -> dict[str, torch.Tensor]:
    content = read_archive(path) if zipfile.is_zipfile(path) else read_old(path)
    nested = (content[key] for key in ("model", "module", "state_dict") if isinstance(content.get(key), dict))
    return {key: value for key, value in next(nested, content).items() if value is not None}


def npz_shapes(width: int, depth: int, heads: int, patches: int, patch: int, classes: int) -> dict[str, tuple]:
    """The arrays of a ViT as it was first released."""
    shapes = {"cls": (1, 1, width), "embedding/kernel": (patch, patch, 3, width), "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, patches + 1, width), "head/kernel": (width, classes),
        "head/bias": (classes,), "Transformer/encoder_norm/scale": (width,), "Transformer/encoder_norm/bias": (width,)}  # fmt: skip
    for layer in range(depth):
        block, head = f"Transformer/encoderblock_{layer}/", (heads, width // heads)
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}{norm}/{part}": (width,) for part in ("scale", "bias")}
        attention, mlp = f"{block}MultiHeadDotProductAttention_1/", f"{block}MlpBlock_3/"
        for part in ("query", "key", "value"):
            shapes |= {f"{attention}{part}/kernel": (width, *head), f"{attention}{part}/bias": head}
        shapes |= {f"{attention}out/kernel": (*head, width), f"{attention}out/bias": (width,)}
        shapes |= {f"{mlp}Dense_0/kernel": (width, 4 * width), f"{mlp}Dense_0/bias": (4 * width,)}
        shapes |= {f"{mlp}Dense_1/kernel": (4 * width, width), f"{mlp}Dense_1/bias": (width,)}
    return shapes


NPZ = npz_shapes(24, 3, 4, 16, 4, 5)


def turned(kernel: np.ndarray) -> np.ndarray:
    """A layer's weight as timm turns it, which it does by the number of axes alone; [out, in]."""
    order = {2: (1, 0), 3: (2, 0, 1), 4: (3, 2, 0, 1)}[kernel.ndim]
    kernel = kernel.transpose(order)
    return kernel.reshape(kernel.shape[0], -1)


def read_npz(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path) as file:
        arrays = {key: file[key].astype(np.float32) for key in NPZ if not key.startswith("head/")}
    for key in arrays:
        shape = NPZ[key]
        if re.search(r"(query|key|value)/", key):
            arrays[key] = arrays[key].reshape(shape)  # timm flattens it
        elif key.endswith("out/kernel"):
            continue  # timm turns it by its number of axes
        assert arrays[key].shape == shape, f"{key} is {arrays[key].shape}"
    found = {"cls_token": arrays["cls"], "pos_embed": arrays["Transformer/posembed_input/pos_embedding"],
        "patch_embed.proj.weight": arrays["embedding/kernel"].transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": arrays["embedding/bias"], "norm.weight": arrays["Transformer/encoder_norm/scale"],
        "norm.bias": arrays["Transformer/encoder_norm/bias"]}  # fmt: skip
    for layer in range(TEACHER["depth"]):
        theirs, ours, width = f"Transformer/encoderblock_{layer}/", f"blocks.{layer}.", TEACHER["embed_dim"]
        for norm, name in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            found[f"{ours}{name}.weight"] = arrays[f"{theirs}{norm}/scale"]
            found[f"{ours}{name}.bias"] = arrays[f"{theirs}{norm}/bias"]
        attention, parts = theirs + "MultiHeadDotProductAttention_1/", ("query", "key", "value")
        kernels = [arrays[f"{attention}{part}/kernel"].reshape(width, width).T for part in parts]
        found[ours + "attn.qkv.weight"] = np.concatenate(kernels)
        found[ours + "attn.qkv.bias"] = np.concatenate([arrays[f"{attention}{part}/bias"].ravel() for part in parts])
        found[ours + "attn.proj.weight"] = turned(arrays[attention + "out/kernel"])
        found[ours + "attn.proj.bias"] = arrays[attention + "out/bias"]
        for number in (0, 1):
            dense = f"{theirs}MlpBlock_3/Dense_{number}/"
            found[f"{ours}mlp.fc{number + 1}.weight"] = arrays[dense + "kernel"].T
            found[f"{ours}mlp.fc{number + 1}.bias"] = arrays[dense + "bias"]
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in found.items()}
