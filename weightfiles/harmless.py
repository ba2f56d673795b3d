"""Objects that training scripts leave in checkpoints beside the weights: read as stand-ins, so that no code of theirs runs."""

from collections import OrderedDict


class StandIn:
    """Stands for an object that is no tensor. It keeps nothing of it, and takes no attributes."""

    __slots__ = ()

    def __new__(cls, *_: object) -> object:
        return super().__new__(cls)

    def __init__(self, *_: object):
        """Ignore the arguments that the object was made with."""

    def __setstate__(self, state: object) -> None:
        """Ignore the object's state."""


class DictStandIn(StandIn):
    """Stands for a kind of dict: a plain one, which may hold tensors."""

    def __new__(cls, *_: object) -> OrderedDict:
        return OrderedDict()


class ListStandIn(StandIn):
    """Stands for a kind of list."""

    def __new__(cls, *_: object) -> list:
        return []


def _names(*lines: str) -> list[str]:
    """List the names in lines of a module and names in it."""
    return [f"{module}.{name}" for module, *names in map(str.split, lines) for name in names]


_NUMBERS = "bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 longdouble complex64 complex128"
_DTYPES = (
    "Bool Int8 Int16 Int32 Int64 UInt8 UInt16 UInt32 UInt64 Float16 Float32 Float64 Complex64 Complex128 Str Bytes"
)
_PATHS = "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"

# Names as a pickle gives them, of old versions and new. Whatever a file does with one of them, it meets only the stand-in.
STAND_INS: dict[str, type[StandIn]] = {
    **dict.fromkeys(
        _names(
            "argparse Namespace",
            "types SimpleNamespace",
            *(f"{module} {_PATHS}" for module in ("pathlib", "pathlib._local")),
            *(f"numpy.{core}.multiarray scalar _reconstruct" for core in ("core", "_core")),
            f"numpy dtype ndarray str_ bytes_ void datetime64 timedelta64 {_NUMBERS}",
            "numpy.dtypes " + " ".join(f"{name}DType" for name in _DTYPES.split()),
            "numpy.random._pickle __randomstate_ctor __generator_ctor __bit_generator_ctor",
            "numpy.random._mt19937 MT19937",
            "numpy.random._pcg64 PCG64",
            "numpy.random.bit_generator SeedSequence __pyx_unpickle_SeedSequence",
            "datetime datetime date time timedelta timezone",
            "uuid UUID",
            "decimal Decimal",
            "fractions Fraction",
            "builtins int float str bool bytes list dict tuple frozenset range slice object Ellipsis NotImplemented",
            "torch.torch_version TorchVersion",
            "omegaconf.base ContainerMetadata Metadata",
            "omegaconf.nodes AnyNode BooleanNode FloatNode IntegerNode StringNode",
            "omegaconf.dictconfig DictConfig",
            "omegaconf.listconfig ListConfig",
            "typing Any",
            "mmengine.logging.history_buffer HistoryBuffer",
        ),
        StandIn,
    ),
    **dict.fromkeys(
        _names(
            "collections defaultdict",
            "yacs.config CfgNode",
            "fvcore.common.config CfgNode",
            "detectron2.config.config CfgNode",
            "easydict EasyDict",
            "addict.addict Dict",
            "mmengine.config.config ConfigDict",
            "lightning.fabric.utilities.data AttributeDict",
            "lightning_fabric.utilities.data AttributeDict",
            "pytorch_lightning.utilities.parsing AttributeDict",
        ),
        DictStandIn,
    ),
    "collections.deque": ListStandIn,
}
