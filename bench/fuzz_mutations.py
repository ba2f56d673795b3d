"""What bench/fuzz.py does to files: (generator, files) -> files, every mutation a pure function of both."""

import io
import json
import os
import pickle
import pickletools
import random
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

BOMB = 1200  # MB
CANARY = "canary-of-the-fuzzer"  # a file that code of a mutant would make in the working folder


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


# ---- zip archives ----


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


# ---- pickles ----


def called(module: str, name: str, arguments: bytes) -> bytes:
    """Opcodes that call module.name with a tuple that `arguments` push."""
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n" + arguments + b"R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def whole(number: int) -> bytes:
    """The opcode of a number of up to 255 bytes."""
    encoded = pickle.encode_long(number)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def nested_tuples(levels: int, width: int = 2) -> bytes:
    """A tuple of `width` times one tuple, which is of the same kind: width**levels objects to whoever walks through them."""
    code = b")"
    for _ in range(levels):
        code = b"(" + code + b"q\xc8" + b"h\xc8" * (width - 1) + b"t"
    return code


def nested_lists(levels: int) -> bytes:
    """A list of two times one list, which is of the same kind."""
    code = b"]q\x64"
    for level in range(levels):
        code = b"]q" + bytes([101 + level]) + code + b"ah" + bytes([100 + level]) + b"a"
    return code


def storage(count: int, kind: str = "FloatStorage", key: str = "0", place: str = "cpu") -> bytes:
    return b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text(place) + whole(count) + b"tQ"


def rebuilt(storage: bytes, size: tuple, stride: tuple, offset: int = 0, function: str = "_rebuild_tensor_v2") -> bytes:
    shape, steps = (b"(" + b"".join(map(whole, each)) + b"t" for each in (size, stride))
    hooks = b"ccollections\nOrderedDict\n)R"
    return called("torch._utils", function, b"(" + storage + whole(offset) + shape + steps + b"\x89" + hooks + b"t")


SHELL = f"touch {CANARY}"
RUN = [called(module, name, b"(" + text(SHELL) + b"t") for module, name in (
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("subprocess", "getoutput"),
    ("subprocess", "Popen"), ("os", "mkdir"), ("builtins", "__import__"), ("builtins", "compile"), ("builtins", "open"),
    ("torch", "load"), ("torch.hub", "load"), ("torch.serialization", "load"), ("numpy", "load"), ("pickle", "loads"),
    ("torch.serialization", "os.system"), ("torch._utils", "os.system"), ("shutil", "rmtree"), ("runpy", "run_path"),
    ("importlib", "import_module"), ("timm.models._helpers", "load_state_dict"), ("torch", "ops.load_library"),
    ("torch.storage", "_load_from_bytes"), ("torch.jit", "load"), ("webbrowser", "open"), ("codecs", "open"))]  # fmt: skip
