"""Run the commands of the README and docs/ as they stand there: only paths and numbers of processes change."""

import importlib.util
import itertools
import json
import os
import pickle
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision.datasets.utils
from conftest import convnext_as_released, write_images

import compare
import engine
import export
import main as script
import models
import predict
import weight_selection
from options.selection import selection_options
from options.tools import export_options, predict_options, sweep_options
from options.training import training_options

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")]
}


def blocks_of(page):
    return re.findall(r"^```bash\n(.*?)^```", PAGES[page], re.M | re.S)


def commands_of(page):
    """The words of each command in a page's shell blocks."""
    for block in blocks_of(page):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def calls(script_name, *pages):
    """The arguments of each complete command that calls `script_name` in these pages."""
    commands = (words for page in pages for words in commands_of(page) if script_name in words and "…" not in words)
    return [words[words.index(script_name) + 1 :] for words in commands]


SELECTIONS = calls("weight_selection.py", "README.md", "docs/selection.md")
IN_TABLES = [
    shlex.split(words) for words in re.findall(r"`python3 weight_selection\.py ([^`]+)`", PAGES["docs/selection.md"])
]
PUBLISHED = [words for words in SELECTIONS if {"vit_small_patch16_224_in21k", "convnext_tiny_in22k"} & set(words)]
PLANS = [words for words in SELECTIONS if "--plan" in words]
PAIRS = [words for words in SELECTIONS if words not in PUBLISHED + PLANS and "--refit" not in words] + IN_TABLES
TUNED = "/path/to/results/vit_small_images/"  # each command of the chain names it
TUNE, DISTIL = (words for words in calls("main.py", "docs/recipes.md") if TUNED in words)
(CUT,) = calls("weight_selection.py", "docs/recipes.md")
REFITS = [words for words in calls("weight_selection.py", *PAGES) if "--refit" in words and words != CUT]
(SHORT,) = (words for words in calls("main.py", "docs/recipes.md") if "short" in words)
TRAININGS = [words for words in calls("main.py", "docs/recipes.md") if TUNED not in words and words != SHORT]
LAUNCHED = TRAININGS[:4]
# the commands' teacher and student at a small size, and what makes a selection from one to the other quick
LARGE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
SMALL = LARGE | {"embed_dim": 16, "num_heads": 2}
LARGE_WORDS, SMALL_WORDS = ([f"{name}={size}" for name, size in each.items()] for each in (LARGE, SMALL))
QUICK = ["--calibration_images", "16", "--pretrained_kwargs", *LARGE_WORDS, "--student_kwargs", *SMALL_WORDS]


def placed(words, places):
    """Replace each /path/to/NAME/ in the arguments by its place in `places`."""
    return [
        next((str(new) + word[len(old) :] for old, new in places.items() if word.startswith(old)), word)
        for word in words
    ]


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory):
    """Fill a hub cache with both teachers of the paper, with random values, as a download leaves them."""
    cache = tmp_path_factory.mktemp("hub")
    for name in ("vit_small_patch16_224.augreg_in21k", "convnext_tiny.fb_in22k"):
        torch.manual_seed(0)
        weights = models.create(name, {}).state_dict()
        folder = cache / f"models--timm--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        content = convnext_as_released(weights) if name.startswith("convnext") else weights
        safetensors.torch.save_file(content, folder / "snapshots" / ("0" * 40) / "model.safetensors")
    return cache


def write_zeros(model, path):
    """A `.safetensors` file of the model's tensors, all zero: a file with holes, which takes no space."""
    header, end = {}, 0
    for key, value in model.state_dict().items():
        dtype, start = {torch.float32: "F32", torch.int64: "I64"}[value.dtype], end
        end += value.numel() * value.element_size()
        header[key] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


