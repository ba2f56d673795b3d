"""docs/paper.md: its commands cover the paper's main table and can run, and our figures on it are in the results."""

import json
import re

import pytest
from test_docs import PAGES, ROOT, calls, options_of

import weight_selection
from options.selection import SCORED_RULES

PAGE = "docs/paper.md"
TRAININGS = [options_of(words) for words in calls("main.py", PAGE, "docs/recipes.md")]
# a plan by such a rule reads the weights
PLANNED = [words for words in calls("weight_selection.py", PAGE) if not set(SCORED_RULES) & set(words)]
MAIN_TABLE = {"IMNET", "CIFAR10", "CIFAR100", "pets", "flowers", "stl10", "food101", "dtd", "svhn", "eurosat"}
RECIPES = {
    "vit_tiny": (512, "2e-3", None),
    "convnext_femto": (1024, "4e-3", "0.1"),
}  # of the paper's README, on CIFAR-100


@pytest.mark.parametrize("model", RECIPES)
def test_each_data_set_of_the_main_table_has_its_command(model):
    runs = {run.get("--data_set", "IMNET"): run for run in TRAININGS if run.get("--model") == model}
    assert runs.keys() - {"image_folder"} == MAIN_TABLE
    for run in calls("main.py", PAGE)[:16]:
        given = options_of(run)
        total = 8 * int(given["--batch_size"]) * int(given.get("--update_freq", 1))
        assert (total, given["--lr"], given.get("--drop_path")) == RECIPES[given["--model"]]


@pytest.mark.parametrize("words", PLANNED, ids=lambda words: words[1].removeprefix("/path/to/weight_selection/"))
def test_selections_of_the_page_can_be_planned(words, capsys):
    assert weight_selection.main([*words[2:], "--plan"]) is None
    assert len(json.loads(capsys.readouterr().out)["plan"]["tensors"]) > 50


def test_our_figures_on_the_page_are_in_the_results():
    tables = "".join(path.read_text() for path in ROOT.glob("results/study*/*.md"))
    figures = re.findall(r"\d+\.\d ± \d\.\d", PAGES[PAGE])
    assert len(figures) > 20
    assert [figure for figure in figures if figure not in tables] == []