RUN += [
    b"cposix\nsystem\n(" + text(SHELL) + b"to.",  # OBJ
    b"(" + text(SHELL) + b"iposix\nsystem\n",  # INST
    text("posix") + text("system") + b"\x93" + text(SHELL) + b"\x85R",  # STACK_GLOBAL
    b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("__code__") + text(SHELL) + b"sb",  # BUILD on a function
    b"ctorch\nTensor\n}" + text("__init__") + text(SHELL) + b"sb",
    called("builtins", "getattr", b"(ctorch._utils\nos\n" + text("system") + b"t") + text(SHELL) + b"\x85R",
    b"\x82\x01",  # EXT1
]
BIG = 10**11
BOMBS = [
    called("builtins", "bytearray", whole(BIG) + b"\x85"),
    called("builtins", "bytearray", whole(3 * 10**9) + b"\x85"),
    called("torch", "Tensor", whole(3 * 10**8) + b"\x85"),
    called("torch", "Size", b"(" + b"".join(map(whole, (BIG, BIG))) + b"t\x85"),
    b"ctorch\nTensor\n" + whole(3 * 10**8) + b"\x85\x81",
    b"ctorch\nFloatTensor\n" + whole(3 * 10**8) + b"\x85\x81",
    rebuilt(storage(4), (BIG,), (1,)),
    rebuilt(storage(4), (3 * 10**9,), (0,)),
    rebuilt(storage(4), (3 * 10**4, 10**5), (0, 0)),
    rebuilt(storage(BIG), (4,), (1,)),
    rebuilt(storage(2**62), (4,), (1,)),
    rebuilt(storage(-4), (4,), (1,)),
    rebuilt(storage(24), (4,), (1,), 10**9),
    rebuilt(storage(24), (4,), (1,), -4),
    rebuilt(storage(24), (-4,), (1,)),
    rebuilt(storage(24), (4,), (-1,)),
    rebuilt(storage(24, "UntypedStorage"), (4,), (1,)),
    rebuilt(storage(24, "QInt8Storage"), (4,), (1,)),
    rebuilt(storage(24, place="cuda:7"), (4,), (1,)),
    rebuilt(storage(24, place="meta"), (4,), (1,)),
    rebuilt(storage(24, key="../../0"), (4,), (1,)),
    rebuilt(storage(24, key="gone"), (4,), (1,)),
    rebuilt(storage(24), (4,), (1,), function="_rebuild_meta_tensor_no_storage"),
    called("torch._utils", "_rebuild_meta_tensor_no_storage", b"(ctorch\nfloat32\n(" + whole(BIG) + b"t(K\1t\x89t"),
    called("torch._utils", "_rebuild_wrapper_subclass", b"(ctorch\nTensor\nctorch\nfloat32\n)t"),
    nested_tuples(40),
    nested_tuples(4, 60),
    nested_lists(60),
    nested_lists(60) + b")R",
    nested_lists(60) + b")\x81",
    b"]q\xc8h\xc8a",  # a list that holds itself
    b"}q\xc8" + text("model") + b"h\xc8s",
    b"]" * 20000 + b"a" * 19999,
    b"K\1" + b"\x85" * 20000,
    whole(2**2000 - 1),
    text("\x1b[2J\n\rline two"),
    b"\x8b" + struct.pack("<i", 2**31 - 1),  # LONG4
    b"X" + struct.pack("<I", 2**32 - 1),
    b"\x8d" + struct.pack("<Q", 2**62),  # BINUNICODE8
    b"r" + struct.pack("<I", 2**32 - 1),  # LONG_BINPUT
    b"j" + struct.pack("<I", 2**32 - 1),
    b"h\xff", b"0" * 9, b"R", b"e", b"s", b"Q", b"NQ", b"b", b"}}b", b"]}b", b"(" * 500, b"t",
]  # fmt: skip
_doubling = text("a") + b"q\xc8"
for _ in range(33):
    _doubling = called("_codecs", "encode", b"(" + _doubling + text("hex") + b"t")
BOMBS.append(called("_codecs", "encode", b"(" + text("a") + text("utf-8") + b"t"))
BOMBS.append(_doubling)


def pickle_changed(chance: Chance, content: bytes) -> bytes:
    """A pickle of a mapping with a thing more in it, in the place of a value, as a key or as all; or with changed opcodes."""
    thing = chance.choice(RUN if chance.random() < 0.4 else BOMBS)
    end = content.rindex(b".")
    kind = chance.randrange(6)
    if kind == 0:
        return content[:2] + thing + b"."
    if kind == 1:  # a value under a new key
        return content[:end] + text(chance.choice(("extra.weight", "pos_embed", "cls_token", "model"))) + thing + b"s."
    if kind == 2:  # a key; what cannot be one is refused
        return content[:end] + thing + b"Ns."
    if kind == 3:  # before the first op
        return content[:2] + thing + content[2:]
    if kind == 4:
        places = [place for _, _, place in pickletools.genops(content)][1:-1]
        place = chance.choice(places)
        return content[:place] + chance.choice((thing, chance.randbytes(1), b"0", b"N", b"h\0")) + content[place:]
    return number_in_pickle_changed(chance, content)


def number_in_pickle_changed(chance: Chance, content: bytes) -> bytes:
    """A size, a stride, an offset or a key of the memo."""
    ops = [(op, place) for op, _, place in pickletools.genops(content)]
    numbers = [at for at, (op, _) in enumerate(ops) if op.name in ("BININT1", "BININT", "BININT2", "BINGET")]
    at = chance.choice(numbers or [1])
    place, after = ops[at][1], ops[at + 1][1]
    new = chance.choice((b"K\0", b"K\1", whole(-1), whole(2**31), whole(BIG), whole(2**63), b"N", b"\x88", b"h\1",
        text("1"), b"G" + struct.pack(">d", 1.5), b"K" + chance.randbytes(1), b"h" + chance.randbytes(1)))  # fmt: skip
    return content[:place] + new + content[after:]


