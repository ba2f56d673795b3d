"""What bench/fuzz.py does to files: (generator, files) -> files, every mutation a pure function of both."""

import json
import os
import random
import re
import struct

from bench.fuzz_bytes import BYTES, FOLDER, Chance, Files, Mutation, one
from bench.fuzz_pickles import BIG, BOMBS, RUN, archive_pickle_changed, bare_pickle, old_pickle_changed
from bench.fuzz_zip import REWRITING_ZIP, ZIP, pack, unpack

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
REWRITING = {change.__name__ for change in (*REWRITING_ZIP, archive_pickle_changed, bare_pickle)}


def mutant(kind: str, number: int, seed: int, files: dict[str, bytes]) -> tuple[str, Files]:
    """The name of a mutation and what it makes of the files; the same for the same kind, number and seed."""
    chance = random.Random(f"{seed}/{kind}/{number}")
    mutation = chance.choice(MUTATIONS[kind])
    return mutation.__name__, mutation(chance, files)
