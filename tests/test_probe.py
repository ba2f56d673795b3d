"""--linear_probe: the classifier alone trains, and the rest stays as it was in evaluation mode."""

import pytest
import small_models
import torch
from conftest import TINY_MODEL, assert_equal_weights, groups_of, in_two_processes, read_log, weights_of, write_run

import main as script
import models
from bench import survive
from images.features import on_features
from images.order import TrainBatches
from images.settings import View
from images.transforms import eval_transform
from options.training import computes_features_once, remarks, training_options
from training.precision import Precision
from training.probe import LinearProbe
from utils import UserError

PAIRS = {name: pair[2:] for name, pair in small_models.PAIRS.items()}
AUGMENTED = "--hflip 0.5 --mixup 0.8"
BATCH_NORMS = "--model resnet18 --model_kwargs layers=[1,1,1,1] channels=[8,8,8,16] drop_rate=0.5"


@pytest.fixture
def probe(image_folder, tmp_path):
    """Return a function: main.py with --linear_probe on `image_folder`, two epochs of five updates, with more options."""

    def run(*more, to="run", model=TINY_MODEL):
        recipe = (
            "--linear_probe true --input_size 32 --epochs 2 --warmup_epochs 0 --batch_size 8 --lr 0.1 --num_workers 0"
        )
        data = f"--data_set image_folder --data_path {image_folder} --output_dir {tmp_path / to} --device cpu"
        return script.main([*model, *f"{recipe} {data}".split(), *" ".join(map(str, more)).split()])

    return run


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "deit distilled"])
def test_probe_gives_the_models_logits_and_moves_its_classifier(name):
    model = models.create(*PAIRS[name])
    model.load_state_dict(small_models.random_tensors(model, torch.float32))
    images = torch.randn(3, 3, *2 * [PAIRS[name][1].get("img_size", 32)])
    expected = model.eval()(images)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    probe = LinearProbe(model, on_features=False).train()
    torch.testing.assert_close(probe(images), expected)
    probe(images).sum().backward()
    trained = [key for key, value in model.named_parameters() if value.grad is not None]
    assert trained == [key for key, value in model.named_parameters() if value.requires_grad]
    assert len(trained) == 2 and all(key.startswith(models.head_prefixes(model)) for key in trained)
    assert_equal_weights(model.state_dict(), before)  # batch norms saw images, and took no statistics
    torch.testing.assert_close(LinearProbe(model, on_features=True)(probe.features(images)), expected)


@pytest.mark.parametrize(
    "more, model",
    [
        ("", TINY_MODEL),
        (AUGMENTED, BATCH_NORMS.split()),
        (
            f"{AUGMENTED} --augment device --update_freq 2 --batch_size 4 --model_ema true --model_ema_eval true",
            TINY_MODEL,
        ),
    ],
)
def test_run_trains_the_head_alone(more, model, probe, tmp_path):
    record = probe(more, model=model)
    state = torch.load(tmp_path / "run" / "checkpoint-1.pth", weights_only=True)
    options = training_options([*model, "--input_size", "32"])
    first = script.make_model(options, 3, Precision(torch.device("cpu"), None)).state_dict()
    head = {key: value for key, value in state["model"].items() if key.startswith(("head.", "fc."))}
    assert len(head) == 2 and all(not torch.equal(value, first[key]) for key, value in head.items())
    assert_equal_weights(state["model"], first | head)
    shapes = [list(values["exp_avg"].shape) for values in state["optimizer"]["state"].values()]
    assert sorted(shapes) == sorted(list(value.shape) for value in head.values())
    measured = probe(more, "--eval true", model=model)
    for name, value in measured.items():
        assert value == pytest.approx(record[name], rel=1e-5)
    assert ("test_acc1_ema" in measured) == ("model_ema" in state) == ("--model_ema" in more)


def test_features_are_of_the_images_that_the_evaluation_sees(probe, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "on_features", lambda *given: seen.append((given, on_features(*given))) or seen[0][1])
    probe("--epochs 1 --input_size 40")
    (((options, model, _, images, *_), loaders),) = seen
    transform = eval_transform(View.from_options(options))
    for loader, count in zip(loaders, (40, 11), strict=True):
        assert len(loader.resident) == count
    order = TrainBatches(40, batch_size=8, update_freq=1, world_size=1, rank=0, seed=0)
    for (features, labels), keys in zip(loaders[0], order, strict=True):
        pixels = torch.stack([transform(images[index][0]) for _, index in keys])
        torch.testing.assert_close(features, LinearProbe(model, on_features=False).features(pixels))
        assert labels.tolist() == images.targets()[[index for _, index in keys]].tolist()


