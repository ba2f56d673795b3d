"""A study whose arms have learning rates of their own: how they are found, and the table."""

import json
import shutil

import pytest
from conftest import read_log, write_run

from study import arms, lengths, rates, run, runs, search, studies


def write_arms(root, ends, section="vit/tenth"):
    """Runs of the section, {arm: {rate: {seed: accuracies}}}, and its teachers."""
    for arm, tried in ends.items():
        for rate, seeds in tried.items():
            for seed, accuracies in seeds.items():
                folder = write_run(root / section / f"{arm}@{rate}-{seed}", accuracies, seed=seed, lr=float(rate))
                finish(folder, 390, 1000)
    for name, size in (("vit/teacher", 3000), (f"{section}/tuned", 3000)):
        if not (root / name).exists():
            finish(write_run(root / name, [10.0, 12.5]), 390, size)


def cells_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def finish(folder, step, parameters):
    """Give the log of a run the figures that say what it cost."""
    records = read_log(folder)
    records[-1] |= {"step": step, "n_parameters": parameters}
    (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_rate_of_an_arm_is_the_best_of_its_own_seed(tmp_path):
    tried = {"1e-3": {3: [20.0, 30.0], 0: [19.0, 31.0], 1: [21.0, 33.0]}, "2e-3": {3: [1.0, 29.0]}}
    better = {"1e-3": {3: [20.0, 35.0]}, "2e-3": {3: [25.0, 36.0], 0: [30.0, 40.0], 1: [34.0, 44.0]}}
    write_arms(tmp_path, {"random": tried, "chain": better, "keep": {"1e-3": {3: [1.0, 2.0]}}})
    text = rates.report(tmp_path)
    cells = cells_of(text)
    cost = 1 + 3 + 3 / 3 + 1024 * (2 * 3000 + 5 * 1000) / 3 / (390 * 64 * 1000)
    assert ["random init", "1e-3", "2", "20.0 ± 1.4", "32.0 ± 1.4", "", "", "", "1.0"] in cells
    chain = arms.ARMS["chain"].title
    assert [chain, "2e-3", "2", "32.0 ± 2.8", "42.0 ± 2.8", "+10.0 ± 1.4", "", "1", f"{cost:.1f}"] in cells
    assert [chain, "35.0", "36.0"] in cells and "- vit/teacher: 12.5 %" in text
    assert [arms.ARMS["keep"].title, "2.0", ""] in cells  # its rate is tried, its seeds are missing
    assert text.count(arms.ARMS["keep"].title) == 1


def test_study_under_way_is_reported_as_far_as_it_has_come(tmp_path):
    write_arms(tmp_path, {"random": {"1e-3": {3: [20.0, 30.0]}}, "keep": {"1e-3": {3: [1.0, 2.0], 0: [21.0, 33.0]}}})
    text = rates.report(tmp_path)
    assert [arms.ARMS["keep"].title, "1e-3", "1", "21.0", "33.0", "", "", "", "1.0"] in cells_of(text)
    assert "| random init | 30.0 |" in " ".join(text.split())


def test_study_finds_the_rate_and_then_runs_the_other_seeds(tmp_path):
    study = studies.STUDIES["refit"]._replace(
        rows=[("vit", "tenth", "random", range(2))], rates={"vit": ("1e-3", "2e-3")}
    )
    place = run.Place(tmp_path, tmp_path)

    def planned():
        return [each.name for each in runs.runs_of(study, place.ends)]

    assert planned() == ["vit/tenth/random@1e-3-3", "vit/tenth/random@2e-3-3"]
    write_arms(tmp_path, {"random": {"1e-3": {3: [20.0, 30.0]}, "2e-3": {3: [20.0, 31.0]}}})
    assert planned()[2:] == ["vit/tenth/random@2e-3-0", "vit/tenth/random@2e-3-1"]


def test_search_goes_on_while_an_end_of_the_ladder_is_best():
    ladder, ends = ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2"), {}
    assert search.rates_to_try(ladder, ends) == ladder[1:4] and search.known_best(ladder, ends) is None
    ends |= {"3e-4": 50.0, "1e-3": 49.0}
    assert search.known_best(ladder, ends) is None
    ends["3e-3"] = 40.0
    assert search.rates_to_try(ladder, ends) == ladder[:4] and search.known_best(ladder, ends) is None
    assert search.known_best(ladder, ends | {"1e-4": 60.0}) == "1e-4"  # the ladder ends there
    assert search.known_best(ladder, ends | {"1e-4": 50.0, "1e-2": 70.0}) == "1e-4"  # the lower of two equal ones
    assert search.rates_to_try(ladder, ends | {"3e-3": 51.0}) == ladder[1:]
    assert (
        search.rates_to_try(ladder[:3], {}) == ladder[:3] == search.rates_to_try(ladder[:3], dict.fromkeys(ladder, 1))
    )


def test_longer_runs_take_the_rates_of_the_shortest(tmp_path):
    study = studies.STUDIES["claims"]._replace(
        rows=[("vit", "full", "random", range(1))], rates={"vit": ("1e-3", "2e-3"), "vit/full": "vit/epochs_1"}
    )
    place = run.Place(tmp_path, tmp_path)

    def planned():
        return [each.name for each in runs.runs_of(study, place.ends)]

    tried = ["vit/epochs_1/random@1e-3-3", "vit/epochs_1/random@2e-3-3"]
    assert planned() == tried
    write_arms(tmp_path, {"random": {"1e-3": {3: [20.0]}, "2e-3": {3: [21.0], 0: [22.0]}}}, "vit/epochs_1")
    write_arms(tmp_path, {"random": {"2e-3": {0: [20.0, 31.0]}}}, "vit/full")
    assert planned() == [*tried, "vit/full/random@2e-3-0"]
    assert ["random init", "2e-3", "1", "20.0", "31.0"] in [row[:5] for row in cells_of(rates.report(tmp_path))]


def test_lengths_are_compared_where_the_baseline_has_several(tmp_path):
    pytest.importorskip("matplotlib")
    for section, random, selected in (("epochs_1", 20.0, 32.0), ("epochs_3", 30.0, 38.0), ("full", 36.0, 44.0)):
        ends = {
            arm: {"1e-3": {0: [end - 1], 1: [end + 1]}} for arm, end in (("random", random), ("selected", selected))
        }
        write_arms(tmp_path, ends, f"vit/{section}")
    write_arms(tmp_path, {"shuffled": {"1e-3": {0: [30.0]}}}, "vit/full")  # of one length only
    rows = cells_of(rates.report(tmp_path).partition("## vit, all images: runs of several lengths")[2])
    assert ["start", "1 epoch", "3 epochs", "10 epochs", "epochs to random init's end"] in rows
    assert ["random init", "20.0 ± 1.4", "30.0 ± 1.4", "36.0 ± 1.4", "10.0 ± 0.0"] in rows
    # 3 ** (4 / 6), each seed
    assert ["weight selection", "32.0 ± 1.4", "38.0 ± 1.4", "44.0 ± 1.4", "2.1 ± 0.0"] in rows
    assert arms.ARMS["shuffled"].title not in {row[0] for row in rows}
    assert (tmp_path / "lengths.png").exists()
    assert lengths.epochs_to(30, {1: 32.0, 3: 38.0}) == (1, False) and lengths.epochs_to(40, {1: 32.0, 3: 38.0}) is None


def test_teacher_in_a_file_counts_by_its_shape(tmp_path):
    tried = {"1e-3": {3: [20.0, 30.0], 0: [20.0, 32.0]}}
    write_arms(tmp_path, {"random": tried, "refit_energy": tried})
    for name in ("vit/teacher", "vit/tenth/tuned"):
        shutil.rmtree(tmp_path / name)
    config = tmp_path / "vit/tenth/refit_energy@1e-3-0/config.json"
    teacher = {"model": "vit_tiny_patch16_224", "kwargs": {"embed_dim": 12, "depth": 1, "num_heads": 1}}
    source = {"path": "a.pth", "sha256": "a", "teacher": teacher}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"initialization": source}))
    assert rates.parameters_of(teacher) == sum(
        (3 * 256 * 12 + 12, 12 + 197 * 12, 24 + 13 * 36 + 13 * 12, 24 + 13 * 48 + 49 * 12, 24, 13 * 1000)
    )
    assert ["energy, refit", "1e-3", "1"] in [row[:3] for row in cells_of(rates.report(tmp_path))]


