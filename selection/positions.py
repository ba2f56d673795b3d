"""What follows the size of the images: position embeddings, patch kernels, tables of relative positions.

These are resampled to the student's grid of patches, and kernels are adapted to the channels of its images, by steps
that the plan records and selection.tensors.STEPS carries out.
"""

import math
from collections.abc import Sequence

from selection.axes import TensorPair
from selection.family import Layout, Refused
from selection.layers import any_layer

TOKENS = ("cls_token", "dist_token", "reg_token")  # in the order of their rows in a position embedding

StepsAndNotes = tuple[list[tuple], list[str]]


def token_rows(layout: Layout) -> dict[str, tuple[int, int]]:
    """Find the rows of the position embedding that belong to tokens: token -> (first row, number of rows)."""
    if layout.grid is None or "pos_embed" not in layout.shapes:
        return {}
    counts = {token: layout.shapes[token][1] for token in TOKENS if token in layout.shapes}
    rows = layout.shapes["pos_embed"][1] - math.prod(layout.grid)
    if rows == 0:
        return {}
    if rows != sum(counts.values()):
        grid = sides(layout.grid)
        raise Refused("positions", f"pos_embed has {rows} rows besides those of {grid} patches, for {counts}")
    rows_of, first = {}, 0
    for token, count in counts.items():
        rows_of[token] = (first, count)
        first += count
    return rows_of


def size_steps(
    pair: TensorPair, words: Sequence[str], teacher_key: str, teacher: Layout, student: Layout
) -> StepsAndNotes:
    """Plan how a tensor whose axes have these words gets to the student's size; no steps if it is there."""
    steps, notes = _resampling_steps(pair, teacher_key, teacher, student) if "~" in words else ([], [])
    if "rgb" in words:
        old, new = (shape[words.index("rgb")] for shape in (pair.teacher, pair.student))
        if old != new:
            steps.append(("channels", new))
            notes.append(f"{pair.key} adapted from {old} to {new} image channels")
    return steps, notes


def _resampling_steps(pair: TensorPair, teacher_key: str, teacher: Layout, student: Layout) -> StepsAndNotes:
    key = pair.key
    if key == "pos_embed":
        return _position_steps(teacher, student)
    if key.endswith(".relative_position_bias_table"):
        old = teacher.windows[teacher_key.rpartition(".")[0]]
        new = student.windows[key.rpartition(".")[0]]
        what, step = "windows", ("window", list(old), list(new))
    else:
        old, new = pair.teacher[2:], pair.student[2:]
        what, step = "patches", ("patch", list(new))
    if old == new:
        return [], []
    return [step], [f"{any_layer(key)} resampled from {what} of {sides(old)} to {sides(new)}"]


def _position_steps(teacher: Layout, student: Layout) -> StepsAndNotes:
    if None in (teacher.grid, student.grid):
        return _positions_without_grid(teacher, student)
    if 0 in student.grid:
        grid = sides(student.grid)
        raise Refused("positions", f"the student's images have {grid} patches: they are smaller than a patch")
    old, new = token_rows(teacher), token_rows(student)
    if (old, teacher.grid) == (new, student.grid):
        return [], []
    rows, notes = [], []
    for token, (_, count) in new.items():
        same = "cls_token" if token == "dist_token" and token not in old else token
        rows += [[same, row] if same in old else None for row in range(count)]
    if None in rows:
        notes.append("pos_embed begins at 0 in the rows of tokens that the teacher's has none for")
    if new:
        notes += [f"row of {token} left out of pos_embed" for token in old if token not in new]
    if teacher.grid != student.grid:
        notes.append(f"pos_embed resampled from {sides(teacher.grid)} patches to {sides(student.grid)}")
    first = {token: row for token, (row, _) in old.items()}
    tokens = sum(count for _, count in old.values())
    return [("positions", rows, first, tokens, list(teacher.grid), list(student.grid))], notes


def _positions_without_grid(teacher: Layout, student: Layout) -> StepsAndNotes:
    old, new = (layout.shapes["pos_embed"][1] for layout in (teacher, student))
    if old != new:
        message = f"pos_embed has {old} rows in the teacher and {new} in the student, and their grid is not known"
        raise Refused("positions", message)
    return [], []


def merged_row_steps(teacher_key: str, teacher: Layout, student: Layout) -> StepsAndNotes:
    """Plan to add a token's row of the position embedding to the token itself, if the student has no rows for tokens."""
    if teacher_key not in TOKENS or token_rows(student):
        return [], []
    first, count = token_rows(teacher).get(teacher_key, (0, 0))
    if not count:
        return [], []
    return [("plus", "pos_embed", first, count)], [f"row of {teacher_key} in pos_embed added to it"]


def sides(sizes: tuple[int, ...]) -> str:
    """Write (14, 14) as 14x14."""
    return "x".join(map(str, sizes))
