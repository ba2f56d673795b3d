"""Training with a teacher: its loss by hand, what a run logs and saves of it, and which teachers are refused."""

import hashlib
import math

import pytest
import small_models
import torch
from conftest import assert_equal_weights, in_two_processes, read_log, weights_of, write_images
from test_engine import HostReads, make_trainer
from test_resume import plug_pulled, state_in
from torch import nn

import main as script
import models
from bench import survive
from compare import group_runs
from engine import Progress, train_one_epoch
from training.distill import Distillation, WithDistiller
from training.finished import find_runs, read_runs
from training.teacher import Teacher
from utils import UserError

WORDS, FEATURES = "--distillation logits --teacher_path", "--distillation features --teacher_path"
IMAGES = torch.zeros(2, 3, 1, 1)


@pytest.fixture(scope="module")
def teacher(image_folder, tmp_path_factory):
    """The folder of a run of one epoch: 48 wide, with an average of its weights."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    words = "--data_set image_folder --input_size 32 --epochs 1 --warmup_epochs 0 --batch_size 8 --num_workers 0 --device cpu"
    words += " --model vit_tiny --model_kwargs embed_dim=48 depth=2 num_heads=3 patch_size=8 --model_ema true"
    words += f" --model_ema_decay 0.5 --lr 1e-2 --data_path {image_folder} --output_dir {folder}"
    script.main(words.split())
    return folder


def distillation(student, taught, **settings):
    """The loss against a teacher that gives `taught` whatever it sees."""
    model = nn.Linear(1, 1)
    model.forward = lambda images: taught
    same = ((0.0,), (1.0,))
    return Distillation(Teacher(model, 2, {}, same, same), student, nn.CrossEntropyLoss(), **settings)


def test_logit_loss_is_the_divergence_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]], requires_grad=True)
    taught = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    loss = distillation(None, taught, alpha=0.5)
    seen, terms = loss(lambda images: logits, IMAGES, torch.tensor([1, 0]))
    assert seen is logits
    # task: log 4/3 and log 2; teacher (3/4, 1/4), student (1/4, 3/4): 3/4 log 3 - 1/4 log 3, and 0 for the second image
    assert terms.tolist() == pytest.approx([(math.log(4 / 3) + math.log(2)) / 2, 0.5 * (0.5 * math.log(3)) / 2])
    terms[1].backward()
    assert logits.grad[0].tolist() == pytest.approx([-0.5 * 0.5 / 2, 0.5 * 0.5 / 2])  # alpha (student - teacher) / 2


def test_temperature_softens_both_and_scales_by_its_square():
    logits, taught = torch.tensor([[0.0, 2 * math.log(3.0)]]), torch.tensor([[2 * math.log(3.0), 0.0]])
    terms = distillation(None, taught, tau=2.0)(lambda images: logits, IMAGES[:1], torch.tensor([1]))[1]
    assert terms[1].item() == pytest.approx(4 * 0.5 * math.log(3))


def test_feature_loss_is_the_mean_distance_by_hand():
    features = torch.tensor([[1.0, 2.0], [3.0, -4.0]], requires_grad=True)
    loss = distillation(None, torch.tensor([[0.0, 0.0], [5.0, -4.0]]), alpha=2.0)
    terms = loss(lambda images: (torch.zeros(2, 2), features), IMAGES, torch.tensor([1, 0]))[1]
    assert terms.tolist() == pytest.approx([math.log(2), 2.0 * (1 + 2 + 2 + 0) / 4])
    terms[1].backward()
    assert features.grad.tolist() == [[0.5, 0.5], [-0.5, 0.0]]


def test_teacher_sees_images_as_it_was_trained():
    model = nn.Flatten()
    model.weight = nn.Parameter(torch.zeros(1))
    other = Teacher(model, 12, {}, ((0.5,) * 3, (0.1,) * 3), ((0.4,) * 3, (0.2,) * 3))
    level = torch.full((1, 3, 2, 2), 0.7)
    torch.testing.assert_close(other((level - 0.4) / 0.2), torch.full((1, 12), (0.7 - 0.5) / 0.1))


@pytest.mark.parametrize("kind", ["vit", "convnext", "dinov3", "swin", "mixer", "resnet basic", "deit distilled"])
def test_one_pass_gives_logits_and_the_features_they_come_from(kind):
    name, kwargs, *_ = small_models.PAIRS[kind]
    model, headless = (models.create(name, {**kwargs, "num_classes": classes}) for classes in (5, 0))
    weights = small_models.random_tensors(model, torch.float32)
    model.load_state_dict(weights)
    images = torch.randn(2, 3, *[kwargs.get("img_size", 64)] * 2, generator=torch.Generator().manual_seed(0))
    model.eval(), headless.eval()
    with torch.no_grad():
        logits, pooled = WithDistiller(model, nn.Identity())(images)
        assert torch.equal(logits, model(images))
        if kind != "deit distilled":  # it has a classifier for each of two tokens
            assert torch.equal(logits, model.get_classifier()(pooled))
        headless.load_state_dict({key: weights[key] for key in headless.state_dict()})
        assert torch.equal(pooled, headless(images))  # a teacher without its head


EXTRAS = {
    "plain": "",
    "everything": "--model_ema true --model_ema_decay 0.9 --update_freq 2 --batch_size 4 --clip_grad 1 --drop_path 0.2 "
    "--use_amp true --amp_dtype bfloat16 --distillation_alpha 2 --imagenet_default_mean_and_std false --layer_decay 0.8 "
    "--channels_last",
}


@pytest.mark.parametrize(("kind", "extra"), [("logits", "plain"), ("logits", "everything"), ("features", "everything")])
def test_resumed_run_ends_like_the_uninterrupted_one(kind, extra, teacher, train, tmp_path):
    options = [
        f"--distillation {kind} --teacher_path",
        teacher,
        EXTRAS[extra],
        "--epochs 3 --save_ckpt_steps 2 --log_freq 3",
    ]
    train(*options, to="whole")
    with plug_pulled(8):
        train(*options, to="cut")
    train(*options, to="cut")
    whole, cut = (state_in(tmp_path / folder) for folder in ("whole", "cut"))
    assert whole.keys() == cut.keys() and ("distiller" in whole) == (kind == "features")
    other = {"options", "metrics"}  # the folder, and the time that it took
    assert not [key for key in whole.keys() - other if not survive.same(whole[key], cut[key])]
    assert survive.log_of(tmp_path / "whole") == survive.log_of(tmp_path / "cut")


def test_teacher_computes_in_the_runs_precision_and_is_frozen(teacher, train, monkeypatch):
    real, seen = Teacher.__call__, []

    def noted(self, images):
        seen.append((self.model.training, (outputs := real(self, images)).dtype, outputs.requires_grad))
        return outputs

    monkeypatch.setattr(Teacher, "__call__", noted)
    train(WORDS, teacher, "--use_amp true --amp_dtype bfloat16")
    assert seen == [(False, torch.bfloat16, False)] * 10


def test_log_has_both_terms_which_add_up_to_the_loss(teacher, train, tmp_path, caplog):
    plain = train(to="plain")
    line = train(WORDS, teacher, "--distillation_alpha 0.5")
    new = {"train_task_loss", "train_distillation_loss"}
    assert line.keys() - plain.keys() == new and not plain.keys() - line.keys()
    assert line["train_loss"] == pytest.approx(line["train_task_loss"] + line["train_distillation_loss"])
    task, taught = (line[f"train_{name}_loss"] for name in ("task", "distillation"))
    assert task > 0 < taught and f"of the task {task:.4f}, of distillation {taught:.4f}, lr" in caplog.text
    plain, distilled = (state_in(tmp_path / name, "checkpoint-1.pth") for name in ("plain", "run"))
    assert distilled.keys() - plain.keys() == {"teacher"} and distilled["model"].keys() == plain["model"].keys()


def test_weight_zero_trains_as_without_a_teacher(teacher, train, tmp_path):
    """The teacher disturbs neither the student's initial weights nor its random draws."""
    for name, words in (("plain", ""), ("zero", f"{WORDS} {teacher} --distillation_alpha 0")):
        train(words, "--drop_path 0.3 --epochs 1", to=name)
    assert_equal_weights(*(weights_of(tmp_path / name, "checkpoint-0.pth") for name in ("plain", "zero")))


