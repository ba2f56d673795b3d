"""What a zip archive and a pickle say of themselves, looked at before either is read: neither may hold more than it weighs."""

import collections
import itertools
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

DOS_FOLDER = 0x10  # the bit of a zip entry's attributes
UNPACKED = 20  # times its own size may a file hold; trained weights hardly compress
OBJECTS = 3 * 10**6  # in a pickle, those that are there several times counted as often
DEPTH = 100  # of objects in objects
CONTAINERS = (Mapping, list, tuple)
# what torch.save writes for tensors and for plain values; torch.load would call a few more, that make tensors of any size
PLAIN = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)|torch(\.storage)? (?!Q)\w+Storage|"
    r"torch Size|torch (?!q)[a-z]\w*|(builtins|__builtin__) (set|complex)"
)
GROWING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # what is below on the stack
PUT, GET = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ("GET", "BINGET", "LONG_BINGET")
# a list of texts and nothing else, as the last pickle of torch's old format is
TEXTS = re.compile(
    r"(PROTO )?EMPTY_LIST (\w*PUT )?(MARK (\w+(UNICODE|STRING) (\w*PUT )?)+APPENDS |\w+(UNICODE|STRING) (\w*PUT )?APPEND )*STOP"
)
ARRAY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """ValueError for an archive of `size` bytes that two readers could read differently, or that is much larger inside."""
    infos = archive.infolist()
    for info in infos:
        if info.external_attr & DOS_FOLDER and not info.is_dir():
            # torch would take what is in memory for its bytes
            raise ValueError(f"its part {info.filename} is marked as a folder")
    name, count = collections.Counter(info.filename.lower() for info in infos).most_common(1)[0] if infos else ("", 0)
    if count > 1:
        raise ValueError(f"its part {name} is there {count} times")
    inside = sum(info.file_size for info in infos)
    if inside > UNPACKED * size:
        raise ValueError(f"it would unpack to {inside / size:.0f} times its size")


def check_pickle(file: BinaryIO) -> list:
    """Read one pickle's opcodes, without doing what they say; returns the ids of the storages that it asks for.

    Raises UnpicklingError for one that names anything but what tensors are put together with, and for objects that hold
    themselves, are nested deeply or hold many more than there are opcodes: who hashes or prints such a one has no end.
    """
    stack, marks, memo, asked = [], [], {}, []
    total = _Object(None)
    try:
        for op, argument, _ in pickletools.genops(file):
            if op.name == "GLOBAL" and not PLAIN.fullmatch(argument):
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
                place = len(stack) - len(op.stack_before)
                if pickletools.markobject in op.stack_before:
                    place = marks.pop() - op.stack_before.index(pickletools.markobject)
                parts = stack[place:]
                del stack[place:]
                if op.name == "BINPERSID":
                    asked.append([part.value for part in parts[0].value])
                if op.stack_after:
                    made = parts.pop(0) if op.name in GROWING else _Object(parts if "TUPLE" in op.name else argument)
                    if made.is_shared and op.name in GROWING:  # what holds it has been counted
                        raise pickle.UnpicklingError("an object grows where it is")
                    made.take(parts)
                    stack.append(made)
            if total.count > OBJECTS or (stack and (stack[-1].count > OBJECTS or stack[-1].depth > DEPTH)):
                raise pickle.UnpicklingError("objects without end")
    except (ValueError, LookupError, OverflowError, TypeError, AttributeError) as error:
        # pickletools says so of what is no pickle; the others come of opcodes that have nothing to work on
        raise pickle.UnpicklingError(str(error)) from error
    return asked


class _Object:
    """One on a pickle's stack: how many objects are in it, how deep, and its parts if it is a tuple, else its argument."""

    def __init__(self, value: object):
        self.value, self.count, self.depth, self.is_shared = value, 1, 1, False

    def take(self, parts: list["_Object"]) -> None:
        self.count += sum(part.count for part in parts)
        self.depth = max([self.depth, *(1 + part.depth for part in parts)])


def check_old_format(file: BinaryIO, size: int) -> int:
    """Check the pickles before the values in a file of `size` bytes of torch's old format; returns how many storages it has.

    Raises UnpicklingError, and ValueError for a storage that is larger than the file, which torch would make first.
    """
    for pid in [pid for _ in range(4) for pid in check_pickle(file)]:
        if not (len(pid) == 6 and isinstance(pid[4], int) and pid[4] <= size):
            raise ValueError("it asks for more values than it has")
    try:
        ops = list(pickletools.genops(file))
    except ValueError as error:
        raise pickle.UnpicklingError(str(error)) from error
    if not TEXTS.fullmatch(" ".join(op.name for op, _, _ in ops)):
        raise pickle.UnpicklingError("no list of keys")
    return len({argument for _, argument, _ in ops if isinstance(argument, str | bytes)})


def check_arrays(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a `.npz`'s arrays, whose values are not read; ValueError where one's header tells other than is there."""
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
                except (MemoryError, RecursionError) as error:  # of Python's parser, which reads it
                    raise ValueError(f"the header of {info.filename} is nested without end") from error
                told = math.prod(shape) * dtype.itemsize
                if file.tell() + told != info.file_size:
                    raise ValueError(f"{info.filename} has {info.file_size - file.tell()} bytes for {told}")
                shapes[info.filename.removesuffix(".npy")] = shape
    return shapes


def check_content(content: object, size: int) -> None:
    """ValueError where the tensors read from `size` bytes have many times as many: strides of 0 make much of little."""
    level, inside = [content], 0
    while level:
        inside += sum(value.nbytes for value in level if isinstance(value, torch.Tensor))
        inner = [each.values() if isinstance(each, Mapping) else each for each in level if isinstance(each, CONTAINERS)]
        level = list(itertools.chain.from_iterable(inner))
    if inside > UNPACKED * size:
        raise ValueError(f"its tensors have {inside / size:.0f} times as many bytes as the file")
