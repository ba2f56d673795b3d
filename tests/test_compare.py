"""compare.py: every figure below is worked out by hand from the accuracies written into the runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import cells, error_of, groups_of, record, write_run

import compare

ROOT = Path(compare.__file__).parent


def test_figures_agree_with_hand_calculation(students):
    random, selected = groups_of(students)
    assert (random["label"], random["n"]) == ("random init", 2)
    assert (selected["label"], selected["n"]) == ("initialize=vit.pth", 3)
    # best: 40 and 52; last: 40 and 50; of two values the sample deviation is their difference over the root of 2
    assert random["best"] == pytest.approx({"mean": 46, "std": 12 / 2**0.5, "n": 2})
    assert random["last"] == pytest.approx({"mean": 45, "std": 10 / 2**0.5, "n": 2})
    # best: 70, 80, 44 (squares of deviations from 64.667: 28.44 + 235.11 + 427.11 = 690.67)
    assert selected["best"] == pytest.approx({"mean": 194 / 3, "std": (2072 / 3 / 2) ** 0.5, "n": 3})
    # 45 % is reached after epoch 1 by the first, exactly at the second epoch by the second, never by the third
    assert selected["epochs_to_baseline"] == pytest.approx({"mean": 1.5, "std": 0.5**0.5, "n": 2, "never": 1})
    # seeds 0 and 1 are in both groups: 60 - 40 and 80 - 50
    assert selected["gain"] == pytest.approx({"mean": 25, "std": 50**0.5, "n": 2})
    # the baseline is not compared with itself
    assert random["epochs_to_baseline"] == {"mean": None, "std": None, "n": 0, "never": 0}
    assert random["gain"]["n"] == 0 and (random["baseline"], selected["baseline"]) == (None, "random init")
    # seed 0: 46, 70, 60; 1: 40, 45, 80; 2: 30, 40, 44
    assert selected["curve"]["epoch"] == [0, 1, 2]
    assert selected["curve"]["mean"] == pytest.approx([116 / 3, 155 / 3, 184 / 3])
    assert random["curve"]["std"] == pytest.approx([50**0.5, 242**0.5, 50**0.5])


def test_table_shows_the_figures(students, capsys, tmp_path):
    compare.main([str(students), "--markdown", str(tmp_path / "new" / "table.md")])
    text = capsys.readouterr().out
    random, selected = map(cells, text.splitlines()[2:4])
    assert random == ["random init", "2", "46.0 ± 8.5", "45.0 ± 7.1", "–", "–"]  # noqa: RUF001
    assert selected[4:] == ["1.5 ± 0.7 (1 of 3 never)", "+25.0 ± 7.1 (2 of 3 seeds)"]
    assert "Baseline: random init, which ends at 45.0 %" in text
    assert (tmp_path / "new" / "table.md").read_text() == text


def test_one_seed_has_no_deviation(root, capsys):
    write_run(root / "a", [12.5])
    write_run(root / "b", [10], sha256="aa")
    compare.main([str(root)])
    line = capsys.readouterr().out.splitlines()[3]
    assert cells(line) == ["initialize=vit.pth", "1", "10.0", "10.0", "– (1 of 1 never)", "-2.5"]  # noqa: RUF001


def test_curve_has_the_epochs_of_all_runs_and_their_later_lines(root):
    with (write_run(root / "whole", [10, 20, 30]) / "log.txt").open("a") as log:
        log.write('{"epoch": 2, "test_acc1": 40}\n')
    late = write_run(root / "late", [0, 40, 50], seed=1, start_epoch=1, resume="checkpoint-0.pth")
    (late / "log.txt").write_text("".join((late / "log.txt").read_text().splitlines(keepends=True)[1:]))
    (group,) = groups_of(root)
    assert (group["curve"]["epoch"], group["curve"]["mean"], group["last"]["mean"]) == ([1, 2], [30, 45], 45)


def test_lower_loss_is_better(root):
    for name, losses in {"run": [2.0, 0.5, 1.0], "base": [1.5]}.items():
        log = write_run(root / name, losses) / "log.txt"
        log.write_text(log.read_text().replace("test_acc1", "test_loss"))
    group = groups_of(root / "base", root / "run", "--metric", "test_loss", "--baseline", root / "base")[1]
    assert (group["best"]["mean"], group["last"]["mean"], group["gain"]["mean"]) == (0.5, 1, 0.5)
    assert group["epochs_to_baseline"]["mean"] == 2  # 0.5 is the first at or below the baseline's last, 1.5


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("log.txt", "", "unfinished, 0 of 2 epochs have test_acc1"),
        ("log.txt", '{"epoch": 0, "test_acc1": 50}', "unfinished, 1 of 2 epochs have test_acc1"),
        ("log.txt", '{"epoch": 1, "test_acc1": null}', "no test_acc1 in log.txt, which has epoch, test_acc1"),
        ("log.txt", '{"epoch": 1, "train_loss": 2.0}', "no test_acc1 in log.txt, which has epoch, train_loss"),
        ("log.txt", '{"epoch": 0, "te', "config.json or log.txt is damaged (JSONDecodeError: "),
        ("log.txt", "[1, 2]", "config.json or log.txt is damaged"),
        ("log.txt", "\0\xff", "config.json or log.txt is damaged"),
        ("log.txt", None, "log.txt: No such file"),
        ("config.json", "", "config.json or log.txt is damaged"),
        ("config.json", "[]", "config.json or log.txt is damaged"),
        ("config.json", '{"options": {"lr": 1}}', "config.json or log.txt is damaged"),
        ("config.json", None, "config.json: No such file"),
        ("config.json", "[" * 100_000, "config.json or log.txt is damaged"),
        ("log.txt", '{"epoch": 1, "test_acc1": "high"}', "config.json or log.txt is damaged"),
        ("log.txt", '{"epoch": 1, "test_acc1": NaN}', "config.json or log.txt is damaged"),
        ("log.txt", '{"epoch": "1", "test_acc1": 50}', "config.json or log.txt is damaged"),
    ],
)
def test_unusable_run_is_named_and_the_others_compared(root, capsys, file, content, reason):
    write_run(root / "good", [10, 20])
    path = write_run(root / "bad", [20, 30], seed=1) / file
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="latin-1")
    assert groups_of(root)[0]["n"] == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"runs/bad is left out: {reason}" in error


@pytest.mark.parametrize(
    "changed",
    [
        {"options": {"epochs": "2"}},
        {"options": {"seed": [1]}},
        {"options": {"batch_size": "64"}},
        {"options": {"data_set": "IMNET", "data_path": 5}},
        {"initialization": "vit.pth"},
        {"initialization": {"path": "vit.pth"}},
        {"environment": {"processes": None}},
        {"teacher": {"sha256": 1}},
        {"in_effect": [1]},
        {"options": None},
    ],
    ids=str,
)
def test_description_of_another_kind_is_named(root, capsys, changed):
    write_run(root / "good", [10, 20])
    folder = write_run(root / "bad", [20, 30], seed=1)
    options = changed.get("options")
    config = json.loads((folder / "config.json").read_text())
    record(folder, **changed | ({"options": config["options"] | options} if options else {}))
    assert groups_of(root)[0]["n"] == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "runs/bad is left out: config.json or log.txt is damaged" in error


def test_control_characters_break_no_line(root, capsys, tmp_path):
    write_run(root / "good", [10])
    write_run(
        root / "odd", [20], sha256="a\ud800", initialize="b\n.pth", lr="c\x1b[2J", data_set="IMNET", data_path="d\r"
    )
    compare.main([str(root), "--markdown", str(tmp_path / "table.md")])
    text = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == text and all(line.isprintable() for line in text.split("\n"))
    assert "on IMNET, data_path=d\\r" in text and "initialize=b\\n.pth" in text


def test_paths_without_runs_and_with_unusable_ones_are_errors(root, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "file", "empty"):
        assert error_of(compare, tmp_path / name).startswith(f"{tmp_path / name}: no run in it or below it")
    write_run(root, [10], epochs=5)
    assert error_of(compare, root) == "no finished run with test_acc1 is left to compare"


@pytest.mark.parametrize("arguments", ["", "--plot curves.txt run", "run --colour"])
def test_usage_errors_end_with_code_2(arguments):
    with pytest.raises(SystemExit) as exit_:
        compare.main(arguments.split())
    assert exit_.value.code == 2


def test_unwritable_output_and_missing_matplotlib_are_named(students, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in error_of(compare, students, "--json", tmp_path / "file" / "result.json")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in error_of(compare, students, "--plot", tmp_path / "curves.png")


def test_plot_is_a_picture(students, tmp_path):
    pytest.importorskip("matplotlib")
    write_run(students / "odd", [1, 2, 3], lr=5, aa="$x^{ | a rather long value that has to be wrapped in the legend")
    write_run(students / "other", [1, 2, 3], model="$x^{")
    compare.main([str(students), "--plot", str(tmp_path / "new" / "curves.png")])
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


def run_script(*arguments, encoding="utf-8"):
    """Run the script in its own process, with this terminal encoding and without installed packages."""
    code = "import sys, runpy; sys.modules |= dict.fromkeys(('torch', 'numpy', 'matplotlib')); "
    code += "runpy.run_path('compare.py', run_name='__main__')"
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True)


@pytest.mark.parametrize(("encoding", "sign"), [("utf-8", "±"), ("latin-1", "±"), ("ascii", "?")])
def test_script_runs_on_plain_python_and_any_terminal(students, encoding, sign):
    done = run_script(students, encoding=encoding)
    assert done.returncode == 0, done.stderr.decode()
    assert f"46.0 {sign} 8.5" in done.stdout.decode(encoding)
    done = run_script(students / "nothing", encoding=encoding)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1 and f"error: {students}/nothing: no run in it".encode() in done.stderr
