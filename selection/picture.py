"""The picture that --plot draws: which of the teacher's layers, channels, heads and hidden units are kept; a refit."""

import io
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from files import check_creatable, write_atomically
from utils import UserError

# in pixels of a PNG
DPI, WIDTH, MARGIN, ROW = 150, 2336, 40, 32
LEFT, STRIP = 456, 1536  # where strips begin and how long they are: many factors of 2 and 3, as widths of models have
INK, MUTED = "#1f2933", "#5f6b76"
PALE, DARK = np.array((221, 227, 233)) / 255, np.array((0, 74, 124)) / 255
# the last part of a group's name -> the title of its panel, in the order of the panels
TITLES = {
    "stream": "Residual stream: channels",
    "registers": "Register tokens",
    "heads": "Attention: heads",
    "slots": "Attention: channels in each head",
    "attn": "Attention: channels of all heads",
    "attn_pool": "Attention pooling: channels",
    "mlp": "MLP: hidden units",
    "mlp_tokens": "MLP over tokens: hidden units",
    "mlp_channels": "MLP over channels: hidden units",
    "groups": "Convolutions: groups",
    "in": "Convolutions: channels per group between the first and the second",
    "out": "Convolutions: channels per group between the second and the third",
    "se": "Squeeze and excitation: hidden units",
}
MOST_STRIPS = 24  # of a panel: the deepest of the stock ViTs of ImageNet has 24 layers
MOST_NUMBERS = 40  # of a strip: the deepest of all ViTs has 40 layers
KEY = (
    "Strips show the teacher's indices in order. Dark: kept, with the teacher's and the student's number. Pale: not kept.",
    "Between: the share that is kept, if a column stands for several. Labels go by the student's layers.",
)


@dataclass(frozen=True)
class Strip:
    """The indices that are kept of an axis of `size`, or of a stage of as many layers."""

    label: str
    size: int
    kept: tuple[int, ...]

    def count(self) -> str:
        """Count in words: "all 64", "12 of 64", "192 of 384, stride 2"."""
        if len(self.kept) == self.size:
            return f"all {self.size}"
        strides = set(np.diff(self.kept).tolist())
        even = len(strides) == 1 and strides != {1} and len(self.kept) >= 8  # of fewer it may be an accident
        return f"{len(self.kept)} of {self.size}" + f", stride {max(strides)}" * even


@dataclass(frozen=True)
class Share:
    """The share of the variance of the teacher's stream that the student explains, as selected and refitted."""

    label: str
    selected: float
    refitted: float

    def count(self) -> str:
        return f"{self.selected:.0%} → {self.refitted:.0%}"


def panels(plan: Mapping) -> dict[str, list[Strip]]:
    """Make a panel of strips for each kind of group, by its title. Layers that keep the same indices share a strip."""
    layers: dict[str, dict[tuple, list]] = {}
    for name, group in plan["groups"].items():
        base, _, tensor = name.partition(" of ")  # the tensor is named if it chooses for itself
        owner, _, kind = base.rpartition(".")
        if kind not in TITLES:
            owner, kind = base, "stream"
        label, layer = tensor or owner or base, None
        if not tensor and kind != "stream" and (layered := re.fullmatch(r"(.+)\.(\d+)(\.\D\w*)?", owner)):
            label, layer = layered[1], int(layered[2])
        if group["teacher_size"] > 1:  # of one there is nothing to choose
            key = label, group["teacher_size"], tuple(group["indices"])
            layers.setdefault(kind, {}).setdefault(key, []).append(layer)
    result = {}
    for kind in filter(layers.get, TITLES):
        strips = [Strip(_label(label, numbers), size, kept) for (label, size, kept), numbers in layers[kind].items()]
        # elsewhere heads are blended
        title = TITLES[kind] + ", in the tables of relative positions" * (kind == "heads" and "attn" in layers)
        title += f" (the first {MOST_STRIPS} of {len(strips)})" * (len(strips) > MOST_STRIPS)
        result[title] = strips[:MOST_STRIPS]
    return result


def _label(owner: str, layers: list[int | None]) -> str:
    if None in layers:
        return owner
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{owner} {layers[0]}\N{EN DASH}{layers[-1]}"
    return f"{owner} {', '.join(map(str, layers))}"


def headline(description: Mapping) -> tuple[str, str]:
    """Name the two models, and the choices."""
    names = []
    for side in (description["student"], description["teacher"]):
        kwargs = ", ".join(f"{key}={value}" for key, value in side["kwargs"].items())
        names.append(side["model"] + f" ({kwargs})" * bool(kwargs))
    choices = description["choices"]
    rule = choices["element_selection"]
    seed = f" (seed {choices['seed']})" if rule.startswith("random") else ""
    parts = [f"layers: {choices['layer_selection']}", f"elements: {rule}{seed}"]
    parts += [f"heads: {choices['heads']}"] * (choices["heads"] is not None)
    parts += [f"classifier: {'taken' if choices['include_head'] else 'new' if choices.get('new_head') else 'left out'}"]
    parts += [f"only {', '.join(choices['take'])}"] if choices["take"] else []
    parts += [f"gain: {choices['gain']:g}"] if choices["gain"] else []
    return " from ".join(names), " · ".join(parts)


