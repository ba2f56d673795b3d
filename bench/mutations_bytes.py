"""Mutations that know nothing of a format. Each is a pure function of a random generator and a file's bytes."""

import random
import struct
from collections.abc import Callable

HUGE = 10**11


class Link(str):
    """In place of a file's bytes: the target of a symbolic link."""


class Pipe:
    """In place of a file's bytes: a named pipe that nobody writes to."""


Chance = random.Random
Content = bytes | Link | Pipe | None  # None: there is no such file
Mutation = Callable[[Chance, bytes], Content]


def flip_bits(chance: Chance, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def flip_bits_at_the_ends(chance: Chance, content: bytes) -> bytes:
    """Headers and directories lie there."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        place = chance.randrange(min(len(changed), 1500))
        changed[chance.choice((place, -1 - place))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def overwrite(chance: Chance, content: bytes) -> bytes:
    """Replace a span by noise, by zeros, by a number at the edge of its range, or by another span."""
    start, length = chance.randrange(len(content)), chance.randint(1, chance.choice((8, 256, 65536)))
    number, other = chance.choice((0, 1, -1, 2**31 - 1, 2**63 - 1, HUGE)), chance.randrange(len(content))
    new = chance.choice((chance.randbytes(length), bytes(length), struct.pack("<q", number), content[other:][:length]))
    return (content[:start] + new + content[start + len(new) :])[: len(content)]


def cut(chance: Chance, content: bytes) -> bytes:
    """Lose the end, or a span."""
    start = chance.choice((chance.randrange(len(content)), len(content) - chance.randint(1, min(64, len(content)))))
    return content[:start] + chance.choice((b"", content[start + chance.randint(1, 256) :]))


def insert(chance: Chance, content: bytes) -> bytes:
    """Noise or a repeated span, anywhere or at one of the ends."""
    start, length = chance.choice((0, len(content), chance.randrange(len(content)))), chance.randint(1, 4096)
    return content[:start] + chance.choice((chance.randbytes(length), content[-length:], b"\0")) + content[start:]


def reorder(chance: Chance, content: bytes) -> bytes:
    a, b, c = sorted(chance.randrange(len(content)) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


OTHER_FILES = [
    b"",
    b"\0",
    bytes(5000),
    b"<!DOCTYPE html><html>404</html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    b"PK\5\6" + bytes(18),
    b"PK\3\4",
    (b"storages".ljust(100, b"\0") + b"0000644\0" * 3 + b"00000000010\0" * 2).ljust(2048, b"\0"),  # tar
    b"\x93NUMPY\1\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': (9,), }",
    b"\x80\2.",
    b"[" * 50000,
    b'{"a":' * 50000,
    b"{}",
    b"null",
]


def other_file(chance: Chance, content: bytes) -> bytes:
    return chance.choice([*OTHER_FILES, chance.randbytes(500)])


def no_regular_file(chance: Chance, content: bytes) -> Content:
    """Absent, a pipe, or a link: to itself, a folder, a device, nothing, or a file of another kind."""
    targets = ("vit.pth", "w.pth", ".", "/dev/zero", "/dev/full", "/proc/self/environ", "absent")
    return chance.choice((None, Pipe(), *map(Link, targets)))


BYTES = [flip_bits, flip_bits_at_the_ends, overwrite, cut, insert, reorder, other_file, no_regular_file]
