"""Runs of main.py as teachers of a selection, and the command that trains from what was selected."""

import json
import shlex
import shutil

import pytest
import safetensors.torch
import torch
from conftest import SHAPE, STUDENT, error_of, train_teacher, weights_of
from small_models import assert_same

import main as script
import models
import weight_selection
from options.parser import keyword, keyword_text
from utils import UserError

KNOWN = f"--pretrained_model vit_tiny --pretrained_kwargs img_size=32 {' '.join(f'{k}={v}' for k, v in SHAPE.items())}"


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    """The folder of a run of two epochs with an average of its weights, whose best checkpoint is not its newest."""
    average = "--model_ema true --model_ema_decay 0.5"
    folder = train_teacher(tmp_path_factory.mktemp("teacher") / "run", image_folder, 2, average)
    shutil.copy(folder / "checkpoint-0.pth", folder / "checkpoint-best.pth")
    return folder


def state_of(run, name="checkpoint-0.pth"):
    return torch.load(run / name, weights_only=True)


@pytest.mark.parametrize(
    ("words", "name", "key"),
    [
        ("{run}", "checkpoint-best.pth", "model"),
        ("{run}/checkpoint-1.pth", "checkpoint-1.pth", "model"),
        ("{run} --model_key model_ema", "checkpoint-best.pth", "model_ema"),
        ("{run} --pretrained_model vit_tiny_patch16_224 --pretrained_kwargs depth=3 num_classes=3", "checkpoint-best.pth", "model"),
    ],
)  # fmt: skip
def test_run_is_a_teacher_that_says_which_model_it_is(words, name, key, run, select, tmp_path):
    tensors, about = select(f"--pretrained_path {words.format(run=run)}")
    assert about["teacher"] == {
        "model": "vit_tiny_patch16_224",
        "kwargs": SHAPE | {"img_size": 32},
        "file": str(run / name),
    }
    torch.save(state_of(run, name)[key], tmp_path / "plain.pth")
    assert_same(tensors, select(f"--pretrained_path {tmp_path}/plain.pth {KNOWN}")[0])


