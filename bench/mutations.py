"""The mutations of bench.fuzz, and hostile pickles: pure functions of a random generator and a file's bytes."""

import io
import itertools
import json
import math
import pickle
import pickletools
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Chance = random.Random
Span = tuple[int, int]  # where a piece of a file starts and ends
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


def replace(chance: Chance, content: bytes, spans: list[Span], new: list[bytes]) -> bytes:
    """Put one of `new`, another span, or nothing in the place of a span or ahead of it."""
    (start, end), (other, its_end) = chance.choices(spans, k=2)
    piece = chance.choice((*[chance.choice(new)] * 3, content[other:its_end], b""))
    return content[:start] + piece + content[chance.choice((start, end, end)) :]


def damage(chance: Chance, content: bytes) -> bytes:
    """Overwrite, insert, repeat, or lose a range, or the end."""
    a, b = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    b, last = chance.choice((b, min(b, a + 8))), max(0, len(content) - chance.randint(1, 64))
    numbers = struct.pack("<q", chance.choice(NUMBERS)), struct.pack("<f", chance.choice((math.nan, -math.inf)))
    new = chance.choice((chance.randbytes(b - a), bytes(b - a), *numbers))
    if chance.random() < 0.6:
        return replace(chance, content, [(a, b), (a, len(content)), (last, len(content))], [new])
    at = chance.choice((0, a, last & ~3))
    return (content[:at] + new + content[at + len(new) :])[: len(content)]


def other_file(chance: Chance, content: bytes) -> bytes | str | None:
    """An empty or foreign file; a text is the target of a link, None a named pipe."""
    starts = b"|<!DOCTYPE html>|version https://git-lfs.github.com/spec/v1\n|null|PK\3\4|\x80\2.|\x93NUMPY\1\0v\0{'shape': (9,)}"
    tar = (b"storages".ljust(100, b"\0") + b"0000644\0" * 3 + b"00000000010\0" * 2).ljust(2048, b"\0")
    contents = *starts.split(b"|"), tar, bytes(5000), chance.randbytes(500), b"[" * 50000, b"PK\5\6" + bytes(18)
    return chance.choice((*contents, None, *"vit.pth w.pth . absent /dev/zero /dev/full /proc/self/environ".split()))


# ---- text: JSON descriptions and indices, headers of .safetensors files and of arrays ----

# strings, numbers, lists or tuples, mappings, other words
WORDS = [rb"\"[^\"]*\"|'[^']*'", rb"-?\d+", rb"\[[^][]*\]|\([^()]*\)", rb"\{[^{}]*\}", rb"null|true|[Ff]alse|[}\]]"]
# what may replace them in JSON, and in the header of an array
NAMES = "F64 F16 BF16 I64 U8 BOOL F8_E4M3 F4 C64 ../secret.safetensors /etc/passwd .. a/../b __metadata__ module.a é".split()
WRONG = [*NAMES, "", "\n\x1b[2J", "\0", "k" * 5000, None, True, 1.5, *NUMBERS, 10**30]
WRONG += [[], {}, {"a": {"b": "c"}}, [0, HUGE], [HUGE, HUGE], [-4, 0], [0, 4], [24], [12]]
NOT_JSON = ["NaN", "1e999", '"\\ud800"', "9" * 5000, "}", "1,", *("[" * depth + "]" * depth for depth in (400, 10**5))]
JSON = [json.dumps(value).encode() for value in WRONG] + [text.encode() for text in NOT_JSON]
ARRAY = b"'>f4' '<f8' '<i4' '|O' '<f2' '|S4' '<M8[s]' '<f99' (-1,) () (1.5,) [4] None True 24,1 1,24 96 12".split()
ARRAY += [b"(%d,)" % HUGE, b"(9**9**9,)", b"(" * 150 + b")" * 150, b"-" * 9000 + b"1", b"{" * 90, b"}" + b"x" * 9000]


def change_text(chance: Chance, content: bytes, new: list[bytes]) -> bytes:
    """Replace, insert, repeat, or lose a value, a key, or a bracket."""
    spans = [[match.span() for match in re.finditer(words, content)] for words in WORDS]
    return replace(chance, content, chance.choice([of_words for of_words in spans if of_words]), new)


def change_json(chance: Chance, content: bytes) -> bytes:
    return change_text(chance, content, JSON)


