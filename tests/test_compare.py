"""compare.py: every figure below is worked out by hand from the accuracies written into the runs."""

import builtins
import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import compare

ROOT = Path(compare.__file__).parent


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


def run_json(tmp_path, *arguments):
    """The parsed --json output, after a call that must succeed."""
    file = tmp_path / "result.json"
    assert compare.main([*map(str, arguments), "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_figures_agree_with_hand_calculation(students, tmp_path):
    random, selected = run_json(tmp_path, students)["groups"]
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
    assert compare.main([str(students), "--markdown", str(tmp_path / "new" / "table.md")]) == 0
    text = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:4]]
    assert cells[0] == ["random init", "2", "46.0 ± 8.5", "45.0 ± 7.1", "–", "–"]  # noqa: RUF001
    assert cells[1][4:] == ["1.5 ± 0.7 (1 of 3 never)", "+25.0 ± 7.1 (2 of 3 seeds)"]
    assert "Baseline: random init, which ends at 45.0 %" in text
    assert (tmp_path / "new" / "table.md").read_text() == text


def test_one_seed_has_no_deviation_and_who_never_reaches_the_baseline_has_no_epochs(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a", [12.5])
    write_run(tmp_path / "runs" / "b", [10], sha256="aa")
    assert compare.main([str(tmp_path / "runs")]) == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[3].split("|")]
    assert cells == ["", "initialize=vit.pth", "1", "10.0", "10.0", "– (1 of 1 never)", "-2.5", ""]  # noqa: RUF001


def test_curve_has_the_epochs_that_all_runs_have(tmp_path):
    write_run(tmp_path / "runs" / "whole", [10, 20, 30])
    late = write_run(tmp_path / "runs" / "late", [0, 40, 50], seed=1, start_epoch=1)
    (late / "log.txt").write_text("".join((late / "log.txt").read_text().splitlines(keepends=True)[1:]))
    (group,) = run_json(tmp_path, tmp_path / "runs")["groups"]
    assert (group["curve"]["epoch"], group["curve"]["mean"]) == ([1, 2], [30, 40])


def test_runs_of_other_length_are_another_group(tmp_path):
    write_run(tmp_path / "runs" / "a", [10, 20, 30])
    write_run(tmp_path / "runs" / "b", [20, 40], seed=1)
    assert [group["label"] for group in run_json(tmp_path, tmp_path / "runs")["groups"]] == ["epochs=3", "epochs=2"]


def test_places_and_machinery_do_not_part_groups_but_settings_do(tmp_path):
    write_run(tmp_path / "runs" / "a", [10], num_workers=2, device="cpu", save_ckpt_freq=1, data_path="/a/x")
    write_run(tmp_path / "runs" / "b", [20], seed=1, num_workers=0, device="cuda", save_ckpt_freq=9, data_path="/b")
    write_run(tmp_path / "runs" / "c", [30], lr=0.002, model_kwargs={"depth": 6, "embed_dim": 64})
    labels = [group["label"] for group in run_json(tmp_path, tmp_path / "runs")["groups"]]
    assert labels == ["lr=0.001, model_kwargs=unset", "lr=0.002, model_kwargs={depth: 6, embed_dim: 64}"]


def test_batch_counts_by_images_of_an_update(tmp_path):
    write_run(tmp_path / "runs" / "a", [10], batch_size=64, update_freq=2)
    write_run(tmp_path / "runs" / "b", [20], batch_size=32, processes=4, seed=1)
    write_run(tmp_path / "runs" / "c", [20], batch_size=64, processes=4)
    result = run_json(tmp_path, tmp_path / "runs")
    assert [group["label"] for group in result["groups"]] == ["images_per_update=128", "images_per_update=256"]
    assert result["groups"][0]["n"] == 2


def test_folders_of_images_count_by_name(tmp_path):
    write_run(tmp_path / "runs" / "a", [10], data_set="image_folder", data_path="/one/birds")
    write_run(tmp_path / "runs" / "b", [10], data_set="image_folder", data_path="/two/birds", seed=1)
    write_run(tmp_path / "runs" / "c", [10], data_set="image_folder", data_path="/one/cars")
    write_run(tmp_path / "runs" / "d", [10], data_set="image_folder", data_path="/one/cars", eval_data_path="/one/vans")
    groups = run_json(tmp_path, tmp_path / "runs")["groups"]
    assert [(group["label"], group["n"]) for group in groups] == [
        ("data_path=birds, eval_data_path=unset", 2),
        ("data_path=cars, eval_data_path=unset", 1),
        ("data_path=cars, eval_data_path=vans", 1),
    ]


