"""compare.py: every figure below is worked out by hand from the accuracies written into the runs."""

import builtins
import json
import subprocess
import sys
from pathlib import Path

import pytest

import compare
from utils import UserError

ROOT = Path(compare.__file__).parent


@pytest.fixture
def root(tmp_path):
    """The folder of the test's runs."""
    return tmp_path / "runs"


def write_run(folder, accuracies, *, seed=0, sha256=None, processes=1, **options):
    """A finished run with these test accuracies, one an epoch."""
    settings = {"epochs": len(accuracies), "lr": 0.001, "batch_size": 64, "update_freq": 1, "data_set": "digits"}
    settings |= {"data_path": "/data", "eval_data_path": None, "output_dir": str(folder), "seed": seed}
    settings |= {"initialize": "init/vit.pth" if sha256 else ""} | options
    initialization = {"path": settings["initialize"], "sha256": sha256} if sha256 else None
    config = {"format": "weight-selection run 1", "options": settings, "initialization": initialization}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"environment": {"processes": processes}}))
    lines = [json.dumps({"epoch": epoch, "test_acc1": value}) for epoch, value in enumerate(accuracies)]
    (folder / "log.txt").write_text("".join(line + "\n" for line in lines))
    return folder


@pytest.fixture
def students(tmp_path):
    """Two seeds without and three with initialization; the baseline ends at 40 and 50, so at 45 on average."""
    for seed, values in enumerate([[10, 30, 40], [20, 52, 50]]):
        write_run(tmp_path / "students" / f"random-{seed}", values, seed=seed)
    for seed, values in enumerate([[46, 70, 60], [40, 45, 80], [30, 40, 44]]):
        write_run(tmp_path / "students" / f"selected-{seed}", values, seed=seed, sha256="aa")
    return tmp_path / "students"


def groups_of(*arguments):
    """The groups of the --json output."""
    file = Path(arguments[0]).parent / "result.json"
    compare.main([*map(str, arguments), "--json", str(file)])
    return json.loads(file.read_text())["groups"]


def error_of(*arguments):
    with pytest.raises(UserError) as error:
        compare.main([*map(str, arguments)])
    return str(error.value)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---- figures ----


def test_figures_agree_with_hand_calculation(students):
    random, selected = groups_of(students)
    assert (random["label"], selected["label"]) == ("random init", "initialize=vit.pth")
    assert (random["n"], selected["n"]) == (2, 3)
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
    assert random["gain"]["n"] == 0
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


def test_curve_has_the_epochs_that_all_runs_have(root):
    write_run(root / "whole", [10, 20, 30])
    late = write_run(root / "late", [0, 40, 50], seed=1, start_epoch=1)
    (late / "log.txt").write_text("".join((late / "log.txt").read_text().splitlines(keepends=True)[1:]))
    (group,) = groups_of(root)
    assert (group["curve"]["epoch"], group["curve"]["mean"]) == ([1, 2], [30, 40])


def test_later_line_of_an_epoch_counts(root):
    with (write_run(root, [10, 20]) / "log.txt").open("a") as log:
        log.write('{"epoch": 1, "test_acc1": 25}\n')
    assert groups_of(root)[0]["last"]["mean"] == 25


def test_lower_loss_is_better(root):
    for name, losses in {"run": [2.0, 0.5, 1.0], "base": [1.5]}.items():
        lines = [json.dumps({"epoch": epoch, "test_loss": value}) for epoch, value in enumerate(losses)]
        (write_run(root / name, losses) / "log.txt").write_text("\n".join(lines))
    group = groups_of(root / "base", root / "run", "--metric", "test_loss")[1]
    assert (group["best"]["mean"], group["last"]["mean"], group["gain"]["mean"]) == (0.5, 1, 0.5)
    assert group["epochs_to_baseline"]["mean"] == 2  # 0.5 is the first at or below the baseline's last, 1.5


# ---- groups ----


BIRDS, CARS = ({"data_set": "image_folder", "data_path": f"/one/{name}"} for name in ("birds", "cars"))
LARGER = {"lr": 0.002, "model_kwargs": {"depth": 6, "embed_dim": 64}}


@pytest.mark.parametrize(
    ("runs", "groups"),
    [
        ([{}, {"epochs": 2, "seed": 1}], {"epochs=1": 1, "epochs=2": 1}),
        (
            # paths and the machine make no difference, settings do
            [{"num_workers": 2, "device": "cpu", "data_path": "/a/x"}, {"num_workers": 0, "seed": 1}, LARGER],
            {"lr=0.001, model_kwargs=unset": 2, "lr=0.002, model_kwargs={depth: 6, embed_dim: 64}": 1},
        ),
        (
            [{"update_freq": 2}, {"batch_size": 32, "processes": 4, "seed": 1}, {"processes": 4}],
            {"images_per_update=128": 2, "images_per_update=256": 1},
        ),
        (
            [BIRDS, BIRDS | {"data_path": "/two/birds", "seed": 1}, CARS],
            {"data_path=birds": 2, "data_path=cars": 1},
        ),
        ([CARS, CARS | {"eval_data_path": "/one/vans"}], {"eval_data_path=unset": 1, "eval_data_path=vans": 1}),
        (
            [
                {"sha256": "aa", "initialize": "small/vit.pth"},
                {"sha256": "aa", "initialize": "copy/vit.pth", "seed": 1},
                {"sha256": "bb", "initialize": "large/vit.pth"},
            ],
            {"initialize=small/vit.pth": 2, "initialize=large/vit.pth": 1},
        ),
        (
            [{"sha256": "a" * 64}, {"sha256": "b" * 64}],
            {"initialize=vit.pth (aaaaaaaa)": 1, "initialize=vit.pth (bbbbbbbb)": 1},
        ),
    ],
)
def test_settings_tell_groups_apart(root, runs, groups):
    for number, options in enumerate(runs):
        write_run(root / str(number), [10] * options.get("epochs", 1), **options)
    assert {group["label"]: group["n"] for group in groups_of(root)} == groups


