"""The picture of a plan that --plot draws: which layers and which slots of the teacher a student keeps."""

import io
import textwrap
from collections.abc import Mapping
from os import W_OK, access
from pathlib import Path

import numpy as np

from selection.strips import Panel, columns, count_words, headline, note_lines, panels
from utils import UserError, write_atomically

# in pixels of a PNG
DPI, WIDTH, MARGIN = 150, 2336, 40
LEFT, STRIP = 456, 1536  # where strips begin and how long they are: many factors of 2 and 3, as widths of models have
PITCH, HEIGHT = 32, 24  # from row to row; of a strip
INK, MUTED, FAINT, KEPT = "#1f2933", "#5f6b76", "#dde3e9", "#004a7c"


def check_plot(path: Path) -> None:
    """UserError, before the work is done, if no picture can be drawn or none can be written at `path`."""
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {path}: expected a name that ends in .png, .pdf or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from error
    if path.is_dir():
        raise UserError(f"--plot {path} is a folder")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not (nearest.is_dir() and access(nearest, W_OK)):
        raise UserError(f"--plot {path} cannot be written: {nearest} is not a folder that can be written to")


def draw(description: Mapping, path: Path) -> None:
    """Write the picture of a description (`weight_selection.initialize`, or the JSON beside a file) to `path`.

    Raises UserError as `check_plot` does.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    title, words = headline(description)
    y = _lines(axes, 56, textwrap.wrap(title, 98), size=18, weight="bold", pitch=46)
    y = _lines(axes, y + 2, textwrap.wrap(words, 148), size=13.5)
    y = _draw_layers(axes, y + 34, description["plan"]["layers"])
    for panel in panels(description["plan"]):
        y = _draw_panel(axes, y + 28, panel)
    y = _draw_key(axes, y + 34)
    notes = [line for note in note_lines(description["plan"]["notes"]) for line in textwrap.wrap(note, 160)]
    height = _lines(axes, y + 30, notes, colour=MUTED)
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    figure.set_size_inches(WIDTH / DPI, height / DPI)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=DPI)
    write_atomically(path, drawn.getvalue())


def _text(axes, x: float, y: float, words: str, *, size: float = 12, colour: str = INK, **looks) -> None:
    axes.text(x, y, words, fontsize=size, color=colour, **({"va": "center_baseline", "parse_math": False} | looks))


def _lines(axes, y: float, lines: list[str], *, pitch: float = PITCH, **looks) -> float:
    """Lines of text from `y` on; gives the y of the next one."""
    for line in lines:
        _text(axes, MARGIN, y, line, **looks)
        y += pitch
    return y


def _strip(
    axes, y: float, shares: np.ndarray, *, left: float = LEFT, width: float = STRIP, height: float = HEIGHT
) -> None:
    """Shares as shades, around `y`."""
    faint, kept = (np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for colour in (FAINT, KEPT))
    image = faint + shares[None, :, None] * (kept - faint)
    edges = (left, left + width, y + height / 2, y - height / 2)
    axes.imshow(image, extent=edges, aspect="auto", interpolation="nearest")
    if width / len(shares) >= 24 and height >= HEIGHT:  # cells that can be counted are parted
        axes.vlines(left + width / len(shares) * np.arange(1, len(shares)), *edges[2:], color="white", lw=0.8)


def _draw_layers(axes, y: float, layers: Mapping) -> float:
    _text(axes, MARGIN, y, "Layers", size=14, weight="bold")
    key = "the teacher's; kept ones are dark, with the student's number, which the rows below go by"
    _text(axes, LEFT, y, key, colour=MUTED)
    deepest = max(stage["teacher_size"] for stage in layers.values())
    cell = min(64, STRIP / deepest)
    small = min(11.5, cell / 3.2)
    y += 36
    for number in range(deepest):
        _text(axes, LEFT + cell * (number + 0.5), y, str(number), size=small * 0.85, colour=MUTED, ha="center")
    y += 34
    for name, stage in layers.items():
        size, kept = stage["teacher_size"], stage["indices"]
        _text(axes, MARGIN, y, name, size=11.5)
        _strip(axes, y, np.isin(np.arange(size), kept).astype(float), width=cell * size, height=36)
        for number, layer in enumerate(kept):
            x = LEFT + cell * (layer + 0.5)
            _text(axes, x, y, str(number), size=small, colour="white", weight="bold", ha="center")
        _text(axes, LEFT + STRIP + 18, y, f"{len(kept)} of {size}" if len(kept) < size else f"all {size}")
        y += 44
    return y


def _draw_panel(axes, y: float, panel: Panel) -> float:
    _text(axes, MARGIN, y, panel.title, size=14, weight="bold")
    remarks = [f"means and the first of {panel.total} strips"] * bool(panel.total)
    each = [_slots_each(len(row.shares)) for row in panel.rows if row.kept < len(row.shares)]
    if max(each, default=1) > 1:
        remarks.append(f"a column is {' to '.join(map(str, sorted({min(each), max(each)})))} slots")
    _text(axes, LEFT + STRIP, y, "; ".join(remarks), colour=MUTED, ha="right")
    y += 38
    size = 11.5 if max(len(row.label) for row in panel.rows) <= 30 else 9.5
    for row in panel.rows:
        label = row.label if len(row.label) <= 36 else f"{row.label[:19]}…{row.label[-16:]}"
        _text(axes, MARGIN, y, label, size=size)
        is_whole = row.kept == len(row.shares)  # nothing was chosen: it need not catch the eye
        _strip(axes, y, columns(row.shares, _slots_each(len(row.shares))), height=HEIGHT / 3 if is_whole else HEIGHT)
        _text(axes, LEFT + STRIP + 18, y, count_words(row))
        y += PITCH
    return y


def _slots_each(size: int) -> int:
    """How many slots a column stands for: few enough, in columns of whole pixels if such a number divides the slots."""
    least = -(-size // (STRIP // 2))
    fitting = (each for each in range(least, 2 * least + 1) if size % each == 0 and STRIP % (size // each) == 0)
    return next(fitting, least)


def _draw_key(axes, y: float) -> float:
    """What the shades mean."""
    _text(axes, MARGIN, y, "teacher's slots, in order", colour=MUTED)
    x = LEFT
    for shares, width, words in (
        (np.ones(1), 40, "kept"),
        (np.zeros(1), 40, "not kept"),
        (np.linspace(0, 1, 256), 160, "share kept, where a column is several slots or a strip is a mean"),
    ):
        _strip(axes, y, shares, left=x, width=width)
        _text(axes, x + width + 14, y, words, colour=MUTED)
        x += width + 60 + 14 * len(words)
    return y + PITCH