@pytest.fixture(scope="module")
def selected(hub_cache, tmp_path_factory):
    """The folder that the README's two selections of the paper wrote."""
    output = tmp_path_factory.mktemp("selection")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache))
        for words in PUBLISHED:
            weight_selection.main(placed(words, {"/path/to/weight_selection": output}))
    return output


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write CIFAR-100 in its own format and ImageNet as folders, with enough images for one update of the commands."""
    root = tmp_path_factory.mktemp("data")
    cifar = root / "cifar" / "cifar-100-python"
    cifar.mkdir(parents=True)
    for part, count in (("train", 128), ("test", 2)):
        rows = np.random.default_rng(0).integers(0, 256, (count, 3072), dtype=np.uint8)
        (cifar / part).write_bytes(pickle.dumps({"data": rows, "fine_labels": [i % 100 for i in range(count)]}))
    (cifar / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))
    write_images(root / "imagenet", "train", {"n01": 256, "n02": 256}, size=64)
    write_images(root / "imagenet", "val", {"n01": 1, "n02": 1}, size=64)
    return root


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """The folder of a file of the weights that the pages distill from, all zero."""
    root = tmp_path_factory.mktemp("teacher")
    write_zeros(models.create("vit_small_patch14_dinov2.lvd142m", {}, device="meta"), root / "teacher.safetensors")
    return root


def options_of(words):
    return dict(itertools.pairwise(words))


def test_pages_have_the_six_commands_of_the_paper():
    assert [options_of(words)["--pretrained_model"] for words in PUBLISHED] == [
        "vit_small_patch16_224_in21k",
        "convnext_tiny_in22k",
    ]
    settings = [options_of(words) for words in LAUNCHED]
    # the total batch of the paper's recipes, on the pages' 8 processes
    totals = [8 * int(options["--batch_size"]) * int(options["--update_freq"]) for options in settings]
    assert totals == [512, 1024, 4096, 4096]
    assert [options["--model"] for options in settings] == ["vit_tiny", "convnext_femto"] * 2
    for words in TRAININGS[4:6]:  # the first recipe on one GPU
        alone = options_of(words)
        assert int(alone["--batch_size"]) * int(alone.get("--update_freq", 1)) == totals[0]
    assert [words for words in calls("main.py", "README.md") if "--eval" not in words] == [SHORT, TRAININGS[0]]


def test_published_selections_write_both_files(selected):
    assert sorted(path.name for path in selected.iterdir()) == ["convnext.json", "convnext.pth", "vit.json", "vit.pth"]
    assert [len(torch.load(selected / name, weights_only=True)) for name in ("vit.pth", "convnext.pth")] == [150, 124]


@pytest.mark.parametrize("words", PAIRS, ids=lambda words: words[1].removeprefix("/path/to/weight_selection/"))
def test_other_selections_run(words, tmp_path, monkeypatch):
    given = options_of(words)
    default = models.FAMILIES[given.get("--model_type", "vit")].teacher
    teacher = models.create(given.get("--pretrained_model") or default, {}, device="meta")
    monkeypatch.setattr("weightfiles.teacher.pretrained_file", lambda *_: tmp_path / "teacher.safetensors")
    write_zeros(teacher, tmp_path / "teacher.safetensors")
    places = {"/path/to/weight_selection": tmp_path / "out", "/path/to/vit_base": tmp_path / "teacher"}
    written = weight_selection.main(placed(words, places))
    description = json.loads(written.with_suffix(".json").read_text())
    student, left_out = description["student"], description["left_out"]
    model = models.create(student["model"], student["kwargs"], device="meta")
    shapes = {key: value.shape for key, value in torch.load(written, weights_only=True).items()}
    head = () if "--new_head" in words else models.head_prefixes(model)
    expected = {key: value.shape for key, value in model.state_dict().items() if not key.startswith(head)}
    assert bool(left_out) == ("--take" in words)
    assert shapes == {key: shape for key, shape in expected.items() if key not in left_out}


def test_pages_have_a_selection_for_every_family():
    students = [options_of(words) for words in PAIRS]
    families = {words.get("--model_type") or "vit" for words in students}
    families |= {
        words["--student_model"].partition("_")[0].removesuffix("v2")
        for words in students
        if "--student_model" in words
    }
    assert families == set(models.FAMILIES)


def test_plan_is_printed_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert weight_selection.main(PLANS[0]) is None
    assert json.loads(capsys.readouterr().out)["plan"]["groups"]["stream"]["teacher_size"] == 768
    assert (tmp_path / "docs" / "plan.png").stat().st_size > 10_000


class FirstUpdate(Exception):
    """Raised after the first optimizer step."""


def _without(words, option):
    place = words.index(option)
    return words[:place] + words[place + 2 :]


# one baseline is enough: all four differ from their commands in the same way
@pytest.mark.parametrize("words", [*TRAININGS, SHORT, _without(TRAININGS[0], "--initialize")])
def test_training_reaches_its_first_optimizer_step(words, selected, data, dinov2, tmp_path, monkeypatch):
    monkeypatch.setattr("weightfiles.teacher.pretrained_file", lambda *_: dinov2 / "teacher.safetensors")
    if words != TRAININGS[0]:
        words = [*words, "--batch_size", "16"]  # as large a batch as written is for a GPU, and once is enough
    trains = ""  # how the keys of all that trains begin
    if "--linear_probe" in words:
        words, trains = [*words, "--input_size", "32"], "head."  # it sees all images before the first update
    monkeypatch.setattr(torchvision.datasets.utils, "check_integrity", lambda *_: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    real = engine._update

    def once(trainer, step):
        before = {key: value.clone() for key, value in trainer.bare_model.state_dict().items()}
        set_to = 1e-3  # a warm-up begins at learning rate 0, which would change no weight
        for group in trainer.optimizer.param_groups:
            group["lr"] = set_to
        assert real(trainer, step).isfinite()
        after = trainer.bare_model.state_dict()
        assert all(torch.equal(before[key], after[key]) != key.startswith(trains) for key in before)
        raise FirstUpdate

    monkeypatch.setattr(engine, "_update", once)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(FirstUpdate):
            places = {
                "/path/to/weight_selection": selected,
                "/path/to/data": data / "cifar",
                "/path/to/imagenet": data / "imagenet",
                "/path/to/images": data / "imagenet",
                "/path/to/results": tmp_path,
            }
            script.main([*placed(words, places), "--num_workers", "2", "--device", "cpu"])
    finally:
        torch.set_num_threads(threads)


def test_chain_of_fine_tuning_refit_and_distillation_runs(image_folder, tmp_path):
    quick = ["--input_size", "32", "--epochs", "1", "--warmup_epochs", "0", "--batch_size", "8"]
    quick += ["--num_workers", "0", "--device", "cpu", "--model_kwargs"]
    places = {
        "/path/to/images": image_folder,
        "/path/to/vit_small": tmp_path / "pretrained",
        "/path/to/weight_selection": tmp_path,
        "/path/to/results": tmp_path / "results",
    }
    tune, cut, distil = (placed(words, places) for words in (TUNE, CUT, DISTIL))
    safetensors.torch.save_file(models.create("vit_small", LARGE).state_dict(), tmp_path / "pretrained.safetensors")
    script.main([*tune, *quick, *LARGE_WORDS])
    assert weight_selection.main([*cut, *QUICK]) == Path(options_of(distil)["--initialize"])
    script.main([*distil, *quick, *SMALL_WORDS])
    (line,) = (tmp_path / "results" / "vit_tiny_images" / "log.txt").read_text().splitlines()
    assert json.loads(line)["train_distillation_loss"] > 0


@pytest.mark.parametrize("words", REFITS)
def test_refits_run(words, image_folder, tmp_path, monkeypatch):
    teacher = models.create(options_of(words)["--pretrained_model"], LARGE)
    safetensors.torch.save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    monkeypatch.setattr("weightfiles.teacher.pretrained_file", lambda *_: tmp_path / "teacher.safetensors")
    (tmp_path / "out").mkdir()
    places = {"/path/to/weight_selection": tmp_path / "out", "/path/to/images": image_folder}
    written = weight_selection.main([*placed(words, places), *QUICK])
    refit = json.loads(written.with_suffix(".json").read_text())["refit"]
    assert (refit["images"], refit["left_as_selected"]) == (16, {})


def test_comparison_runs(tiny_run, tmp_path, monkeypatch):
    for seed in (0, 1):
        script.main(tiny_run("--seed", seed, "--epochs", "1", output_dir=tmp_path / "results" / str(seed)))
    words = calls("compare.py", "README.md")[0]
    monkeypatch.chdir(tmp_path)
    assert compare.main(placed(words, {"/path/to/results": tmp_path / "results"})) in (None, 0)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_trained_model_is_used_as_its_page_says(tiny_run, image_folder, tmp_path, capsys):
    script.main(tiny_run("--model_ema true --epochs 1", output_dir=tmp_path / "run"))
    places = {
        "/path/to/results/vit_images/": f"{tmp_path / 'run'}/",
        "/path/to/exported": tmp_path / "exported",
        "/path/to/photo.jpg": image_folder / "val" / "grey" / "000.jpg",
        "/path/to/photos/": image_folder / "val" / "grey",
    }
    page = "docs/use.md"
    for call in (predict.main, export.main):
        for words in calls(f"{call.__module__}.py", page):
            call(placed(words, places))
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["image"][-7:] for line in lines[1:5]] == ["000.jpg", "001.jpg", "002.jpg", "003.jpg"]
    for words in calls("main.py", page):
        assert script.main(placed(words, places)).keys() >= {"test_acc1"}
    snippets = re.findall(r"^```python\n(.*?)^```", PAGES[page], re.M | re.S)
    assert len(snippets) == 3
    for snippet in snippets:
        for name, place in places.items():
            snippet = snippet.replace(name, str(place))
        exec(snippet, {})
    likeliest = lines[0].partition(": ")[2].split()[0]
    assert capsys.readouterr().out.split() == [likeliest] * 3


def test_timm_snippets_run(selected):
    snippets = re.findall(r"^```python\n(.*?)^```", PAGES["docs/selection.md"], re.M | re.S)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet.replace("/path/to/weight_selection", str(selected)), {})


PARSERS = {
    "main.py": training_options,
    "weight_selection.py": selection_options,
    "compare.py": compare.parse,
    "sweep.py": sweep_options,
    "export.py": export_options,
    "predict.py": predict_options,
}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_can_be_pasted(page):
    for block in blocks_of(page):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    for words in commands_of(page):
        for name in PARSERS.keys() & set(words) if "…" not in words else ():
            PARSERS[name](words[words.index(name) + 1 :])  # a usage error would end the test
        if words[1:2] == ["-m"]:
            assert importlib.util.find_spec(words[2]), f"{page}: {shlex.join(words)}"
        if words[0].startswith("./"):
            assert os.access(ROOT / words[0], os.X_OK), f"{page}: {shlex.join(words)}"


def test_links_and_files_that_pages_name_exist():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)|src=\"([^\"]+)\"", text):
            name = target[0] or target[1]
            assert ((ROOT / page).parent / name).exists(), f"{page} names {name}"
