"""The study runs what is missing through the two scripts, goes on where it was stopped, and keeps logs without paths."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from conftest import read_log, write_images

STUDY = Path(__file__).parents[1] / "study"


def script(name):
    """The module study/<name>.py, which is no package's."""
    spec = importlib.util.spec_from_file_location(f"study_{name}", STUDY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


run = script("run")


def tiny_study():
    """A teacher and the arms of one row, an epoch of ten images each."""
    recipe = "--input_size 16 --batch_size 4 --warmup_epochs 0 --device cpu --num_workers 0 --augment device"
    shape = "img_size=16 patch_size=8 num_heads=2 "
    return run.Study(
        recipe,
        {
            "vit/student": run.Model("vit_tiny", shape + "embed_dim=8 depth=1", "--lr 1e-3", 1, 1.0),
            "vit/teacher": run.Model("vit_tiny", shape + "embed_dim=16 depth=2", "--lr 1e-3", 1, 2.0),
        },
        [("vit", "full", "random shuffled", range(1))],
    )


@pytest.fixture
def data(tmp_path):
    for name, classes in ((run.TEACHER_DATA, "abc"), (run.STUDENT_DATA, "de")):
        for part in ("train", "val"):
            write_images(tmp_path / "images" / name, part, dict.fromkeys(classes, 5), size=16)
    return tmp_path / "images"


def test_a_study_is_run_once_and_keeps_logs_without_paths(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(run.STUDIES, "cpu", tiny_study())
    call = ["cpu", "--data", str(data), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    assert run.main(call) == 0, capsys.readouterr().err
    for name in ("vit/teacher", "vit/full/random-0", "vit/full/shuffled-0"):
        assert [line["epoch"] for line in read_log(tmp_path / "results" / name)] == [0]
        config = (tmp_path / "results" / name / "config.json").read_text()
        assert str(tmp_path) not in config and str(Path.home()) not in config
    assert json.loads(config)["initialization"]["teacher"]["file"] == "vit/teacher_shuffled.pth"
    assert len(list((tmp_path / "results").rglob("*.*"))) == 6
