"""Check zip and pickle headers before loading; refuse files that claim to expand far beyond their size."""

import collections
import itertools
import math
import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from weightfiles.harmless import STAND_INS

DOS_FOLDER = 0x10  # the bit of a zip entry's attributes
END_BYTES = 98  # of an archive of torch.save: the zip64 record of its directory, the record's locator, the end record
UNPACKED = 20  # times its own size may a file hold; trained weights hardly compress
OBJECTS = 3 * 10**6  # in a pickle; an object that appears several times counts each time
DEPTH = 100  # of objects in objects
CONTAINERS = (Mapping, list, tuple)
# What torch.save writes for tensors and plain values. torch.load would call a few more that make tensors of any size.
PLAIN = re.compile(
    r"collections (OrderedDict|Counter)|_codecs encode|torch\.serialization _get_layout|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)|torch(\.storage)? (?!Q)\w+Storage|"
    r"torch Size|torch (?!q)[a-z]\w*|(builtins|__builtin__) (set|complex)"
)
GROWING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # opcodes that add to an object below them
PUT, GET = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ("GET", "BINGET", "LONG_BINGET")
# the opcodes of a list of strings, which is the last pickle of torch's old format
STRINGS = re.compile(
    r"(PROTO )?EMPTY_LIST (\w*PUT )?(MARK (\w+(UNICODE|STRING) (\w*PUT )?)+APPENDS |\w+(UNICODE|STRING) (\w*PUT )?APPEND )*STOP"
)
ARRAY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """ValueError for an archive of `size` bytes that another reader may read differently, or that unpacks to far more."""
    _check_directory(archive, size)
    infos = archive.infolist()
    for info in infos:
        if info.external_attr & DOS_FOLDER and not info.is_dir():
            # torch would return uninitialized memory for it
            raise ValueError(f"its part {info.filename} is marked as a folder")
    name, count = collections.Counter(info.filename.lower() for info in infos).most_common(1)[0] if infos else ("", 0)
    if count > 1:
        raise ValueError(f"its part {name} is there {count} times")
    unpacked = sum(info.file_size for info in infos)
    if unpacked > UNPACKED * size:
        raise ValueError(f"it would unpack to {unpacked / size:.0f} times its size")


def _check_directory(archive: zipfile.ZipFile, size: int) -> None:
    """ValueError unless the directory lies where the archive's last bytes say.

    zipfile looks for it right before the end record, torch at the stated offset. A file with two directories could
    show harmless parts to our checks and others to torch.
    """
    archive.fp.seek(max(0, size - END_BYTES))
    ending = archive.fp.read().rjust(END_BYTES)
    record, locator, end = ending[:56], ending[56:76], ending[76:]
    offset = end[16:20]
    if locator.startswith(b"PK\6\7"):
        offset = record[48:]
        if not record.startswith(b"PK\6\6") or int.from_bytes(locator[8:16], "little") != size - END_BYTES:
            offset = b""
    if not end.startswith(b"PK\5\6") or int.from_bytes(offset, "little") != archive.start_dir:
        raise ValueError("its directory is not where its last bytes say")


def check_pickle(file: BinaryIO) -> list[list]:
    """Read one pickle's opcodes without executing them; return the ids of the storages that it asks for.

    Raises UnpicklingError if it names anything that neither a plain tensor needs nor has a stand-in, or if objects contain
    themselves, are nested deeply, or hold far more objects than there are opcodes: hashing or printing such an object
    never ends.
    """
    stack, marks, memo, asked = [], [], {}, []
    total = _Object(None)
    try:
        for op, argument, _ in pickletools.genops(file):
            if op.name == "GLOBAL" and not (PLAIN.fullmatch(argument) or _full_name(argument) in STAND_INS):
                raise pickle.UnpicklingError(f"GLOBAL {argument.replace(' ', '.')}")
            if op.name in PUT:
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif op.name in GET:
                stack.append(memo[argument])
                stack[-1].is_shared = True
                total.take(stack[-1:])
            elif op.name == "MARK":
                marks.append(len(stack))
            else:
                bottom = len(stack) - len(op.stack_before)
                if pickletools.markobject in op.stack_before:
                    bottom = marks.pop() - op.stack_before.index(pickletools.markobject)
                parts = stack[bottom:]
                del stack[bottom:]
                if op.name == "REDUCE" and parts[0].value == "_codecs encode":
                    _check_encoding(parts[1])
                if op.name == "BINPERSID":
                    asked.append([part.value for part in parts[0].value])
                if op.stack_after:
                    stack.append(_result(op.name, argument, parts))
            if total.count > OBJECTS or (stack and (stack[-1].count > OBJECTS or stack[-1].depth > DEPTH)):
                raise pickle.UnpicklingError("objects without end")
    except (ValueError, LookupError, OverflowError, TypeError, AttributeError) as error:
        # ValueError comes from pickletools if this is no pickle, the others from opcodes that find nothing to work on
        raise pickle.UnpicklingError(str(error)) from error
    return asked


