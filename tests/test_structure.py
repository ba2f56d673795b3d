"""The shape of the code: which part may import which, and what runs without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# a script, a module or a folder imports only from levels below its own, and from itself
LEVELS = [
    ["utils"],
    ["options", "models", "optim_factory", "weightfiles"],
    ["training", "selection"],
    ["images"],
    ["datasets", "engine"],
    ["main", "weight_selection", "compare"],
    ["study", "bench"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def imported(path):
    """The top-level names that a file imports anywhere, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def files_of(name):
    return sorted((ROOT / name).rglob("*.py")) if (ROOT / name).is_dir() else [ROOT / f"{name}.py"]


def test_every_module_has_a_level():
    modules = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert modules == set(LEVEL)


@pytest.mark.parametrize("name", LEVEL)
def test_modules_import_only_from_levels_below_their_own(name):
    for path in files_of(name):
        for other in imported(path):
            assert other == name or LEVEL.get(other, -1) < LEVEL[name], f"{path.name} imports {other}"


@pytest.mark.parametrize("module", ["options", "utils", "compare", "study.run", "study.report", "study.make_data"])
def test_what_has_to_answer_at_once_needs_only_python(module):
    code = f"import sys; sys.path.append({str(ROOT)!r}); import {module}"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)  # -S: without installed packages