def test_teacher_comes_from_a_run_a_checkpoint_or_a_file(teacher, train, tmp_path):
    weights = weights_of(teacher, "checkpoint-best.pth")
    torch.save(weights, tmp_path / "file.pth")
    kwargs = "--teacher_model vit_tiny --teacher_kwargs embed_dim=48 depth=2 num_heads=3 patch_size=8 img_size=32"
    ways = {
        "run": teacher,
        "checkpoint": teacher / "checkpoint-0.pth",
        "file": f"{tmp_path}/file.pth {kwargs} --imagenet_default_mean_and_std false",
        "average": f"{teacher} --teacher_key model_ema",
    }
    losses = {name: train(WORDS, way, "--epochs 1", to=name)["train_distillation_loss"] for name, way in ways.items()}
    assert losses["run"] == losses["checkpoint"] != losses["average"]
    assert losses["file"] > 0  # normalized by timm's mean and deviation for this model, 0.5, in the student's run too


def test_resuming_takes_the_same_teacher_from_any_path(teacher, train, tmp_path):
    torch.save(state_in(teacher, "checkpoint-0.pth"), tmp_path / "same.pth")
    other = state_in(teacher, "checkpoint-0.pth")
    other["model"]["norm.bias"] += 1
    torch.save(other, tmp_path / "other.pth")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "teacher.pth").write_bytes((tmp_path / "same.pth").read_bytes())
    with plug_pulled(7):
        train(WORDS, tmp_path / "same.pth")
    with pytest.raises(
        UserError, match=r"checkpoint-0\.pth belongs to a run with another teacher: its sha256 was \w{64}, is \w{64}$"
    ):
        train(WORDS, tmp_path / "other.pth")
    assert train(WORDS, tmp_path / "elsewhere" / "teacher.pth")["epoch"] == 1


