"""What a script says where it lacks what it needs: a package, a newer one, or the modules beside it."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import requirements
from utils import UserError

ROOT = Path(__file__).parents[1]


def lowest():
    """The lines of requirements.txt as {name: version}."""
    return dict(line.split(">=") for line in requirements.REQUIREMENTS.read_text().splitlines())


def test_what_is_installed_here_is_new_enough():
    requirements.check_packages()


@pytest.mark.parametrize("build", ["{}", "{}.0", "{}+cpu", "{}.post1", "99.0.0a0+git1234567"])
def test_lowest_versions_and_newer_ones_pass(build, monkeypatch):
    monkeypatch.setattr(requirements, "version", lambda name: build.format(lowest()[name]))
    requirements.check_packages()


@pytest.mark.parametrize(
    ("name", "found"),
    [("timm", "1.0.20"), ("timm", "1.0.9"), ("timm", "0.9.16"), ("torch", "2.2.2+cu121"), ("Pillow", "9.5.0")],
)
def test_older_package_is_named_with_both_versions(name, found, monkeypatch):
    versions = lowest() | {name: found}
    monkeypatch.setattr(requirements, "version", versions.__getitem__)
    with pytest.raises(UserError) as error:
        requirements.check_packages()
    wanted = lowest()[name]
    assert str(error.value) == (f"{name} {found} is too old, the lowest is {wanted}: pip install -U '{name}>={wanted}'")


def test_missing_package_is_named(monkeypatch):
    def version(name):
        if name == "tensorboardX":
            raise PackageNotFoundError(name)
        return "99"

    monkeypatch.setattr(requirements, "version", version)
    with pytest.raises(UserError, match=r"^tensorboardX is not installed: pip install -r requirements\.txt$"):
        requirements.check_packages()


def test_install_page_names_the_lowest_versions():
    text = " ".join((ROOT / "INSTALL.md").read_text().split())
    for name, version in lowest().items():
        assert f"{name} {version}" in text, name


@pytest.mark.parametrize("script", ["main.py", "weight_selection.py"])
def test_old_timm_is_a_line_before_it_is_imported(script, tmp_path):
    about = tmp_path / "timm-1.0.20.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 1.0.20\n")
    options = ["--plan"] if script == "weight_selection.py" else []
    command, environment = [sys.executable, str(ROOT / script), *options], {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{script}: error: timm 1.0.20 is too old, the lowest is {lowest()['timm']}:")


@pytest.mark.parametrize("script", ["main", "weight_selection", "compare", "sweep", "export", "predict"])
@pytest.mark.parametrize("how", ["-P", "-I", "PYTHONSAFEPATH"])
def test_python_that_may_not_look_beside_the_script_is_a_line(script, how, tmp_path):
    switches, environment = ([how], os.environ) if how.startswith("-") else ([], {**os.environ, how: "1"})
    command = [sys.executable, *switches, str(ROOT / f"{script}.py"), "-h"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    message = "No module named 'options': unset PYTHONSAFEPATH, and start python without -P and -I"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{script}.py: error: {message}\n")
