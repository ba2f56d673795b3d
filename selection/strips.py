"""What there is to see in a plan, in words and numbers: panels of strips, for selection.picture to draw."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

DASH = "–"  # noqa: RUF001

# the last part of a group's name -> what its slots are, in the order of the panels
KINDS = {
    "stream": "Residual stream: channels",
    "registers": "Register tokens",
    "heads": "Attention: heads",
    "slots": "Attention: slots in each head",
    "attn": "Attention: slots of all heads",
    "mlp": "MLP: hidden units",
    "mlp_tokens": "MLP over tokens: hidden units",
    "mlp_channels": "MLP over channels: hidden units",
    "groups": "Convolutions: groups",
    "in": "Convolutions: channels between the first and the second",
    "out": "Convolutions: channels between the second and the third",
    "se": "Squeeze and excitation: hidden units",
}
LAYER_RULES = {"first": "the first", "last": "the last", "middle": "the middle ones", "uniform": "evenly spread"}
SLOT_RULES = {
    "uniform": "evenly spaced",
    "consecutive": "the first",
    "random": "at random, seed {seed}",
    "random_inconsistent": "at random for each axis of each tensor, seed {seed}",
    "magnitude": "those with the largest weights",
}
HEAD_RULES = {"blend": "blended from several of the teacher's", "keep": "whole ones"}


MOST_ROWS, EXAMPLES = 66, 8  # of all panels; of a panel that is sampled because there are more, without its means
MOST_NOTES = 10
FEW = 8  # slots whose steps can be seen, and be equal by accident


@dataclass(frozen=True)
class Row:
    """A strip: the share in which each of the teacher's slots is kept, float [slots]; `kept` of them are in the student."""

    family: str  # rows that differ in their layer or tensor alone
    label: str
    kept: int
    shares: np.ndarray


@dataclass(frozen=True)
class Panel:
    """The strips of one kind of group; `total` is how many there are where `rows` is a sample, else 0."""

    title: str
    rows: list[Row]
    total: int = 0


def panels(plan: Mapping) -> list[Panel]:
    """The panels of a plan, those of `KINDS` first; equal strips of a stage are one row, and the rows are bounded."""
    strips: dict[tuple, list] = {}
    for name, group in plan["groups"].items():
        size, kept = group["teacher_size"], tuple(group["indices"])
        if size == 1:
            continue  # nothing to choose, as the one group of a plain convolution
        base, _, tensor = name.partition(" of ")  # a tensor is named if it chooses for itself
        kind, family, layer = _place(base, plan["layers"])
        own = tensor if len(kept) < size else ""
        strips.setdefault((kind, family, size, kept, own), []).append(tensor or layer)
    rows: dict[str, list[Row]] = {}
    for (kind, family, size, kept, _), members in strips.items():
        shares = np.zeros(size)
        shares[list(kept)] = 1
        rows.setdefault(kind, []).append(Row(family, _label(family, members), len(kept), shares))
    found = [Panel(_title(kind, rows), rows[kind]) for kind in dict.fromkeys([*KINDS, *rows]) if kind in rows]
    if sum(len(panel.rows) for panel in found) <= MOST_ROWS:
        return found
    return [_sample(panel) if len(panel.rows) > 2 * EXAMPLES else panel for panel in found]


def _place(base: str, stages: Iterable[str]) -> tuple[str, str, int | None]:
    """The kind of a group, its family, and the number of its layer if it is of one."""
    for stage in stages:
        # blocks.0.attn.heads, or blocks.0.attns.1.attn.heads where a layer has several attentions
        found = re.fullmatch(rf"{re.escape(stage)}\.(\d+)\.(?:(.+\.\d+)\.)?(?:.+\.)?(\w+)", base)
        if found:
            return found[3], stage if found[2] is None else f"{stage} ({found[2]})", int(found[1])
    owner, _, last = base.rpartition(".")
    if base == "attn_pool":
        return "attn", base, None
    return (last, owner or base, None) if last in KINDS else ("stream", base, None)


def _label(family: str, members: list) -> str:
    """What a row is called: its family, with its layers or its one tensor."""
    if isinstance(members[0], str):
        return members[0] if len(members) == 1 else f"{family}: {len(members)} axes"
    return family if members[0] is None else f"{family} {_ranges(members)}"


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers in words, with a dash for a run of them."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}{DASH}{run[-1]}" for run in runs)


def _title(kind: str, kinds: Iterable[str]) -> str:
    title = KINDS.get(kind, kind)
    if kind == "heads" and "attn" in kinds:
        return f"{title}, in the tables of relative positions"
    return f"{title}, of each group" if kind in ("in", "out") and "groups" in kinds else title


def _sample(panel: Panel) -> Panel:
    """For each family and size the mean of its strips, then the first of them."""
    families: dict[tuple[str, int], list[Row]] = {}
    for row in panel.rows:
        families.setdefault((row.family, len(row.shares)), []).append(row)
    shown, rows = max(1, EXAMPLES // len(families)), []
    for (family, _), members in families.items():
        if len(members) > shown:
            mean = np.mean([row.shares for row in members], axis=0)
            rows.append(Row(family, f"{family}: mean of {len(members)}", members[0].kept, mean))
        rows += members[:shown]
    return Panel(panel.title, rows, len(panel.rows))


def columns(shares: np.ndarray, slots_each: int) -> np.ndarray:
    """A strip in columns, each the mean of `slots_each` slots (the last one: of those that are left).

    No slot is skipped, so that no stride can look like all or nothing.
    """
    starts = np.arange(0, len(shares), slots_each)
    return np.add.reduceat(shares, starts) / np.diff([*starts, len(shares)])


def count_words(row: Row) -> str:
    """How many slots of how many: "all 64", "12 of 64", "192 of 384, stride 2"."""
    size, slots = len(row.shares), np.flatnonzero(row.shares == 1)
    if row.kept == size:
        return f"all {size}"
    steps = set(np.diff(slots).tolist()) if len(slots) == row.kept >= FEW else {1}
    return f"{row.kept} of {size}" + (f", stride {max(steps)}" if len(steps) == 1 and steps != {1} else "")


def headline(description: Mapping) -> tuple[str, str]:
    """The two models, and the choices in words."""
    student, teacher = (_model(description[side]) for side in ("student", "teacher"))
    choices, plan = description["choices"], description["plan"]
    slots = SLOT_RULES.get(choices["element_selection"], choices["element_selection"]).format(seed=choices["seed"])
    words = [f"layers: {LAYER_RULES.get(choices['layer_selection'], choices['layer_selection'])}", f"slots: {slots}"]
    kinds = {_place(name.partition(" of ")[0], plan["layers"])[0] for name in plan["groups"]}
    if kinds & {"heads", "attn"}:
        words.append(f"heads: {HEAD_RULES.get(choices['heads'], choices['heads'])}")
    words.append(f"classifier: {'taken' if choices['include_head'] else 'left out'}")
    return f"{student} from {teacher}", " · ".join(words)


def _model(side: Mapping) -> str:
    kwargs = ", ".join(f"{key}={value}" for key, value in side["kwargs"].items())
    return f"{side['model']} ({kwargs})" if kwargs else side["model"]


def note_lines(notes: Mapping[str, int]) -> list[str]:
    """What is not a plain copy of slots, a line each."""
    lines = [f"{note} ({count} tensors)" if count > 1 else note for note, count in notes.items()]
    hidden = len(lines) - MOST_NOTES
    return lines if hidden <= 0 else [*lines[:MOST_NOTES], f"… and {hidden} more"]