def archive_pickle_changed(chance: Chance, content: bytes) -> bytes:
    """In an archive whose checksums fit."""
    entries = unpack(content)
    place = next(place for place, (info, _) in enumerate(entries) if info.filename.endswith("/data.pkl"))
    entries[place] = entries[place][0], pickle_changed(chance, entries[place][1])
    return pack(entries)


def old_pickle_changed(chance: Chance, content: bytes) -> bytes:
    """One of the pickles of torch's old format: a number, a version, sizes, the tensors, the storages' keys."""
    ends, file = [0], io.BytesIO(content)
    for _ in range(5):
        list(pickletools.genops(file))
        ends.append(file.tell())
    which = chance.choice((0, 1, 2, 3, 3, 3, 4, 4))
    part = content[ends[which] : ends[which + 1]]
    if which == 4 and chance.random() < 0.7:
        ops = [(place, op.name) for op, _, place in pickletools.genops(part)]
        texts = [place for place, name in ops if name == "BINUNICODE"]
        first = chance.choice(texts)
        after = next(place for place, _ in ops if place > first)
        part = chance.choice((b"\x80\2].", b"\x80\2}.", b"\x80\2)", part[:first] + part[after:], part[:after] + part[first:],
            part[:after] + text("7") + part[after:]))  # fmt: skip
    else:
        part = pickle_changed(chance, part)
    return content[: ends[which]] + part + content[ends[which + 1] :]


def bare_pickle(chance: Chance, content: bytes) -> bytes:
    thing = chance.choice(RUN + BOMBS)
    return (
        b"\x80" + chance.choice((b"\2", b"\4", b"\5")) + chance.choice((thing, b"}" + text("a") + thing + b"s")) + b"."
    )


# ---- safetensors ----


HUGE = [2**31, 2**63 - 1, 2**64, -1, 10**30, 1.5, True, None, "1", [], {}]