def change_header(chance: Chance, content: bytes) -> bytes:
    """Change the header of a `.safetensors` file, or its length."""
    length = int.from_bytes(content[:8], "little")
    if chance.random() < 0.1:
        return struct.pack("<q", chance.choice((*NUMBERS, length - 1, length + 1, len(content)))) + content[8:]
    header = change_json(chance, content[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


# ---- zip archives ----


class Part(NamedTuple):  # of an archive
    name: str
    content: bytes
    attributes: int = 0
    compression: int = zipfile.ZIP_STORED


def unpack(content: bytes) -> list[Part]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [Part(info.filename, archive.read(info), info.external_attr) for info in archive.infolist()]


def pack(parts: list[Part]) -> bytes:
    """An archive with checksums that fit."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compresslevel=1) as archive:
        for part in parts:
            info = zipfile.ZipInfo(part.name)
            info.external_attr, info.compress_type = part.attributes, part.compression
            archive.writestr(info, part.content)
    return file.getvalue()


def change_parts(chance: Chance, content: bytes) -> bytes:
    """Rename, damage, mark, compress, add, or lose a part; or let one unpack to more than a reader may take."""
    parts = unpack(content)
    at, other = chance.randrange(len(parts)), chance.choice(parts).name
    part, (folder, _, file) = parts[at], parts[at].name.partition("/")
    names = f"../../{file} /{file} {file}/ other/{file} {folder}\\{file} {folder}x {folder}/data/999 {folder}/byteorder"
    renamed = part._replace(name=chance.choice((*names.split(), "other/data.pkl", part.name.upper(), "", *[other] * 4)))
    damaged = part._replace(content=chance.choice((flip_bits, damage))(chance, part.content or bytes(8)))
    marked = part._replace(attributes=chance.choice((0x10, 0o120777 << 16)))  # as a folder, or as a symbolic link
    methods = zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA
    compressed = part._replace(compression=chance.choice(methods))
    added = chance.choice((renamed, renamed._replace(content=damaged.content)))
    new = chance.choice(([renamed], [damaged], [damaged], [marked], [compressed], [part, added], [added, part], []))
    if chance.random() < 0.02:
        new = [Part(part.name, bytes(BOMB), compression=zipfile.ZIP_DEFLATED)]
    return pack([*parts[:at], *new, *parts[at + 1 :]])


def change_record(chance: Chance, content: bytes) -> bytes:
    """Change a number in an archive's directory, in the header of a part, or at the end."""
    signature, length = chance.choice(((b"PK\1\2", 46), (b"PK\3\4", 30), (b"PK\5\6", 22)))
    start = chance.choice([match.start() for match in re.finditer(signature, content)]) + chance.randrange(4, length, 2)
    number = struct.pack("<q", chance.choice((*NUMBERS, chance.getrandbits(32))))[: chance.choice((2, 4))]
    return content[:start] + number + content[start + len(number) :]


def change_array(chance: Chance, content: bytes) -> bytes:
    """Change a word of an array's header."""
    parts = unpack(content)
    at = chance.randrange(len(parts))
    array = parts[at].content
    end = 10 + int.from_bytes(array[8:10], "little")
    header = change_text(chance, array[10:end], ARRAY)
    parts[at] = parts[at]._replace(content=array[:8] + struct.pack("<H", len(header)) + header + array[end:])
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
# names that have a stand-in, or that torch.load itself calls
RUN_CODE += [
    b"c" + name + b"\n}" + push("__setstate__") + SHELL + b"sb" for name in (b"argparse\nNamespace", b"numpy\ndtype")
]
RUN_CODE += [
    called("_codecs.encode", SHELL, push("zlib_codec")),
    called("pathlib:Path.home"),
    called("numpy.load", SHELL),
]
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


NEW = [*map(push, (*NUMBERS, None, True, "1")), b"h\1", b"h\7", b"0"]  # in the place of a number


def pickles(content: bytes) -> list[list[Span]]:
    """The opcodes of each of the pickles that the content begins with."""
    file, spans = io.BytesIO(content), []
    while content.startswith(b"\x80\2", file.tell()):
        starts = [start for _, _, start in pickletools.genops(file)]
        spans.append(list(itertools.pairwise((*starts, file.tell()))))
    return spans


def change_pickle(chance: Chance, content: bytes) -> bytes:
    """Change an opcode of a file of torch.save, or add hostile ones: as a value, as a key, or as all of a pickle."""
    if content.startswith(b"PK"):
        parts = unpack(content)
        at = next(index for index, part in enumerate(parts) if part.name.endswith("/data.pkl"))
        parts[at] = parts[at]._replace(content=change_pickle(chance, parts[at].content))
        return pack(parts)
    parts = pickles(content)  # five in the old format: a number, a version, sizes, the tensors, the storages' keys
    (_, start), *spans, (end, _) = chance.choice([*parts, *parts[-2:]])
    numbers = [span for span in spans if content[span[0]] in b"KMJhj"]  # and references to earlier objects
    hostile = chance.choice(chance.choice((RUN_CODE, HOSTILE, HOSTILE)))
    key = push(chance.choice(("extra.weight", "pos_embed", "cls_token", "model")))
    as_value, as_key = (content[:end] + code + content[end:] for code in (key + hostile + b"s", hostile + b"Ns"))
    changed = replace(chance, content, numbers or spans, NEW), replace(chance, content, spans, [hostile, b"0", b"N"])
    return chance.choice((content[:start] + hostile + content[end:], as_value, as_key, *changed))


BYTES = [flip_bits, flip_bits, damage, damage, other_file]
MUTATIONS = {  # by the suffix of a file; the more often one stands here, the more often it is taken
    ".pth": [*BYTES, *[change_parts] * 3, change_record, *[change_pickle] * 6],
    ".pt": [*BYTES, *[change_pickle] * 5],
    ".safetensors": [*BYTES, *[change_header] * 5],
    ".npz": [*BYTES, *[change_parts] * 2, change_record, *[change_array] * 4],
    ".json": [*BYTES, *[change_json] * 5],
}
FITTING = {change_parts, change_array, change_pickle}  # they write checksums that fit


def mutant(kind: str, number: int, seed: int, files: dict[str, bytes]) -> tuple[Callable, dict]:
    """A mutation and the files with one of them changed; the same for the same kind, number, and seed."""
    chance = random.Random(f"{seed}/{kind}/{number}")
    name = chance.choice(list(files))
    mutation = chance.choice(MUTATIONS[Path(name).suffix])
    return mutation, {**files, name: mutation(chance, files[name])}
