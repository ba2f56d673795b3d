"""The mutations of each kind of file that bench.fuzz reads. Each is a pure function of a random generator and bytes."""

import json
import os
import random
import re
import struct
from pathlib import Path

from bench.hostile_pickles import HOSTILE, HUGE
from bench.mutations_bytes import BYTES, Chance, Content, Link, Mutation, Pipe
from bench.mutations_zip import ARCHIVE_PICKLES, OLD_FORMAT, ZIP, Entries, make_value_not_finite, repacked

# ---- JSON: descriptions, indices, headers of .safetensors files ----

WRONG = [None, True, 0, -1, 1.5, 2**31, 2**63 - 1, 2**64, 10**30, "", "x", "\n\x1b[2J", "\0", "k" * 5000, "vit"]
WRONG += [[], [1], {}, {"a": 1}, {"a": {"b": "c"}}, [0, HUGE], [HUGE, HUGE], [-4, 0], [0, 4], [24], [12]]
WRONG += "F64 F16 BF16 I32 I64 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F4 C64 U16".split()
WRONG += "../secret.safetensors /etc/passwd .. . a/../b ./x C:\\x ~/x file:///x".split()
NOT_JSON = ["NaN", "-Infinity", "1e999", "'x'", '"\\ud800"', "9" * 4000, "9" * 5000]
KEYS = ["", "\n", "../x", "é", "module.a", "__metadata__", "a\nb\x1b[2J", "k" * 5000]


def change_json(chance: Chance, content: bytes) -> bytes:
    """Replace a value, at any depth, by another of the file, one of another type, huge, nested, or not JSON; or a key."""
    tree = json.loads(content)
    node, names = tree, list(tree)
    while True:
        name, other = chance.choice(names), chance.choice(names)
        inner = node[name]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.3:
            break
        node, names = inner, list(inner) if isinstance(inner, dict) else range(len(inner))
    depth, brother = chance.choice((50, 400, 900, 3000, 100000)), json.dumps(node[other])
    nested = ["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth]
    new = chance.choice((json.dumps(chance.choice(WRONG)), brother, chance.choice(NOT_JSON), chance.choice(nested)))
    node[name] = "the fuzzer's value"
    if isinstance(node, dict) and chance.random() < 0.2:
        removed = node.pop(name)
        node |= chance.choice(({}, {chance.choice([*KEYS, other]): removed}))
    text = json.dumps(tree).replace(json.dumps("the fuzzer's value"), new, 1)
    twice = text[:-1] + "," + text[1:]
    return chance.choice(
        (text, text, text, text, twice, text[:-1] + ",}", text.replace('"', "'"), text + "\0")
    ).encode()


def change_header(chance: Chance, content: bytes) -> bytes:
    """The header of a `.safetensors` file, or its length."""
    length = int.from_bytes(content[:8], "little")
    header, values = content[8 : 8 + length], content[8 + length :]
    if chance.random() < 0.9:
        header = change_json(chance, header)
        return len(header).to_bytes(8, "little") + header + values
    lengths = (0, 1, 7, length - 1, length + 1, len(content), 10**8, HUGE, 2**63, 2**64 - 1)
    return chance.choice(lengths).to_bytes(8, "little") + content[8:]


# ---- .npz ----

ARRAY_DTYPES = ">f4 <f8 <i4 |O <f2 <c8 |S4 <U1 |V4 <M8[s] <f99".split()
ARRAY_SHAPES = [
    f"({HUGE},)",
    "(-1,)",
    "()",
    "(0,)",
    "(10,10,10,10,10,10,10,10,10,10,10,10)",
    "(4294967296, 4294967296)",
]
ARRAY_SHAPES += ["(True,)", "(1.5,)", "[4]", "None", "(9**9**9,)", "(" * 150 + ")" * 150]


@repacked
def change_array_header(chance: Chance, entries: Entries, at: int) -> None:
    """Its dtype, order, shape or version, or it is no header."""
    info, array = entries[at]
    end = 10 + int.from_bytes(array[8:10], "little")
    header, values = array[10:end].decode(), array[end:]
    shape = re.search(r"\(.*?\)", header)[0]
    sides = [int(side) for side in re.findall(r"\d+", shape)]
    shapes = [str((*sides, 1)), str((1, *sides)), str(tuple(sides[::-1])), *ARRAY_SHAPES]
    no_headers = [
        "{" * 90 + header,
        "-" * 9000 + "1",
        header.replace("descr", "describe"),
        header + "x" * 9000,
        "\0" * 60,
    ]
    candidates = [
        header.replace("<f4", chance.choice(ARRAY_DTYPES)),
        header.replace("False", chance.choice(("True", "None", "0"))),
        header.replace(shape, chance.choice(shapes)),
        chance.choice(no_headers),
    ]
    encoded = chance.choice(candidates).encode()
    version = chance.choice((b"\1\0", b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\7\7"))
    size = struct.pack("<H" if version[0] == 1 else "<I", len(encoded) if chance.random() < 0.9 else 65535)
    entries[at] = info, b"\x93NUMPY" + version + size + encoded + values


@repacked
def make_object_array(chance: Chance, entries: Entries, at: int) -> None:
    """An array of objects, whose bytes are a pickle."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    pickled = b"\x80\2" + chance.choice(HOSTILE) + b"."
    entries[at] = entries[at][0], b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + pickled


# ---- which for which ----

# by kind of file: how often a group is drawn, the suffix of the files that it changes, its mutations
SAFETENSORS = [*[change_header] * 9, make_value_not_finite]
TORCH = [(1, "", BYTES), (2, "", ZIP), (2, "", ARCHIVE_PICKLES)]
DESCRIPTION = [(1, ".json", [change_json]), (1, ".json", BYTES)]
Group = tuple[int, str, list[Mutation]]
MUTATIONS: dict[str, list[Group]] = {
    "initialization .pth": [*((weight, ".pth", group) for weight, _, group in TORCH), *DESCRIPTION],
    "initialization .safetensors": [(1, ".safetensors", BYTES), (1, ".safetensors", SAFETENSORS), *DESCRIPTION],
    "checkpoint": TORCH,
    ".pth": TORCH,
    ".bin, nested": TORCH,
    ".pth, old": [(1, "", BYTES), (1, "", OLD_FORMAT)],
    ".safetensors": [(1, "", BYTES), (1, "", SAFETENSORS)],
    ".npz": [(1, "", BYTES), (1, "", ZIP), (1, "", [change_array_header, change_array_header, make_object_array])],
    "index": [(1, "", BYTES), (1, ".safetensors", SAFETENSORS), (1, ".json", [change_json])],
}


def mutant(kind: str, number: int, seed: int, files: dict[str, bytes]) -> tuple[Mutation, dict[str, Content]]:
    """A mutation and the files with one of them changed; the same for the same kind, number and seed."""
    chance = random.Random(f"{seed}/{kind}/{number}")
    groups = MUTATIONS[kind]
    _, suffix, mutations = chance.choices(groups, [weight for weight, _, _ in groups])[0]
    mutation, name = chance.choice(mutations), chance.choice([name for name in files if name.endswith(suffix)])
    return mutation, {**files, name: mutation(chance, files[name])}


def write(files: dict[str, Content], folder: Path) -> None:
    """Write a mutant's files, links and pipes into an empty folder."""
    for name, content in files.items():
        path = folder / name
        if isinstance(content, Link):
            path.symlink_to(content)
        elif isinstance(content, Pipe):
            os.mkfifo(path)
        elif content is not None:
            path.write_bytes(content)
