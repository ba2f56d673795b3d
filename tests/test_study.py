"""The study runs what is missing with the two scripts, survives any signal, and reports from logs alone."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import error_of, read_log, write_images, write_run

import main
import weight_selection
from options.selection import selection_options
from options.training import training_defaults, training_options
from study import arms, controls, report, run, runs, studies, untrained
from training import launch
from utils import STOPPED, UserError
from weightfiles.lazy import open_weights

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("study", studies.STUDIES)
def test_both_scripts_understand_every_command(study, tmp_path, capsys):
    planned = set()
    for each in runs.runs_of(studies.STUDIES[study]):
        *_, train = run.Place(tmp_path, tmp_path).commands(each)
        assert training_options(train[2:]).output_dir == each.name
        if each.selection is not None:
            planned.add(each.selection)
    needs_values = {"magnitude", "magnitude_inconsistent", "l1_inconsistent", "--data_path"}
    shapes_suffice = [words for words in planned if needs_values.isdisjoint(words)]
    for selection in planned:
        selection_options([*selection, "--plan"])
    for selection in shapes_suffice:
        weight_selection.main([*selection, "--plan"])
    assert capsys.readouterr().out.count('"family"') == len(shapes_suffice)


def test_teachers_come_before_their_students_and_runs_once():
    names = [each.name for each in runs.runs_of(studies.STUDIES["cpu"])]
    assert len(names) == len(set(names)) == 4 + 4 * 9 + 3 * (5 + 3 + 4 + 2)
    assert names.index("vit/teacher") < names.index("vit/full/selected-0")
    assert names.index("vit/wide_teacher") < names.index("vit/tenth/wide_blend-0")


def test_a_row_for_a_gpu_and_its_teacher_fit_into_25_minutes():
    study = studies.STUDIES["gpu"]
    for row in study.rows:
        assert sum(each.minutes for each in runs.runs_of(studies.Study(study.recipe, study.models, [row]))) < 25


def test_only_takes_the_teacher_that_is_needed():
    def names(pattern):
        return [each.name for each in run.chosen(runs.runs_of(studies.STUDIES["cpu"]), pattern)]

    assert names("vit/tenth/wide_keep-1") == ["vit/wide_teacher", "vit/tenth/wide_keep-1"]
    assert names("vit/full/random-2$") == ["vit/full/random-2"]
    with pytest.raises(UserError, match="--only keep_all: no run has such a name"):
        names("keep_all")


def tiny_study():
    """A teacher and two arms, an epoch of ten images each."""
    shape = "img_size=16 patch_size=8 num_heads=2 "
    return studies.Study(
        "--input_size 16 --batch_size 4 --warmup_epochs 0 --device cpu --num_workers 0 --augment device",
        {
            "vit/student": studies.Model("vit_tiny", shape + "embed_dim=8 depth=1", "--lr 1e-3", 1, 1.0),
            "vit/teacher": studies.Model("vit_tiny", shape + "embed_dim=16 depth=2", "--lr 1e-3", 1, 2.0),
        },
        [("vit", "full", "random shuffled", range(1))],
    )


@pytest.fixture
def call(tmp_path, monkeypatch):
    """The command line of the tiny study, on images of noise, and its folders in `tmp_path`."""
    for name, classes in ((arms.TEACHER_DATA, "abc"), (arms.STUDENT_DATA, "de")):
        for part in ("train", "val"):
            write_images(tmp_path / "images" / name, part, dict.fromkeys(classes, 5), size=16)
    monkeypatch.setitem(studies.STUDIES, "cpu", tiny_study())
    return f"cpu --data {tmp_path}/images --work {tmp_path}/work --results {tmp_path}/results".split()


SCRIPTS = {
    "main.py": main,
    "weight_selection.py": weight_selection,
    "study.controls": controls,
    "study.untrained": untrained,
}


@pytest.fixture
def commands(monkeypatch):
    """The scripts that the study calls, here in this process."""
    called = []

    def in_process(_, command, *, cwd, env, **__):
        monkeypatch.chdir(cwd)
        assert env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
        _, script, *arguments = [word for word in command if word != "-m"]
        called.append(Path(script).name)
        SCRIPTS[called[-1]].main(arguments)
        return 0

    monkeypatch.setattr(launch.Commands, "call", in_process)
    return called


def test_a_study_is_run_once_and_keeps_logs_without_paths(call, commands, tmp_path, capsys):
    results, names = tmp_path / "results", ["vit/full/random-0", "vit/teacher", "vit/full/shuffled-0"]
    run.main(call)
    assert commands == ["main.py", "main.py", "weight_selection.py", "study.controls", "main.py"]
    for name in names:
        assert [line["epoch"] for line in read_log(results / name)] == [0]
        config = (results / name / "config.json").read_text()
        assert str(tmp_path) not in config and str(Path.home()) not in config
    assert json.loads(config)["initialization"]["path"] == "vit/full/shuffled-0.pth"
    selected, shuffled = (
        open_weights(tmp_path / f"work/vit/full/shuffled-0{end}") for end in (".selected.pth", ".pth")
    )
    assert all(torch.equal(shuffled[key].flatten().sort()[0], selected[key].flatten().sort()[0]) for key in selected)
    assert {file.name for file in results.rglob("*") if file.is_file()} == {"config.json", "log.txt"}

    run.main(call)
    assert len(commands) == 5
    (results / names[2] / "log.txt").unlink()  # as if stopped before it was copied
    capsys.readouterr()
    run.main([*call, "--list"])
    listed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert listed[:3] == [[names[0], "finished"], [names[1], "finished"], [names[2], "epoch"]]
    run.main(call)
    assert commands[5:] == ["weight_selection.py", "study.controls", "main.py"]
    assert [line["epoch"] for line in read_log(results / names[2])] == [0]


def test_a_students_accuracy_before_training_is_kept(call, commands, tmp_path, monkeypatch):
    near = tiny_study()._replace(rows=[("vit", "near", "selected", range(1))])
    monkeypatch.setitem(studies.STUDIES, "cpu", near)
    monkeypatch.setitem(arms.SETTINGS, "near", arms.SETTINGS["near"]._replace(fraction=1.0, epochs=2))
    run.main(call)
    assert commands == ["main.py", "weight_selection.py", "study.untrained", "main.py"]
    folder = tmp_path / "results" / "vit" / "near" / "selected-0"
    measured = json.loads((folder / "untrained.json").read_text())
    assert measured.keys() == {"test_loss", "test_acc1", "test_acc5"} and len(read_log(folder)) == 2


def test_logs_of_a_teacher_are_not_replaced_by_a_new_ones(call, commands, tmp_path):
    for name in ("vit/teacher", "vit/full/random-0", "vit/full/shuffled-0"):
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "log.txt").write_text('{"epoch": 0}\n')
    run.main(call)  # nothing is missing: its weights are not needed
    (tmp_path / "results" / "vit" / "full" / "shuffled-0" / "log.txt").unlink()
    teacher = tmp_path / "work" / "vit" / "teacher"
    assert "is of a vit/teacher whose weights are not in --work" in error_of(run, *call)
    teacher.mkdir(parents=True)
    (teacher / "checkpoint-0.pth").touch()
    (teacher / "log.txt").write_text("of another\n")
    assert "is of a vit/teacher whose weights are not in --work" in error_of(run, *call)
    assert not commands


def test_a_folder_of_work_keeps_its_images(call, tmp_path):
    run.link_data(tmp_path / "images", tmp_path / "work")
    run.link_data(tmp_path / "images", tmp_path / "work")
    (tmp_path / "images").rename(tmp_path / "moved")
    assert f"have images of {tmp_path / 'images'}" in error_of(run, *call[:2], tmp_path / "moved", *call[3:])


@pytest.fixture
def hanging(call, tmp_path):
    """Start the tiny study with a main.py that hangs; return the study's process, the id of the hanging one, a function that takes its lock."""
    place, locked = run.Place(tmp_path / "work", tmp_path / "results"), runs.Run("vit/full/random-0", (), 1, 1.0)
    (tmp_path / "code").mkdir()
    os.mkfifo(tmp_path / "started")
    hang = "import os, pathlib, signal; pathlib.Path({!r}).write_text(str(os.getpid())); signal.pause()"
    (tmp_path / "code" / "main.py").write_text(hang.format(str(tmp_path / "started")))
    start = "import pathlib, sys; from study import run; run.ROOT = pathlib.Path({!r}); "
    start += "sys.exit(run.run_script(lambda: run.main({!r})))"
    start = start.format(str(tmp_path / "code"), [*call, "--only", "random-0"])
    process = subprocess.Popen([sys.executable, "-c", start], cwd=ROOT, stdout=subprocess.DEVNULL)
    with open(tmp_path / "started") as file:  # waits until main.py writes
        hanging = int(file.read())
    yield process, hanging, lambda: launch.hold(place.lock_file(locked))
    process.kill()
    process.wait()