def test_average_that_was_evaluated_has_a_best_of_its_own(run, select, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.copy(folder / "checkpoint-1.pth", folder / "checkpoint-best-ema.pth")
    for key, name in (("model", "checkpoint-best.pth"), ("model_ema", "checkpoint-best-ema.pth")):
        assert select(f"--pretrained_path {folder} --model_key {key}")[1]["teacher"]["file"] == str(folder / name)


def test_newest_checkpoint_stands_in_for_a_missing_best(run, select, tmp_path, caplog):
    folder = shutil.copytree(run, tmp_path / "run", ignore=lambda *_: ["checkpoint-best.pth"])
    assert select(f"--pretrained_path {folder}")[1]["teacher"]["file"] == str(folder / "checkpoint-1.pth")
    assert f"{folder} has no checkpoint-best.pth: the newest checkpoint, checkpoint-1.pth, is taken" in caplog.text


REFUSED = {
    "{run} --pretrained_model vit_small": "--pretrained_model vit_small, but --pretrained_path {run}/checkpoint-best.pth is a checkpoint of vit_tiny",
    "{run} --pretrained_kwargs depth=4": "--pretrained_kwargs depth=4, but --pretrained_path .* is a checkpoint of a model with depth=3",
    "{run} --pretrained_kwargs qk_norm=True": "--pretrained_kwargs qk_norm=True, but --pretrained_path .*best.pth has no qk_norm",
    "{run} --model_key ema": "best.pth has no weights under ema",
    "{run}/..": "--pretrained_path {run}/.. has no checkpoint of main.py: wanted checkpoint-best.pth or checkpoint-<epoch>.pth",
    "{damaged}": "{damaged}: the options or classes in this checkpoint are damaged",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_contradicts_a_run_is_one_line(words, run, tmp_path):
    places = {"run": run, "damaged": tmp_path / "damaged.pth"}
    if "damaged" in words:
        state = state_of(run)
        torch.save(state | {"options": state["options"] | {"input_size": "32"}}, places["damaged"])
    argv = [
        "--output_dir",
        str(tmp_path / "out.pth"),
        "--pretrained_path",
        *f"{words.format(**places)} {STUDENT}".split(),
    ]
    with pytest.raises(UserError, match=REFUSED[words].format(**places)):
        weight_selection.main(argv)
    assert not (tmp_path / "out.pth").exists()


def test_teacher_that_nobody_named_is_said(run, tmp_path, caplog):
    torch.save(state_of(run)["model"], tmp_path / "plain.pth")
    message = error_of(weight_selection, "--plan", "--pretrained_path", f"{tmp_path}/plain.pth", "--model_type", "mixer",
                       "--student_kwargs", "img_size=64")  # fmt: skip
    assert "mlp_tokens" in message
    text = "no --pretrained_model is given: the teacher in {}/plain.pth is taken for mixer_b16_224, the default of the family mixer"
    assert text.format(tmp_path) in caplog.text


def test_run_of_other_means_is_warned_of_if_it_sees_images(run, image_folder, select, caplog):
    words = f"--pretrained_path {run} --data_path {image_folder} --calibration_images 16 --element_selection energy"
    for more, said in (("", True), (" --imagenet_default_mean_and_std false", False)):
        select(words + more)
        assert (
            "was trained with --imagenet_default_mean_and_std False, and sees images with True" in caplog.text
        ) == said
        caplog.clear()


def test_folder_of_a_library_is_a_teacher_that_has_to_be_named(run, select, tmp_path):
    safetensors.torch.save_file(state_of(run)["model"], tmp_path / "model.safetensors")
    tensors, about = select(f"--pretrained_path {tmp_path} {KNOWN}")
    assert about["teacher"]["file"] == f"{tmp_path}/model.safetensors"
    assert_same(tensors, select(f"--pretrained_path {run}/checkpoint-0.pth")[0])


# ---- the command that trains ----


def command(capsys):
    """The words of the command that the script printed last."""
    *_, before, line = capsys.readouterr().out.splitlines()
    assert before.endswith("; to train from it, add --data_path to:")
    return shlex.split(line)


def test_printed_command_trains_from_every_tensor(run, image_folder, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kwargs = "embed_dim=16 depth=2 num_heads=2 patch_size=(8,8) img_size=32 num_classes=7 act_layer=gelu in_chans=1"
    output = "it's here/$HOME.pth"
    argv = ["--student_model", "vit_tiny", "--student_kwargs", *kwargs.split(), "--pretrained_path", str(run)]
    weight_selection.main(["--output_dir", output, *argv])
    python, main_py, *words = command(capsys)
    assert python == "python3" and main_py == script.__file__
    quick = (
        "--epochs 1 --warmup_epochs 0 --lr 0 --min_lr 0 --batch_size 8 --num_workers 0 --device cpu --output_dir run"
    )
    caplog.clear()
    script.main([*words, "--data_path", str(image_folder), *quick.split()])
    trained = weights_of(tmp_path / "run", "checkpoint-0.pth")
    assert all(torch.equal(trained[key], tensor) for key, tensor in torch.load(output, weights_only=True).items())
    assert (
        f"30 of 30 tensors of vit_tiny taken from {output} (timm layout)" in caplog.text
        and "resampled" not in caplog.text
    )
    options = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    seen = options["input_size"], options["imagenet_default_mean_and_std"], options["exif"]
    assert seen == (32, False, True)  # the run's


def test_printed_command_is_short_from_the_projects_folder(tmp_path, capsys, monkeypatch):
    kwargs = {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 8)}
    torch.save(models.create("convnext_femto", kwargs | {"dims": (8, 8, 8, 8)}).state_dict(), tmp_path / "teacher.pth")
    monkeypatch.chdir(script.__file__.removesuffix("main.py"))
    argv = f"--output_dir {tmp_path}/out.pth --pretrained_path {tmp_path}/teacher.pth --model_type convnext".split()
    argv += ["--pretrained_model", "convnext_femto", "--pretrained_kwargs", "depths=(1,1,1,1)", "dims=(8,8,8,8)"]
    weight_selection.main([*argv, "--student_kwargs", "depths=(1,1,1,1)", "dims=(4,8,8,8)"])
    expected = f"python3 main.py --model convnext_femto --input_size 224 --initialize {tmp_path}/out.pth --model_kwargs"
    assert command(capsys) == [*expected.split(), "depths=(1, 1, 1, 1)", "dims=(4, 8, 8, 8)"]


@pytest.mark.parametrize("student", ["in_chans=4", "img_size=(32,64)"])
def test_student_that_main_cannot_train_has_no_command(student, run, select, capsys):
    select(f"--pretrained_path {run} --student_kwargs {student}")
    assert "; main.py trains on square images of 3 channels or 1, but this student takes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "value", ["gelu", "6", 6, 0.5, True, None, (1, 2), "None", "false", "a b", "(1,", "it's", ["x"]]
)
def test_arguments_are_written_as_they_are_read(value):
    assert keyword(keyword_text("name", value)) == ("name", value)


# ---- nothing to select ----


def test_selection_in_which_nothing_is_smaller_says_so(run, select, caplog):
    said = "nothing is smaller in the student, vit_tiny_patch16_224, than in the teacher, vit_tiny_patch16_224"
    select(f"--pretrained_path {run}")
    assert said not in caplog.text
    select(f"--pretrained_path {run} --student_kwargs embed_dim=48 depth=3 num_heads=3")
    assert said in caplog.text
