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
    ["files", "options", "models", "optim_factory", "requirements"],
    ["weightfiles"],
    ["selection"],
    ["training"],
    ["images"],
    ["datasets", "engine", "deploy"],
    ["main", "weight_selection", "compare", "export", "predict"],
    ["sweep"],
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


@pytest.mark.parametrize(
    "module",
    [
        "options.tools",
        "options.selection",
        "utils",
        "requirements",
        "training.signals",
        "compare",
        "sweep",
        "study.run",
        "study.report",
        "study.make_data",
    ],
)
def test_what_has_to_answer_at_once_needs_only_python(module):
    code = f"import sys; sys.path.append({str(ROOT)!r}); import {module}"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)  # -S: without installed packages


FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")])
TABLES = {"options/table.py": "training_parser"}  # a table of options may be as long as it has rows


def lengths_and_parameters(path):
    """The name, lines and number of parameters of each function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args
            names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            names += [each.arg for each in (given.vararg, given.kwarg) if each]
            yield (
                node.name,
                node.end_lineno - node.lineno + 1,
                len([name for name in names if name not in ("self", "cls")]),
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_functions_and_names_are_short(path):
    name = path.relative_to(ROOT).as_posix()
    longest = 400 if name.startswith("tests/") else 300
    assert len(path.read_text().splitlines()) <= longest
    for function, lines, parameters in lengths_and_parameters(path):
        assert lines <= 50 or function == TABLES.get(name), f"{function} has {lines} lines"
        assert parameters <= 8, f"{function} has {parameters} parameters"
        assert len(function) <= 60, f"{function}: a name of {len(function)} characters"


def test_formatter_exceptions_are_few():
    exceptions = [path.name for path in FILES for line in path.read_text().splitlines() if "# fmt" + ":" in line]
    assert len(exceptions) < 20, exceptions