def test_a_terminated_study_ends_its_run(hanging):
    process, _, lock = hanging
    assert lock() is None
    process.terminate()
    assert process.wait() == STOPPED == 75
    os.close(lock())


def test_what_a_killed_study_left_behind_keeps_its_folder(hanging):
    process, left_behind, lock = hanging
    process.kill()
    process.wait()
    try:
        assert lock() is None
    finally:
        os.kill(left_behind, signal.SIGKILL)


def test_failures_are_named(call, tmp_path, monkeypatch):
    error = error_of(run, "cpu", "--data", tmp_path, "--work", tmp_path / "work")
    assert error == f"--data {tmp_path}: no folder {arms.TEACHER_DATA}/train in it"
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in error_of(run, *call[:3], "--work", tmp_path / "file" / "work")
    (tmp_path / "main.py").write_text("import sys; print('first'); sys.exit('main.py: error: no such model')")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert "vit/full/random-0 failed with code 1: main.py: error: no such model" in error_of(run, *call)


def test_controls_write_the_same_file_for_the_same_seed(tmp_path):
    generator = torch.Generator().manual_seed(1)
    tensors = {"a": torch.randn(6, 50, generator=generator), "b": torch.randn(300, generator=generator)}
    torch.save(tensors, tmp_path / "teacher.pth")
    for file, seed in (("x", "0"), ("z", "1")):
        controls.main(["shuffled", str(tmp_path / "teacher.pth"), str(tmp_path / file), "--seed", seed])
    command = [sys.executable, "-m", "study.controls", "shuffled", "teacher.pth", "y"]  # as a study runs it
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": run.python_path()}, check=True)
    x, y, z = (open_weights(tmp_path / file) for file in "xyz")
    for key, tensor in tensors.items():
        assert x[key].shape == tensor.shape and torch.equal(x[key], y[key])
        assert torch.equal(x[key].flatten().sort().values, tensor.flatten().sort().values)
        assert not torch.equal(x[key], z[key]) and not torch.equal(x[key], tensor)


