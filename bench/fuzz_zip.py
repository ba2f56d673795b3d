"""Mutations of zip archives: entries written anew with checksums that fit, or headers and directory changed."""

import io
import os
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import cache

from bench.fuzz_bytes import Chance, flip_bits, grown, number_changed, one, random_run, set_bytes, truncated, zeroed

BOMB = 1200  # MB

Entries = list[tuple[zipfile.ZipInfo, bytes]]


def unpack(content: bytes) -> Entries:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(info, archive.read(info)) for info in archive.infolist()]


def pack(entries: Entries) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for info, content in entries:
            fresh = zipfile.ZipInfo(info.filename)
            fresh.external_attr, fresh.compress_type = info.external_attr, info.compress_type
            archive.writestr(fresh, content)
    return file.getvalue()


def with_entries(change: Callable[[Chance, Entries], Entries | None]) -> Callable[[Chance, bytes], bytes]:
    """The archive written anew, whole and with right checksums, from changed entries."""

    def changed(chance: Chance, content: bytes) -> bytes:
        entries = unpack(content)
        other = change(chance, entries)
        with warnings.catch_warnings(action="ignore"):  # of names that are there twice
            return pack(entries if other is None else other)

    changed.__name__ = change.__name__
    return changed


def entry_renamed(chance: Chance, entries: Entries) -> None:
    info, _ = chance.choice(entries)
    name, other = info.filename, chance.choice(entries)[0].filename
    info.filename = chance.choice((f"../../{name}", f"/{name}", os.path.abspath("absolute"), name + "/", name.upper(),
        other, other.upper(), name + "x", "", "..", name.replace("/", "\\"), "other/" + name, name[::-1], "é" + name))  # fmt: skip


def entry_is_link(chance: Chance, entries: Entries) -> None:
    place = chance.randrange(len(entries))
    info, content = entries[place]
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    entries[place] = info, chance.choice((content, b"/etc/passwd", b"../../outside"))


def entry_is_folder(chance: Chance, entries: Entries) -> None:
    chance.choice(entries)[0].external_attr |= 0x10


def entries_twice(chance: Chance, entries: Entries) -> Entries:
    """A name twice, with other bytes the second time."""
    info, content = chance.choice(entries)
    at = chance.choice((0, len(entries)))
    return [*entries[:at], (info, chance.choice((content, random_run(chance, content or b"\0")))), *entries[at:]]


def entries_reordered(chance: Chance, entries: Entries) -> None:
    chance.shuffle(entries)


def entry_lost(chance: Chance, entries: Entries) -> None:
    entries.pop(chance.randrange(len(entries)))


def entry_more(chance: Chance, entries: Entries) -> None:
    folder = entries[0][0].filename.partition("/")[0]
    name = chance.choice(
        ("data/999", "byteorder", "constants.pkl", "code/x.py", "../x", ".data/x", "data/0.npy", "data.pkl")
    )
    place = chance.choice((folder, "other", ".."))
    entries.insert(chance.randrange(len(entries) + 1), (zipfile.ZipInfo(f"{place}/{name}"), chance.randbytes(24)))


def entry_bytes_changed(chance: Chance, entries: Entries) -> None:
    """With a checksum that fits."""
    place = chance.choice([place for place, (_, content) in enumerate(entries) if content])
    info, content = entries[place]
    change = chance.choice((flip_bits, set_bytes, truncated, grown, zeroed, number_changed))
    entries[place] = info, change(chance, content)


def entries_compressed(chance: Chance, entries: Entries) -> None:
    for info, _ in entries:
        info.compress_type = chance.choice(
            (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_STORED)
        )


def values_not_finite(chance: Chance, entries: Entries) -> None:
    place = chance.choice([place for place, (_, content) in enumerate(entries) if len(content) > 300])
    info, content = entries[place]
    at = len(content) - 4 * chance.randint(1, 20)
    entries[place] = (
        info,
        content[:at] + struct.pack("<f", chance.choice((float("nan"), float("inf")))) + content[at + 4 :],
    )


