"""What a zip archive and a pickle say of themselves, looked at before either is read: neither may hold more than it weighs."""

import collections
import math
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

DOS_FOLDER = 0x10  # the bit of a zip entry's attributes
UNPACKED = 20  # times its own size may a file hold; trained weights hardly compress
OBJECTS = 10**7  # in a pickle, those that are there several times counted as often
DEPTH = 100  # of objects in objects
# what torch.save writes for tensors and for plain values; torch.load would call a few more, that make tensors of any size
PLAIN = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)|torch(\.storage)? \w+Storage|"
    r"torch Size|torch [a-z]\w*|(builtins|__builtin__) (set|complex)"
)
PUT, GET = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ("GET", "BINGET", "LONG_BINGET")
GROWING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
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


def check_pickle(file: BinaryIO) -> None:
    """Read one pickle's opcodes, without doing what they say.

    Raises UnpicklingError for one that names anything but what tensors are put together with, or whose objects are
    nested deeply, or many more than its opcodes: walking through them, as a mapping does with its keys, would not end.
    """
    stack, marks, memo, objects = [], [], {}, 0  # on the stack, for each object: how many are in it, how deep
    try:
        for op, argument, _ in pickletools.genops(file):
            if op.name == "GLOBAL" and not PLAIN.fullmatch(argument):
                raise pickle.UnpicklingError(f"GLOBAL {argument.replace(' ', '.')}")
            if op.name in PUT:
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif op.name in GET:
                stack.append(memo[argument])
                objects += memo[argument][0]
            elif op.name == "MARK":
                marks.append(len(stack))
            else:
                place = len(stack) - len(op.stack_before)
                if pickletools.markobject in op.stack_before:
                    place = marks.pop() - op.stack_before.index(pickletools.markobject)
                taken = [stack.pop() for _ in range(len(stack) - place)]
                inside = 1 + sum(count for count, _ in taken), 1 + max((depth for _, depth in taken), default=0)
                if op.stack_after:
                    made = taken[-1] if op.name in GROWING else [0, 0]
                    made[:] = inside
                    stack.append(made)
                objects += 1
                if objects > OBJECTS or inside[0] > OBJECTS or inside[1] > DEPTH:
                    raise pickle.UnpicklingError("objects without end")
    except (ValueError, LookupError, OverflowError) as error:  # pickletools says so of what is no pickle
        raise pickle.UnpicklingError(str(error)) from error


def check_old_format(file: BinaryIO) -> int:
    """Check the pickles that stand before the values in a file of torch's old format; returns how many storages it has."""
    for _ in range(4):
        check_pickle(file)
    try:
        ops = list(pickletools.genops(file))
    except ValueError as error:
        raise pickle.UnpicklingError(str(error)) from error
    if not TEXTS.fullmatch(" ".join(op.name for op, _, _ in ops)):
        raise pickle.UnpicklingError("no list of keys")
    return len({argument for _, argument, _ in ops if isinstance(argument, str | bytes)})


def check_arrays(path: str | Path) -> None:
    """ValueError for a `.npz` with an array whose header tells of more or less than is there; its values are not read."""
    with zipfile.ZipFile(path) as archive:
        check_archive(archive, Path(path).stat().st_size)
        for info in archive.infolist():
            with archive.open(info) as file:
                version = np.lib.format.read_magic(file)
                if version not in ARRAY_HEADERS:
                    raise ValueError(f"{info.filename} is of the format {version}, which is not known")
                shape, _, dtype = ARRAY_HEADERS[version](file)
                told = math.prod(shape) * dtype.itemsize
                if file.tell() + told != info.file_size:
                    raise ValueError(f"{info.filename} has {info.file_size - file.tell()} bytes for {told}")
