"""Mutations of zip archives: entries packed anew with right checksums, or changed headers and directories; and of pickles."""

import io
import os
import pickletools
import re
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable
from functools import cache, wraps

from bench.hostile_pickles import HOSTILE, HUGE, RUN_CODE, text, whole
from bench.mutations_bytes import Chance, Mutation, cut, flip_bits, insert, overwrite

BOMB = 400 * 2**20  # bytes

Entries = list[tuple[zipfile.ZipInfo, bytes]]


def unpack(content: bytes) -> Entries:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(info, archive.read(info)) for info in archive.infolist()]


def pack(entries: Entries) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w") as archive:  # warns of a name twice
        for info, content in entries:
            fresh = zipfile.ZipInfo(info.filename)
            fresh.external_attr, fresh.compress_type = info.external_attr, info.compress_type
            archive.writestr(fresh, content)
    return file.getvalue()


def repacked(change: Callable[[Chance, Entries, int], None]) -> Mutation:
    """Change the entries in place, around the one at a random position, then write the archive with right checksums."""

    @wraps(change)
    def mutation(chance: Chance, content: bytes) -> bytes:
        entries = unpack(content)
        change(chance, entries, chance.randrange(len(entries)))
        return pack(entries)

    mutation.repacks = True
    return mutation


@repacked
def rename_entry(chance: Chance, entries: Entries, at: int) -> None:
    name, other = entries[at][0].filename, chance.choice(entries)[0].filename
    names = [f"../../{name}", f"/{name}", os.path.abspath("absolute"), name + "/", name.upper(), other, other.upper()]
    names += [name + "x", "", "..", name.replace("/", "\\"), "other/" + name, name[::-1], "é" + name]
    entries[at][0].filename = chance.choice(names)


@repacked
def make_entry_link_or_folder(chance: Chance, entries: Entries, at: int) -> None:
    info, content = entries[at]
    info.external_attr |= chance.choice((0x10, (stat.S_IFLNK | 0o777) << 16))
    entries[at] = info, chance.choice((content, content, b"/etc/passwd"))


@repacked
def repeat_entry(chance: Chance, entries: Entries, at: int) -> None:
    """With the same or other bytes the second time."""
    info, content = entries[at]
    entries.insert(
        chance.choice((0, len(entries))), (info, chance.choice((content, overwrite(chance, content + b"\0"))))
    )


@repacked
def lose_or_reorder_entries(chance: Chance, entries: Entries, at: int) -> None:
    entries.pop(at) if chance.random() < 0.5 else chance.shuffle(entries)


@repacked
def add_entry(chance: Chance, entries: Entries, at: int) -> None:
    names = "data/999 byteorder constants.pkl code/x.py ../x .data/x data/0.npy data.pkl".split()
    folder = chance.choice((entries[0][0].filename.partition("/")[0], "other", ".."))
    entries.insert(at, (zipfile.ZipInfo(f"{folder}/{chance.choice(names)}"), chance.randbytes(24)))


@repacked
def change_entry(chance: Chance, entries: Entries, at: int) -> None:
    info, content = entries[at]
    entries[at] = info, chance.choice((flip_bits, overwrite, cut, insert))(chance, content or b"\0")


@repacked
def compress_entries(chance: Chance, entries: Entries, at: int) -> None:
    for info, _ in entries:
        info.compress_type = chance.choice((0, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))


def make_value_not_finite(chance: Chance, content: bytes) -> bytes:
    """One of the last values before a file's end."""
    at = len(content) - 4 * chance.randint(1, 20)
    return content[:at] + struct.pack("<f", chance.choice((float("nan"), -float("inf")))) + content[at + 4 :]


@repacked
def make_entry_not_finite(chance: Chance, entries: Entries, at: int) -> None:
    at = chance.choice([place for place, (_, content) in enumerate(entries) if len(content) > 300])
    entries[at] = entries[at][0], make_value_not_finite(chance, entries[at][1])


def change_zip_header(chance: Chance, content: bytes) -> bytes:
    """A field of an entry's record in the directory or of its local header: sizes, checksum, method, flags, offset."""
    changed = bytearray(content)
    signature, fields = chance.choice(
        ((b"PK\1\2", (6, 8, 10, 16, 20, 24, 28, 30, 32, 38, 42)), (b"PK\3\4", range(6, 30, 2)))
    )
    start = chance.choice([match.start() for match in re.finditer(re.escape(signature), content)]) + chance.choice(
        fields
    )
    number = chance.choice((0, 1, 8, 99, 2**31 - 1, 2**32 - 1, chance.getrandbits(32)))
    width = chance.choice((2, 4))
    changed[start : start + width] = number.to_bytes(4, "little")[:width]
    return bytes(changed)