def test_ablations_take_their_arms_rate_and_have_a_table(tmp_path):
    study = studies.STUDIES["refit"]
    study = study._replace(rows=[("vit", "tenth", "refit_energy ridge_1", range(1))], rates={"vit": ("1e-3", "2e-3")})
    place = run.Place(tmp_path, tmp_path)
    tried = {"1e-3": {3: [20.0, 30.0]}, "2e-3": {3: [20.0, 31.0], 0: [20.0, 32.0]}}
    write_arms(tmp_path, {"random": tried, "refit_energy": tried, "ridge_1": {"2e-3": {0: [20.0, 35.0]}}})
    names = [each.name for each in runs.runs_of(study, place.ends)]
    assert names[-2:] == ["vit/tenth/refit_energy@2e-3-0", "vit/tenth/ridge_1@2e-3-0"] and len(names) == 5
    text = rates.report(tmp_path)
    above, _, below = text.partition("### Changes of energy, refit")
    assert "ridge 1 " not in above and below.index("energy, refit") < below.index("ridge 1 ")


def test_accuracy_before_training_is_a_column_if_it_was_measured(tmp_path):
    runs_at = {"1e-3": {3: [20.0, 30.0], 0: [19.0, 31.0]}}
    write_arms(tmp_path, {"random": runs_at, "selected": runs_at}, "vit/near")
    assert "untrained" not in rates.report(tmp_path)
    (tmp_path / "vit/near/selected@1e-3-0/untrained.json").write_text(json.dumps({"test_acc1": 7.25}))
    text = rates.report(tmp_path)
    cells = cells_of(text)
    assert cells[2][:4] == ["start", "rate", "n", "untrained"]
    assert ["weight selection", "1e-3", "1", "7.2"] in [row[:4] for row in cells]


def test_tuned_teacher_and_the_one_it_starts_from_come_first():
    study = studies.STUDIES["refit"]
    names = [each.name for each in run.chosen(runs.runs_of(study), "vit/tenth/chain@1e-3-3")]
    assert names == ["vit/teacher", "vit/tenth/tuned", "vit/tenth/chain@1e-3-3"]