def test_controls_keep_what_they_say():
    generator = torch.Generator().manual_seed(2)
    shapes = {"matrix": (64, 96), "filter": (32, 3, 8, 8), "embedding": (1, 17, 64), "vector": (640,)}
    shapes["attn.qkv.weight"] = (192, 64)
    tensors = {key: 2 + 3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    changed = {name: controls.controlled(tensors, name, 0) for name in controls.CONTROLS}
    for key, shape in shapes.items():
        rows = (17, 64) if key == "embedding" else (shape[0], -1)
        for name, axis in (("rows", 1), ("columns", 0)):
            before, after = tensors[key].view(rows), changed[name][key].view(rows)
            for one, other in zip(*(x.chunk(3 if "qkv" in key else 1) for x in (before, after)), strict=True):
                assert torch.equal(one.sort(axis).values, other.sort(axis).values)
            assert torch.equal(before, after) == (key == "vector")
        values = [changed["matrices"][key], tensors[key]]
        assert torch.equal(*values) == (key == "vector")
        assert torch.equal(*(value.flatten().sort().values for value in values))
        moments = changed["moments"][key]
        assert moments.mean() == pytest.approx(2, abs=0.5) and moments.std() == pytest.approx(3, abs=0.3)
    kept = changed["vectors"]
    assert torch.equal(kept["vector"], tensors["vector"])
    for key, deviation in {"matrix": 0.02, "embedding": 0.02, "filter": (3 * 3 * 8 * 8) ** -0.5}.items():
        assert kept[key].std() == pytest.approx(deviation, rel=0.1) and abs(kept[key].mean()) < 0.1 * deviation


@pytest.fixture
def write_runs(tmp_path):
    """Return a function that writes finished runs of a study with these accuracies, one per epoch."""

    def write(runs, *, root="study", **changes):
        for name, accuracies in runs.items():
            arm, _, seed = name.partition("-")
            sha256 = None if arm.endswith(("random", "teacher")) else arm
            wanted = {"epochs": len(accuracies), "seed": int(seed or 0), **changes}
            write_run(tmp_path / root / name, accuracies, sha256=sha256, **training_defaults() | wanted)

    return write


@pytest.fixture
def tables(tmp_path, capsys):
    """Return a function that makes the report of these folders and returns what it prints."""
    pytest.importorskip("matplotlib")

    def make(*roots):
        report.main([str(tmp_path / root) for root in roots or ["study"]])
        return capsys.readouterr().out

    return make


def rows_of(text):
    return [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("| [")]


def test_table_has_means_paired_gains_and_shares_of_the_run(write_runs, tables, tmp_path):
    rising = [10, 11, 20, 21, 22, 23, 24, 25, 26]
    runs = {"vit/teacher": [5, 7.25], "vit/full/random-0": [*rising, 30], "vit/full/random-1": [*rising, 34]}
    runs["vit/full/selected-0"] = [12, 14, 33, *rising[3:], 40]
    runs["vit/full/selected-1"] = [14, 18, 31, 32, *rising[4:], 42]
    runs["vit/full/selected-2"] = [13, 16, 32, *rising[3:], 41]
    write_runs(runs | {"vit/full/keep-0": [*rising, 41]})
    text = tables()
    assert text == (tmp_path / "study" / "tables.md").read_text()
    section = "[vit/full](vit/full)"
    selected = ["13.0 ± 1.0", "32.0 ± 1.0", "41.0 ± 1.0"]
    assert rows_of(text) == [
        # epochs 1, round(10 / 3) = 3 and 10; the baseline ends at 32, which seeds 0, 1, 2 reach in epochs 3, 4, 3
        [section, "random init", "2", "10.0 ± 0.0", "20.0 ± 0.0", "32.0 ± 2.8", "–", "–"],  # noqa: RUF001
        [section, "weight selection", "3", *selected, "+9.0 ± 1.4 (2 of 3 seeds)", "3.3 ± 0.6"],
        [section, "weight selection", "3", *selected, "–", "–"],  # noqa: RUF001
        [section, "whole heads", "1", "10.0", "20.0", "41.0", "+1.0", "10.0"],
        [section, "weight selection", "3", *selected, "–", "–"],  # noqa: RUF001
        [section, "whole heads", "1", "10.0", "20.0", "41.0", "+1.0", "10.0"],
    ]
    assert "- [vit/teacher](vit/teacher): 7.2 % after 2 epochs." in text
    figures = {file.name for file in (tmp_path / "study").glob("*.png")}
    assert figures == {"curves-gain.png", "curves-elements.png", "curves-width.png", "gains.png"}


def test_pairs_are_compared_seed_by_seed(write_runs, tables):
    finals = {"random": [10, 20], "shuffled": [30, 41], "selected": [33, 43, 90]}.items()
    write_runs({f"vit/tenth/{arm}-{n}": [1, 2, end] for arm, values in finals for n, end in enumerate(values)})
    (line,) = re.findall(r"^\| vit/tenth .*", tables(), re.M)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # 3 epochs: a tenth and a third are the first; 33 - 30 and 43 - 41 at the end
    assert cells[1:] == ["weight selection above shuffled weights", "2", "+0.0 ± 0.0", "+0.0 ± 0.0", "+2.5 ± 0.7"]


def replace_in_config(tmp_path, name, old, new):
    config = tmp_path / "study" / name / "config.json"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))


