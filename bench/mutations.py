"""The mutations of bench.fuzz, and hostile pickles: pure functions of a random generator and a file's bytes."""

import io
import json
import math
import pickle
import pickletools
import random
import re
import struct
import zipfile
from collections.abc import Callable

Chance = random.Random
HUGE = 10**11
NUMBERS = (0, 1, -1, 7, 99, 2**31 - 1, 2**32 - 1, HUGE, 2**63 - 1)
BOMB = 300 * 2**20  # bytes


# ---- bytes of any format ----


def flip_bits(chance: Chance, content: bytes) -> bytes:
    """Anywhere, or at the ends, where headers and directories lie."""
    changed = bytearray(content)
    reach = min(len(changed), chance.choice((1500, len(changed))))
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        place = chance.randrange(reach)
        changed[chance.choice((place, -1 - place))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def damage(chance: Chance, content: bytes) -> bytes:
    """Overwrite, insert, lose, repeat, or swap ranges."""
    a, b, c = sorted(chance.randrange(len(content) + 1) for _ in range(3))
    b, end = chance.choice((b, min(b, a + 8))), max(0, len(content) - chance.randint(1, 64))
    numbers = struct.pack("<q", chance.choice(NUMBERS)), struct.pack("<f", chance.choice((math.nan, -math.inf)))
    new = chance.choice((chance.randbytes(b - a), bytes(b - a), *numbers))
    at = chance.choice((0, a, end & ~3, len(content)))
    overwritten = (content[:at] + new + content[at + len(new) :])[: len(content)]
    lost = chance.choice((content[:a], content[:end], content[:a] + content[b:]))
    swapped = content[:a] + content[b:c] + content[a:b] + content[c:]
    inserted, repeated = content[:at] + new + content[at:], content[:b] + content[a:]
    return chance.choice((overwritten, overwritten, inserted, lost, repeated, swapped))


def other_file(chance: Chance, content: bytes) -> bytes | str | None:
    """An empty or foreign file; a text is the target of a link, None a named pipe."""
    starts = b"|<!DOCTYPE html>|version https://git-lfs.github.com/spec/v1\n|null|PK\3\4|\x80\2.|\x93NUMPY\1\0v\0{'shape': (9,)}"
    tar = (b"storages".ljust(100, b"\0") + b"0000644\0" * 3 + b"00000000010\0" * 2).ljust(2048, b"\0")
    contents = *starts.split(b"|"), tar, bytes(5000), chance.randbytes(500), b"[" * 50000, b"PK\5\6" + bytes(18)
    return chance.choice((*contents, None, *"vit.pth w.pth . absent /dev/zero /dev/full /proc/self/environ".split()))


# ---- JSON: descriptions, indices, headers of .safetensors files ----

# what may replace a name, dtype, shape, offset, or file
NAMES = "F64 F16 BF16 I64 U8 BOOL F8_E4M3 F4 C64 ../secret.safetensors /etc/passwd .. a/../b __metadata__ module.a é".split()
WRONG = [*NAMES, "", "\n\x1b[2J", "\0", "k" * 5000, None, True, 1.5, *NUMBERS, 10**30]
WRONG += [[], {}, {"a": {"b": "c"}}, [0, HUGE], [HUGE, HUGE], [-4, 0], [0, 4], [24], [12]]
NOT_JSON = ["NaN", "1e999", '"\\ud800"', "9" * 5000, "}", "1,", *("[" * depth + "]" * depth for depth in (400, 10**5))]


def places(node: dict | list) -> list[tuple]:
    """Each (mapping or list, key) at any depth."""
    own = [(node, key) for key in (node if isinstance(node, dict) else range(len(node)))]
    return own + [place for _, key in own if isinstance(node[key], dict | list) for place in places(node[key])]


def change_json(chance: Chance, content: bytes) -> bytes:
    """Replace a value by another one or by no JSON; or lose, rename, or repeat a key."""
    tree = json.loads(content)
    (node, key), (others, other) = chance.choices(places(tree), k=2)
    new = chance.choice((json.dumps(chance.choice(WRONG)), json.dumps(others[other]), chance.choice(NOT_JSON)))
    node[key] = "the fuzzer's value"
    if isinstance(node, dict) and chance.random() < 0.2:
        removed = node.pop(key)
        node |= chance.choice(({}, {chance.choice((*NAMES, "\n", str(other))): removed}))
    changed = json.dumps(tree).replace('"the fuzzer\'s value"', new, 1)
    return chance.choice((changed, changed, changed, changed[:-1] + "," + changed[1:])).encode()


def change_header(chance: Chance, content: bytes) -> bytes:
    """Change the header of a `.safetensors` file, or its length."""
    length = int.from_bytes(content[:8], "little")
    if chance.random() < 0.1:
        return struct.pack("<q", chance.choice((*NUMBERS, length - 1, length + 1, len(content)))) + content[8:]
    header = change_json(chance, content[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


# ---- zip archives ----


def unpack(content: bytes) -> list[list]:
    """The parts of an archive: name, bytes, attributes, compression."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [[info.filename, archive.read(info), info.external_attr, 0] for info in archive.infolist()]


def pack(parts: list[list]) -> bytes:
    """An archive with checksums that fit."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compresslevel=1) as archive:
        for name, content, attributes, compression in parts:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = attributes, compression
            archive.writestr(info, content)
    return file.getvalue()


def change_parts(chance: Chance, content: bytes) -> bytes:
    """Rename, damage, mark, compress, add, or lose a part; or let one unpack to more than a reader may take."""
    parts = unpack(content)
    part = chance.choice(parts)
    name, folder = part[0], part[0].partition("/")[0]
    names = [
        f"../../{name}",
        f"/{name}",
        f"{name}/",
        f"other/{name}",
        name.upper(),
        name.replace("/", "\\"),
        f"{folder}x",
    ]
    names += [f"{folder}/data/999", f"{folder}/byteorder", "other/data.pkl", "", *[chance.choice(parts)[0]] * 4]
    damaged = chance.choice((flip_bits, damage))(chance, part[1] or bytes(8))
    # 0x10 marks a folder, the other attributes a symbolic link
    values = names, [damaged], (0x10, 0o120777 << 16), (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    field = chance.choice((0, 1, 1, 2, 3, 4, 5))
    if chance.random() < 0.02:
        part[1], part[3] = bytes(BOMB), zipfile.ZIP_DEFLATED
    elif field < 4:
        part[field] = chance.choice(values[field])
    elif field == 4:
        parts.insert(chance.choice((0, len(parts))), [chance.choice(names), chance.choice((part[1], damaged)), 0, 0])
    else:
        parts.remove(part)
    return pack(parts)


def change_record(chance: Chance, content: bytes) -> bytes:
    """Change a number in an archive's directory, in the header of a part, or at the end."""
    signature, length = chance.choice(((b"PK\1\2", 46), (b"PK\3\4", 30), (b"PK\5\6", 22)))
    start = chance.choice([match.start() for match in re.finditer(signature, content)]) + chance.randrange(4, length, 2)
    number = struct.pack("<q", chance.choice((*NUMBERS, chance.getrandbits(32))))[: chance.choice((2, 4))]
    return content[:start] + number + content[start + len(number) :]


# words of an array's header, and what may replace them
WORDS = re.compile(r"'<f4'|False|\(.*?\)|\d+|'descr'|}")
ARRAYS = "'>f4' '<f8' '<i4' '|O' '<f2' '|S4' '<M8[s]' '<f99' (-1,) () (1.5,) [4] None True 24,1 1,24 96 12".split()
ARRAYS += [f"({HUGE},)", "(9**9**9,)", "(" * 150 + ")" * 150, "-" * 9000 + "1", "{" * 90, "}" + "x" * 9000]


def change_array(chance: Chance, content: bytes) -> bytes:
    """Change a word of an array's header."""
    parts = unpack(content)
    part = chance.choice(parts)
    end = 10 + int.from_bytes(part[1][8:10], "little")
    header, values = part[1][10:end].decode(), part[1][end:]
    word = chance.choice(("'<f4'", *WORDS.findall(header)))
    encoded = header.replace(word, chance.choice(ARRAYS), 1).encode()
    part[1] = part[1][:8] + struct.pack("<H", len(encoded)) + encoded + values
    return pack(parts)


# ---- pickles: opcodes that run code, ask for too much memory, or take forever to walk ----


def push(value: object) -> bytes:
    """Opcodes that leave a plain value on the stack."""
    return pickle.dumps(value, protocol=2)[2:-1]


def called(name: str, *arguments: bytes) -> bytes:
    """Call module.name, or module:name if the name has dots, which protocol 4 follows."""
    module, _, name = name.partition(":") if ":" in name else name.rpartition(".")
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def tensor(length=24, kind="Float", key="0", device="cpu", shape=(4,), stride=(1,), offset=0) -> bytes:
    """Rebuild a tensor from a storage of `length` values, as torch.save does."""
    kind = f"ctorch\n{kind}Storage\n".encode()
    storage = b"(" + push("storage") + kind + push(key) + push(device) + push(length) + b"tQ"
    numbers = push(offset) + push(shape) + push(stride)
    return called("torch._utils._rebuild_tensor_v2", storage, numbers, b"\x89", called("collections.OrderedDict"))


def nested(kind: type, levels: int, width: int = 2) -> bytes:
    """A tuple or list holding one `width` times, and so on: a walk through it meets width**levels objects."""
    value = kind()
    for _ in range(levels):
        value = kind([value] * width)
    return push(value)


SHELL = push("touch canary-of-the-fuzzer")  # a file in the working folder, if the code in a mutant runs
CALLABLES = """os.system builtins.eval builtins.__import__ builtins.open subprocess.Popen webbrowser.open pickle.loads
    torch.load torch.hub.load torch.storage._load_from_bytes torch.serialization:os.system torch:ops.load_library"""
RUN_CODE = [called(name, SHELL) for name in CALLABLES.split()]
# the other opcodes that call: OBJ, INST, STACK_GLOBAL, EXT1, BUILD on a function and on a class
RUN_CODE += [b"cposix\nsystem\n(" + SHELL + b"to.", b"(" + SHELL + b"iposix\nsystem\n"]
RUN_CODE += [push("posix") + push("system") + b"\x93" + SHELL + b"\x85R", b"\x82\x01"]
RUN_CODE += [b"ctorch._utils\n_rebuild_tensor_v2\n}" + push("__code__") + SHELL + b"sb"]
RUN_CODE += [b"ctorch\nTensor\n}" + push("__init__") + SHELL + b"sb"]
RUN_CODE += [called("builtins.getattr", b"ctorch._utils\nos\n", push("system")) + SHELL + b"\x85R"]
MEMORY = [called(name, push(10**9)) for name in "builtins.bytearray torch.Tensor torch.FloatTensor torch.Size".split()]
MEMORY += [b"ctorch\nFloatTensor\n" + push(10**9) + b"\x85\x81", called("_codecs.encode", push("a"), push("hex"))]
# lengths of LONG4, BINUNICODE, BINUNICODE8; and LONG_BINPUT, for which Python's unpickler in C makes a table as long
MEMORY += [b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"r\xff\xff\xff\xff", push(2**2000)]
TENSORS = [tensor(length) for length in (HUGE, 2**62, -4)] + [tensor(shape=(side,)) for side in (HUGE, -4)]
TENSORS += [tensor(kind="Untyped"), tensor(kind="QInt8"), tensor(device="cuda:7"), tensor(device="meta")]
TENSORS += [tensor(key="../../0"), tensor(key="gone"), tensor(offset=10**9), tensor(offset=-4), tensor(stride=(-1,))]
TENSORS += [tensor(shape=(3 * 10**9,), stride=(0,)), tensor(shape=(3 * 10**4, 10**5), stride=(0, 0))]
ENDLESS = [nested(tuple, 40), nested(tuple, 4, 60), nested(list, 60), nested(list, 60) + b")R"]
ENDLESS += [b"]q\xc8h\xc8a", b"}q\xc8" + push("model") + b"h\xc8s"]  # a list and a mapping that hold themselves
ENDLESS += [b"]" * 20000 + b"a" * 19999, b"K\1" + b"\x85" * 20000]
MALFORMED = [*(b"h\xff 0 R e s Q NQ b }}b ]}b t".split()), b"0" * 9, b"(" * 500, push("\x1b[2J\n\rline two")]
HOSTILE = [*RUN_CODE, *MEMORY, *TENSORS, *ENDLESS, *MALFORMED]


def changed_pickle(chance: Chance, content: bytes) -> bytes:
    """A pickled mapping with hostile opcodes as a value, as a key, or as all of it; or with one of its opcodes changed."""
    hostile, end = chance.choice(chance.choice((RUN_CODE, HOSTILE, HOSTILE))), content.rindex(b".")
    names, starts = zip(*((op.name, start) for op, _, start in pickletools.genops(content)), strict=True)
    at = chance.randrange(1, len(starts) - 1)
    numbers = [index for index, name in enumerate(names) if name.startswith(("BININT", "BINGET"))]
    number = chance.choice(numbers or [at])
    key = push(chance.choice(("extra.weight", "pos_embed", "cls_token", "model")))
    as_value, as_key = content[:end] + key + hostile + b"s.", content[:end] + hostile + b"Ns."
    new = chance.choice((hostile, chance.randbytes(1), b"0", b"N"))
    inserted = content[: starts[at]] + new + content[starts[at] :]
    new = chance.choice((*map(push, (*NUMBERS, None, True, "1")), b"h\1", b"h\7"))
    replaced = content[: starts[number]] + new + content[starts[number + 1] :]
    return chance.choice((content[:2] + hostile + b".", as_value, as_key, inserted, replaced, replaced))


def change_pickle(chance: Chance, content: bytes) -> bytes:
    """Change the pickle in an archive of torch.save."""
    parts = unpack(content)
    part = next(part for part in parts if part[0].endswith("/data.pkl"))
    part[1] = changed_pickle(chance, part[1])
    return pack(parts)


def change_old_pickle(chance: Chance, content: bytes) -> bytes:
    """Change one of the five pickles of torch's old format: a number, a version, sizes, the tensors, the storages' keys."""
    *pickles, keys = content[2:].split(b".\x80\2", 4)
    keys, _, values = keys.partition(b".")
    pickles.append(keys)
    which = chance.choice((0, 1, 2, 3, 3, 3, 4))
    changed = changed_pickle(chance, b"\x80\2" + pickles[which] + b".")[2:-1]
    pickles[which] = chance.choice((changed, b"]", b"}", b")")) if which == 4 else changed
    return b"\x80\2" + b".\x80\2".join(pickles) + b"." + values


# by kind of file: the suffix of the files that are changed, and the mutations
BYTES = [flip_bits, flip_bits, damage, damage, other_file]
TORCH = [*BYTES, change_parts, change_parts, change_parts, change_record, *[change_pickle] * 6]
HEADER = [*BYTES, *[change_header] * 5]
DESCRIPTION = [*BYTES, *[change_json] * 5]
MUTATIONS: dict[str, dict[str, list[Callable]]] = {
    "initialization": {".pth": TORCH, ".json": DESCRIPTION},
    "checkpoint": {"": TORCH},
    ".pth": {"": TORCH},
    ".pth, old": {"": [*BYTES, *[change_old_pickle] * 5]},
    ".safetensors": {"": HEADER},
    ".npz": {"": [*BYTES, change_parts, change_parts, change_record, *[change_array] * 4]},
    "index": {".safetensors": HEADER, ".json": DESCRIPTION},
}
FITTING = {change_parts, change_array, change_pickle}  # they write checksums that fit


def mutant(kind: str, number: int, seed: int, files: dict[str, bytes]) -> tuple[Callable, dict]:
    """A mutation and the files with one of them changed; the same for the same kind, number, and seed."""
    chance = random.Random(f"{seed}/{kind}/{number}")
    suffix, mutations = chance.choice(list(MUTATIONS[kind].items()))
    mutation, name = chance.choice(mutations), chance.choice([name for name in files if name.endswith(suffix)])
    return mutation, {**files, name: mutation(chance, files[name])}
