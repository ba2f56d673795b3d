"""Mutations that know nothing of a format: of bytes, and of which files there are. What a mutation is stands here."""

import os
import random
from collections.abc import Callable
from pathlib import Path


class Link(str):
    """In the place of a file's bytes: the target of a symbolic link."""


class Pipe(str):
    """In the place of a file's bytes: a named pipe, which nobody writes to."""


Chance = random.Random
Files = dict[str, bytes | Link | Pipe]
Mutation = Callable[[Chance, Files], Files]


def one(change: Callable[[Chance, bytes], bytes], suffix: str = "") -> Mutation:
    """A mutation of one of the files, whose name ends with `suffix`, from one of its bytes."""

    def mutation(chance: Chance, files: Files) -> Files:
        name = chance.choice([name for name in files if name.endswith(suffix)])
        return {**files, name: change(chance, files[name])}

    mutation.__name__ = change.__name__
    return mutation


# ---- bytes ----


def span(chance: Chance, content: bytes, longest: int = 256) -> tuple[int, int]:
    start = chance.randrange(len(content))
    return start, min(len(content), start + chance.randint(1, longest))


def flip_bits(chance: Chance, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def flip_bits_at_the_ends(chance: Chance, content: bytes) -> bytes:
    """Where headers and directories are."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        place = chance.randrange(min(len(changed), 1500))
        changed[place if chance.random() < 0.5 else -1 - place] ^= 1 << chance.randrange(8)
    return bytes(changed)


def set_bytes(chance: Chance, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(3):
        changed[chance.randrange(len(changed))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    return bytes(changed)


def random_run(chance: Chance, content: bytes) -> bytes:
    start, end = span(chance, content)
    return content[:start] + chance.randbytes(end - start) + content[end:]


def zeroed(chance: Chance, content: bytes) -> bytes:
    start, end = span(chance, content, chance.choice((8, 512, 65536)))
    return content[:start] + bytes(end - start) + content[end:]


def truncated(chance: Chance, content: bytes) -> bytes:
    return content[: chance.choice((chance.randrange(len(content)), len(content) - chance.randint(1, 64)))]


def grown(chance: Chance, content: bytes) -> bytes:
    return content + chance.choice((b"\0", b"\n", chance.randbytes(chance.randint(1, 5000)), content))


def prefixed(chance: Chance, content: bytes) -> bytes:
    return chance.randbytes(chance.randint(1, 200)) + content


def removed(chance: Chance, content: bytes) -> bytes:
    start, end = span(chance, content)
    return content[:start] + content[end:]


def inserted(chance: Chance, content: bytes) -> bytes:
    start, end = span(chance, content)
    return content[:start] + chance.randbytes(end - start) + content[start:]


def duplicated(chance: Chance, content: bytes) -> bytes:
    start, end = span(chance, content, 4096)
    return content[:end] + content[start:]


def reordered(chance: Chance, content: bytes) -> bytes:
    a, b, c = sorted(chance.randrange(len(content)) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def spliced(chance: Chance, content: bytes) -> bytes:
    """A part laid over another place of the same length."""
    start, end = span(chance, content, 4096)
    place = chance.randrange(len(content))
    return content[:place] + content[start:end] + content[place + end - start :]


def number_changed(chance: Chance, content: bytes) -> bytes:
    """Two, four or eight bytes are a number at one of its edges."""
    width = chance.choice((2, 4, 8))
    place = chance.randrange(max(1, len(content) - width))
    number = chance.choice((0, 1, -1, 2 ** (8 * width - 1) - 1, 2**31 - 1, 10**11)) % 2 ** (8 * width)
    return content[:place] + number.to_bytes(width, "little") + content[place + width :]


def other_file(chance: Chance, content: bytes) -> bytes:
    page, pointer = b"<!DOCTYPE html><html>404</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"
    tar = b"storages".ljust(100, b"\0") + b"0000644\0" * 3 + b"00000000010\0" * 2
    return chance.choice((b"", b"\0", page, pointer, b"PK\5\6" + bytes(18), b"PK\3\4", tar.ljust(2048, b"\0"),
        b"\x93NUMPY\1\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': (9,), }", bytes(5000), b"\x80\2.",
        chance.randbytes(500), b"[" * 50000, b'{"a":' * 50000, b"{}", b"null"))  # fmt: skip


BYTES = [one(change) for change in (flip_bits, flip_bits, flip_bits_at_the_ends, flip_bits_at_the_ends, set_bytes, random_run,
    zeroed, truncated, grown, prefixed, removed, inserted, duplicated, reordered, spliced, number_changed, other_file)]  # fmt: skip

# ---- folders ----


def replaced_by_link(chance: Chance, files: Files) -> Files:
    """A file is a symbolic link: to itself, to a folder, to a device, or to a file elsewhere."""
    name = chance.choice(list(files))
    elsewhere = {name: Link("elsewhere/real"), "elsewhere/real": files[name]}
    targets = [{name: Link(target)} for target in (name, ".", "/dev/zero", "/dev/full", "/proc/self/environ", "absent")]
    return {**files, **chance.choice([*targets, elsewhere])}


def absent_or_pipe(chance: Chance, files: Files) -> Files:
    name = chance.choice(list(files))
    rest = {other: content for other, content in files.items() if other != name}
    return {**rest, name: Pipe()} if chance.random() < 0.5 else {**rest, "unrelated": b""}


FOLDER: list[Mutation] = [replaced_by_link, absent_or_pipe]


def put(files: Files, folder: Path) -> None:
    """Write a mutant's files, links and pipes into an empty folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, Link):
            path.symlink_to(content)
        elif isinstance(content, Pipe):
            os.mkfifo(path)
        else:
            path.write_bytes(content)