@pytest.mark.parametrize("more", ["", "--use_amp true --amp_dtype float16"])
def test_teacher_that_is_not_finite_ends_the_run_in_one_line(more, teacher, train, tmp_path):
    state = state_in(teacher, "checkpoint-0.pth")
    for key in ("norm.weight", "head.weight"):
        state["model"][key] *= 1e30
    torch.save(state, tmp_path / "teacher.pth")
    with pytest.raises(UserError, match="the loss was not finite in the 5 updates up to step 4 of epoch 0"):
        train(WORDS, tmp_path / "teacher.pth", more)
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_distiller_is_trained_clipped_and_saved_beside_the_model(teacher, train, tmp_path, caplog):
    # momentum and one update at a learning rate of 1: the step is the clipped gradient
    words = "--opt momentum --momentum 0 --weight_decay 0 --lr 1 --clip_grad 0.01 --warmup_epochs 0 --epochs 1 --model_ema true"
    line = train(FEATURES, teacher, words, "--batch_size 40 --save_ckpt_steps 1")
    state = state_in(tmp_path / "run", "checkpoint-0.pth")
    shapes = {key: list(value.shape) for key, value in state["distiller"].items()}
    assert shapes == {"fc1.weight": [48, 32], "fc1.bias": [48], "fc2.weight": [48, 48], "fc2.bias": [48]}
    assert state["model"].keys() == state["model_ema"].keys() and not [key for key in state["model"] if "fc" in key[:4]]
    assert sum(len(group["params"]) for group in state["optimizer"]["param_groups"]) == len(state["model"]) + 4
    assert line["n_parameters"] == sum(value.numel() for value in state["model"].values())
    assert "0.03 M parameters" in caplog.text
    train(FEATURES, teacher, words, "--batch_size 40 --lr 0", to="still")
    before = state_in(tmp_path / "still", "checkpoint-0.pth")
    moves = {part: [state[part][key] - before[part][key] for key in state[part]] for part in ("model", "distiller")}
    squares = {part: sum(move.square().sum().item() for move in values) for part, values in moves.items()}
    assert squares["distiller"] > 0 and math.sqrt(sum(squares.values())) == pytest.approx(0.01, rel=1e-3)
    assert line["train_grad_norm"] > 0.01


