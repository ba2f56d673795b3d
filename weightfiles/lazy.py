"""A teacher's tensors, each read when it is asked for: time and private memory grow with what is taken, not with the file."""

import json
import mmap
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import safetensors
import torch
from torch import Tensor

from utils import UserError, first_line
from weightfiles.read import (
    check_file,
    check_plain,
    is_archive,
    open_archive,
    read_weights,
    reading,
    shapes_of,
    unpickle,
    unwrap,
)

INDEX_SUFFIX = ".safetensors.index.json"
MAPPED_BYTES = 2**26  # of values, after which a file's pages are given back
CRC_BYTES = 2**18  # read at once for a checksum: small enough to stay in the processor's cache


class Weights(Mapping[str, Tensor]):
    """A teacher's tensors on the CPU, each read when it is asked for.

    What `weights[key]` gives may be a view of mapped memory: it is never to be written to. Each asking reads anew, and
    a mapping's pages are given back when the tensor is dropped. Raises UserError with the file and the key for a
    tensor that is damaged, where the format tells.

    `shapes`: of all tensors, known without reading a value.
    `whole`: "" or why the file had to be read whole.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor], whole: str = "") -> None:
        self.shapes = shapes
        self.whole = whole
        self._read = read

    @classmethod
    def in_memory(cls, tensors: Mapping[str, Tensor], whole: str) -> "Weights":
        """Tensors that have been read already, and why."""
        return cls(shapes_of(tensors), tensors.__getitem__, whole)

    def __getitem__(self, key: str) -> Tensor:
        return self._read(key)

    def __contains__(self, key: object) -> bool:
        return key in self.shapes  # Mapping's own asks for the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def open_weights(path: str | Path, model_key: str = "model|module|state_dict") -> Weights:
    """The tensors of a `.safetensors` file, of the files behind a `.safetensors.index.json`, or of what `torch.save` wrote.

    `model_key` is as in `weights.read_weights`, and so is what ends in a UserError. The values in a `.safetensors`
    file have no checksums; those in an archive of `torch.save` are compared with theirs when they are asked for.
    """
    path = Path(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _open_safetensors(path, read_index(path), model_key)
    check_file(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path, dict.fromkeys(_header(path), path), model_key)
    whole = "a file of torch's old format is read whole"
    with reading(path):
        zipped = is_archive(path)
    if zipped:
        weights = _open_archive(path, model_key)
        if weights is not None:
            return weights
        whole = "an archive that is not laid out as torch.save does is read whole"
    tensors = read_weights(path, model_key)
    return Weights.in_memory(tensors, whole)


# ---- safetensors ----


def read_index(path: Path) -> dict[str, Path]:
    """The file that holds each tensor, by its key, from the `.safetensors.index.json` beside these files.

    Raises UserError for what is no such index and for a file anywhere else.
    """
    check_file(path)
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as an index of weights: {first_line(error)}") from error
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not (isinstance(files, dict) and files):
        raise UserError(f"{path} is no index of weights: it has no weight_map from keys to files")
    for key, name in files.items():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise UserError(f"{path}: {key} is in {name!r}, which is not the name of a file in the same folder")
    return {key: path.parent / name for key, name in files.items()}


def _open_safetensors(path: Path, files: dict[str, Path], model_key: str) -> Weights:
    """The tensors of `files`, by the keys they have there; `path` is what the user named."""
    for key, file in files.items():
        if not os.path.isfile(file):  # Path's own raises for a name that is too long
            raise UserError(f"{path}: {key} is in {file.name}, which does not exist")
    headers = {file: _header(file) for file in dict.fromkeys(files.values())}
    for key, file in files.items():
        if key not in headers[file]:
            raise UserError(f"{path}: {key} is in {file.name}, which has no such tensor")
    names = unwrap(path, {key: key for key in files}, model_key)
    shapes = {key: headers[files[name]][name] for key, name in names.items()}
    mapped = {file: _Mapped(file) for file in headers}
    return Weights(shapes, lambda key: mapped[files[names[key]]].read(names[key], shapes[key]))


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in one `.safetensors` file, in the order of their values."""
    check_file(path)
    with reading(path), safetensors.safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.offset_keys()}


class _Mapped:
    """One `.safetensors` file whose tensors are views of a mapping: no value is copied, only pages looked at are read.

    All tensors of one opening share one mapping, whose pages count as ours while any of them lives: a file is opened
    anew, which takes 0.3 ms, after MAPPED_BYTES. (The backend "pread" would copy each tensor whole, to private memory.)
    """

    def __init__(self, path: Path):
        self.path, self.file, self.asked = path, None, 0

    def read(self, key: str, shape: tuple[int, ...]) -> Tensor:
        with reading(self.path, key):
            if self.file is None or self.asked > MAPPED_BYTES:
                self.file, self.asked = safetensors.safe_open(self.path, framework="pt"), 0
            tensor = self.file.get_tensor(key)
        self.asked += tensor.nbytes
        if tensor.shape != shape:
            was = f"{list(tensor.shape)} and was {list(shape)} when the file was opened first"
            raise UserError(f"{self.path}: {key} is {was}")
        return tensor


