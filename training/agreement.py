"""What all processes of a run must have in common, compared before it can do harm; single processes compare nothing.

Each rank learns what all others have. So if something differs, all ranks raise the same error, and none waits for another.
"""

import logging
from collections import defaultdict
from itertools import zip_longest

import torch

from options.table import FREE_PER_RANK, PATHS
from training import distributed
from utils import UserError, environment

log = logging.getLogger(__name__)

VERSIONS = ("python", "torch", "torchvision", "timm", "numpy", "pillow")
MOST_VALUES = 4  # of one thing that an error lists
LONGEST_VALUE = 80  # characters


def check_options(options: dict) -> None:
    """UserError on all ranks if their options differ, except those in FREE_PER_RANK; warn of other versions of libraries."""
    described = {}
    for name, value in options.items():
        if isinstance(value, dict):  # NAME=VALUE …
            described |= {f"--{name} {key}": each for key, each in value.items()}
        elif name in PATHS:
            # a node's own path to it; but an URL is downloaded by one process for all
            described[f"--{name}"] = value if value.startswith("https://") else "a path" if value else "unset"
        elif name not in FREE_PER_RANK:
            described[f"--{name}"] = value
    check_same(described, "start all with the same options")
    if distributed.world_size() > 1:
        here = environment(torch.device("cpu"), distributed.world_size())
        for difference in differences({name: here[name] for name in VERSIONS}):
            log.warning("the processes differ in their version of %s, and so may what they compute", difference)


def check_same(described: dict, advice: str) -> None:
    """UserError on all ranks, with what differs, the ranks and their values, unless they describe the run alike.

    `described` holds plain values by what they are, such as {"--lr": 0.001}; ranks may lack some. A collective.
    """
    found = differences(described)
    if found:
        raise UserError(f"the processes differ in {', '.join(found)}: {advice}")


def differences(described: dict) -> list[str]:
    """Return a phrase for each name whose values differ between the ranks. A collective."""
    everywhere = distributed.of_all_ranks(described)
    if all(each == everywhere[0] for each in everywhere):
        return []
    names = dict.fromkeys(name for each in everywhere for name in each)
    values = {name: [each.get(name, "unset") for each in everywhere] for name in names}
    return [_phrase(name, each) for name, each in values.items() if any(value != each[0] for value in each)]


def _phrase(name: str, values: list) -> str:
    """Return e.g. "--lr (0.001 on ranks 0 to 2, 0.005 on rank 3)"; `values` has one per rank."""
    ranks = defaultdict(list)
    for rank, value in enumerate(in_short(values)):
        ranks[value].append(rank)
    listed = [f"{value} on {_ranks(members)}" for value, members in ranks.items()]
    more = f" and {len(listed) - MOST_VALUES} more values" if len(listed) > MOST_VALUES else ""
    return f"{name} ({', '.join(listed[:MOST_VALUES])}{more})"


def in_short(values: list) -> list[str]:
    """Return values as text; of long lists, their lengths and the first item in which they differ."""
    texts = [value if isinstance(value, str) and value else repr(value) for value in values]
    if all(len(text) <= LONGEST_VALUE for text in texts):
        return texts
    if all(isinstance(value, list) for value in values):
        rows = enumerate(zip_longest(*values, fillvalue="missing"))
        number, items = next((number, items) for number, items in rows if any(item != items[0] for item in items))
        pairs = zip(values, items, strict=True)
        texts = [f"{len(value)}, number {number} of them {item}" for value, item in pairs]
    return [text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…" for text in texts]


def _ranks(members: list[int]) -> str:
    """Return e.g. "rank 3" or "ranks 0 to 2, 5"; `members` ascend."""
    runs: list[list[int]] = []
    for rank in members:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    spans = [str(first) if first == last else f"{first} to {last}" for first, last in runs]
    return f"rank{'s' * (len(members) > 1)} {' and '.join(spans[:MOST_VALUES])}{'…' * (len(spans) > MOST_VALUES)}"
