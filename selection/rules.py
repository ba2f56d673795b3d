"""The rules of choice, as pure functions: which layers a student takes, and which indices along an axis."""

import zlib
from dataclasses import dataclass

import numpy as np
import torch

from options.selection import ELEMENT_RULES, HEAD_RULES, LAYER_RULES, PARTS, SCORED_RULES
from utils import Stream, hint, permutation


def check_rule(kind: str, rule: str | None, known: tuple[str | None, ...]) -> None:
    """Raise ValueError unless a rule is one of those of its kind."""
    if rule not in known:
        names = [name for name in known if name]
        raise ValueError(f"{kind}={rule!r} is none of {', '.join(names)}{hint(str(rule), names)}")


@dataclass(frozen=True)
class Choices:
    """What to take, and how: rules for layers and for indices, whether heads stay whole, a seed for the random rules.

    The defaults are the paper's. `heads` "blend" builds a student's head from channels of several teacher heads; "keep"
    takes whole heads; None is "blend" if channels of different heads can be mixed, else "keep". `take` names the parts
    of the student that are taken, None all of them. `gain` is the power of (teacher's inputs / student's inputs) by which
    weights are multiplied. Raises ValueError for a rule or part that is not in the tables of `options`.
    """

    layer_selection: str = "first"
    element_selection: str = "uniform"
    heads: str | None = None
    seed: int = 0
    take: tuple[str, ...] | None = None
    gain: float = 0.0

    def __post_init__(self) -> None:
        check_rule("layer_selection", self.layer_selection, LAYER_RULES)
        check_rule("element_selection", self.element_selection, ELEMENT_RULES)
        check_rule("heads", self.heads, (*HEAD_RULES, None))
        for part in self.take or ():
            check_rule("take", part, PARTS)


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


# each of options.LAYER_RULES -> the `target` layers taken from a stage of `source`
LAYERS_BY_RULE = {
    "first": lambda source, target: list(range(target)),
    "last": lambda source, target: list(range(source - target, source)),
    "middle": lambda source, target: list(range((source - target) // 2, (source - target) // 2 + target)),
    "uniform": evenly_spaced,
}


def select_layers(rule: str, source: int, target: int, *, first_stays: bool = False, turns: int = 1) -> list[int]:
    """Choose `target` of a stage's `source` layers, ascending. Raises ValueError if there are too few, or no such rule.

    `first_stays`: layer 0 stays layer 0, and the rule chooses among the others. `turns`: so many kinds of layer take
    turns and must keep doing so, hence the rule chooses whole rounds.
    """
    if not 1 <= target <= source:
        raise ValueError(f"cannot keep {target} of {source} layers")
    check_rule("layer_selection", rule, LAYER_RULES)
    choose = LAYERS_BY_RULE[rule]
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
    """Choose `target` of `source` indices along an axis group, ascending.

    `options.SCORED_RULES` need a `score` [source]. The random rules draw from (seed, name of the group), so that no draw
    depends on the order of the plan. Raises ValueError if there are too few indices, or no such rule.
    """
    check_rule("element_selection", rule, ELEMENT_RULES)
    if not 1 <= target <= source:
        raise ValueError(f"cannot keep {target} of {source} indices")
    if rule == "uniform":
        return evenly_spaced(source, target)
    if rule == "consecutive":
        return list(range(target))
    if rule in SCORED_RULES:
        ranked = np.argsort(-score, kind="stable")  # of equal scores the earlier index wins
        return sorted(ranked[:target].tolist())
    # "random" and "random_inconsistent", which differ in what is a group
    draw = permutation(source, Stream.SLOTS, seed, zlib.crc32(group.encode()))
    return sorted(draw[:target].tolist())