def _full_name(argument: str) -> str:
    """The name of a GLOBAL opcode's "module name" as torch looks it up, which knows the names of Python 2."""
    module, name = argument.split(" ")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _check_encoding(arguments: "_Object") -> None:
    """UnpicklingError unless a call of `_codecs.encode` does what it is there for in a pickle: make bytes of Latin-1."""
    text, encoding = arguments.value
    if not (isinstance(text.value, str) and encoding.value == "latin1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding.value}")


def _result(name: str, argument: object, parts: list["_Object"]) -> "_Object":
    """The object that an opcode leaves on the stack after taking `parts` from it."""
    if name in GROWING:
        result, *parts = parts
        if result.is_shared:  # its size has been counted in what holds it
            raise pickle.UnpicklingError("an object grows after it was shared")
    else:
        result = _Object(parts if "TUPLE" in name else argument)
    result.take(parts)
    return result


class _Object:
    """An object on a pickle's stack: how many objects it holds, how deep, and a tuple's parts or the opcode's argument."""

    def __init__(self, value: object):
        self.value, self.count, self.depth, self.is_shared = value, 1, 1, False

    def take(self, parts: list["_Object"]) -> None:
        self.count += sum(part.count for part in parts)
        self.depth = max([self.depth, *(1 + part.depth for part in parts)])


def check_old_format(file: BinaryIO, size: int) -> int:
    """Check the pickles of a file of `size` bytes in torch's old format; return how many storages it has values for.

    Raises UnpicklingError, and ValueError for a storage larger than the file: torch would allocate it before reading.
    """
    for pid in [pid for _ in range(4) for pid in check_pickle(file)]:
        if not (len(pid) == 6 and isinstance(pid[4], int) and pid[4] <= size):
            raise ValueError("it asks for more values than it has")
    try:
        ops = list(pickletools.genops(file))
    except ValueError as error:
        raise pickle.UnpicklingError(str(error)) from error
    if not STRINGS.fullmatch(" ".join(op.name for op, _, _ in ops)):
        raise pickle.UnpicklingError("not a list of keys")
    return len({argument for _, argument, _ in ops if isinstance(argument, str | bytes)})


def check_arrays(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a `.npz`, without reading values; ValueError if a header declares another size than is there."""
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        check_archive(archive, Path(path).stat().st_size)
        for info in archive.infolist():
            with archive.open(info) as file:
                version = np.lib.format.read_magic(file)
                if version not in ARRAY_HEADERS:
                    raise ValueError(f"{info.filename} is of the format {version}, which is not known")
                try:
                    shape, _, dtype = ARRAY_HEADERS[version](file)
                except (MemoryError, RecursionError) as error:  # from Python's parser, which numpy uses
                    raise ValueError(f"the header of {info.filename} is nested without end") from error
                declared = math.prod(shape) * dtype.itemsize
                if file.tell() + declared != info.file_size:
                    raise ValueError(f"{info.filename} has {info.file_size - file.tell()} bytes for {declared}")
                shapes[info.filename.removesuffix(".npy")] = shape
    return shapes


def check_content(content: object, size: int) -> None:
    """ValueError if tensors read from `size` bytes have far more bytes: a stride of 0 repeats one value."""
    level, total = [content], 0
    while level:
        total += sum(value.nbytes for value in level if isinstance(value, torch.Tensor))
        inner = [each.values() if isinstance(each, Mapping) else each for each in level if isinstance(each, CONTAINERS)]
        level = list(itertools.chain.from_iterable(inner))
    if total > UNPACKED * size:
        raise ValueError(f"its tensors have {total / size:.0f} times as many bytes as the file")
