"""An exported folder computes in timm, transformers and onnxruntime what main.py's evaluation computed."""

import json
import logging
import shutil
import sys

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers
from conftest import error_of, smooth, write_images
from PIL import Image

import export
import main as script
import models
import predict
from deploy.exported import from_run
from deploy.ways import write_onnx
from images.settings import View
from images.transforms import eval_config, eval_transform
from options.training import training_options
from training.checkpoint import options_of, read_checkpoint
from training.precision import Precision

NAMES = ["dark", "grey", "light"]
# a run with arguments for the model, the moving average and a mean of 0.5; and one with a crop
VIT = "--model_ema true --model_ema_eval true --model_ema_decay 0.5 --imagenet_default_mean_and_std false"
CONVNEXT = "--input_size 40 --crop_pct 0.8 --channels_last --drop_path 0.1 --layer_scale_init_value 0.5"
CONVNEXT += " --model convnext_femto --head_init_scale 0.5"


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    """A folder with the runs "vit" and "convnext", of one epoch each."""
    root = tmp_path_factory.mktemp("runs")
    recipe = "--input_size 32 --epochs 1 --warmup_epochs 0 --batch_size 8 --lr 1e-3 --num_workers 0 --device cpu"
    recipe = [*recipe.split(), "--data_set", "image_folder", "--data_path", str(image_folder)]
    sizes = {"vit": "embed_dim=32 depth=2 num_heads=2 patch_size=8", "convnext": "depths=[1,1,1,1] dims=[8,8,8,12]"}
    for name, more in (("vit", f"--model vit_tiny {VIT}"), ("convnext", CONVNEXT)):
        words = f"{more} --model_kwargs {sizes[name]}".split()
        script.main([*recipe, *words, "--output_dir", str(root / name)])
    return root


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """A folder with the exported folders "vit" (the average of its weights) and "convnext"."""
    root = tmp_path_factory.mktemp("exported")
    export.main([str(runs / "vit"), str(root / "vit"), "--onnx", "--model_key", "model_ema"])
    export.main([str(runs / "convnext"), str(root / "convnext"), "--onnx", "true"])
    return root


def expected(checkpoint, key, pictures):
    """What main.py's own model gives for these images."""
    state = read_checkpoint(checkpoint)
    options = options_of(checkpoint, state)
    model = script.make_model(options, 3, Precision(torch.device("cpu"), None)).eval()
    model.load_state_dict(state[key])
    pixels = torch.stack([eval_transform(View.from_options(options))(picture) for picture in pictures])
    return model(pixels)


@pytest.mark.parametrize(("name", "file"), [("vit", "checkpoint-best-ema.pth"), ("convnext", "checkpoint-best.pth")])
@torch.no_grad()
def test_all_three_ways_give_the_runs_logits(name, file, runs, exported):
    pictures = [Image.fromarray(smooth(*size, seed)) for seed, size in enumerate([(50, 70), (90, 61), (32, 32)])]
    wanted = expected(runs / name / file, "model_ema" if name == "vit" else "model", pictures)
    folder = exported / name

    def assert_as_expected(logits):
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5)  # sums in another order; the logits are below 3

    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(by_timm))
    pixels = torch.stack([transform(picture) for picture in pictures])
    assert_as_expected(by_timm(pixels))
    by_transformers = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert_as_expected(by_transformers(**processor(pictures, return_tensors="pt")).logits)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for batch in (pixels, pixels[:1].repeat(7, 1, 1, 1)):  # any number of images
        (logits,) = session.run(["logits"], {"pixel_values": batch.numpy()})
        assert logits.shape == (len(batch), 3)
    assert_as_expected(session.run(["logits"], {"pixel_values": pixels.numpy()})[0])
    assert by_transformers.config.id2label == dict(enumerate(NAMES))
    assert by_timm.pretrained_cfg["label_names"] == NAMES
    config = json.loads((folder / "config.json").read_text())
    assert "drop_path_rate" not in config["model_args"] and "head_init_scale" not in config["model_args"]
    # what somebody who goes on training expects of timm: a head for other classes
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).num_classes == 7