def check_plot(path: Path) -> None:
    """Refuse a --plot that cannot be drawn or written, before the work is done."""
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {path}: expected a name that ends in .png, .pdf or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from error
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        raise UserError(f"--plot {path} is a folder")
    check_creatable(path, f"--plot {path} cannot be written")


def draw(description: Mapping, path: Path) -> None:
    """Draw a description (`weight_selection.select_weights`, or the JSON beside a file) and write it to `path`."""
    check_plot(path)
    from matplotlib.figure import Figure

    rows = _rows(description)
    figure = Figure((WIDTH / DPI, ROW * len(rows) / DPI), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))  # in pixels, from the upper left
    axes.axis("off")
    for number, row in enumerate(rows):
        y = ROW * (number + 0.5)
        if isinstance(row, Strip):
            _draw_strip(axes, y, row)
        elif isinstance(row, Share):
            _draw_share(axes, y, row)
        else:
            words, looks = row
            _text(axes, MARGIN, y, words, **looks)
    axes.set(xlim=(0, WIDTH), ylim=(ROW * len(rows), 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=DPI)
    write_atomically(path, drawn.getvalue())


def _shares(description: Mapping) -> dict[str, list[Share]]:
    """Make the panel of a refit, if there was one."""
    if "refit" not in description:
        return {}
    after, before = (each["explained_variance"] for each in (description["refit"], description["refit"]["selected"]))
    title = "Refit: the share of the teacher's stream behind each block that is explained, before (dark) and after"
    return {title: [Share(block, before[block], after[block]) for block in after]}


def _rows(description: Mapping) -> list[Strip | Share | tuple[str, dict]]:
    """List the rows of the picture: strips, shares, and (text, its looks)."""
    plan, bold = description["plan"], {"weight": "bold"}
    title, choices = headline(description)
    rows = [("", {})]
    rows += [(line, {"fontsize": 15, **bold}) for line in textwrap.wrap(title, 110)]
    rows += [(line, {"fontsize": 13}) for line in textwrap.wrap(choices, 150)]
    layers = [Strip(name, stage["teacher_size"], tuple(stage["indices"])) for name, stage in plan["layers"].items()]
    for heading, strips in {"Layers": layers, **panels(plan), **_shares(description)}.items():
        rows += [("", {}), (heading, {"fontsize": 14, **bold}), *strips]
    notes = [note + f" ({count} tensors)" * (count > 1) for note, count in plan["notes"].items()]
    small = [line for note in (*KEY, *notes) for line in textwrap.wrap(note, 160)]
    return [*rows, ("", {}), *((line, {"color": MUTED}) for line in small), ("", {})]


def _text(axes, x: float, y: float, words: str, **looks) -> None:
    axes.text(x, y, words, **{"fontsize": 11.5, "color": INK, "va": "center_baseline", "parse_math": False} | looks)


def _draw_strip(axes, y: float, strip: Strip) -> None:
    """Draw the share kept of each column as a shade, between the label and the count; with numbers if there is room."""
    _text(axes, MARGIN, y, strip.label, fontsize=min(11.5, 340 / len(strip.label)))
    _text(axes, LEFT + STRIP + 18, y, strip.count())
    # a thin strip if nothing was chosen: it need not catch the eye
    half = 12 if len(strip.kept) < strip.size or strip.size <= MOST_NUMBERS else 4
    edges, shares = (LEFT, LEFT + STRIP, y + half, y - half), columns(strip.size, strip.kept)
    axes.imshow(PALE + shares[None, :, None] * (DARK - PALE), extent=edges, aspect="auto", interpolation="nearest")
    if strip.size <= MOST_NUMBERS:
        cell = STRIP / strip.size
        axes.vlines(LEFT + cell * np.arange(1, strip.size), *edges[2:], color="white", lw=0.8)
        for number, index in enumerate(strip.kept):
            looks = {"fontsize": min(10, cell / 9), "color": "white", "weight": "bold", "ha": "center"}
            _text(axes, LEFT + cell * (index + 0.5), y, f"{index}→{number}", **looks)


def _draw_share(axes, y: float, share: Share) -> None:
    """Draw a bar from 0 to 100 %; a share below 0, of a stream worse than its mean, is drawn as 0."""
    _text(axes, MARGIN, y, share.label)
    _text(axes, LEFT + STRIP + 18, y, share.count())
    for value, darkness in ((1.0, 0.0), (share.refitted, 0.5), (share.selected, 1.0)):
        colour = PALE + darkness * (DARK - PALE)
        axes.barh(y, STRIP * min(max(value, 0.0), 1.0), height=16, left=LEFT, color=tuple(colour))


def columns(size: int, kept: Sequence[int]) -> np.ndarray:
    """Compute the share kept in each column of a strip; float [columns].

    A column that is too thin to see stands for several indices. None is skipped, or an even stride would look like all
    or nothing; and 2, 4, 8, … of them keep the usual strides even.
    """
    each = 1 << (-(-size // (STRIP // 2)) - 1).bit_length()
    starts = np.arange(0, size, each)
    return np.add.reduceat(np.isin(np.arange(size), kept), starts, dtype=float) / np.diff([*starts, size])