def header_changed(chance: Chance, content: bytes) -> bytes:
    """The header of a .safetensors file: its length, a dtype, a shape, a place, a name, keys twice, or what is not JSON."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    key, other = chance.sample([key for key in header if key != "__metadata__"], 2)
    entry, kind = header[key], chance.randrange(12)
    lengths = [0, 1, 7, length - 1, length + 1, len(content), 10**8, 10**11, 2**63, 2**64 - 1]
    if kind == 0:
        return chance.choice(lengths).to_bytes(8, "little") + content[8:]
    if kind == 1:
        entry["dtype"] = chance.choice(("F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0",
            "F4", "C64", "U16", "X", 3, None))  # fmt: skip
        if chance.random() < 0.6:  # as many values as the bytes are
            width = {"F64": 8, "I64": 8, "C64": 8, "F16": 2, "BF16": 2, "U16": 2, "I32": 4}.get(entry["dtype"], 1)
            count = (entry["data_offsets"][1] - entry["data_offsets"][0]) // width
            entry["shape"] = [count]
    elif kind == 2:
        shape = entry["shape"]
        entry["shape"] = chance.choice(
            (shape[::-1], [*shape, 1], [1, *shape], shape[1:], [0, BIG], [BIG, BIG], [], shape * 2)
        )
    elif kind == 3:
        place = chance.randrange(max(1, len(entry["shape"])))
        entry["shape"][place : place + 1] = [chance.choice(HUGE)]
    elif kind == 4:
        entry["data_offsets"] = chance.choice(
            ([0, 0], [0, 4], entry["data_offsets"][::-1], [0, 10**11], [-4, 0], [1], "x")
        )
    elif kind == 5:
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == 6:
        entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], entry["data_offsets"]
    elif kind == 7:
        names = (
            other,
            key.upper(),
            "",
            "__metadata__",
            "a\nb\x1b[2J",
            "../../x",
            "k" * 5000,
            "module." + key,
            "\0",
            "é",
        )
        header[chance.choice(names)] = header.pop(key)
    elif kind == 8:
        header["__metadata__"] = chance.choice(({"a": 1}, {"a": {"b": "c"}}, [], "x", None, {"a": "x" * 10000}))
    elif kind == 9:
        header.pop(key)
    elif kind == 10:
        header["extra.weight"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    encoded = json.dumps(header).encode()
    if kind == 11:
        twice = json.dumps({key: header[chance.choice((key, other))]}).encode()
        encoded = chance.choice((encoded[:-1] + b"," + twice[1:], b"[" * 5000, b'{"a":' * 5000, encoded + b" " * 1000,
            encoded + b"\0", encoded.replace(b'"', b"'"), encoded[:-1] + b",}", b"\xff" + encoded))  # fmt: skip
    return len(encoded).to_bytes(8, "little") + encoded + data


def floats_not_finite(chance: Chance, content: bytes) -> bytes:
    at = len(content) - 4 * chance.randint(1, 2000)
    return content[:at] + struct.pack("<f", chance.choice((float("nan"), -float("inf")))) + content[at + 4 :]


# ---- JSON ----


WRONG = [
    None,
    True,
    0,
    -1,
    1.5,
    "",
    "x",
    "\n\x1b[2J",
    [],
    [1],
    {},
    {"a": 1},
    10**30,
    "../../x",
    "/etc/passwd",
    "\0",
    "vit",
    10**4000,
]


def json_changed(chance: Chance, content: bytes) -> bytes:
    """One value, at any depth, is of another type, huge, deeply nested, or no JSON; or a key is another."""
    tree = json.loads(content)
    node, names = tree, list(tree)
    while True:
        name = chance.choice(names)
        inner = node[name]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.4:
            break
        node, names = inner, list(inner) if isinstance(inner, dict) else range(len(inner))
    marker = "value of the fuzzer"
    node[name] = marker
    if isinstance(node, dict) and chance.random() < 0.15:
        node[chance.choice(("", "\n", "../x", "é", "module.a"))] = node.pop(name)
    text, deep = json.dumps(tree), chance.choice((50, 400, 900, 3000, 100000))
    new = chance.choice((lambda: json.dumps(chance.choice(WRONG[:-1])), lambda: "9" * 5000, lambda: "NaN", lambda: "-Infinity",
        lambda: "1e999", lambda: "[" * deep + "]" * deep, lambda: '{"a":' * deep + "1" + "}" * deep, lambda: "'x'",
        lambda: '"\\ud800"', lambda: "9" * 4000, lambda: json.dumps("y" * 100000)))()  # fmt: skip
    return text.replace(json.dumps(marker), new, 1).encode()


def weight_map_changed(chance: Chance, content: bytes) -> bytes:
    """The file of a tensor is one elsewhere, of another kind, or the whole map another thing."""
    tree = json.loads(content)
    files = tree["weight_map"]
    key = chance.choice(list(files))
    kind = chance.randrange(4)
    if kind == 0:
        others = set(files.values()) - {files[key]}
        files[key] = chance.choice(["../secret.safetensors", "/etc/passwd", os.path.abspath("x"), "..", ".", "", "a/../b",
            "./" + files[key], "C:\\x", "a\nb", "\0", "x" * 5000, *others, "~/x", "file:///x", 3, None, ["x"]])  # fmt: skip
    elif kind == 1:
        files[chance.choice((key.upper(), "extra.weight", "", "a\nb\x1b[2J"))] = files.pop(key)
    elif kind == 2:
        files.pop(key)
    else:
        tree["weight_map"] = chance.choice((None, [], "x", {}, list(files), {key: files[key]}))
    return json.dumps(tree).encode()


# ---- npz ----


def array_header_changed(chance: Chance, content: bytes) -> bytes:
    """The header of an array in a .npz: dtype, order, shape, version, or what is no header."""
    entries = unpack(content)
    place = chance.randrange(len(entries))
    info, array = entries[place]
    length = int.from_bytes(array[8:10], "little")
    header, data = array[10 : 10 + length].decode(), array[10 + length :]
    shape = re.search(r"\(.*?\)", header)[0]
    numbers = [int(number) for number in re.findall(r"\d+", shape)]
    new = chance.choice((
        lambda: header.replace("<f4", chance.choice((">f4", "<f8", "<i4", "|O", "<f2", "<c8", "|S4", "<U1", "|V4", "<M8[s]", "<f99"))),
        lambda: header.replace("False", chance.choice(("True", "None", "0"))),
        lambda: header.replace(shape, str((*numbers, 1))),
        lambda: header.replace(shape, str((1, *numbers))),
        lambda: header.replace(shape, str(tuple(numbers[::-1]))),
        lambda: header.replace(shape, chance.choice(("(100000000000,)", "(-1,)", "()", "(0,)", "(10,10,10,10,10,10,10,10,10,10,10,10)",
            "(4294967296, 4294967296)", "(True,)", "(1.5,)", "[4]", "None", "(9**9**9,)", "(" * 150 + ")" * 150))),
        lambda: "{" * 90 + header,
        lambda: "-" * 9000 + "1",
        lambda: header.replace("descr", "describe"),
        lambda: header + "x" * 9000,
        lambda: "\0" * 60,
    ))()  # fmt: skip
    version = chance.choice((b"\1\0", b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\7\7"))
    encoded = new.encode()
    size = struct.pack("<H" if version[0] == 1 else "<I", len(encoded) if chance.random() < 0.9 else 65535)
    entries[place] = info, b"\x93NUMPY" + version + size + encoded + data
    return pack(entries)


def object_array(chance: Chance, content: bytes) -> bytes:
    """An array of objects, whose bytes are a pickle."""
    entries = unpack(content)
    place = chance.randrange(len(entries))
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    pickled = b"\x80\2" + chance.choice(RUN + BOMBS) + b"."
    entries[place] = entries[place][0], b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + pickled
    return pack(entries)


# ---- which for which ----


def only(mutations: list[Mutation], suffix: str) -> list[Mutation]:
    """The mutations, of the files whose names end with `suffix`."""

    def restricted(mutation: Mutation) -> Mutation:
        def of_some(chance: Chance, files: Files) -> Files:
            chosen = {name: content for name, content in files.items() if name.endswith(suffix)}
            return {**files, **mutation(chance, chosen)}

        of_some.__name__ = mutation.__name__
        return of_some

    return [restricted(mutation) for mutation in mutations]


ARCHIVE = [*BYTES, *ZIP, *ZIP, *FOLDER, *[one(archive_pickle_changed)] * 24, one(bare_pickle)]
TENSORS = [*BYTES, *FOLDER, *[one(header_changed)] * 20, one(floats_not_finite)]
DESCRIPTION = [*[one(json_changed, ".json")] * 12, *only(FOLDER, ".json")]


MUTATIONS: dict[str, list[Mutation]] = {
    "initialization .pth": [*only(ARCHIVE, ".pth"), *DESCRIPTION, *only(BYTES, ".json")],
    "initialization .safetensors": [*only(TENSORS, ".safetensors"), *DESCRIPTION, *only(BYTES, ".json")],
    "checkpoint": ARCHIVE,
    ".pth": ARCHIVE,
    ".bin, nested": ARCHIVE,
    ".pth, old": [*BYTES, *FOLDER, *[one(old_pickle_changed)] * 24, one(bare_pickle)],
    ".safetensors": TENSORS,
    ".npz": [*BYTES, *ZIP, *FOLDER, *[one(array_header_changed)] * 12, one(object_array), one(object_array)],
    "index": [*BYTES, *FOLDER, *only(TENSORS, ".safetensors"), *[one(weight_map_changed, ".json")] * 10,
        *[one(json_changed, ".json")] * 3, *only(BYTES, ".json")],
}  # fmt: skip


# those that write an archive's checksums anew: what such a mutant of our own formats holds is what is written there
REWRITING = {change.__name__ for change in (entry_renamed, entry_is_link, entries_twice, entry_lost, entry_more,
    entry_bytes_changed, values_not_finite, archive_pickle_changed, bare_pickle, directory_repeated)}  # fmt: skip


def mutant(kind: str, number: int, seed: int, files: dict[str, bytes]) -> tuple[str, Files]:
    """The name of a mutation and what it makes of the files; the same for the same kind, number and seed."""
    chance = random.Random(f"{seed}/{kind}/{number}")
    mutation = chance.choice(MUTATIONS[kind])
    return mutation.__name__, mutation(chance, files)


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