@pytest.mark.parametrize("size", [8, 32, 33, 64, 224, 383, 384])
@pytest.mark.parametrize("more", ["", "--crop_pct 0.93 --imagenet_default_mean_and_std false"])
def test_image_processor_makes_the_evaluations_pixels(size, more, tmp_path):
    view = View.from_options(training_options(["--input_size", str(size), *more.split()]))
    config = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": eval_config(view)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    for seed, shape in enumerate([(50, 70), (91, 33), (size, size), (2 * size, size + 1)]):
        picture = Image.fromarray(smooth(*shape, seed))
        pixels = processor(picture, return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels[0], eval_transform(view)(picture)), shape


def test_log_has_both_accuracies_and_what_is_left_out(runs, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, "transformers", None)
    logged = json.loads((runs / "convnext" / "log.txt").read_text())["test_acc1"]
    export.main([str(runs / "convnext"), str(tmp_path / "out")])
    assert "timm: logits of 11 images within" in caplog.text
    assert f"accuracy {logged:.2f} % (the log: {logged:.2f} %)" in caplog.text
    assert "not checked: transformers (not installed)" in caplog.text and "transformers:" not in caplog.text
    caplog.clear()
    export.main([str(runs / "convnext"), str(tmp_path / "out"), "--check_accuracy", "false"])
    assert "logits of 11 images" in caplog.text and "accuracy" not in caplog.text
    state = read_checkpoint(runs / "convnext" / "checkpoint-best.pth")
    for metrics, said in (({"test_acc1": 98.0}, "the accuracy is not the log's"), ({}, "(the log has none)")):
        torch.save(state | {"metrics": metrics}, tmp_path / "other.pth")
        export.main([str(tmp_path / "other.pth"), str(tmp_path / "out")])
        assert said in caplog.text


