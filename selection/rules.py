"""The rules of choice, as pure functions: which layers a student takes, and which indices along an axis."""

import zlib
from dataclasses import dataclass

import numpy as np
import torch

from options import ACTIVATION_RULES
from utils import Stream, permutation


@dataclass(frozen=True)
class Choices:
    """How to choose: a rule for layers, a rule for indices, whether heads stay whole, and a seed for the random rules.

    The defaults are the paper's. `heads` "blend" builds a student's head from channels of several teacher heads; "keep"
    takes whole heads; None is "blend" if channels of different heads can be mixed, else "keep".
    """

    layer_selection: str = "first"
    element_selection: str = "uniform"
    heads: str | None = None
    seed: int = 0


def evenly_spaced(source: int, target: int) -> list[int]:
    """Spread `target` indices evenly over `source`, ascending.

    If the sizes divide, the stride is constant. If not, `linspace(0, source - 1)` is rounded in float32, ties to even, as
    in the paper's code (weight_selection.py:14-18 at e9b6d0c). Raises ValueError if target > source or target < 1.
    """
    if not 1 <= target <= source:
        raise ValueError(f"cannot keep {target} of {source} indices")
    if source % target == 0:
        return list(range(0, source, source // target))
    return torch.round(torch.linspace(0, source - 1, target)).long().tolist()


# rule -> the `target` layers taken from a stage of `source`; another rule is a row here and a choice in options.py
LAYER_RULES = {
    "first": lambda source, target: list(range(target)),
    "last": lambda source, target: list(range(source - target, source)),
    "middle": lambda source, target: list(range((source - target) // 2, (source - target) // 2 + target)),
    "uniform": evenly_spaced,
}


def select_layers(rule: str, source: int, target: int, *, first_stays: bool = False, turns: int = 1) -> list[int]:
    """Choose `target` of a stage's `source` layers, ascending. Raises ValueError if there are too few.

    `first_stays`: layer 0 stays layer 0, and the rule chooses among the others. `turns`: so many kinds of layer take
    turns and must keep doing so, hence the rule chooses whole rounds.
    """
    if not 1 <= target <= source:
        raise ValueError(f"cannot keep {target} of {source} layers")
    choose = LAYER_RULES[rule]
    if first_stays:
        others = choose(source - 1, target - 1) if target > 1 else []
        return [0, *(layer + 1 for layer in others)]
    # A last round that is cut short may only become the student's last round if that is cut short too
    whole_rounds = source // turns if target % turns == 0 else -(-source // turns)
    rounds = choose(whole_rounds, -(-target // turns))
    return [turns * number + turn for number in rounds for turn in range(turns)][:target]


def select_indices(
    rule: str, source: int, target: int, *, group: str, seed: int, score: np.ndarray | None
) -> list[int]:
    """Choose `target` of `source` indices along an axis group, ascending. Raises ValueError if there are too few.

    "magnitude" and the rules by activation need `score` [source]. The random rules draw from (seed, name of the group), so that no draw depends on
    the order of the plan.
    """
    if not 1 <= target <= source:
        raise ValueError(f"cannot keep {target} of {source} indices")
    if rule == "uniform":
        return evenly_spaced(source, target)
    if rule == "consecutive":
        return list(range(target))
    if rule in ("magnitude", *ACTIVATION_RULES):
        ranked = np.argsort(-score, kind="stable")  # of equal scores the earlier index wins
        return sorted(ranked[:target].tolist())
    if rule in ("random", "random_inconsistent"):  # they differ in what is a group
        draw = permutation(source, Stream.SLOTS, seed, zlib.crc32(group.encode()))
        return sorted(draw[:target].tolist())
    raise ValueError(f"{rule} is not an element rule")
