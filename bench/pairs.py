"""Plan every pair of timm's models within each family, from shapes alone, and count what is planned and what is refused.

    python -m bench.pairs [--out results/pairs.json] [--families vit swin …]

No weights are read or made: models are built on the meta device. Two models of a family are two pairs, one per order. Any
exception but a refusal with its reason ends the run with code 1.
"""

import collections
import importlib.util
import inspect
import itertools
import math
import platform
import sys
import time
import warnings
from pathlib import Path

import timm
import torch

import models
from options.parser import Parser
from options.selection import HEAD_RULES, LAYER_RULES
from selection.families import FAMILIES
from selection.family import Layout, Refused
from selection.match import match
from selection.plan import choose
from selection.rules import Choices
from utils import json_lines


def names_of(kind: type) -> list[str]:
    """List timm's architectures that may be of class `kind`: those of the modules that define or import the class."""
    names = set()
    for module in filter(lambda module: importlib.util.find_spec(f"timm.models.{module}"), timm.list_modules()):
        members = inspect.getmembers(importlib.import_module(f"timm.models.{module}"), inspect.isclass)
        if any(issubclass(member, kind) for _, member in members):
            names |= set(timm.list_models(module=module))
    return sorted(names)


def layouts(family: str) -> dict[str, Layout]:
    """Describe all models of the family, without their heads."""
    described = {}
    for name in names_of(models.FAMILIES[family].kind):
        model = models.create(name, {}, device="meta")
        if models.family_of(model) == family:
            described[name] = Layout.of(model, FAMILIES[family], models.head_prefixes(model))
    return described


def count(family: str, known: dict[str, Layout], choices: Choices) -> tuple[list[str], dict[str, list[str]]]:
    """List the pairs that can be planned, as "teacher -> student", and the refused ones by reason."""
    planned, refused = [], collections.defaultdict(list)
    for teacher, student in itertools.permutations(known, 2):
        pair = f"{teacher} -> {student}"
        try:
            choose(match(FAMILIES[family], known[teacher], known[student], choices), choices)
        except Refused as refusal:
            refused[refusal.reason].append(pair)
        except Exception as error:
            raise RuntimeError(f"{pair}: neither planned nor refused") from error
        else:
            planned.append(pair)
    return planned, refused


def counts(family: str, choices: Choices) -> dict:
    """Count one family for `--out`, and print the counts."""
    start, known = time.perf_counter(), layouts(family)
    planned, refused = count(family, known, choices)
    refused = dict(sorted(refused.items(), key=lambda item: -len(item[1])))
    values = {name: sum(map(math.prod, layout.shapes.values())) for name, layout in known.items()}
    smaller = sum(values[student] < values[teacher] for teacher, student in (pair.split(" -> ") for pair in planned))
    counted = f"{len(planned)} pairs planned, {smaller} of them with a smaller student"
    print(f"{family}: {len(known)} models, {counted} ({time.perf_counter() - start:.0f} s)")
    for reason, pairs in refused.items():
        print(f"  {len(pairs):6} refused: {reason:18} e.g. {pairs[0]}", flush=True)
    return {
        "models": len(known),
        "planned": len(planned),
        "planned with a smaller student": smaller,
        "planned, both of DINOv3": sum(pair.count("dinov3") == 2 for pair in planned),
        "refused": {reason: len(pairs) for reason, pairs in refused.items()},
        "pairs": planned,
    }


def main(argv: list[str] | None = None) -> dict:
    """Count the families; returns what `--out` holds."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--layer_selection", choices=LAYER_RULES, default="first")
    parser.add_argument("--heads", choices=HEAD_RULES, help="(default: blend; keep if heads cannot be mixed)")
    parser.add_argument("--out", metavar="FILE", help="write counts and the planned pairs as JSON")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    choices = Choices(layer_selection=options.layer_selection, heads=options.heads)
    result = {
        "command": " ".join(["python", "-m", "bench.pairs", *(sys.argv[1:] if argv is None else argv)]),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "timm": timm.__version__},
        "families": {family: counts(family, choices) for family in options.families},
    }
    if options.out:
        Path(options.out).write_text(json_lines(result, levels=3) + "\n")
    return result


if __name__ == "__main__":
    main()