# ---- archives of torch.save ----


class _Entry(NamedTuple):
    """Where a zip archive holds the values of one storage, and their checksum."""

    start: int
    size: int
    crc: int


def _open_archive(path: Path, model_key: str) -> Weights | None:
    """The tensors of an archive that torch.save wrote, or None if it cannot be told where in the file each one lies."""
    storages = []

    def noted(storage: torch.UntypedStorage, _: str) -> torch.UntypedStorage:
        storages.append(storage)
        return storage

    with reading(path):
        entries = _data_entries(path)
        if entries is None:
            return None
        content = unpickle(path, map_location=noted, mmap=True)
    tensors = unwrap(path, content, model_key)
    check_plain(path, tensors)
    places = _match(storages, entries)
    if places is None or not all(_is_placed(tensor, places) for tensor in tensors.values()):
        return None
    return Weights(shapes_of(tensors), lambda key: _read_entry(path, key, tensors[key], places))


def _data_entries(path: Path) -> list[_Entry] | None:
    """Where an archive's storages lie, in the file's order; None if their bytes are not as they are in memory.

    The other entries, the pickle above all, are compared with their checksums here; zipfile raises for a damaged one.
    """
    with open_archive(path) as archive, open(path, "rb", buffering=0) as file:
        infos = archive.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
            return None
        entries, others = [], {}
        for info in infos:
            if not re.fullmatch(r"[^/]+/data/[^/]+", info.filename):
                others[info.filename.partition("/")[2]] = archive.read(info)
            elif info.file_size:
                archive.open(info).close()  # zipfile compares what stands ahead of the bytes with its directory
                entries.append(_Entry(_start(file, info), info.file_size, info.CRC))
    same_order = others.get("byteorder", b"little") == sys.byteorder.encode()
    return sorted(entries) if same_order else None


def _start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind a header of 30 bytes, its name, and the padding that aligns them."""
    file.seek(info.header_offset + 26)
    lengths = file.read(4)
    return info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _match(storages: list[torch.UntypedStorage], entries: list[_Entry]) -> dict[int, _Entry] | None:
    """The entry of each mapped storage, by the storage's address; None unless each entry has one, at its place.

    The storages are slices of one mapping of the file, so both lie in one order and at the same distances.
    """
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
    addresses = sorted(sizes)
    if [sizes[address] for address in addresses] != [entry.size for entry in entries]:
        return None
    if len({address - entry.start for address, entry in zip(addresses, entries, strict=True)}) > 1:
        return None
    return dict(zip(addresses, entries, strict=True))


def _is_placed(tensor: Tensor, places: Mapping[int, _Entry]) -> bool:
    """Whether the tensor can be made from the bytes of its entry alone."""
    storage = tensor.untyped_storage()
    return (storage.nbytes() == 0 or storage.data_ptr() in places) and not (tensor.is_conj() or tensor.is_neg())


def _read_entry(path: Path, key: str, tensor: Tensor, places: Mapping[int, _Entry]) -> Tensor:
    """A tensor like the given one of torch's mapping, its bytes compared with their checksum, in a mapping of its own.

    torch's mapping lives as long as any of its tensors does, and would count every page that was looked at.
    """
    if tensor.untyped_storage().nbytes() == 0:
        return tensor.detach()
    entry = places[tensor.untyped_storage().data_ptr()]
    with reading(path, key), open(path, "rb", buffering=0) as file:
        if _crc32(file, entry) != entry.crc:
            raise UserError(f"{path} cannot be read as weights: {key} does not match its checksum")
        storage = _map(file, entry).untyped_storage()
        flat = torch.empty(0, dtype=tensor.dtype, device="cpu")
        return flat.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _crc32(file: BinaryIO, entry: _Entry) -> int:
    """The checksum of an entry's bytes; read, which takes a third of the time that faulting mapped pages in does."""
    buffer = memoryview(bytearray(min(CRC_BYTES, entry.size)))
    file.seek(entry.start)
    crc, left = 0, entry.size
    while left > 0:
        count = file.readinto(buffer[:left])
        if not count:
            raise EOFError("the file ends before it")
        crc = zlib.crc32(buffer[:count], crc)
        left -= count
    return crc


def _map(file: BinaryIO, entry: _Entry) -> Tensor:
    """An entry's bytes as mapped memory; [size] uint8."""
    ahead = entry.start % mmap.ALLOCATIONGRANULARITY  # a mapping begins at a page
    # a copy on write: torch warns of memory that it could not write to
    mapped = mmap.mmap(file.fileno(), ahead + entry.size, access=mmap.ACCESS_COPY, offset=entry.start - ahead)
    return torch.frombuffer(mapped, dtype=torch.uint8, offset=ahead, count=entry.size)
