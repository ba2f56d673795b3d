"""predict.py prints what the run's model makes of images, from the run or from the folder that export.py wrote."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import error_of, read_log
from PIL import ExifTags, Image

import export
import main as script
import predict
from images.settings import View
from images.transforms import eval_transform
from training.checkpoint import options_of, read_checkpoint
from training.precision import Precision

NAMES = ["dark", "grey", "light"]


@pytest.fixture
def run(train, tmp_path):
    train("--epochs 1 --model_ema true --imagenet_default_mean_and_std false")
    return tmp_path / "run"


@pytest.fixture
def pictures(image_folder, tmp_path):
    """A folder of 3 images in two folders, one of them grey, beside hidden files and a text."""
    root = shutil.copytree(image_folder / "val" / "grey", tmp_path / "pictures" / "b")
    for number in ("002", "003"):
        (root / f"{number}.jpg").unlink()
    shutil.copy(root / "000.jpg", tmp_path / "pictures" / "._0.jpg")
    (tmp_path / "pictures" / "a.PNG").parent.mkdir(exist_ok=True)
    Image.new("L", (9, 50), 200).save(tmp_path / "pictures" / "a.PNG")
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    return tmp_path / "pictures"


def printed(capsys, *arguments):
    capsys.readouterr()
    predict.main([*map(str, arguments), "--device", "cpu"])
    return capsys.readouterr().out.splitlines()


@torch.no_grad()
def test_probabilities_are_the_models(run, pictures, capsys):
    checkpoint = run / "checkpoint-best.pth"
    state = read_checkpoint(checkpoint)
    options = options_of(checkpoint, state)
    files = [pictures / name for name in ("a.PNG", "b/000.jpg", "b/001.jpg")]
    pixels = [eval_transform(View.from_options(options))(Image.open(file).convert("RGB")) for file in files]
    for key in ("model", "model_ema"):
        model = script.make_model(options, 3, Precision(torch.device("cpu"), None)).eval()
        model.load_state_dict(state[key])
        lines = [json.loads(line) for line in printed(capsys, run, pictures, "--json", "--model_key", key)]
        assert [line["image"] for line in lines] == list(map(str, files))
        for line, wanted in zip(lines, model(torch.stack(pixels)).softmax(1), strict=True):
            given = {each["class"]: each["probability"] for each in line["classes"]}
            assert list(given) == [NAMES[number] for number in wanted.argsort(descending=True)]
            assert [given[name] for name in NAMES] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_lines_are_the_same_from_run_checkpoint_and_folder(run, pictures, tmp_path, capsys):
    export.main([str(run), str(tmp_path / "out")])
    wanted = printed(capsys, run, pictures / "b" / "001.jpg", pictures, "--top", "2")
    assert [line.partition(": ")[0] for line in wanted] == [
        str(pictures / name) for name in ("b/001.jpg", "a.PNG", "b/000.jpg", "b/001.jpg")
    ]
    first, second = (part.split() for part in wanted[0].partition(": ")[2].split(", "))
    assert {first[0], second[0]} < set(NAMES) and float(first[1]) >= float(second[1]) and first[2] == "%"
    for model in (run / "checkpoint-best.pth", tmp_path / "out"):
        assert printed(capsys, model, pictures / "b" / "001.jpg", pictures, "--top", "2") == wanted


def test_folder_of_others_is_read_if_it_describes_its_model(run, pictures, tmp_path, capsys):
    out = export.main([str(run), str(tmp_path / "out")])
    config = json.loads((out / "config.json").read_text())
    wrong = config | {"weight_selection": config["weight_selection"] | {"sha256": "0" * 64}}
    (out / "config.json").write_text(json.dumps(wrong))
    assert "is not the file that its config.json describes" in error_of(predict, out, pictures)
    # as timm writes one: the size of the image only in pretrained_cfg, and no names of classes
    others = {key: config[key] for key in ("architecture", "num_classes", "pretrained_cfg")}
    others |= {"model_args": {key: value for key, value in config["model_args"].items() if key != "img_size"}}
    (out / "config.json").write_text(json.dumps(others))
    as_numbers = printed(capsys, out, pictures / "a.PNG")[0]
    for number, name in enumerate(NAMES):
        as_numbers = as_numbers.replace(f" {number} ", f" {name} ")
    assert as_numbers == printed(capsys, run, pictures / "a.PNG")[0]
    for damage, message in (
        ({"architecture": "hf-hub:somebody/model"}, "hf-hub:somebody/model is not a name of timm"),
        ({"architecture": "vit_huge_patch99"}, "vit_huge_patch99 cannot be built"),
        ({"pretrained_cfg": None}, "config.json does not describe a model (TypeError"),
        ({"label_names": ["a"]}, "its label_names are not a list of 3 names"),
        ({"model_args": {"checkpoint_path": "/x"}}, "checkpoint_path=/x is not an argument of a model's shape"),
        ({"num_classes": 4}, "model.safetensors does not fit the model that is described"),
    ):
        (out / "config.json").write_text(json.dumps(others | damage))
        assert message in error_of(predict, out, pictures)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nothing.jpg", "nothing.jpg is neither an image nor a folder"),
        ("empty", "empty: no file in this folder ends in .jpg"),
    ],
)
def test_what_is_no_image_is_named(image, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.jpg").write_text("no image")
    assert message in error_of(predict, run, image)


def test_image_that_cannot_be_read_costs_no_other_its_line(run, pictures, capsys, caplog):
    (pictures / "b" / "broken.jpg").write_text("no image")
    whole = printed(capsys, run, pictures / "a.PNG", pictures / "b" / "000.jpg", pictures / "b" / "001.jpg")
    assert error_of(predict, run, pictures) == "1 of 4 images could not be read"
    assert capsys.readouterr().out.splitlines() == whole
    assert any("cannot read" in line and "broken.jpg" in line for line in caplog.messages)


def test_average_is_refused_where_there_is_none(run, pictures, tmp_path):
    export.main([str(run), str(tmp_path / "out")])
    assert "holds a single set of weights" in error_of(predict, tmp_path / "out", pictures, "--model_key", "model_ema")
    assert len(read_log(run)) == 1


def test_images_are_turned_if_the_runs_were(train, tmp_path, capsys):
    train("--epochs 1 --exif true --aa none --reprob 0 --mixup 0 --cutmix 0")
    out = export.main([str(tmp_path / "run"), str(tmp_path / "out")])
    halves = Image.fromarray(np.repeat([[0] * 32, [255] * 32], 16, axis=0).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3  # upside down
    halves.rotate(180).save(tmp_path / "stored.png", exif=exif)
    halves.save(tmp_path / "plain.png")
    for model in (tmp_path / "run", out):
        turned, plain = printed(capsys, model, tmp_path / "stored.png", tmp_path / "plain.png", "--json")
        assert json.loads(turned)["classes"] == json.loads(plain)["classes"]
    config = json.loads((out / "config.json").read_text())
    config["weight_selection"]["exif"] = False
    (out / "config.json").write_text(json.dumps(config))
    assert (
        json.loads(printed(capsys, out, tmp_path / "stored.png", "--json")[0])["classes"]
        != json.loads(plain)["classes"]
    )