def test_initializations_count_by_sha256_and_are_told_apart_by_path(tmp_path):
    write_run(tmp_path / "runs" / "a", [10], sha256="aa", initialize="small/vit.pth")
    write_run(tmp_path / "runs" / "b", [10], sha256="aa", initialize="copy/vit.pth", seed=1)
    write_run(tmp_path / "runs" / "c", [10], sha256="bb", initialize="large/vit.pth")
    groups = run_json(tmp_path, tmp_path / "runs")["groups"]
    assert [(group["label"], group["n"]) for group in groups] == [
        ("initialize=small/vit.pth", 2),
        ("initialize=large/vit.pth", 1),
    ]


def test_equal_paths_of_different_files_show_their_sha256(tmp_path):
    write_run(tmp_path / "runs" / "a", [10], sha256="a" * 64)
    write_run(tmp_path / "runs" / "b", [10], sha256="b" * 64)
    labels = [group["label"] for group in run_json(tmp_path, tmp_path / "runs")["groups"]]
    assert labels == ["initialize=vit.pth (aaaaaaaa)", "initialize=vit.pth (bbbbbbbb)"]


def test_ignored_initialize_only_parts_initialized_from_random(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a", [10])
    write_run(tmp_path / "runs" / "b", [10], sha256="aa", seed=0)
    write_run(tmp_path / "runs" / "c", [10], sha256="bb", seed=1)
    groups = run_json(tmp_path, tmp_path / "runs", "--ignore", "initialize")["groups"]
    assert [(group["label"], group["n"]) for group in groups] == [("random init", 1), ("initialize=any", 2)]
    assert compare.main([str(tmp_path / "runs"), "--ignore", "colour"]) == 1
    error = capsys.readouterr().err
    assert "--ignore colour: no such setting; the settings are data_set, epochs, images_per_update" in error


def test_lower_loss_is_better(tmp_path):
    folder = write_run(tmp_path / "run", [1, 1, 1])
    losses = [2.0, 0.5, 1.0]
    lines = [json.dumps({"epoch": epoch, "test_loss": value}) for epoch, value in enumerate(losses)]
    (folder / "log.txt").write_text("\n".join(lines))
    base = write_run(tmp_path / "base", [1])
    (base / "log.txt").write_text('{"epoch": 0, "test_loss": 1.5}\n')
    group = run_json(tmp_path, base, folder, "--metric", "test_loss")["groups"][1]
    assert (group["best"]["mean"], group["last"]["mean"], group["gain"]["mean"]) == (0.5, 1, 0.5)
    assert group["epochs_to_baseline"]["mean"] == 2  # 0.5 is the first at or below the baseline's last, 1.5


@pytest.mark.parametrize("by", ["label", "folder", "run"])
def test_baseline_is_the_named_group(students, tmp_path, by):
    folder = tmp_path / "elsewhere"
    write_run(folder / "lr", [90, 90, 90], lr=0.5)
    wanted = {"label": "random init, lr=0.5", "folder": folder, "run": folder / "lr"}[by]
    groups = run_json(tmp_path, students, folder, "--baseline", wanted)["groups"]
    assert [group["baseline"] for group in groups] == ["random init, lr=0.5"] * 3
    assert groups[0]["label"] == "random init, lr=0.5"


def test_each_model_and_data_set_has_a_baseline_of_its_own(students, tmp_path, capsys):
    other = tmp_path / "other"
    write_run(other / "a", [1, 2, 4], sha256="bb", data_set="CIFAR100")
    write_run(other / "b", [1, 2, 3], data_set="CIFAR100")
    write_run(other / "c", [7, 8, 9], sha256="cc", model="convnext_femto")  # which has no run of random values
    groups = run_json(tmp_path, students, other)["groups"]
    digits, cifar = "random init, data_set=digits, model=unset", "random init, data_set=CIFAR100, model=unset"
    assert [group["baseline"] for group in groups][2:] == [cifar, cifar, groups[4]["label"]]
    assert [group["label"] for group in groups][::2] == [digits, cifar, groups[4]["label"]]
    assert [group["gain"]["mean"] for group in groups] == [None, pytest.approx(25), None, 1, None]
    assert f"Baseline: {digits}, which ends at 45.0 %; {cifar}, which ends at 3.0 %; init" in capsys.readouterr().out


def test_unknown_baseline_is_one_line_naming_the_groups(students, capsys):
    assert compare.main([str(students), "--baseline", "nothing"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--baseline nothing" in error and "random init; initialize=vit.pth" in error


def test_a_run_named_twice_counts_once(tmp_path, capsys):
    folder = write_run(tmp_path / "runs" / "a", [10])
    assert run_json(tmp_path, folder, tmp_path / "runs", folder)["groups"][0]["n"] == 1
    assert capsys.readouterr().err == ""


def test_repeated_seed_is_left_out_with_a_warning(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a", [10])
    write_run(tmp_path / "runs" / "b", [20])
    (group,) = run_json(tmp_path, tmp_path / "runs")["groups"]
    assert group["n"] == 1 and group["last"]["mean"] == 10
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "runs/b is left out: settings and seed 0 are those of" in error


def test_later_line_of_an_epoch_counts(tmp_path):
    folder = write_run(tmp_path / "run", [10, 20])
    with (folder / "log.txt").open("a") as log:
        log.write('{"epoch": 1, "test_acc1": 25}\n')
    assert run_json(tmp_path, folder)["groups"][0]["last"]["mean"] == 25


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
def test_unusable_run_is_named_and_the_others_are_compared(tmp_path, capsys, file, content, reason):
    write_run(tmp_path / "runs" / "good", [10, 20])
    path = write_run(tmp_path / "runs" / "bad", [20, 30], seed=1) / file
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="latin-1")
    assert run_json(tmp_path, tmp_path / "runs")["groups"][0]["n"] == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"runs/bad is left out: {reason}" in error


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_path_without_runs_is_one_line_and_code_1(tmp_path, capsys, kind):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    assert compare.main([str(tmp_path / kind)]) == 1
    assert capsys.readouterr().err.startswith(f"compare.py: error: {tmp_path / kind}: no run in it or below it")


def test_only_unusable_runs_are_an_error(tmp_path, capsys):
    write_run(tmp_path / "run", [10], epochs=5)
    assert compare.main([str(tmp_path)]) == 1
    assert "no finished run with test_acc1 is left to compare" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--plot", "curves.txt", "run"], ["run", "--colour"]])
def test_usage_errors_end_with_code_2(arguments):
    with pytest.raises(SystemExit) as exit_:
        compare.main(arguments)
    assert exit_.value.code == 2


def test_unwritable_output_is_one_line(students, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert compare.main([str(students), "--json", str(tmp_path / "file" / "result.json")]) == 1
    assert "file" in capsys.readouterr().err.splitlines()[-1]


def test_plot_is_a_picture(students, tmp_path):
    pytest.importorskip("matplotlib")
    write_run(students / "odd", [1, 2, 3], lr=5, aa="$x^{ | a rather long value that has to be wrapped in the legend")
    assert compare.main([str(students), "--plot", str(tmp_path / "new" / "curves.png")]) == 0
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_named(students, tmp_path, capsys, monkeypatch):
    real_import = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert compare.main([str(students), "--plot", str(tmp_path / "curves.png")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(("encoding", "sign"), [("utf-8", "±"), ("latin-1", "±"), ("ascii", "?")])
def test_script_runs_without_torch_and_matplotlib_on_any_terminal(students, encoding, sign):
    code = "import sys, runpy; sys.modules |= dict.fromkeys(('torch', 'matplotlib')); runpy.run_path('compare.py', run_name='__main__')"
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code, students], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert f"46.0 {sign} 8.5" in done.stdout.decode(encoding)


def test_demo_data_has_equal_classes_in_the_original_format():
    raw = ROOT / "demo" / "data" / "FashionMNIST" / "raw"
    for split, per_class in (("train", 1200), ("t10k", 200)):
        labels = gzip.decompress((raw / f"{split}-labels-idx1-ubyte.gz").read_bytes())
        images = gzip.decompress((raw / f"{split}-images-idx3-ubyte.gz").read_bytes())
        assert labels[:4] == bytes([0, 0, 8, 1]) and images[:4] == bytes([0, 0, 8, 3])
        assert np.bincount(np.frombuffer(labels[8:], np.uint8)).tolist() == [per_class] * 10
        assert np.frombuffer(images[4:16], ">i4").tolist() == [10 * per_class, 28, 28]
        assert len(images) == 16 + 10 * per_class * 28 * 28


def test_subset_is_balanced_ordered_and_repeatable():
    spec = importlib.util.spec_from_file_location("make_subset", ROOT / "demo" / "make_subset.py")
    make_subset = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_subset)
    labels = np.arange(200) % 10
    kept = make_subset.pick(labels, 3, seed=1)
    assert np.bincount(labels[kept]).tolist() == [3] * 10
    assert np.all(np.diff(kept) > 0)
    assert np.array_equal(kept, make_subset.pick(labels, 3, seed=1))