def test_an_arm_of_two_teachers_is_refused(write_runs, tmp_path):
    write_runs({f"vit/full/{arm}-{n}": [30] for arm in ("random", "selected", "random_slots") for n in (0, 1)})
    for arm in ("random_slots", "selected"):  # the first draws anew for each seed, so its weights may differ
        replace_in_config(tmp_path, f"vit/full/{arm}-1", f'"sha256": "vit/full/{arm}"', '"sha256": "other"')
    error = error_of(report, tmp_path / "study")
    assert "selected-1 cannot be compared: they inherit from two teachers" in error


def test_machines_are_listed_with_what_ran_on_them(write_runs, tables, tmp_path):
    write_runs({"vit/full/random-0": [30], "vit/full/selected-0": [40], "vit/teacher": [5]})
    replace_in_config(tmp_path, "vit/teacher", '"torch": "2"', '"torch": "3"')
    replace_in_config(tmp_path, "vit/teacher", '"abc"', '"0123456789abcdef-dirty"')
    text = tables()
    assert "- Ran on cpu, 1 process, 2 threads, torch 2, timm 1: vit/full." in text
    assert "- Ran on cpu, 1 process, 2 threads, torch 3, timm 1: vit/teacher." in text
    assert "- Code: `0123456789ab-dirty`, `abc`." in text


def test_results_of_several_folders_are_taken_together(write_runs, tables, tmp_path):
    write_runs({"vit/full/random-0": [30]})
    write_runs({"vit/full/selected-0": [40]}, root="second")
    first, second = rows_of(tables("study", "second"))
    assert first[0] == "[vit/full](vit/full)" and second[0] == "[vit/full](../second/vit/full)"
    assert second[-2] == "+10.0"
    write_runs({"vit/full/random-0": [31]}, root="second")
    error = error_of(report, tmp_path / "study", tmp_path / "second")
    assert "second/vit/full/random-0 are the same seed 0 of an arm" in error


def test_what_cannot_be_compared_is_an_error(write_runs, tmp_path):
    write_runs({"vit/full/random-0": [30]})
    assert error_of(report, tmp_path / "study") == "no arm has both runs and runs of its baseline yet"
    write_runs({"vit/full/selected-0": [40]}, lr=1e-3)
    assert "cannot be compared: they differ in lr" in error_of(report, tmp_path / "study")
