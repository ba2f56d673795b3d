"""Mutations of pickles, alone, in an archive, or in torch's old format: code that must not run, and what costs too much."""

import io
import pickle
import pickletools
import struct

from bench.fuzz_bytes import Chance
from bench.fuzz_zip import pack, unpack

CANARY = "canary-of-the-fuzzer"  # a file that code of a mutant would make in the working folder


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
