"""Folders of models that say themselves which model they hold, as teachers: export.py's, and timm's on the Hub."""

import json
import shutil

import pytest
import safetensors.torch
from conftest import SHAPE, STUDENT, error_of, train_teacher
from small_models import assert_same

import export
import models
import weight_selection
from training.trained import find_trained
from utils import UserError


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    """The folder of a run of one epoch, with other means and EXIF than the defaults."""
    return train_teacher(tmp_path_factory.mktemp("teacher") / "run", image_folder, 1)


@pytest.fixture(scope="module")
def exported(run):
    """The same run, written by export.py."""
    return export.main([str(run), str(run.parent / "exported"), "--check_accuracy", "false"])


def hub_folder(folder, config, tensors):
    """Write a folder as timm does."""
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("file", ["", "/model.safetensors"])
@pytest.mark.parametrize("more", ["", "--pretrained_kwargs depth=3 num_classes=3"])
def test_exported_folder_is_a_teacher_that_says_its_model(file, more, run, exported, select, capsys):
    tensors, about = select(f"--pretrained_path {exported}{file} {more}")
    assert_same(tensors, select(f"--pretrained_path {run}")[0])
    assert about["teacher"] == {
        "model": "vit_tiny_patch16_224",
        "kwargs": SHAPE | {"img_size": 32},
        "file": str(exported / "model.safetensors"),
    }
    assert "--input_size 32" in (said := capsys.readouterr().out)
    assert "--imagenet_default_mean_and_std false --exif true" in said


def test_what_a_run_knows_its_export_knows(run, exported):
    by_run, by_folder = (find_trained(None, {}, str(place), "model", "--x") for place in (run, exported))
    for name in ("classes", "input_size", "mean_and_std", "imagenet", "exif", "kwargs", "channels"):
        assert getattr(by_run, name) == getattr(by_folder, name), name


REFUSED = {
    "--pretrained_model vit_small": "--pretrained_model vit_small, but --pretrained_path {} has a config.json of vit_tiny_patch16_224",
    "--pretrained_kwargs depth=4": "--pretrained_kwargs depth=4, but --pretrained_path {} has a config.json of a model with depth=3",
    "--pretrained_kwargs num_classes=9": "--pretrained_kwargs num_classes=9, but --pretrained_path {} has a config.json of a model with num_classes=3",
    "--model_key model_ema": "{} has no weights under model_ema",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_contradicts_an_exported_folder_is_one_line(words, exported, tmp_path):
    argv = f"--output_dir {tmp_path}/out.pth {STUDENT} --pretrained_path {exported} {words}"
    assert REFUSED[words].format(exported / "model.safetensors") in error_of(weight_selection, *argv.split())


def test_config_of_other_weights_or_no_model_is_refused(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())

    def refused(entries):
        (folder / "config.json").write_text(json.dumps(config | entries))
        with pytest.raises(UserError) as error:
            find_trained(None, {}, str(folder), "model", "--teacher")
        return str(error.value)

    mark = {"weight_selection": config["weight_selection"] | {"sha256": "0"}}
    assert "model.safetensors is not the file that its config.json describes (sha256 differs)" in refused(mark)
    start = f"--teacher_path {folder}/config.json does not describe a model"
    assert refused({"architecture": "vit_tinny"}).startswith(f"{start}: vit_tinny is not a model (timm")
    for entries in ({"pretrained_cfg": {"input_size": [3, 32]}}, {"num_classes": None}, {"model_args": 3}):
        assert refused(entries).startswith(start)


def test_folder_of_timm_says_its_own_model_not_ours_of_that_name(tmp_path):
    arguments = {"dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    weights = models.create("convnext_femto", arguments, short=False).state_dict()  # with convolutions in its MLPs
    seen = {"input_size": [3, 64, 64], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "fixed_input_size": False}
    config = {"architecture": "convnext_femto", "num_classes": 1000, "pretrained_cfg": seen, "model_args": arguments}
    folder = hub_folder(tmp_path / "hub", config, weights)
    argv = f"--output_dir {tmp_path}/out.pth --pretrained_path {folder} --student_model convnext_femto --student_kwargs"
    path = weight_selection.main([*argv.split(), "dims=(4,4,4,4)", "depths=(1,1,1,1)", "conv_mlp=True"])
    teacher = json.loads(path.with_suffix(".json").read_text())["teacher"]
    assert (teacher["model"], teacher["kwargs"]) == ("convnext_femto.d1_in1k", arguments)
    named = find_trained(None, {}, str(folder), "model", "--teacher")
    assert named.mean_and_std == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) and named.imagenet is None
    assert find_trained("resnet18", {}, f"{folder}/model.safetensors", "model", "--teacher").name == "resnet18"
    more = find_trained("convnext_femto.d1_in1k", {"ls_init_value": None}, str(folder), "model", "--teacher")
    assert more.kwargs == arguments | {"ls_init_value": None}


def test_exported_folder_teaches_a_run(exported, train, caplog):
    caplog.set_level("INFO")
    record = train("--epochs 1 --distillation logits --teacher_path", exported)
    assert record["train_distillation_loss"] > 0
    said = "for images of mean (0.5, 0.5, 0.5) and standard deviation (0.5, 0.5, 0.5)"
    assert f"teacher: vit_tiny_patch16_224 from {exported}/model.safetensors, {said}" in caplog.text
