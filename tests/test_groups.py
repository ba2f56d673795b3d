"""compare.py groups runs by their settings, in tables with short labels, and finds each group's baseline."""

import pytest
from conftest import cells, error_of, groups_of, record, write_run

import compare
from options.training import training_defaults

BIRDS, CARS = ({"data_set": "image_folder", "data_path": f"/one/{name}"} for name in ("birds", "cars"))
ELSEWHERE = {"num_workers": 2, "device": "cpu", "data_path": "/a/x"}  # paths and the machine do not count
FASTER = {"lr": 0.002}
SMALL, COPY = ({"sha256": "aa", "initialize": f"{name}/vit.pth"} for name in ("small", "copy"))
LARGE = {"sha256": "bb", "initialize": "large/vit.pth"}


@pytest.mark.parametrize(
    ("runs", "groups"),
    [
        ([{}, {"epochs": 2, "seed": 1}], {"epochs=1": 1, "epochs=2": 1}),
        (
            [ELSEWHERE, {"num_workers": 0, "seed": 1}, FASTER],
            {"lr=0.001": 2, "lr=0.002": 1},
        ),
        (
            [{"update_freq": 2}, {"batch_size": 32, "processes": 4, "seed": 1}, {"processes": 4}],
            {"images_per_update=128": 2, "images_per_update=256": 1},
        ),
        ([BIRDS, BIRDS | {"data_path": "/two/birds", "seed": 1}], {"random init": 2}),
        ([CARS, CARS | {"eval_data_path": "/one/vans"}], {"eval_data_path=unset": 1, "eval_data_path=vans": 1}),
        (
            [SMALL, COPY | {"seed": 1}, LARGE],
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
    for name, sha256, seed in (("a", None, 0), ("b", "aa", 0), ("c", "bb", 1)):
        write_run(root / name, [10], sha256=sha256, seed=seed)
    groups = groups_of(root, "--ignore", "initialize")
    assert [(group["label"], group["n"]) for group in groups] == [("random init", 1), ("initialize=any", 2)]
    error = error_of(compare, root, "--ignore", "colour")
    assert "--ignore colour is none of the settings aa, amp_dtype" in error and "images_per_update" in error


def test_baseline_is_the_named_group(students, tmp_path, capsys):
    folder = tmp_path / "elsewhere"
    write_run(folder / "lr", [90, 90, 90], lr=0.5)
    for wanted in ("random init, lr=0.5", folder, folder / "lr"):
        groups = groups_of(students, folder, "--baseline", wanted)
        assert groups[0]["label"] == "random init, lr=0.5"
        assert [group["baseline"] for group in groups] == [None, *["random init, lr=0.5"] * 2]
    said = capsys.readouterr().out
    assert "random init, lr=0.001 differs from its baseline in lr (0.5, here 0.001)." in said
    error = error_of(compare, students, "--baseline", "nothing")
    assert "--baseline nothing" in error and "random init; initialize=vit.pth" in error
    assert "several groups; the groups are: random init; initialize" in error_of(
        compare, students, "--baseline", students
    )


def test_baseline_has_the_settings_of_its_group(root, capsys):
    """The first random-init run of the folder has another learning rate: a gain over it says nothing."""
    for lr, random, selected in ((1e-3, 80, 81.5), (1e-4, 66.5, None), (1e-5, None, 50)):
        if random:
            write_run(root / f"a-random-{lr}", [random], lr=lr)
        if selected:
            write_run(root / f"selected-{lr}", [selected], lr=lr, sha256="aa")
    gains = {group["label"]: group["gain"]["mean"] for group in groups_of(root)}
    assert gains == {
        "random init, lr=0.0001": None,
        "random init, lr=0.001": None,
        "initialize=vit.pth, lr=0.001": 1.5,
        "initialize=vit.pth, lr=1e-05": None,
    }
    said = capsys.readouterr().out
    assert "Baseline: random init, lr=0.001, which ends at 80.0 %.\n" in said
    assert said.endswith(
        "No baseline for initialize=vit.pth, lr=1e-05: the nearest random init differs in lr (0.0001, here 1e-05).\n"
    )


def test_run_that_went_on_with_fewer_processes_keeps_its_group(root):
    """Its options and its number of processes are the last command's; what it trained with is in effect."""
    write_run(root / "whole", [50], seed=0, processes=2, batch_size=64)
    resumed = write_run(root / "resumed", [60], seed=1, processes=1, batch_size=64)
    for folder in (root / "whole", resumed):
        record(folder, in_effect={"images_per_update": 128, "lr": 0.001, "precision": "float32"})
    assert [group["label"] for group in groups_of(root)] == ["random init"]


UNEQUAL = {
    "epochs": {"epochs": 2},
    "augmentation": {"aa": "none"},
    "images": {"update_freq": 2},
    "start": {"start_epoch": 1},
    "new option": {"mixup": 0.1},
}


@pytest.mark.parametrize("changed", UNEQUAL.values(), ids=UNEQUAL)
def test_unequal_random_init_is_no_baseline(root, changed, capsys):
    write_run(root / "random", [10] * changed.get("epochs", 1), **changed)
    write_run(root / "selected", [20], sha256="aa")
    assert [group["gain"]["mean"] for group in groups_of(root)] == [None, None]
    (name,) = changed
    name = "images_per_update" if name == "update_freq" else name
    assert f"the nearest random init differs in {name} (" in capsys.readouterr().out


def test_options_on_reading_the_file_are_no_difference(root):
    write_run(root / "random", [10], model_key="model")  # of an older version: it records few options
    wanted = training_defaults() | {"epochs": 1, "lr": 0.001, "data_set": "digits", "initialize": "vit.pth"}
    write_run(root / "selected", [20], sha256="aa", **wanted | {"model_key": "model_ema", "model_prefix": "x."})
    write_run(root / "again", [30], sha256="aa", **wanted)
    gains = {group["label"]: group["gain"]["mean"] for group in groups_of(root)}
    key = "model_key=model_ema, model_prefix=x."
    assert gains == {
        "random init": None,
        f"initialize=vit.pth, {key}": 10,
        "initialize=vit.pth, model_key=model|module, model_prefix=": 20,
    }


def test_what_the_options_became_counts_if_all_runs_record_it(root, capsys):
    """Two folders of one name, another precision by the machine, and an --update_freq that a resumed run adjusted."""
    folder = {"data_set": "image_folder", "data_path": "/one/images"}
    for name, sha256, images in (("random", None, 500), ("selected", "aa", 600)):
        record(
            write_run(root / name, [10], sha256=sha256, **folder), in_effect={"classes": 2, "training_images": images}
        )
    *_, selected = groups_of(root)
    assert (selected["gain"]["mean"], selected["table"]) == (None, "convnext_tiny on image_folder, training_images=600")
    assert "no run of this model on these data starts from random init" in capsys.readouterr().out
    write_run(root / "older", [10], seed=1, **folder)
    assert [group["label"] for group in groups_of(root)] == ["random init", "initialize=vit.pth"]
    other = root / "other"
    record(write_run(other / "random", [10]), in_effect={"precision": "float32", "images_per_update": 128, "lr": 0.001})
    more = {"update_freq": 2, "lr": None}
    for name, precision in (("same", "float32"), ("half", "bfloat16")):
        folder = write_run(other / name, [20], sha256=name, **more)
        record(folder, in_effect={"precision": precision, "images_per_update": 128, "lr": 0.001})
    assert [group["gain"]["mean"] for group in groups_of(other)] == [None, 10, None]


def test_recipe_stands_for_its_options_in_labels(root):
    short = {"recipe": "short", "aa": "none", "mixup": 0.0, "lr": 0.002}
    for name, options in {"a": {}, "b": {"sha256": "aa"}, "c": short, "d": short | {"sha256": "aa"}}.items():
        write_run(root / name, [10], **options)
    labels = ["random init, recipe=paper", "initialize=vit.pth, recipe=paper"]
    assert [group["label"] for group in groups_of(root)] == labels + [each.replace("paper", "short") for each in labels]
    write_run(root / "e", [10], **short | {"mixup": 0.5})  # given beside the recipe
    labels = {group["label"] for group in groups_of(root)}
    assert {"random init, recipe=short, mixup=0.0", "random init, recipe=short, mixup=0.5"} <= labels


def test_each_model_and_data_set_has_a_table(students, root, capsys, tmp_path):
    write_run(root / "a", [1, 2, 4], sha256="bb", data_set="CIFAR100")
    write_run(root / "b", [1, 2, 3], data_set="CIFAR100")
    write_run(root / "c", [7, 8, 9], sha256="cc", model="vit_tiny")  # no run starts from random weights
    groups = groups_of(students, root)
    assert [(group["label"], group["gain"]["mean"]) for group in groups] == [
        ("random init", None),
        ("initialize=vit.pth", pytest.approx(25)),
        ("random init", None),
        ("initialize=vit.pth", 1),
        ("initialize=vit.pth", None),
    ]
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith("##")] == [
        "## convnext_tiny on digits",
        "## convnext_tiny on CIFAR100",
        "## vit_tiny on digits",
    ]
    assert "Baseline: random init, which ends at 3.0 %" in text
    assert text.endswith(": no run of this model on these data starts from random init.\n")
    error = error_of(compare, students, root, "--baseline", "random init")
    assert "several groups; the groups are: convnext_tiny on digits: random init; convnext_tiny on CIFAR100" in error
    groups = groups_of(students, root, "--baseline", "convnext_tiny on CIFAR100: random init")
    assert {group["baseline"] for group in groups} == {None, "random init", "convnext_tiny on CIFAR100: random init"}


@pytest.mark.parametrize("sha256", [None, "aa"])
def test_lone_group_is_no_baseline_of_itself(root, sha256, capsys):
    write_run(root / "a", [10], sha256=sha256)
    (group,) = groups_of(root)
    assert (group["baseline"], group["gain"]["n"], group["epochs_to_baseline"]["n"]) == (None, 0, 0)
    said = capsys.readouterr().out
    assert "Baseline:" not in said and ("No baseline for initialize=vit.pth: no run" in said) == bool(sha256)


def test_other_random_starts_are_compared_with_random_init(root):
    for name, value, options in (("a", 5, {"init": "xavier"}), ("b", 10, {}), ("c", 30, {"sha256": "aa"})):
        write_run(root / name, [value], **options)
    gains = [(group["label"], group["gain"]["mean"]) for group in groups_of(root)]
    assert gains == [("random init", None), ("xavier init", -5), ("initialize=vit.pth", 20)]


def test_without_a_common_seed_the_gain_says_so(root, capsys):
    write_run(root / "a", [10], seed=1)
    write_run(root / "b", [20], sha256="aa")
    compare.main([str(root)])
    assert cells(capsys.readouterr().out.splitlines()[3])[-1] == "– (0 of 1 seeds)"  # noqa: RUF001


def test_run_named_twice_and_repeated_seed_count_once(root, capsys):
    folder = write_run(root / "a", [10])
    assert groups_of(folder, root, folder)[0]["n"] == 1
    assert capsys.readouterr().err == ""
    write_run(root / "b", [20])
    (group,) = groups_of(root)
    assert group["n"] == 1 and group["last"]["mean"] == 10
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "runs/b is left out: settings and seed 0 are those of" in error
