"""The picture of a plan that --plot draws: which of the teacher's layers, channels, heads and hidden units are kept."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from selection.strips import Strip, headline, panels
from utils import UserError, check_creatable, write_atomically

# in pixels of a PNG
DPI, WIDTH, MARGIN = 150, 2336, 40
LEFT, STRIP = 456, 1536  # where strips begin and how long they are: many factors of 2 and 3, as widths of models have
PITCH, HEIGHT = 32, 24  # from row to row; of a strip
INK, MUTED, FAINT, KEPT = "#1f2933", "#5f6b76", "#dde3e9", "#004a7c"


def check_plot(path: Path) -> None:
    """Refuse a --plot that cannot be drawn or written, before the work is done."""
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {path}: expected a name that ends in .png, .pdf or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from error
    if path.is_dir():
        raise UserError(f"--plot {path} is a folder")
    check_creatable(path, f"--plot {path} cannot be written")


def draw(description: Mapping, path: Path) -> None:
    """Draw a description (`weight_selection.select_weights`, or the JSON beside a file) and write it to `path`."""
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))  # in pixels, from the upper left
    axes.axis("off")
    title, choices = headline(description)
    y = _lines(axes, 56, textwrap.wrap(title, 98), size=18, weight="bold", pitch=46)
    y = _lines(axes, y + 2, textwrap.wrap(choices, 148), size=13.5)
    y = _draw_layers(axes, y + 34, description["plan"]["layers"])
    for heading, strips in panels(description["plan"]).items():
        y = _draw_panel(axes, y + 28, heading, strips)
    _text(axes, MARGIN, y + 34, "the teacher's indices, in order", colour=MUTED)
    key = "dark: kept; pale: not kept; between: the share that is kept, if a column stands for several indices"
    _text(axes, LEFT, y + 34, key, colour=MUTED)
    notes = [note + f" ({count} tensors)" * (count > 1) for note, count in description["plan"]["notes"].items()]
    height = _lines(axes, y + 96, [line for note in notes for line in textwrap.wrap(note, 160)], colour=MUTED)
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    figure.set_size_inches(WIDTH / DPI, height / DPI)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=DPI)
    write_atomically(path, drawn.getvalue())


def _text(axes, x: float, y: float, words: str, *, size: float = 12, colour: str = INK, **looks) -> None:
    axes.text(x, y, words, fontsize=size, color=colour, **({"va": "center_baseline", "parse_math": False} | looks))


def _lines(axes, y: float, lines: list[str], *, pitch: float = PITCH, **looks) -> float:
    """Write lines of text from `y` on; returns the y of the next one."""
    for line in lines:
        _text(axes, MARGIN, y, line, **looks)
        y += pitch
    return y


def _draw_strip(axes, y: float, shares: np.ndarray, width: float, height: float) -> None:
    """Draw the share kept of each column as a shade."""
    faint, kept = (np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for colour in (FAINT, KEPT))
    edges = (LEFT, LEFT + width, y + height / 2, y - height / 2)
    axes.imshow(faint + shares[None, :, None] * (kept - faint), extent=edges, aspect="auto", interpolation="nearest")
    if width / len(shares) >= 24 and height >= HEIGHT:  # few enough to be counted
        axes.vlines(LEFT + width / len(shares) * np.arange(1, len(shares)), *edges[2:], color="white", lw=0.8)


def columns(size: int, kept: Sequence[int]) -> np.ndarray:
    """Compute the share kept in each column of a strip; float [columns].

    A column that is too thin to see stands for several indices. None is skipped, or an even stride would look like all
    or nothing; and 2, 4, 8, … of them keep the usual strides even.
    """
    each = 1 << (-(-size // (STRIP // 2)) - 1).bit_length()
    starts = np.arange(0, size, each)
    return np.add.reduceat(np.isin(np.arange(size), kept), starts, dtype=float) / np.diff([*starts, size])


def _draw_layers(axes, y: float, stages: Mapping) -> float:
    _text(axes, MARGIN, y, "Layers", size=14, weight="bold")
    key = "the teacher's; kept ones are dark, with the student's number, which the rows below go by"
    _text(axes, LEFT, y, key, colour=MUTED)
    deepest = max(stage["teacher_size"] for stage in stages.values())
    cell = min(64, STRIP / deepest)
    small = min(11.5, cell / 3.2)
    for number in range(deepest):
        _text(axes, LEFT + cell * (number + 0.5), y + 36, str(number), size=small * 0.85, colour=MUTED, ha="center")
    y += 70
    for name, stage in stages.items():
        size, kept = stage["teacher_size"], stage["indices"]
        _text(axes, MARGIN, y, name, size=11.5)
        _draw_strip(axes, y, np.isin(np.arange(size), kept), cell * size, 36)
        for number, layer in enumerate(kept):
            x = LEFT + cell * (layer + 0.5)
            _text(axes, x, y, str(number), size=small, colour="white", weight="bold", ha="center")
        _text(axes, LEFT + STRIP + 18, y, f"{len(kept)} of {size}" if len(kept) < size else f"all {size}")
        y += 44
    return y


def _draw_panel(axes, y: float, heading: str, strips: list[Strip]) -> float:
    _text(axes, MARGIN, y, heading, size=14, weight="bold")
    y += 38
    for strip in strips:
        label = strip.label if len(strip.label) <= 36 else f"{strip.label[:19]}…{strip.label[-16:]}"
        _text(axes, MARGIN, y, label, size=11.5 if len(label) <= 30 else 9.5)
        # a thin strip if nothing was chosen: it need not catch the eye
        height = HEIGHT if len(strip.kept) < strip.size else HEIGHT / 3
        _draw_strip(axes, y, columns(strip.size, strip.kept), STRIP, height)
        _text(axes, LEFT + STRIP + 18, y, strip.count())
        y += PITCH
    return y
