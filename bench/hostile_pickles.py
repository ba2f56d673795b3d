"""Opcodes for pickles that must be refused: they run code, ask for too much memory, or take forever to walk."""

import pickle
import struct

from bench.mutations_bytes import HUGE

CANARY = "canary-of-the-fuzzer"  # a file in the working folder that appears if the code in a mutant runs
SHELL = f"touch {CANARY}"


def text(value: str) -> bytes:
    """Push a string."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def whole(number: int) -> bytes:
    """Push an integer of up to 255 bytes."""
    encoded = pickle.encode_long(number)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def several(*items: bytes) -> bytes:
    """Push a tuple."""
    return b"(" + b"".join(items) + b"t"


def called(module: str, name: str, *arguments: bytes) -> bytes:
    """Call module.name."""
    return f"c{module}\n{name}\n".encode() + several(*arguments) + b"R"


def nested_tuples(levels: int, width: int = 2) -> bytes:
    """A tuple holding one tuple `width` times, and so on: a walk through it meets width**levels objects."""
    code = b")"
    for _ in range(levels):
        code = b"(" + code + b"q\xc8" + b"h\xc8" * (width - 1) + b"t"
    return code


def nested_lists(levels: int) -> bytes:
    """A list holding one list twice, and so on."""
    code = b"]q\x64"
    for level in range(levels):
        code = b"]q" + bytes([101 + level]) + code + b"ah" + bytes([100 + level]) + b"a"
    return code


def storage(length: int, kind: str = "FloatStorage", key: str = "0", device: str = "cpu") -> bytes:
    """Ask for a storage, as torch.save does."""
    return several(text("storage"), f"ctorch\n{kind}\n".encode(), text(key), text(device), whole(length)) + b"Q"


def tensor(storage: bytes, shape: tuple, stride: tuple, offset: int = 0) -> bytes:
    """Rebuild a tensor, as torch.save does."""
    sides, steps = several(*map(whole, shape)), several(*map(whole, stride))
    hooks = called("collections", "OrderedDict")
    return called("torch._utils", "_rebuild_tensor_v2", storage, whole(offset), sides, steps, b"\x89", hooks)


def encoded_over_and_over(times: int) -> bytes:
    """A string that doubles its length with each call."""
    code = text("a")
    for _ in range(times):
        code = called("_codecs", "encode", code, text("hex"))
    return code


CALLABLES = """os.system posix.system builtins.eval builtins.exec builtins.__import__ builtins.open subprocess.Popen
    importlib.import_module webbrowser.open pickle.loads numpy.load torch.load torch.hub.load torch.storage._load_from_bytes
    timm.models._helpers.load_state_dict"""
RUN_CODE = [called(*name.rsplit(".", 1), text(SHELL)) for name in CALLABLES.split()]
RUN_CODE += [
    # names with dots, which protocol 4 follows
    called("torch.serialization", "os.system", text(SHELL)),
    called("torch._utils", "os.system", text(SHELL)),
    called("torch", "ops.load_library", text(SHELL)),
    # the other opcodes that call: OBJ, INST, STACK_GLOBAL, BUILD on a function and on a class, EXT1
    b"cposix\nsystem\n(" + text(SHELL) + b"to.",
    b"(" + text(SHELL) + b"iposix\nsystem\n",
    text("posix") + text("system") + b"\x93" + text(SHELL) + b"\x85R",
    b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("__code__") + text(SHELL) + b"sb",
    b"ctorch\nTensor\n}" + text("__init__") + text(SHELL) + b"sb",
    called("builtins", "getattr", b"ctorch._utils\nos\n", text("system")) + text(SHELL) + b"\x85R",
    b"\x82\x01",
]
TOO_MUCH_MEMORY = [
    called("builtins", "bytearray", whole(HUGE)),
    called("builtins", "bytearray", whole(3 * 10**9)),
    called("torch", "Tensor", whole(3 * 10**8)),
    called("torch", "Size", several(whole(HUGE), whole(HUGE))),
    b"ctorch\nTensor\n" + whole(3 * 10**8) + b"\x85\x81",
    b"ctorch\nFloatTensor\n" + whole(3 * 10**8) + b"\x85\x81",
    called(
        "torch._utils", "_rebuild_meta_tensor_no_storage", b"ctorch\nfloat32\n", several(whole(HUGE)), b"K\1\x85\x89"
    ),
    called("torch._utils", "_rebuild_wrapper_subclass", b"ctorch\nTensor\n", b"ctorch\nfloat32\n", b")"),
    encoded_over_and_over(33),
    whole(2**2000 - 1),
    b"\x8b" + struct.pack("<i", 2**31 - 1),  # LONG4
    b"X" + struct.pack("<I", 2**32 - 1),  # BINUNICODE
    b"\x8d" + struct.pack("<Q", 2**62),  # BINUNICODE8
    b"r" + struct.pack("<I", 2**32 - 1),  # LONG_BINPUT: Python's unpickler in C makes a table as long
    b"j" + struct.pack("<I", 2**32 - 1),  # LONG_BINGET
]
WRONG_TENSORS = [
    tensor(storage(length, kind, key, device), (4,), (1,))
    for length, kind, key, device in [
        (HUGE, "FloatStorage", "0", "cpu"),
        (2**62, "FloatStorage", "0", "cpu"),
        (-4, "FloatStorage", "0", "cpu"),
        (24, "UntypedStorage", "0", "cpu"),
        (24, "QInt8Storage", "0", "cpu"),
        (24, "FloatStorage", "0", "cuda:7"),
        (24, "FloatStorage", "0", "meta"),
        (24, "FloatStorage", "../../0", "cpu"),
        (24, "FloatStorage", "gone", "cpu"),
    ]
] + [
    tensor(storage(24), shape, stride, offset)
    for shape, stride, offset in [
        ((HUGE,), (1,), 0),
        ((3 * 10**9,), (0,), 0),
        ((3 * 10**4, 10**5), (0, 0), 0),
        ((4,), (1,), 10**9),
        ((4,), (1,), -4),
        ((-4,), (1,), 0),
        ((4,), (-1,), 0),
    ]
]
ENDLESS = [
    nested_tuples(40),
    nested_tuples(4, 60),
    nested_lists(60),
    nested_lists(60) + b")R",
    nested_lists(60) + b")\x81",
    b"]q\xc8h\xc8a",  # a list that holds itself
    b"}q\xc8" + text("model") + b"h\xc8s",  # a mapping that holds itself
    b"]" * 20000 + b"a" * 19999,
    b"K\1" + b"\x85" * 20000,
]
MALFORMED = [*(b"h\xff 0 R e s Q NQ b }}b ]}b t".split()), b"0" * 9, b"(" * 500, text("\x1b[2J\n\rline two")]
HOSTILE = [*RUN_CODE, *TOO_MUCH_MEMORY, *WRONG_TENSORS, *ENDLESS, *MALFORMED]
