import json
import logging
import sys

import numpy as np
import pytest
import torch
import wandb
from conftest import assert_equal_weights, read_log, weights_of, write_images

import main as script
import models
import weight_selection
from options.training import training_options
from utils import UserError
from weightfiles.initialization import write_initialization

LOG_KEYS = set(  # the original's, for a run with mixup and without EMA
    "train_loss train_lr train_min_lr train_weight_decay test_loss test_acc1 test_acc5 epoch n_parameters".split()
)
STANDING_STILL = "--epochs 1 --warmup_epochs 0 --lr 0 --min_lr 0"


def test_run_leaves_config_log_and_checkpoints(train, tmp_path):
    record, folder = train(), tmp_path / "run"
    names = ".lock config.json log.txt checkpoint-0.pth checkpoint-1.pth checkpoint-best.pth".split()
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    lines = read_log(folder)
    assert [line["epoch"] for line in lines] == [0, 1] and lines[-1] == record
    assert lines[0].keys() >= LOG_KEYS and all(np.isfinite(value) for line in lines for value in line.values())
    assert [line["step"] for line in lines] == [5, 10]  # 40 images in batches of 8
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["model_kwargs"] == {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
    assert config["environment"]["torch"].startswith(torch.__version__.split("+")[0])
    assert config["initialization"] is None
    state = torch.load(folder / "checkpoint-1.pth", weights_only=True)
    assert state["best"] == {"test_acc1": max(line["test_acc1"] for line in lines)} and state["metrics"] == record


def test_run_without_output_dir_writes_nothing_and_says_so(tiny_run, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint-0.pth").write_text("not ours: an empty --output_dir must not resume from here")
    assert script.main(tiny_run("--epochs 1 --nb_classes 3", output_dir=""))["epoch"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0.pth"]
    assert caplog.messages[0] == "no --output_dir: nothing is kept, neither checkpoints nor log.txt"


def test_same_seed_same_weights_and_another_seed_others(train, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train("--epochs 1 --seed", seed, to=name)
    a, b, c = (weights_of(tmp_path / name, "checkpoint-0.pth") for name in "abc")
    assert_equal_weights(a, b)
    assert not torch.equal(a["norm.weight"], c["norm.weight"])


def test_loss_falls_on_images_that_can_be_told_apart(train, tmp_path):
    train("--epochs 10 --aa none --reprob 0 --mixup 0 --cutmix 0 --smoothing 0 --color_jitter 0 --lr 3e-3")
    first, *_, last = read_log(tmp_path / "run")
    assert last["train_loss"] < 0.6 * first["train_loss"] and last["train_class_acc"] > first["train_class_acc"]
    assert last["test_acc1"] >= 90


def test_eval_gives_the_logged_accuracy(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    average = "--model_ema true --model_ema_eval true"
    train(average)
    logged = read_log(tmp_path / "run")
    for more, line in (([], logged[1]), (["--resume", tmp_path / "run" / "checkpoint-0.pth"], logged[0])):
        measured = train(average, "--eval true", *more)
        assert measured == {key: line[key] for key in measured}
    assert "11 images: test loss" in caplog.text
    assert read_log(tmp_path / "run") == logged


def test_eval_of_random_weights_says_so(tiny_run, caplog):
    script.main(tiny_run("--eval true --resplit true --dist_on_itp true --local_rank=0 --local-rank=0", output_dir=""))
    assert "random weights" in caplog.text
    assert "--resplit is accepted and has no effect" in caplog.text and "--dist_on_itp is accepted" in caplog.text


def test_disable_eval_trains_without_evaluation_data(train, tmp_path):
    write_images(tmp_path / "only", "train", {"a": 8, "b": 8})
    train("--disable_eval true --data_path", tmp_path / "only")
    assert all("test_acc1" not in line for line in read_log(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoint-best.pth").exists()


def test_eval_data_path_and_fraction(train, image_folder):
    record = train("--data_fraction 0.4 --epochs 1 --warmup_epochs 0 --eval_data_path", image_folder / "train")
    assert record["step"] == 2  # 16 of 40 images in batches of 8
    assert record["test_acc1"] * 40 / 100 == pytest.approx(round(record["test_acc1"] * 40 / 100))


@pytest.fixture
def initialization(tmp_path):
    """The folder of an initialization file for the tiny ViT, and its weights."""
    kwargs = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}
    pair = models.ModelSpec("vit_tiny", {**kwargs, "embed_dim": 64}), models.ModelSpec("vit_tiny", kwargs)
    torch.save(models.create(pair[0].name, pair[0].kwargs).state_dict(), tmp_path / "teacher.pth")
    tensors, description = weight_selection.select_weights(*pair, pretrained_path=str(tmp_path / "teacher.pth"))
    (tmp_path / "init").mkdir()
    write_initialization(tmp_path / "init" / "vit.pth", tensors, description)
    return tmp_path / "init", tensors


@pytest.mark.parametrize("name", ["", "vit.pth"])
def test_training_starts_from_the_selected_weights(name, initialization, train, tmp_path):
    folder, tensors = initialization
    train(STANDING_STILL, "--initialize", folder / name)
    trained = weights_of(tmp_path / "run", "checkpoint-0.pth")
    assert all(torch.equal(trained[key], value) for key, value in tensors.items())
    source = json.loads((tmp_path / "run" / "config.json").read_text())["initialization"]
    assert source["teacher"]["model"] == "vit_tiny_patch16_224" and len(source["sha256"]) == 64


def test_head_of_another_class_count_is_dropped_and_said(initialization, train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for classes in (7, 3):
        head = {"head.weight": torch.ones(classes, 32), "head.bias": torch.zeros(classes)}
        torch.save(initialization[1] | head, tmp_path / f"{classes}.pth")
        train(STANDING_STILL, "--initialize", tmp_path / f"{classes}.pth", to=f"run-{classes}")
        said = "head.weight, head.bias is for other classes; the head starts from random values" in caplog.text
        trained = weights_of(tmp_path / f"run-{classes}", "checkpoint-0.pth")["head.weight"]
        assert (said, torch.equal(trained, torch.ones(3, 32))) == (classes == 7, classes == 3)
        caplog.clear()


def test_checkpoint_of_a_run_can_start_another(train, tmp_path):
    train("--epochs 1", to="a")
    train(STANDING_STILL, "--initialize", tmp_path / "a" / "checkpoint-0.pth", to="b")
    assert_equal_weights(*(weights_of(tmp_path / name, "checkpoint-0.pth") for name in "ab"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "cls_token",
            torch.zeros(1, 1, 16),
            r"has cls_token \[1, 1, 16\], unlike the \[1, 1, 32\] of vit_tiny; see --model_kwargs",
        ),
        ("cls_token", None, "has no cls_token, unlike the"),
        ("norm_pre.weight", torch.zeros(1), "has norm_pre.weight, which is no tensor of vit_tiny"),
        ("norm.bias", torch.full((32,), torch.nan), r"norm\.bias holds values that are not finite"),
    ],
)
def test_initialization_that_does_not_fit_names_the_keys(key, value, message, initialization, train, tmp_path):
    tensors = {key: value for key, value in (initialization[1] | {key: value}).items() if value is not None}
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        train("--initialize", tmp_path / "x.pth")
    assert not list((tmp_path / "run").glob("[!.]*"))


def test_initialization_for_another_model_is_named(initialization, train, tmp_path):
    description = {"family": "convnext", "student": {"model": "convnext_femto"}}
    write_initialization(tmp_path / "c.pth", initialization[1], description)
    with pytest.raises(UserError, match=r"c\.pth was made for convnext_femto, but --model is vit_tiny"):
        train("--initialize", tmp_path / "c.pth")


def test_different_classes_are_named(train, tmp_path):
    write_images(tmp_path / "d", "train", {"cat": 8, "dog": 8})
    write_images(tmp_path / "d", "val", {"cat": 2, "bird": 2})
    with pytest.raises(UserError, match="dog.*bird"):
        train("--data_path", tmp_path / "d")


def test_recipe_sets_what_is_not_given():
    short = training_options("--recipe short --mixup 0.2 --epochs 25".split())
    assert (short.epochs, short.warmup_epochs, short.lr, short.mixup, short.cutmix) == (25, 2.5, None, 0.2, 0.0)
    assert (short.aa, short.reprob, short.color_jitter) == ("none", 0.0, 0.0)
    assert training_options("--recipe short --warmup_epochs 3".split()).warmup_epochs == 3
    assert vars(training_options("--recipe paper".split())) == vars(training_options([]))


def test_short_recipe_trains_at_a_rate_that_fits_the_batch(tiny_run, tmp_path):
    words = tiny_run("--recipe short --update_freq 2")
    for option in ("--lr", "--warmup_epochs"):
        place = words.index(option)
        del words[place : place + 2]
    script.main(words)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["lr"] is None and config["options"]["warmup_epochs"] == 0.2
    assert config["in_effect"] == {
        "lr": 1e-3 * 16 / 512,
        "images_per_update": 16,
        "precision": "float32",
        "classes": 3,
        "training_images": 40,
        "evaluation_images": 11,
    }
    first, _ = read_log(tmp_path / "run")  # 2 of 4 updates: a warm-up of 0.4 updates is none
    assert first["train_lr"] == pytest.approx(1e-3 * 16 / 512 * (1 + 0.854) / 2, rel=0.05)


FOR_CONVNEXT = "--head_init_scale and --layer_scale_init_value are for convnext"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--update_freq 6", "48 images per update, but the training set has 40: --update_freq can be 5 at most"),
        ("--batch_size 64", "the training set has 40: --batch_size can be 40 at most"),
        ("--warmup_steps 11", "--warmup_steps 11 is longer than the run, 2 epochs of 5 updates: give at most 10"),
        ("--data_path nowhere", "nowhere"),
        ("--nb_classes 4", "--nb_classes 4, but --data_set image_folder has 3"),
        ("--model vit_tny", r"vit_tny is not a model \(.*\); nearest: vit_tiny"),
        ("--model_kwargs num_heads=5", "vit_tiny cannot be built"),
        ("--opt adamx", "--opt adamx cannot be built: .*; nearest: adam"),
        ("--opt adahessian", "--opt adahessian needs second derivatives"),
        ("--opt_betas 0.9", "--opt adamw takes 2 betas, but --opt_betas gives 1"),
        ("--model_kwargs img_size=16", r"--model vit_tiny does not take images of 32 x 32: .*\(16\)"),
        ("--model_kwargs in_chans=4", "--model_kwargs in_chans=4: images have 3 channels or, in grey, 1$"),
        ("--model_kwargs global_pool=''", r"--model vit_tiny gives \[2, 17, 3\] for 2 images, not \[2, 3\]"),
        ("--model_kwargs num_classes=5", "the number of classes comes from the data"),
        ("--model_kwargs checkpoint_path=/x", "checkpoint_path=/x is not an argument of a model's shape"),
        ("--model_kwargs act_layer=nope", "vit_tiny cannot be built"),
        ("--device meta", "--device meta is not auto, cuda, cuda:N, mps or cpu"),
        ("--aa rnd-m9", "--aa .?rnd-m9"),
        ("--device gpu", "--device gpu is not auto, cuda, cuda:N, mps or cpu"),
        ("--head_init_scale 0.5", FOR_CONVNEXT),
        ("--layer_scale_init_value 1", FOR_CONVNEXT),
        ("--initialize nothing.pth", "nothing.pth does not exist"),
        ("--resume nothing.pth", "nothing.pth does not exist"),
        ("--output_dir file/run", "--output_dir file/run cannot be written to: Not a directory"),
        ("--log_dir file/tb", "--log_dir file/tb cannot be written to"),
    ],
)
def test_what_only_the_data_or_the_model_shows_ends_in_one_line(more, message, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=message) as caught:
        train(more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("package", "more"), [("tensorboardX", "--log_dir tb"), ("wandb", "--enable_wandb true")])
def test_missing_optional_package_is_named(package, more, train, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs the package {package}: pip install {package}"):
        train(more)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "--warmup_epochs 5 --epochs 3",
            "--warmup_epochs 5 is longer than the run, --epochs 3: give one up to 3 (0: none), or --recipe short",
        ),
        ("--batch_size 7", "--batch_size 7 is odd, but mixup and cutmix pair"),
        ("--data_set CIFAR1000", "--data_set CIFAR1000 is none of CIFAR10"),
        ("--use_amp maybe", "'maybe' is neither true nor false"),
        ("--epochs 0", "0 is not at least 1"),
        ("--smoothing 1.5", "1.5 is not from 0 to 1"),
        ("--dist_timeout 1e10", "1e10 is not from 1 to 10000000"),  # more than a wait can be told
        ("--smoothing 1 --mixup 0 --cutmix 0", "--smoothing 1 leaves nothing of the labels"),
        ("--opt_betas 0.9 1", "argument --opt_betas: 1 is not below 1"),
        ("--momentum 1", "argument --momentum: 1 is not below 1"),
        ("--input_size 10000000000", "is not from 1 to 1000000000"),
        ("--model_kwargs depth", "'depth' is not of the form name=value"),
        ("--initialize http://example.org/x.pth", "a URL must be https://…#sha256="),
        ("--batchsize 64", "unrecognized argument --batchsize"),
        ("--eval true --disable_eval true", "leave nothing to do"),
        ("--cutmix_minmax 1 0", "--cutmix_minmax takes two numbers from 0 to 1"),
        ("--seed 18446744073709551616", "is not from 0 to"),
        ("--train_split x", "are for torch/NAME and hfds/NAME, not for IMNET"),
        ("--wandb_ckpt true", "it needs --enable_wandb true"),
        ("--resume https://example.org/x.pth", "--resume https://example.org/x.pth: a URL must be"),
    ],
)
def test_usage_errors_name_the_option_and_exit_with_2(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        training_options(argv.split())
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_defaults_are_the_originals(reference):
    ours = vars(training_options([]))
    changed = {"device": "auto", "nb_classes": None}  # by the design
    for name, value in reference["defaults"].items():
        assert ours[name] == changed.get(name, value), name


def test_tensorboard_and_wandb_get_the_figures(train, tmp_path):
    train("--epochs 1 --enable_wandb true --wandb_ckpt true --log_dir", tmp_path / "tb")
    wandb.teardown()  # waits for its service to write the file out
    events = next((tmp_path / "tb").glob("events*")).read_bytes()
    assert b"test/acc1" in events and b"train/loss" in events
    run_folder = next((tmp_path / "run" / "wandb").glob("offline-run-*"))
    stored = next(run_folder.glob("*.wandb")).read_bytes()
    assert b"test/acc1" in stored and b"train/lr" in stored
    assert (tmp_path / "run" / "wandb_id.txt").read_text().strip() in run_folder.name


def test_progress_bar_shows_loss_speed_and_time_left(train, capsys):
    train("--progress true --epochs 1 --log_freq 1")
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("epoch 0/0", "img/s", "left", "loss"))


def test_image_size_reaches_models_that_pass_it_on():
    model = models.build_model("deit_tiny_distilled_patch16_224", num_classes=3, input_size=32)
    assert model.patch_embed.img_size == (32, 32)


@pytest.mark.parametrize(
    "model",
    [
        "convnext_femto --channels_last --model_kwargs depths=[1,1,1,1] dims=[4,8,8,8]",
        "resnet18 --model_kwargs layers=[1,1,1,1]",
        "convnextv2_atto --model_kwargs depths=[1,1,1,1] dims=[4,8,8,8]",
    ],
)
def test_other_models_train_and_resume(model, tiny_run):
    argv = tiny_run("--epochs 1 --model", model)
    del argv[argv.index("--model_kwargs") : argv.index("--data_set")]  # the tiny ViT's
    record = script.main(argv)
    assert record == script.main(argv)
    assert np.isfinite(record["train_loss"])


def test_compiled_model_keeps_the_names_of_its_weights(train, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: compiled.append(type(self).__name__))
    train("--compile --epochs 1")
    assert compiled == ["Probe", "VisionTransformer"]  # first a try
    assert "cls_token" in weights_of(tmp_path / "run", "checkpoint-0.pth")


def test_missing_compiler_is_said_before_anything_is_written(train, tmp_path, monkeypatch):
    torch._dynamo.reset()  # forget what other tests compiled
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nowhere/g++"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"--compile: torch cannot compile here \(.*/nowhere/g\+\+.*; leave it out, or"):
        train("--compile")
    assert not (tmp_path / "run").exists()