@pytest.mark.parametrize("kind", ["logits", "features"])
def test_two_processes_resume_exactly_and_equal_one(kind, teacher, tiny_run, tmp_path):
    more = f"--distillation {kind} --teacher_path {teacher} --drop_path 0.2 --save_ckpt_num 9 --batch_size 4"

    def run(to):
        argv = tiny_run(more, output_dir=tmp_path / to)
        codes, said = in_two_processes(argv, tmp_path / "said.txt")
        assert codes == [0, 0], said

    run("whole")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "checkpoint-0.pth").write_bytes((tmp_path / "whole" / "checkpoint-0.pth").read_bytes())
    run("cut")
    script.main(tiny_run(more, "--update_freq 2", output_dir=tmp_path / "one"))
    whole, cut, one = (state_in(tmp_path / name, "checkpoint-1.pth") for name in ("whole", "cut", "one"))
    for part in ("model", "distiller") if kind == "features" else ("model",):
        assert_equal_weights(whole[part], cut[part])
        for key in whole[part]:  # gradients are summed in another order, and AdamW divides by their size
            torch.testing.assert_close(whole[part][key], one[part][key], rtol=0, atol=2e-4)
    logs = [read_log(tmp_path / name)[0]["train_distillation_loss"] for name in ("whole", "one")]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_distilled_checkpoint_is_evaluated_and_initializes(teacher, train, tmp_path, caplog, monkeypatch):
    line = train(FEATURES, teacher)
    monkeypatch.setattr("training.distill.make_teacher", None)  # an evaluation reads no teacher
    measured = train("--eval true", FEATURES, "gone")
    assert measured["test_acc1"] == line["test_acc1"]
    assert "--distillation is accepted and has no effect" in caplog.text
    file = tmp_path / "run" / "checkpoint-1.pth"
    train("--epochs 1 --lr 0 --min_lr 0 --initialize", file, to="next")
    assert_equal_weights(weights_of(tmp_path / "next", "checkpoint-0.pth"), weights_of(tmp_path / "run"))


def test_timms_own_weights_are_the_default(train, tmp_path, monkeypatch):
    kwargs = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 32}
    weights = small_models.random_tensors(models.create("vit_tiny_patch16_224", kwargs), torch.float32)
    torch.save(weights, tmp_path / "timm.pth")
    monkeypatch.setattr("weightfiles.teacher.pretrained_file", lambda *_: tmp_path / "timm.pth")
    words = [
        "--teacher_model vit_tiny_patch16_224 --teacher_kwargs",
        *(f"{key}={value}" for key, value in kwargs.items()),
    ]
    assert train("--distillation features", *words, to="named")["train_distillation_loss"] > 0
    source = state_in(tmp_path / "named", "checkpoint-1.pth")["teacher"]
    assert source["sha256"] == hashlib.sha256((tmp_path / "timm.pth").read_bytes()).hexdigest()
    assert (source["model"], source["kwargs"]) == ("vit_tiny_patch16_224", kwargs)
    with pytest.raises(
        UserError, match=r"logits needs .* of the data's 3 classes, .*: head.weight is \[1000, 24\], not \[3, 24\]"
    ):
        train("--distillation logits", *words)


SHAPE = "embed_dim=48 depth=2 num_heads=3 patch_size=8 img_size=32"
REFUSED = {
    "{dir}": "--teacher_path {dir} has no checkpoint of main.py: wanted checkpoint-best.pth or",
    "{dir}/none.pth": "--teacher_path {dir}/none.pth does not exist",
    "{file}": "--teacher_path {file} is no checkpoint of main.py: name its model with --teacher_model",
    "{file} --teacher_model vit_tinny": "vit_tinny is not a model",
    "{file} --teacher_model vit_tiny": r"--teacher_path {file} .*--teacher_kwargs",
    f"{{file}} --teacher_model vit_tiny --teacher_kwargs num_classes=3 {SHAPE}": "--teacher_kwargs num_classes=3: the number",
    f"{{file}} --teacher_model vit_tiny --teacher_kwargs {SHAPE} --teacher_key ema": r"no weights under ema \(--model_key, --teacher_key\); its keys: ",
    f"{{file}} --teacher_model vit_tiny --teacher_kwargs {SHAPE} --input_size 40": r"vit_tiny does not take images of 40 x 40.*--teacher_kwargs",
    "{run} --input_size 40": r"--teacher_model vit_tiny does not take images of 40 x 40: .*--input_size",
    "{damaged}": "--teacher_path {damaged}: the options or classes in this checkpoint are damaged",
    "{run} --teacher_model vit_small": "--teacher_model vit_small, but --teacher_path .* is a checkpoint of vit_tiny",
    "{run} --teacher_kwargs depth=3": "--teacher_kwargs depth=3, but --teacher_path .* is a checkpoint of a model with depth=2",
    "{run} --data_path {two}": "--teacher_path .*checkpoint-best.pth has 3 classes, but the data has 2",
    "{run} --data_path {other}": "--teacher_path .*: its class 0 is dark, but the data's is black",
}