def test_ignored_initialize_keeps_random_init_apart(root):
    write_run(root / "a", [10])
    write_run(root / "b", [10], sha256="aa", seed=0)
    write_run(root / "c", [10], sha256="bb", seed=1)
    groups = groups_of(root, "--ignore", "initialize")
    assert [(group["label"], group["n"]) for group in groups] == [("random init", 1), ("initialize=any", 2)]
    error = error_of(root, "--ignore", "colour")
    assert "--ignore colour: no such setting; the settings are data_set, epochs, images_per_update" in error


@pytest.mark.parametrize("by", ["label", "folder", "run"])
def test_baseline_is_the_named_group(students, tmp_path, by):
    folder = tmp_path / "elsewhere"
    write_run(folder / "lr", [90, 90, 90], lr=0.5)
    wanted = {"label": "random init, lr=0.5", "folder": folder, "run": folder / "lr"}[by]
    groups = groups_of(students, folder, "--baseline", wanted)
    assert [group["baseline"] for group in groups] == ["random init, lr=0.5"] * 3
    assert groups[0]["label"] == "random init, lr=0.5"


def test_each_model_and_data_set_has_its_own_baseline(students, root, capsys):
    write_run(root / "a", [1, 2, 4], sha256="bb", data_set="CIFAR100")
    write_run(root / "b", [1, 2, 3], data_set="CIFAR100")
    write_run(root / "c", [7, 8, 9], sha256="cc", model="convnext_femto")  # without a run of random init
    groups = groups_of(students, root)
    digits, cifar = "random init, data_set=digits, model=unset", "random init, data_set=CIFAR100, model=unset"
    assert [group["baseline"] for group in groups][2:] == [cifar, cifar, groups[4]["label"]]
    assert [group["label"] for group in groups][::2] == [digits, cifar, groups[4]["label"]]
    assert [group["gain"]["mean"] for group in groups] == [None, pytest.approx(25), None, 1, None]
    assert f"Baseline: {digits}, which ends at 45.0 %; {cifar}, which ends at 3.0 %; init" in capsys.readouterr().out


def test_unknown_baseline_is_an_error_naming_the_groups(students):
    error = error_of(students, "--baseline", "nothing")
    assert "--baseline nothing" in error and "random init; initialize=vit.pth" in error


def test_a_run_named_twice_counts_once(root, capsys):
    folder = write_run(root / "a", [10])
    assert groups_of(folder, root, folder)[0]["n"] == 1
    assert capsys.readouterr().err == ""


def test_repeated_seed_is_left_out_with_a_warning(root, capsys):
    write_run(root / "a", [10])
    write_run(root / "b", [20])
    (group,) = groups_of(root)
    assert group["n"] == 1 and group["last"]["mean"] == 10
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "runs/b is left out: settings and seed 0 are those of" in error


# ---- what is wrong ----


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


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_path_without_runs_is_an_error(tmp_path, kind):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    assert error_of(tmp_path / kind).startswith(f"{tmp_path / kind}: no run in it or below it")


def test_only_unusable_runs_are_an_error(root):
    write_run(root, [10], epochs=5)
    assert error_of(root) == "no finished run with test_acc1 is left to compare"


@pytest.mark.parametrize("arguments", [[], ["--plot", "curves.txt", "run"], ["run", "--colour"]])
def test_usage_errors_end_with_code_2(arguments):
    with pytest.raises(SystemExit) as exit_:
        compare.main(arguments)
    assert exit_.value.code == 2


def test_unwritable_output_is_an_error_naming_the_file(students, tmp_path):
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in error_of(students, "--json", tmp_path / "file" / "result.json")


def test_plot_is_a_picture(students, tmp_path):
    pytest.importorskip("matplotlib")
    write_run(students / "odd", [1, 2, 3], lr=5, aa="$x^{ | a rather long value that has to be wrapped in the legend")
    compare.main([str(students), "--plot", str(tmp_path / "new" / "curves.png")])
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_named(students, tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert "pip install matplotlib" in error_of(students, "--plot", tmp_path / "curves.png")


def run_script(*arguments, encoding="utf-8"):
    """Run the script in a process of its own on a terminal of this encoding, where only Python itself is installed."""
    code = (
        "import sys, runpy; sys.modules |= dict.fromkeys(('torch', 'numpy', 'matplotlib')); "
        "runpy.run_path('compare.py', run_name='__main__')"
    )
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True)


@pytest.mark.parametrize(("encoding", "sign"), [("utf-8", "±"), ("latin-1", "±"), ("ascii", "?")])
def test_script_runs_on_plain_python_and_any_terminal(students, encoding, sign):
    done = run_script(students, encoding=encoding)
    assert done.returncode == 0, done.stderr.decode()
    assert f"46.0 {sign} 8.5" in done.stdout.decode(encoding)


def test_error_of_the_script_is_one_line_and_code_1(tmp_path):
    done = run_script(tmp_path)
    assert done.returncode == 1
    assert done.stderr.decode().count("\n") == 1 and f"error: {tmp_path}: no run in it" in done.stderr.decode()
