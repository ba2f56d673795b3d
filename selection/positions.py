"""Position embeddings: which rows belong to tokens, and the steps from the teacher's to the student's."""

import math

from selection.family import Layout, Refused

TOKENS = ("cls_token", "dist_token", "reg_token")  # in the order of their rows


def token_rows(layout: Layout) -> dict[str, tuple[int, int]]:
    """The rows of the position embedding that belong to tokens: token -> (first row, number of rows)."""
    if layout.grid is None or "pos_embed" not in layout.shapes:
        return {}
    counts = {token: layout.shapes[token][1] for token in TOKENS if token in layout.shapes}
    rows = layout.shapes["pos_embed"][1] - math.prod(layout.grid)
    if rows == 0:
        return {}
    if rows != sum(counts.values()):
        raise Refused(
            "positions", f"pos_embed has {rows} rows besides those of {sides(layout.grid)} patches, for {counts}"
        )
    found, first = {}, 0
    for token, count in counts.items():
        found[token] = (first, count)
        first += count
    return found


def position_steps(teacher: Layout, student: Layout) -> tuple[list[tuple], list[str]]:
    """The step that turns the teacher's position embedding into the student's, if it takes one, and what to say of it."""
    if None in (teacher.grid, student.grid):
        lengths = [layout.shapes["pos_embed"][1] for layout in (teacher, student)]
        if lengths[0] == lengths[1]:
            return [], []
        raise Refused(
            "positions",
            f"pos_embed has {lengths[0]} rows in the teacher, {lengths[1]} in the student, of no known grid",
        )
    if 0 in student.grid:
        raise Refused(
            "positions", f"the student's images have {sides(student.grid)} patches: they are smaller than a patch"
        )
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


def sides(sizes) -> str:
    """14x14, from (14, 14)."""
    return "x".join(map(str, sizes))
