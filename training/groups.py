"""Group finished runs by their settings and find what each group is compared with. Standard library only."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from options.table import RECIPES
from training.finished import READING_IT, FinishedRun, warn
from utils import UserError, few, hint

# Groups that agree in these stand in one table.
MODEL_AND_DATA = ("model", "model_kwargs", "data_set", "data_path", "data_fraction", "classes", "training_images")
START = {"initialize", *READING_IT, "init"}  # settings in which a run may differ from its baseline
OF_RECIPES = {name for values in RECIPES.values() for name in values}


class Group(NamedTuple):
    """Runs that differ only in their seeds. `label` is what differs from the other groups of its table."""

    table: str
    label: str
    settings: dict[str, str]
    runs: list[FinishedRun]

    @property
    def is_random(self) -> bool:
        return random_start(self.settings) == "random init"

    @property
    def name(self) -> str:
        return f"{self.table}: {self.label}"


def group_runs(runs: list[FinishedRun], ignore: list[str]) -> list[Group]:
    """Group runs of equal settings, tables and groups in the order of the runs. Of a repeated seed the first counts.

    A fact that some of the runs do not record tells no runs apart.
    """
    facts = set.intersection(*(set(run.facts) for run in runs))
    known = sorted({name for run in runs for name in run.settings} | facts)
    for name in ignore:
        if name not in known:
            raise UserError(f"--ignore {name} is none of the settings {', '.join(known)}{hint(name, known)}")
    ignored = set(ignore) | set(READING_IT if "initialize" in ignore else ())
    by_settings: dict[tuple, dict[int, FinishedRun]] = defaultdict(dict)
    for run in runs:
        kept = run.settings | {name: run.facts[name] for name in facts}
        if "initialize" in ignore:  # but keep random init apart from the rest, or there would be no baseline
            kept["initialize"] = kept["initialize"] and "any"
        kept = {name: value for name, value in kept.items() if name == "initialize" or name not in ignored}
        first = by_settings[tuple(sorted(kept.items()))].setdefault(run.seed, run)
        if first is not run:
            warn(f"{run.folder} is left out: settings and seed {run.seed} are those of {first.folder}")
    return in_tables([(dict(settings), list(by_seed.values())) for settings, by_seed in by_settings.items()])


def in_tables(groups: list[tuple[dict[str, str], list[FinishedRun]]]) -> list[Group]:
    """Give each group of these settings and runs its table and its label there."""
    titles = table_titles([settings for settings, _ in groups])
    tables: dict[str, list] = defaultdict(list)
    for title, group in zip(titles, groups, strict=True):
        tables[title].append(group)
    return [
        Group(title, label, settings, runs)
        for title, members in tables.items()
        for label, (settings, runs) in zip(labels(members), members, strict=True)
    ]


def differing(settings: list[dict[str, str]], names: Iterable[str]) -> list[str]:
    """Return those of `names` whose values are not the same in all of `settings`."""
    return [name for name in names if len({each.get(name) for each in settings}) > 1]


def table_titles(settings: list[dict[str, str]]) -> list[str]:
    """Return "MODEL on DATA SET" for each of `settings`, with what else differs among models and data sets."""
    others = differing(settings, [name for name in MODEL_AND_DATA if name not in ("model", "data_set")])
    return [
        ", ".join([f"{each['model']} on {each['data_set']}", *(f"{name}={each.get(name, 'unset')}" for name in others)])
        for each in settings
    ]


def random_start(settings: dict[str, str]) -> str:
    """Return what to call a start from random weights: "random init", or by its --init; "" for one from a file."""
    kind = settings.get("init", "timm")
    return "" if settings["initialize"] else "random init" if kind == "timm" else f"{kind} init"


def labels(groups: list[tuple[dict[str, str], list[FinishedRun]]]) -> list[str]:
    """Return a label for each group of a table, made of what differs among their settings, the initialization first."""
    settings, recipes = [each for each, _ in groups], [runs[0].recipe for _, runs in groups]
    files = initialization_names(groups)
    others = differing(settings, sorted({name for each in settings for name in each} - START))
    # options that have one value per recipe are said by its name
    by_recipe = {
        name for name in OF_RECIPES.intersection(others) if one_each(recipes, [each[name] for each in settings])
    }
    # how a file is read belongs to its name, and random init has no file
    reading = differing([each for each in settings if each["initialize"]], READING_IT)
    has_start = not others or differing(settings, ["initialize", "init"])

    def parts(each: dict[str, str], recipe: str) -> Iterator[str]:
        if has_start:
            yield random_start(each) or f"initialize={files[each['initialize']]}"
        if each["initialize"]:
            yield from (f"{name}={each[name]}" for name in reading)
        if by_recipe:
            yield f"recipe={recipe}"
        yield from (f"{name}={each.get(name, 'unset')}" for name in others if name not in by_recipe)

    return [", ".join(parts(*each)) for each in zip(settings, recipes, strict=True)]


def one_each(keys: list[str], values: list[str]) -> bool:
    """Return whether equal keys always have equal values."""
    return len(set(zip(keys, values, strict=True))) == len(set(keys))


def initialization_names(groups: list[tuple[dict[str, str], list[FinishedRun]]]) -> dict[str, str]:
    """Return {sha256: file name}, with the file's folder or part of the sha256 if names alone are not distinct."""
    paths = {each["initialize"]: Path(runs[0].initialize_path) for each, runs in groups}
    if "any" in paths:
        return {"any": "any"}
    for style in ("{0.name}", "{0.parent.name}/{0.name}", "{0.name} ({1:.8})"):
        names = {sha256: style.format(path, sha256) for sha256, path in paths.items()}
        if len(set(names.values())) == len(names):
            break
    return names


# ---- what a group is compared with ----


def differences(group: Group, other: Group) -> list[str]:
    """Return what differs between two groups besides the initialization, each as "lr (0.001, here 0.002)"."""
    ours, theirs = group.settings, other.settings
    names = sorted((ours.keys() | theirs.keys()) - START)
    return [
        f"{name} ({theirs.get(name, 'unset')}, here {ours.get(name, 'unset')})"
        for name in differing([ours, theirs], names)
    ]


def baseline_of(group: Group, groups: list[Group]) -> Group | None:
    """Return the random-init group that differs from this one in the initialization alone; None if there is none."""
    if group.is_random:
        return None
    return next((each for each in groups if each.is_random and not differences(group, each)), None)


def why_without_baseline(group: Group, groups: list[Group]) -> str:
    """Say what differs between an initialized group and the random-init group of its table that is nearest to it."""
    found = [differences(group, each) for each in groups if each.is_random and each.table == group.table]
    if not found:
        return "no run of this model on these data starts from random init"
    return f"the nearest random init differs in {few(min(found, key=len))}"


def named_group(groups: list[Group], wanted: str) -> Group:
    """Return the group that `--baseline` names by its label, its table's title and label, or a folder of its runs."""
    folder = Path(wanted).resolve()
    found = [each for each in groups if wanted in (each.label, each.name)] or [
        each for each in groups if any(run.folder.resolve().is_relative_to(folder) for run in each.runs)
    ]
    if len(found) == 1:
        return found[0]
    problem = "several groups" if found else "no group and no folder of one"
    several_tables = len({each.table for each in groups}) > 1
    names = [each.name if several_tables else each.label for each in found or groups]
    raise UserError(f"--baseline {wanted}: {problem}; the groups are: {'; '.join(names)}")