def test_features_are_computed_once_without_augmentation_alone(probe, monkeypatch):
    counted, real = [], LinearProbe.features
    monkeypatch.setattr(
        LinearProbe, "features", lambda probe, images: counted.append(len(images)) or real(probe, images)
    )
    probe("--epochs 3", to="once")
    assert sum(counted) == 40 + 11
    counted.clear()
    probe("--hflip 0.1 --epochs 3", to="each")
    assert sum(counted) == 3 * 40


@pytest.mark.parametrize("more", ["", AUGMENTED])
def test_resumed_probe_equals_the_whole_one(more, probe, tmp_path):
    extras = "--model_ema true --model_ema_decay 0.5 --model_ema_eval true --bad_images skip", more
    probe(*extras, to="whole")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-0.pth").write_bytes((tmp_path / "whole" / "checkpoint-0.pth").read_bytes())
    probe(*extras)
    whole, resumed = (torch.load(tmp_path / name / "checkpoint-1.pth", weights_only=True) for name in ("whole", "run"))
    for name in ("model", "model_ema", "optimizer"):
        assert survive.same(whole[name], resumed[name])
    with pytest.raises(UserError, match="--linear_probe was True, is False"):
        probe(*extras, "--linear_probe false")


def test_two_processes_probe_as_one(image_folder, tmp_path):
    argv = "--linear_probe true --input_size 32 --epochs 1 --warmup_epochs 0 --batch_size 4 --lr 1e-2 --num_workers 0"
    argv = f"{argv} --device cpu --data_set image_folder --data_path {image_folder} --output_dir".split()
    codes, said = in_two_processes([*TINY_MODEL, *argv, tmp_path / "two"], tmp_path / "said.txt")
    assert codes == [0, 0], said
    script.main([*TINY_MODEL, *argv, str(tmp_path / "one"), "--update_freq", "2"])
    two, one = (weights_of(tmp_path / name, "checkpoint-0.pth") for name in ("two", "one"))
    for key in one:  # the same images; gradients are summed in another order, and AdamW divides by their size
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-4)
    (logged,), (other,) = read_log(tmp_path / "two"), read_log(tmp_path / "one")
    assert logged["test_acc1"] == other["test_acc1"]
    assert logged["test_loss"] == pytest.approx(other["test_loss"], rel=1e-4)


@pytest.mark.parametrize("more, compiled", [(AUGMENTED, ["VisionTransformer", "LinearProbe"]), ("", [])])
def test_what_sees_images_is_compiled(more, compiled, probe, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "check_compiler", lambda *_: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, mode: seen.append(type(module).__name__))
    probe("--epochs 1 --compile", more)
    assert seen == compiled


def test_defaults_are_those_of_a_linear_probe_unless_given():
    options = training_options(["--linear_probe", "true"])
    assert computes_features_once(options) and (options.aa, options.hflip, options.mixup) == ("none", 0, 0)
    for given in (
        "--aa rand-m9-mstd0.5-inc1",
        "--color_jitter 0.1",
        "--hflip 0.5",
        "--reprob 0.1",
        "--mixup 0.8",
        "--cutmix 1",
        "--cutmix_minmax 0.2 0.8",
    ):
        augmented = training_options(f"--linear_probe true {given}".split())
        assert not computes_features_once(augmented)
    for recipe in ("paper", "short"):
        assert computes_features_once(training_options(f"--recipe {recipe} --linear_probe true".split()))
    assert not computes_features_once(training_options("--linear_probe true --eval true".split()))
    idle = training_options("--linear_probe true --compile --channels_last --augment device".split())
    assert [line.split()[0] for line in remarks(idle)[:3]] == ["--compile", "--channels_last", "--augment"]


@pytest.mark.parametrize(
    "given, said",
    [
        ("--distillation logits --teacher_model vit_small", "labels alone, not by --distillation logits"),
        ("--drop_path 0.1", "--drop_path 0.1 is for blocks that --linear_probe true freezes"),
        ("--layer_decay 0.8", "--layer_decay 0.8 is for layers that --linear_probe true freezes"),
        ("--cache ram", "--cache ram has nothing to speed up"),
    ],
)
def test_options_that_contradict_a_probe_are_usage_errors(given, said, capsys):
    with pytest.raises(SystemExit) as ended:
        training_options(f"--linear_probe true {given}".split())
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert training_options(f"--linear_probe true --eval true {given}".split())


def test_model_without_a_linear_classifier_is_refused(probe):
    small = "--model deit_tiny_distilled_patch16_224 --model_kwargs embed_dim=12 depth=1 num_heads=2"
    with pytest.raises(UserError, match="ends in one Linear, but deit_tiny_distilled.* ends in Linear and Linear"):
        probe(model=small.split())


def test_probes_and_whole_trainings_are_compared_apart(root):
    for name, linear_probe in (("probe", True), ("whole", False)):
        write_run(root / name, [10, 20], linear_probe=linear_probe)
    assert [group["label"] for group in groups_of(root)] == ["linear_probe=true", "linear_probe=false"]