@pytest.mark.parametrize("words", REFUSED)
def test_teacher_that_does_not_fit_ends_the_run_before_it_writes(words, teacher, train, tmp_path):
    torch.save(weights_of(teacher, "checkpoint-best.pth"), tmp_path / "file.pth")
    torch.save(state_in(teacher, "checkpoint-0.pth") | {"data": {"classes": "abc"}}, tmp_path / "damaged.pth")
    places = {"dir": tmp_path, "file": tmp_path / "file.pth", "damaged": tmp_path / "damaged.pth", "run": teacher}
    for name, classes in (("two", ["a", "b"]), ("other", ["black", "grey", "light"])):
        places[name] = tmp_path / name
        for split in ("train", "val") if name in words else ():
            write_images(tmp_path / name, split, dict.fromkeys(classes, 8))
    with pytest.raises(UserError, match=REFUSED[words].format(**places)) as error:
        train(WORDS, words.format(**places))
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--distillation logits", "--distillation logits needs a teacher: --teacher_model NAME or --teacher_path FILE"),
        ("--teacher_kwargs depth=1", "--teacher_kwargs {'depth': 1} is for --distillation logits or features"),
        ("--distillation_alpha 0.5", "--distillation_alpha 0.5 is for --distillation logits or features"),
        (
            "--distillation features --teacher_path x --distillation_tau 2",
            "--distillation_tau 2.0 is for --distillation logits",
        ),
    ],
)
def test_contradictions_are_usage_errors(words, message, tiny_run, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(tiny_run(words))
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["logits", "features"])
def test_compiled_run_learns_as_the_plain_one(kind, teacher, train, tmp_path, monkeypatch):
    """What is traced is not made into C++ here."""
    real, compiled = nn.Module.compile, []

    def note(model, **_):
        compiled.append(type(model).__name__)
        return real(model, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", note)
    words = f"--distillation {kind} --teacher_path {teacher} --epochs 1"
    plain, fast = train(words, to="plain"), train(words, "--compile", to="fast")
    assert compiled == ["Probe", *["VisionTransformer"] * 2, *["WithDistiller"] * (kind == "features")]
    for name in ("train_task_loss", "train_distillation_loss", "test_loss"):
        assert fast[name] == pytest.approx(plain[name], rel=1e-3)


@pytest.mark.parametrize("kind", ["logits", "features"])
def test_host_waits_only_at_log_steps(kind, monkeypatch):
    model = models.create("vit_tiny", {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 16, "num_classes": 3})
    other = models.create(
        "vit_tiny", {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 16, "num_classes": 3 * (kind == "logits")}
    )
    teacher = Teacher(other, 24, {}, ((0.5,) * 3,) * 2, ((0.4,) * 3,) * 2)
    student = WithDistiller(model, nn.Linear(16, 24)) if kind == "features" else model
    trainer = make_trainer(student, "--log_freq 4", 9, criterion=Distillation(teacher, student, nn.CrossEntropyLoss()))
    batches = [(torch.zeros(2, 3, 16, 16), torch.tensor([0, 1])) for _ in range(9)]
    with HostReads(monkeypatch) as host:
        train_one_epoch(trainer, batches, Progress(), steps=9, report=lambda *_: None)
    assert host.seen == ["tolist"] * 3


def test_runs_of_other_teachers_are_compared_apart(teacher, train, tmp_path):
    other = state_in(teacher, "checkpoint-0.pth") | {"epoch": 1}
    torch.save(other, tmp_path / "other.pth")
    for number, path in enumerate((teacher / "checkpoint-0.pth", tmp_path / "other.pth", "none")):
        train(*((WORDS, path) if path != "none" else ()), "--epochs 1", to=f"runs/{number}")
    runs = read_runs(find_runs([tmp_path / "runs"]), "test_acc1")
    assert len({run.settings.get("teacher") for run in runs}) == 3 == len(group_runs(runs, []))
