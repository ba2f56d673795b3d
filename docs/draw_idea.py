"""Draw docs/idea.png: how a small model's weights are picked from a large one's, in three steps from model to matrix.

python docs/draw_idea.py [FILE.png]
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

WIDTH, HEIGHT = 800, 600  # the units of the drawing: pixels of a page that shows it 800 wide
INK, MUTED, FAINT, ZOOM = "#1f2933", "#5f6b76", "#dfe4e9", "#eef2f5"
BLUE = "#0072B2"
BLUES = LinearSegmentedColormap.from_list("blues", ["#8ec4e4", "#0072B2", "#00395a"])

TEACHER_LAYERS, STUDENT_LAYERS, SHOWN_LAYER = 6, 3, 1
COMPONENTS = ("norm", "qkv", "proj", "norm", "fc1", "fc2")
SHOWN_COMPONENT = 4
TEACHER_MATRIX, STUDENT_MATRIX = (8, 12), (4, 6)


@dataclass(frozen=True)
class Side:
    """Where and how large one of the two models is drawn."""

    title: str
    left: float
    width: float
    layer: tuple[float, float]
    chip: tuple[float, float]
    cell: float

    def row(self, count: int, size: tuple[float, float], centre_y: float) -> list[Rectangle]:
        """Place `count` boxes of `size` in a centred row, over the whole width unless the gaps would be wide."""
        gap = min((self.width - count * size[0]) / (count - 1), 16)
        left = self.left + (self.width - count * size[0] - (count - 1) * gap) / 2
        corners = [(left + i * (size[0] + gap), centre_y - size[1] / 2) for i in range(count)]
        return [Rectangle(corner, *size) for corner in corners]


TEACHER = Side("Large pretrained model", left=182, width=318, layer=(44, 72), chip=(46, 42), cell=17)
STUDENT = Side("Small model", left=568, width=200, layer=(34, 50), chip=(31, 30), cell=17)
LAYERS_Y, CHIPS_Y, MATRIX_Y = 478, 318, 122


def text(axes: Axes, x: float, y: float, words: str, size: float = 12, **looks) -> None:
    axes.text(x, y, words, fontsize=size * 0.72, **({"color": INK, "ha": "left", "va": "center"} | looks))


def box(axes: Axes, shape: Rectangle, *, colour: str, edge: str = "none") -> None:
    """Draw `shape` as a rounded box."""
    style = "round,pad=0,rounding_size=5"
    axes.add_patch(
        FancyBboxPatch(shape.get_xy(), shape.get_width(), shape.get_height(), style, fc=colour, ec=edge, lw=1)
    )


def zoom(axes: Axes, shape: Rectangle, start_y: float, end: tuple[float, float, float]) -> None:
    """Draw a pale funnel, from the width of `shape` at `start_y` to `end`: left, right, y."""
    left, right, y = end
    x = shape.get_x()
    corners = [(x, start_y), (x + shape.get_width(), start_y), (right, y), (left, y)]
    axes.add_patch(Polygon(corners, closed=True, fc=ZOOM, ec="none", zorder=0))


def arrow(axes: Axes, y: float) -> None:
    looks = {"arrowstyle": "-|>", "mutation_scale": 13, "lw": 1.6, "color": BLUE, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch((TEACHER.left + TEACHER.width + 18, y), (STUDENT.left - 18, y), **looks))


def step(axes: Axes, y: float, number: int, title: str, lines: Sequence[str]) -> None:
    """Write the words at the left of a row."""
    axes.add_patch(Rectangle((24, y - 34), 3, 68, fc=BLUE, ec="none"))
    text(axes, 38, y + 25, f"{number}  {title}", 14, weight="bold")
    for index, line in enumerate(lines):
        text(axes, 38, y + 3 - 17 * index, line, 12, color=MUTED)


def draw_layers(axes: Axes) -> tuple[Rectangle, Rectangle]:
    """Draw row 1; returns the layer of each side that row 2 looks into."""
    shown = []
    for side, count in ((TEACHER, TEACHER_LAYERS), (STUDENT, STUDENT_LAYERS)):
        shapes = side.row(count, side.layer, LAYERS_Y)
        for index, shape in enumerate(shapes):
            kept = index < STUDENT_LAYERS
            box(axes, shape, colour=BLUE if kept else FAINT)
            x, y = shape.get_x() + shape.get_width() / 2, LAYERS_Y
            text(axes, x, y, str(index + 1), 14, ha="center", color="white" if kept else MUTED, weight="bold")
        shown.append(shapes[SHOWN_LAYER])
    return shown[0], shown[1]


def draw_components(axes: Axes, layers: tuple[Rectangle, Rectangle]) -> tuple[Rectangle, Rectangle]:
    """Draw row 2; returns the component of each side that row 3 looks into."""
    shown = []
    for side, layer in zip((TEACHER, STUDENT), layers, strict=True):
        shapes = side.row(len(COMPONENTS), side.chip, CHIPS_Y)
        zoom(axes, layer, layer.get_y() - 3, (side.left - 8, side.left + side.width + 8, CHIPS_Y + 34))
        axes.add_patch(Rectangle((side.left - 8, CHIPS_Y - 34), side.width + 16, 68, fc=ZOOM, ec="none", zorder=0))
        for index, (name, shape) in enumerate(zip(COMPONENTS, shapes, strict=True)):
            is_shown = index == SHOWN_COMPONENT
            box(axes, shape, colour=BLUE if is_shown else "white", edge=BLUE)
            x, colour = shape.get_x() + shape.get_width() / 2, "white" if is_shown else INK
            text(axes, x, CHIPS_Y, name, 12 if side is TEACHER else 10, ha="center", color=colour)
        shown.append(shapes[SHOWN_COMPONENT])
    return shown[0], shown[1]


def draw_matrix(axes: Axes, side: Side, weights: np.ndarray, picked: np.ndarray) -> None:
    """Draw row 3 of one side: `weights` in shades, those not `picked` in grey."""
    rows, columns = weights.shape
    left = side.left + (side.width - columns * side.cell) / 2
    top = MATRIX_Y + rows * side.cell / 2
    for (row, column), weight in np.ndenumerate(weights):
        colour = BLUES(weight) if picked[row, column] else FAINT
        corner = (left + column * side.cell, top - (row + 1) * side.cell)
        axes.add_patch(Rectangle(corner, side.cell, side.cell, fc=colour, ec="white", lw=1))
    if picked.all():
        return
    for row in np.flatnonzero(picked.any(axis=1)):
        axes.plot(left - 7, top - (row + 0.5) * side.cell, marker=">", ms=3.5, color=BLUE)
    for column in np.flatnonzero(picked.any(axis=0)):
        axes.plot(left + (column + 0.5) * side.cell, top + 7, marker="v", ms=3.5, color=BLUE)


def draw() -> Figure:
    """Draw the whole picture."""
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    for side in (TEACHER, STUDENT):
        text(axes, side.left + side.width / 2, 562, side.title, 16, weight="bold", ha="center")
    step(axes, LAYERS_Y, 1, "Layers", ["the first N of", "the large model"])
    step(axes, CHIPS_Y, 2, "Components", ["each part from", "its counterpart"])
    step(axes, MATRIX_Y, 3, "Elements", ["evenly spaced rows", "and columns,", "packed together"])
    components = draw_components(axes, draw_layers(axes))

    weights = np.random.default_rng(3).uniform(size=TEACHER_MATRIX)
    kept = np.ix_(*(range(0, n, n // m) for n, m in zip(TEACHER_MATRIX, STUDENT_MATRIX, strict=True)))
    picked = np.zeros(TEACHER_MATRIX, bool)
    picked[kept] = True
    sides = ((TEACHER, weights, picked), (STUDENT, weights[kept], picked[kept]))
    for (side, values, mask), component in zip(sides, components, strict=True):
        half_width = values.shape[1] * side.cell / 2 + 18
        half_height = values.shape[0] * side.cell / 2 + 18
        centre = side.left + side.width / 2
        zoom(axes, component, CHIPS_Y - 34, (centre - half_width, centre + half_width, MATRIX_Y + half_height))
        corner = (centre - half_width, MATRIX_Y - half_height)
        axes.add_patch(Rectangle(corner, 2 * half_width, 2 * half_height, fc=ZOOM, ec="none", zorder=0))
        draw_matrix(axes, side, values, mask)
    for y in (LAYERS_Y, CHIPS_Y, MATRIX_Y):
        arrow(axes, y)
    return figure


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("idea.png")
    # without the library's version in the file, the same drawing gives the same bytes
    draw().savefig(target, dpi=200, metadata={"Software": None})
