"""The rules of choice: which layers, and which slots of an axis group. Pure functions of sizes, seeds and scores."""

import zlib
from dataclasses import dataclass

import numpy as np
import torch

from utils import Stream, permutation


@dataclass(frozen=True)
class Choices:
    """How to choose: the rule for layers, the rule for slots, whether heads stay whole, the seed of the random rules.

    `heads` "blend" takes a student head's slots from several teacher heads, as the paper's code does; "keep" takes whole
    heads; None is "blend" where slots of different heads can be mixed, else "keep".
    """

    layer_selection: str = "first"
    element_selection: str = "uniform"
    heads: str | None = None
    seed: int = 0


def select_indices(source: int, target: int) -> list[int]:
    """Evenly spaced positions to keep when `source` slots shrink to `target`; ascending.

    Divisible sizes use a constant stride; others round `linspace(0, source - 1)` in float32, ties to even, as the
    paper's code does (weight_selection.py:14-18 at e9b6d0c). Raises ValueError if target > source or target < 1.
    """
    if not 1 <= target <= source:
        raise ValueError(f"cannot keep {target} of {source} slots")
    if source % target == 0:
        return list(range(0, source, source // target))
    return torch.round(torch.linspace(0, source - 1, target)).long().tolist()


def select_layers(rule: str, source: int, target: int, *, first_stays: bool = False, turns: int = 1) -> list[int]:
    """The teacher's layer for each of the `target` layers of a student's stage, ascending; `source` are there.

    With `first_stays` layer 0 is taken as layer 0 and the rule chooses among the others. `turns` kinds of layer that
    take turns keep doing so: whole rounds are chosen. Raises ValueError if there are not enough layers.
    """
    if not 1 <= target <= source:
        raise ValueError(f"cannot keep {target} of {source} layers")
    if first_stays:
        rest = select_layers(rule, source - 1, target - 1) if target > 1 else []
        return [0, *(layer + 1 for layer in rest)]
    if turns > 1:
        # a last round that is not complete can only become one that is not complete either
        complete = target % turns == 0
        rounds = _spread(rule, source // turns if complete else -(-source // turns), -(-target // turns))
        return [turns * number + turn for number in rounds for turn in range(turns)][:target]
    return _spread(rule, source, target)


def _spread(rule: str, source: int, target: int) -> list[int]:
    start = {"first": 0, "middle": (source - target) // 2, "last": source - target}.get(rule)
    return select_indices(source, target) if start is None else list(range(start, start + target))


def select_slots(rule: str, source: int, target: int, *, group: str, seed: int, score: np.ndarray | None) -> list[int]:
    """The slots of an axis group to keep, ascending; `score` [source] is for "magnitude", `seed` for the random rules.

    Each group draws for itself, from (seed, its name), so that no draw depends on the order of the plan.
    """
    if not 1 <= target <= source:
        raise ValueError(f"cannot keep {target} of {source} slots")
    if rule == "uniform":
        return select_indices(source, target)
    if rule == "consecutive":
        return list(range(target))
    if rule == "magnitude":
        ranked = np.argsort(-score, kind="stable")  # the earlier of equals
        return sorted(ranked[:target].tolist())
    draw = permutation(source, Stream.SLOTS, seed, zlib.crc32(group.encode()))
    return sorted(draw[:target].tolist())
