"""What the tests share: small images on disk, and the command line of a run that takes a second."""

import os

# set before the imports, which read it: no test may wait for a network
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true")

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from PIL import Image

import compare
import main
import models
import weight_selection
from bench import survive
from images.images import Images
from images.settings import Augmentation, Loading, View
from options.training import training_options
from utils import UserError

torch.set_num_threads(1)  # on tensors this small a second thread costs more than it gains

TINY_MODEL = ["--model", "vit_tiny", "--model_kwargs", "embed_dim=32", "depth=2", "num_heads=2", "patch_size=8"]
# a teacher of the tests, and the options of its student
SHAPE = {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 8}
STUDENT = "--student_model vit_tiny --student_kwargs embed_dim=16 depth=2 num_heads=2 patch_size=8 img_size=32"


def train_teacher(folder, image_folder, epochs, more=""):
    """Train a run of SHAPE in `folder`, with other means and EXIF than the defaults."""
    words = (
        f"--data_set image_folder --input_size 32 --epochs {epochs} --warmup_epochs 0 --batch_size 8 --num_workers 0"
    )
    words += f" --device cpu --imagenet_default_mean_and_std false --exif true {more} --model vit_tiny --model_kwargs"
    shape = [f"{key}={value}" for key, value in SHAPE.items()]
    main.main([*words.split(), *shape, "--data_path", str(image_folder), "--output_dir", str(folder)])
    return folder


@pytest.fixture
def select(tmp_path):
    """Return a function: select the small student, with these options for the teacher; the tensors and the `.json`."""

    def selected(words):
        path = weight_selection.main(["--output_dir", str(tmp_path / "out.pth"), *f"{STUDENT} {words}".split()])
        return torch.load(path, weights_only=True), json.loads(path.with_suffix(".json").read_text())

    return selected


@pytest.fixture(scope="session")
def reference() -> dict:
    """Values that the paper's own code computes (OscarXZQ/weight-selection at e9b6d0c)."""
    return json.loads((Path(__file__).parent / "reference_values.json").read_text())


