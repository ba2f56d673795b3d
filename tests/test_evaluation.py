"""`--eval true` measures a run as the run did, with no more than the checkpoint's name; a run says which was its best."""

import logging
import re

import pytest
import torch
from conftest import read_log, write_images

import main as script
from options.training import training_options
from training.checkpoint import options_of, read_checkpoint
from utils import UserError

AVERAGE = "--model_ema true --model_ema_eval true --model_ema_decay 0.5"


def measured(*words):
    return script.main(["--eval", "true", *map(str, words)])


def test_checkpoint_alone_gives_the_logged_figures(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(AVERAGE, "--imagenet_default_mean_and_std false --drop_path 0.1 --use_amp true")
    folder, lines = tmp_path / "run", read_log(tmp_path / "run")
    caplog.clear()
    best = max(lines, key=lambda line: line["test_acc1"])  # the first of equals
    for words, line in (
        (["--output_dir", folder], lines[1]),
        (["--resume", folder / "checkpoint-0.pth"], lines[0]),
        (["--resume", folder], best),
    ):
        figures = measured(*words)
        assert figures.keys() == {key for key in line if key.startswith("test_")}
        assert figures == {key: line[key] for key in figures}
    best = f"for the best: --resume {folder}/checkpoint-best.pth"
    assert f"evaluating {folder}/checkpoint-1.pth, of epoch 1; {best}, for the best average" in caplog.text
    assert "evaluated otherwise" not in caplog.text


def test_given_options_that_differ_are_named(train, tmp_path, image_folder, caplog):
    caplog.set_level(logging.INFO)
    train("--epochs 1 --eval_data_path", image_folder / "val")
    best = tmp_path / "run" / "checkpoint-best.pth"
    write_images(tmp_path / "moved", "val", {"dark": 2, "grey": 2, "light": 1})
    measured("--resume", best, "--batch_size", "8", "--crop_pct", "0.9", "--data_path", tmp_path / "moved")
    said = re.search("evaluated otherwise than its run: (.*)", caplog.text)[1]
    assert "--crop_pct was None, is 0.9" in said and f"--data_path was {image_folder}, is {tmp_path / 'moved'}" in said
    assert "--batch_size" not in said and "--device" not in said and "--resume" not in said
    assert "5 images: test loss" in caplog.text  # not those of the run's --eval_data_path
    assert f"evaluating {best}, of epoch 0, the best of its run" in caplog.text


def test_options_contradict_only_together_with_the_runs(train, tmp_path, capsys):
    train("--epochs 1 --model_ema true")
    best = tmp_path / "run" / "checkpoint-best.pth"
    assert "test_acc1_ema" in measured("--resume", best, "--model_ema_eval", "true")
    with pytest.raises(SystemExit):
        measured("--resume", best, "--val_split", "test")
    assert "are for torch/NAME and hfds/NAME, not for image_folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # known before a checkpoint is looked for
        training_options(["--eval", "true", "--resume", "https://example.org/x.pth"])


def test_file_apart_from_its_run_is_evaluated_as_given(train, tmp_path, tiny_run, caplog):
    train("--epochs 1 --save_ckpt_steps 2")
    (tmp_path / "alone").mkdir()
    for name in ("checkpoint-0-4.pth", "checkpoint-0.pth"):
        (tmp_path / "run" / name).rename(tmp_path / "alone" / name)
    caplog.set_level(logging.INFO)
    measured("--resume", tmp_path / "alone" / "checkpoint-0-4.pth")
    assert "of epoch 0, which it is in the middle of; there is no checkpoint-best.pth beside it" in caplog.text
    script.main(tiny_run("--eval true --initialize", tmp_path / "alone" / "checkpoint-0.pth", output_dir=""))
    assert "random weights" not in caplog.text


def test_folder_without_a_checkpoint_is_an_error(tiny_run, tmp_path):
    with pytest.raises(UserError, match=f"--output_dir {tmp_path}/mistyped has no checkpoint to evaluate"):
        script.main(tiny_run("--eval true", output_dir=tmp_path / "mistyped"))
    assert not (tmp_path / "mistyped").exists()


def test_damaged_options_of_a_checkpoint_are_named(train, tmp_path):
    train("--epochs 1")
    path = tmp_path / "run" / "checkpoint-0.pth"
    state = read_checkpoint(path)
    assert options_of(path, state | {"options": {"lr": 1}}).epochs == 300  # the default of what a file does not know
    torch.save(state | {"options": state["options"] | {"model_kwargs": "depth=2"}}, path)
    with pytest.raises(UserError, match="options in this checkpoint are damaged: model_kwargs is 'depth=2'"):
        measured("--resume", path)


def test_run_ends_with_its_best_epoch_and_its_file(train, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    real, values = script.evaluate, [70.0, 81.36, 65.0, 64.0, 10.0, 81.0, 20.0, 60.0]
    monkeypatch.setattr(script, "evaluate", lambda *a, **k: {**real(*a, **k), "acc1": values.pop(0)})
    train(AVERAGE, "--epochs 2")  # the average's come second
    folder = tmp_path / "run"
    assert caplog.messages[-2:] == [
        f"best EMA 81.4 % at epoch 0, {folder}/checkpoint-best-ema.pth",
        f"best 70.0 % at epoch 0, {folder}/checkpoint-best.pth",
    ]
    train(AVERAGE, "--epochs 2")
    assert caplog.messages[-1] == f"best 70.0 % at epoch 0, {folder}/checkpoint-best.pth"  # nothing was left to do
    train("--epochs 2 --save_ckpt false", to="other")
    assert caplog.messages[-1] == "best 81.0 % at epoch 1, no checkpoint kept"


def test_best_epoch_comes_along_when_a_run_is_resumed(train, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    real, values = script.evaluate, [70.0, 60.0, 65.0]
    monkeypatch.setattr(script, "evaluate", lambda *a, **k: {**real(*a, **k), "acc1": values.pop(0)})
    train("--epochs 3", to="whole")
    (tmp_path / "whole" / "checkpoint-2.pth").unlink()
    values.append(66.0)
    train("--epochs 3", to="whole")
    assert caplog.messages[-1] == f"best 70.0 % at epoch 0, {tmp_path}/whole/checkpoint-best.pth"