def directory_of(content: bytes) -> tuple[int, int, int]:
    """Where an archive's directory starts, its size, its number of records."""
    count, size, start = struct.unpack_from("<HII", content, content.rindex(b"PK\5\6") + 10)
    return start, size, count


def repeat_directory_record(chance: Chance, content: bytes) -> bytes:
    """Thousands of names for the bytes of one entry: whoever unpacks each never ends."""
    start, size, count = directory_of(content)
    record = content[start : content.index(b"PK\1\2", start + 4)]
    length = int.from_bytes(record[28:30], "little")
    names = (str(number).zfill(length)[-length:].encode() for number in range(60000))
    records = content[start : start + size] + b"".join(record[:46] + name + record[46 + length :] for name in names)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count + 60000, count + 60000, len(records), start, 0)
    return content[:start] + records + end


def two_directories(chance: Chance, content: bytes) -> bytes:
    """zipfile looks right before the end record, torch at the stated offset, where the values are damaged."""
    start, size, count = directory_of(content)
    archive = content[: start + size]
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, start, 0)
    return flip_bits(chance, content[:start]) + content[start : start + size] + archive + end


@cache
def bomb_of(content: bytes) -> bytes:
    file, entries = io.BytesIO(), unpack(content)
    large = max(entries, key=lambda entry: entry[0].file_size)[0].filename
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for info, data in entries:
            archive.writestr(info.filename, bytes(BOMB) if info.filename == large else data)
    return file.getvalue()


def bomb(chance: Chance, content: bytes) -> bytes:
    """One entry unpacks to more than a reader may take."""
    return bomb_of(content)


bomb.repacks = repeat_directory_record.repacks = True
ZIP = [rename_entry, make_entry_link_or_folder, repeat_entry, lose_or_reorder_entries, add_entry, change_entry]
ZIP += [compress_entries, make_entry_not_finite, change_zip_header, repeat_directory_record, two_directories, bomb]


# ---- pickles ----


def change_pickle(chance: Chance, content: bytes) -> bytes:
    """Put hostile opcodes in a pickled mapping: as a value, a key, or all of it; or change one of its opcodes."""
    hostile, end = chance.choice(chance.choice((RUN_CODE, HOSTILE, HOSTILE))), content.rindex(b".")
    ops = [(op.name, place) for op, _, place in pickletools.genops(content)]
    at = chance.randrange(1, len(ops) - 1)
    numbers = [
        number for number, (name, _) in enumerate(ops) if name in ("BININT1", "BININT2", "BININT", "BINGET")
    ] or [1]
    number = chance.choice(numbers)
    new = chance.choice((*map(whole, (0, 1, -1, 2**31, HUGE, 2**63)), b"N", b"\x88", b"h\1", text("1"), b"h\x07"))
    key = text(chance.choice(("extra.weight", "pos_embed", "cls_token", "model")))
    return chance.choice(
        (
            content[:2] + hostile + b".",
            content[:end] + key + hostile + b"s.",
            content[:end] + hostile + b"Ns.",
            content[:2] + hostile + content[2:],
            content[: ops[at][1]] + chance.choice((hostile, chance.randbytes(1), b"0", b"N")) + content[ops[at][1] :],
            content[: ops[number][1]] + new + content[ops[number + 1][1] :],
        )
    )


@repacked
def change_archives_pickle(chance: Chance, entries: Entries, at: int) -> None:
    place = next(place for place, (info, _) in enumerate(entries) if info.filename.endswith("/data.pkl"))
    entries[place] = entries[place][0], change_pickle(chance, entries[place][1])


def change_old_format(chance: Chance, content: bytes) -> bytes:
    """One of the five pickles of torch's old format: a number, a version, sizes, the tensors, the storages' keys."""
    ends, file = [0], io.BytesIO(content)
    for _ in range(5):
        list(pickletools.genops(file))
        ends.append(file.tell())
    which = chance.choice((0, 1, 2, 3, 3, 3, 4, 4))
    start, end = ends[which : which + 2]
    part = change_pickle(chance, content[start:end])
    if which == 4:
        keys = content[start:end]
        first = keys.index(b"X")
        part = chance.choice((part, b"\x80\2].", b"\x80\2}.", b"\x80\2)", keys[:first] + keys[first + 15 :]))
    return content[:start] + part + content[end:]


def bare_pickle(chance: Chance, content: bytes) -> bytes:
    hostile = chance.choice(HOSTILE)
    return (
        b"\x80"
        + chance.choice((b"\2", b"\4", b"\5"))
        + chance.choice((hostile, b"}" + text("a") + hostile + b"s"))
        + b"."
    )


bare_pickle.repacks = True
ARCHIVE_PICKLES = [change_archives_pickle] * 9 + [bare_pickle]
OLD_FORMAT = [change_old_format] * 9 + [bare_pickle]