def convnext_as_released(weights):
    """timm's tensors under the names of the original ConvNeXt release."""
    released = {}
    for key, value in weights.items():
        key = key.replace("head.norm.", "norm.").replace("head.fc.", "head.").replace("stem.", "downsample_layers.0.")
        key = key.replace(".conv_dw.", ".dwconv.").replace(".mlp.fc", ".pwconv").replace(".blocks.", ".")
        key = re.sub(r"stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        released[key] = value
    return released


def write_images(root: Path, split: str, classes: dict[str, int], size: int = 32, seed: int = 0) -> None:
    """A folder of JPEG files for each class, each class with a brightness of its own under the noise."""
    generator = np.random.default_rng(seed)
    for number, (name, count) in enumerate(classes.items()):
        folder = root / split / name
        folder.mkdir(parents=True)
        for image in range(count):
            pixels = generator.integers(0, 100, (size, size, 3)) + 70 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{image:03}.jpg")


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture without sharp edges, uint8 [height, width, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def write_smooth(root: Path, sizes: list[tuple[int, int]], split: str = "train", suffix: str = ".png") -> Path:
    """A folder with one smooth picture of each (height, width), in two classes by turns; return `root`."""
    for number, size in enumerate(sizes):
        folder = root / split / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth(*size, number)).save(folder / f"{number:03}{suffix}", quality=95)
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """40 training and 11 evaluation images of 3 classes, 32 px, as `--data_set image_folder` reads them."""
    root = tmp_path_factory.mktemp("images")
    write_images(root, "train", {"dark": 14, "grey": 13, "light": 13}, seed=1)
    write_images(root, "val", {"dark": 4, "grey": 4, "light": 3}, seed=2)
    return root


@pytest.fixture
def tiny_run(image_folder, tmp_path):
    """Return a function: the options of a two-epoch run on `image_folder`, five updates per epoch, and more.

    One string may hold several options.
    """

    def options(*more: str, output_dir: Path | str = tmp_path / "run") -> list[str]:
        recipe = "--input_size 32 --epochs 2 --warmup_epochs 1 --batch_size 8 --lr 1e-3 --num_workers 0 --device cpu"
        data = ["--data_set", "image_folder", "--data_path", str(image_folder)]
        return [*TINY_MODEL, *data, *recipe.split(), "--output_dir", str(output_dir), *" ".join(map(str, more)).split()]

    return options


@pytest.fixture
def small_teacher(tmp_path) -> tuple[str, dict[str, torch.Tensor]]:
    """The path of a file with the weights of the script's small teacher, and these weights."""
    weights = small_models.random_tensors(models.create("vit_tiny", small_models.SCRIPT_TEACHER), torch.float32)
    torch.save(weights, tmp_path / "teacher.pth")
    return str(tmp_path / "teacher.pth"), weights


@pytest.fixture
def train(tiny_run, tmp_path):
    """Return a function: main.py with the options of `tiny_run` and more, into this folder in `tmp_path`."""
    return lambda *more, to="run": main.main(tiny_run(*more, output_dir=tmp_path / to))


def settings(*words: str, device: str = "cpu") -> tuple[View, Augmentation, Loading]:
    """The settings of images for these options of main.py; without --num_workers, no workers."""
    options = training_options(["--num_workers", "0", *words])
    loading = Loading.from_options(options, device=torch.device(device))
    return View.from_options(options), Augmentation.from_options(options), loading


def noise(count: int) -> Images:
    """`count` different pictures of 32 px with labels 0, 1, 2, 0, ..."""
    arrays = np.random.RandomState(0).randint(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return Images("noise", np.arange(count) % 3, source=[(Image.fromarray(array),) for array in arrays])


def generators() -> tuple:
    """The state of the three global generators."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log.txt."""
    return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]


def write_run(folder: Path, accuracies: list[float], *, seed=0, sha256=None, processes=1, **options) -> Path:
    """Write a finished run with these test accuracies, one per epoch."""
    wanted = {"epochs": len(accuracies), "lr": 0.001, "batch_size": 64, "update_freq": 1, "data_set": "digits"}
    wanted |= {"data_path": "/data", "eval_data_path": None, "output_dir": str(folder), "seed": seed}
    wanted |= {"initialize": "init/vit.pth" if sha256 else ""} | options
    source = {"path": wanted["initialize"], "sha256": sha256} if sha256 else None
    machine = {"device": "cpu", "processes": processes, "threads": 2, "torch": "2", "timm": "1"}
    config = {"format": "weight-selection run 1", "options": wanted, "initialization": source, "environment": machine}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"revision": "abc"}))
    lines = [json.dumps({"epoch": epoch, "test_acc1": value}) for epoch, value in enumerate(accuracies)]
    (folder / "log.txt").write_text("".join(line + "\n" for line in lines))
    return folder


def record(folder, **entries):
    """Add to a run's config.json what a newer version of main.py writes there."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


@pytest.fixture
def root(tmp_path):
    """The folder of the test's runs."""
    return tmp_path / "runs"


@pytest.fixture
def students(tmp_path):
    """Write two runs without and three with initialization. The baseline ends at 40 and 50: 45 on average."""
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


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def error_of(script, *arguments) -> str:
    """The message of the UserError that ends a script."""
    with pytest.raises(UserError) as error:
        script.main([*map(str, arguments)])
    return str(error.value)


def has_logged(folder: Path) -> bool:
    """Tell whether a run has finished an epoch."""
    return (folder / "log.txt").exists() and bool(read_log(folder))


def weights_of(folder: Path, name: str = "checkpoint-1.pth") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)["model"]


def assert_equal_weights(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a), max((a[key] - b[key]).abs().max() for key in a)


def in_two_processes(argv: list, said: Path) -> tuple[list[int], str]:
    """Run in two processes and return their exit codes and output. Forking them saves the time of their imports."""
    said.unlink(missing_ok=True)
    codes = survive.Job(list(map(str, argv)), 2, said).wait(120)
    return codes, said.read_text()


def wait_for(condition, seconds=180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def pids(*described) -> list[int]:
    """Return the ids of the processes that pgrep lists for these words."""
    listed = subprocess.run(["pgrep", *map(str, described)], capture_output=True, text=True).stdout
    return list(map(int, listed.split()))


def start(argv: list, *launcher: str) -> subprocess.Popen:
    """Start main.py in its own process. `launcher`: the words between python and main.py."""
    command = [sys.executable, *launcher, str(Path(main.__file__)), *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