def test_missing_packages_for_onnx_are_named(runs, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(export, "write_onnx", lambda model, shape, path: path.touch())  # the real one takes seconds
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    export.main([str(runs / "vit" / "checkpoint-0.pth"), str(tmp_path / "out"), "--onnx"])
    assert "not checked: model.onnx (onnxruntime is not installed)" in caplog.text
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    wanted = "--onnx needs the packages onnx and onnxscript: pip install onnxscript"
    assert error_of(export, runs / "vit", tmp_path / "none", "--onnx") == wanted
    assert not (tmp_path / "none").exists()


def test_what_the_optimizer_of_onnx_leaves_alone_is_not_news(tmp_path, caplog):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    write_onnx(models.create("vit_small_patch16_dinov3_qkvb", sizes).eval(), [3, 16, 16], tmp_path / "model.onnx")
    logging.getLogger("onnxscript.optimizer._constant_folding").warning("another")
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == ["another"]  # nothing of Split, which its rotary embedding has in each block


def test_without_data_random_images_are_checked_and_said(runs, image_folder, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(export, "load_images", gone(image_folder))
    export.main([str(runs / "vit"), str(tmp_path / "out")])
    assert "the run's data cannot be used, so random images alone are checked" in caplog.text
    assert "timm: logits of 64 random images within" in caplog.text and "accuracy" not in caplog.text
    write_images(tmp_path / "moved", "val", {"dark": 3, "grey": 3, "light": 70}, size=50)
    for place in ("moved", "moved/val"):
        caplog.clear()
        export.main([str(runs / "vit"), str(tmp_path / "out"), "--data_path", str(tmp_path / place)])
        assert "logits of 64 images within" in caplog.text and "accuracy on 76 images" in caplog.text


def gone(folder):
    """`load_images`, but as if `folder` were no longer there."""
    real = export.load_images
    return lambda name, root, *rest, **more: real(name, "/gone" if root == str(folder) else root, *rest, **more)


def test_data_of_other_classes_is_refused(runs, tmp_path):
    write_images(tmp_path, "val", {"dark": 1, "gray": 1, "light": 1})
    message = error_of(export, runs / "vit", tmp_path / "out", "--data_path", tmp_path)
    assert "its class 1 is grey, but the data's is gray" in message
    assert "nowhere" in error_of(export, runs / "vit", tmp_path / "out", "--data_path", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_if_a_way_computes_something_else(runs, tmp_path, monkeypatch):
    right = eval_config
    monkeypatch.setattr("deploy.exported.eval_config", lambda view: right(view) | {"mean": [0.45, 0.45, 0.45]})
    message = error_of(export, runs / "vit", tmp_path / "out")
    assert message.startswith("timm would not compute what main.py does: logits of 11 images differ by up to")
    assert not (tmp_path / "out").exists()


def test_only_folders_of_its_own_are_replaced(runs, exported, tmp_path):
    out = shutil.copytree(exported / "vit", tmp_path / "out")
    (out / "README.md").write_text("mine")
    assert "model.onnx would be left from the export before" in error_of(export, runs / "vit", out)
    (out / "model.onnx").unlink()
    export.main([str(runs / "convnext"), str(out)])
    assert (out / "model.safetensors").read_bytes() == (exported / "convnext" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((out / "config.json").read_text())
    del config["weight_selection"]  # as somebody else's folder
    (out / "config.json").write_text(json.dumps(config))
    assert "config.json was not written by export.py" in error_of(export, runs / "vit", out)
    assert "config.json was not written by export.py" in error_of(export, runs / "vit", runs / "convnext")
    assert error_of(export, runs / "vit", runs / "vit" / "log.txt") == f"{runs / 'vit' / 'log.txt'} is not a folder"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "nowhere does not exist"),
        ("", "has no checkpoint of main.py: wanted checkpoint-best.pth or checkpoint-<epoch>.pth"),
        ("convnext/config.json", "config.json is refused"),
        ("convnext --model_key model_ema", "has no moving average of the weights: its run had no --model_ema true"),
    ],
)
def test_what_is_no_run_is_refused(place, message, runs, tmp_path):
    place, *more = place.split() or [""]
    assert message in error_of(export, runs / place, tmp_path / "out", *more)


def test_timms_own_name_is_not_taken_for_our_short_one(runs, tmp_path):
    path = runs / "convnext" / "checkpoint-best.pth"
    state = read_checkpoint(path)
    sizes = state["options"]["model_kwargs"]
    name = "convnext_femto.d1_in1k"  # as convnext_femto of timm, with another MLP than ours of that name
    state["options"] |= {"model": name, "layer_scale_init_value": 1e-6, "head_init_scale": 1.0}
    state |= {"data": {"classes": 3}, "model": models.create(name, sizes | {"num_classes": 3}).state_dict()}
    described = from_run(path, state, "model")
    assert described.config["architecture"] == "convnext_femto" and described.config["model_args"] == sizes
    assert described.labels == ["0", "1", "2"]  # the data had no names for them
    assert described.build().state_dict().keys() == state["model"].keys()


def test_model_of_the_hub_is_described_by_its_architecture(runs, tmp_path, monkeypatch):
    path = runs / "vit" / "checkpoint-best.pth"
    state = read_checkpoint(path)
    saved = state["options"]["model_kwargs"] | {"class_token": False, "global_pool": "avg", "drop_path_rate": 0.1}
    config = {"input_size": [3, 32, 32], "fixed_input_size": True, "num_classes": 5}
    for module in (timm.models, timm.models._factory):  # as if the hub had it
        monkeypatch.setattr(
            module, "load_model_config_from_hf", lambda *_, **__: (config, "vit_tiny_patch16_224", saved)
        )
    state["options"] |= {"model": "hf-hub:somebody/vit", "model_kwargs": {"depth": 1}}
    torch.manual_seed(0)
    own = models.create("hf-hub:somebody/vit", {"depth": 1, "num_classes": 3, "img_size": 32}).eval()
    described = from_run(path, state | {"model": own.state_dict()}, "model")
    assert described.config["architecture"] == "vit_tiny_patch16_224"
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(described.build()(pixels), own(pixels))


def test_model_of_grey_images_is_given_grey_ones(train, tmp_path, image_folder, capsys):
    train("--epochs 1 --input_size 40 --model_kwargs in_chans=1")
    out = export.main([str(tmp_path / "run"), str(tmp_path / "out")])
    path = tmp_path / "run" / "checkpoint-best.pth"
    view = View.from_options(options_of(path, read_checkpoint(path)))
    picture = Image.fromarray(smooth(50, 70)).convert("L")
    pixels = transformers.AutoImageProcessor.from_pretrained(out)(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0], eval_transform(view)(picture.convert("RGB"))) and pixels.shape == (1, 1, 40, 40)
    capsys.readouterr()
    for model in (out, path):
        predict.main([str(model), str(image_folder / "val" / "grey" / "000.jpg"), "--device", "cpu"])
    by_folder, by_run = capsys.readouterr().out.splitlines()
    assert by_folder == by_run and "grey" in by_run