def directory_changed(chance: Chance, content: bytes) -> bytes:
    """A field of an entry in the archive's directory: sizes, checksum, method, flags, place."""
    changed = bytearray(content)
    start = chance.choice([match.start() for match in re.finditer(b"PK\1\2", content)])
    at, width = chance.choice(
        ((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (38, 4), (42, 4))
    )
    number = chance.choice((0, 1, 8, 99, 2**31 - 1, 2**32 - 1, chance.getrandbits(32))) % 2 ** (8 * width)
    changed[start + at : start + at + width] = number.to_bytes(width, "little")
    return bytes(changed)


def local_header_changed(chance: Chance, content: bytes) -> bytes:
    changed = bytearray(content)
    start = chance.choice([match.start() for match in re.finditer(b"PK\3\4", content)])
    at, width = chance.choice(((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2), (30, 1)))
    changed[start + at : start + at + width] = chance.randbytes(width)
    return bytes(changed)


def directory_repeated(chance: Chance, content: bytes) -> bytes:
    """Many entries of the directory for the bytes of one: what unpacks each is long at it."""
    end = content.rindex(b"PK\5\6")
    size, start = struct.unpack_from("<II", content, end + 12)
    records = [match.start() for match in re.finditer(b"PK\1\2", content[start:end])]
    first = chance.randrange(len(records))
    record = content[start + records[first] : start + [*records, size][first + 1]]
    count = chance.choice((2, 60000))
    length = int.from_bytes(record[28:30], "little")
    numbered = record[:46] + b"%0*d" + record[46 + length :]
    more = b"".join(numbered.replace(b"%0*d", str(number).zfill(length).encode()[-length:]) for number in range(count))
    if chance.random() < 0.3:
        more = record * count
    total = len(records) + count
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, total, total, size + len(more), start, 0)
    return content[:end] + more + tail


@cache
def zeros() -> tuple[bytes, int]:
    """A bomb's MB of zeros deflated, and their checksum."""
    packer, block, crc = zlib.compressobj(9, zlib.DEFLATED, -15), bytes(2**20), 0
    one_block = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(BOMB):
        crc = zlib.crc32(block, crc)
    return one_block * BOMB + packer.flush(), crc


def bomb(chance: Chance, content: bytes) -> bytes:
    """One entry unpacks to more than a reader may take, by what it says and in truth."""
    entries = unpack(content)
    place = chance.choice(
        [place for place, (info, _) in enumerate(entries) if "/data/" in info.filename or ".npy" in info.filename]
    )
    name, (deflated, crc) = entries[place][0].filename.encode(), zeros()
    mark = zlib.compress(name)[:16].ljust(16, b"#")
    entries[place] = entries[place][0], mark
    entries[place][0].compress_type = zipfile.ZIP_STORED
    content = pack(entries)
    data = content.index(mark)
    header = data - len(name) - 30
    fields = struct.pack("<III", crc, len(deflated), BOMB * 2**20)
    content = content[: header + 8] + b"\x08\0" + content[header + 10 : header + 14] + fields + content[header + 26 :]
    content = content[:data] + deflated + content[data + len(mark) :]
    grown_by, end = len(deflated) - len(mark), content.rindex(b"PK\5\6")
    changed = bytearray(content)
    start = int.from_bytes(changed[end + 16 : end + 20], "little") + grown_by
    changed[end + 16 : end + 20] = start.to_bytes(4, "little")
    while changed[start : start + 4] == b"PK\1\2":
        lengths = struct.unpack_from("<HHH", changed, start + 28)
        offset = int.from_bytes(changed[start + 42 : start + 46], "little")
        if offset == header:
            changed[start + 10 : start + 12], changed[start + 16 : start + 28] = b"\x08\0", fields
        elif offset > header:
            changed[start + 42 : start + 46] = (offset + grown_by).to_bytes(4, "little")
        start += 46 + sum(lengths)
    return bytes(changed)


ZIP = [one(change) for change in (*map(with_entries, (entry_renamed, entry_renamed, entry_is_link, entry_is_folder,
    entries_twice, entries_reordered, entry_lost, entry_more, entry_bytes_changed, entries_compressed, values_not_finite)),
    directory_changed, directory_changed, local_header_changed, directory_repeated, bomb)]  # fmt: skip

# those that write checksums anew
REWRITING_ZIP = (entry_renamed, entry_is_link, entries_twice, entry_lost, entry_more, entry_bytes_changed,
    values_not_finite, directory_repeated)  # fmt: skip
