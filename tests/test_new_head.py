"""--new_head: a head of timm's own initial values, for readers that want every key, such as timm's training script."""

import json
import shlex

import pytest
import safetensors.torch
import timm
import torch
from small_models import SCRIPT_STUDENT, assert_same, random_tensors, selected, small_pair
from test_parts import start_from

import models
import weight_selection
from models import ModelSpec
from models.initial import fresh_head
from options.parser import keyword_text
from options.training import training_options

HEADS = {
    "vit_tiny_patch16_224": (["head.weight", "head.bias"], {"embed_dim": 48, "depth": 2}),
    "convnext_femto": (
        ["head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"],
        # our convnext_femto has linear layers, as the paper's; timm's has 1x1 convolutions
        {"conv_mlp": False, "dims": (8, 10, 12, 16), "depths": (1, 1, 2, 1)},
    ),
}


@pytest.fixture(scope="module", params=HEADS)
def written(request, tmp_path_factory):
    """A model's name and arguments, a function that writes its initialization with a head, and the head's keys."""
    name, folder = request.param, tmp_path_factory.mktemp("new_head")
    keys, kwargs = HEADS[name]
    teacher = random_tensors(timm.create_model(name, **kwargs), torch.float32)
    safetensors.torch.save_file(teacher, folder / "teacher.safetensors")
    words = (
        f"--pretrained_model {name} --pretrained_path {folder / 'teacher.safetensors'} --student_model {name}".split()
    )
    for option in ("--student_kwargs", "--pretrained_kwargs"):
        words += [option, *(keyword_text(key, value) for key, value in kwargs.items())]

    def write(classes):
        file = weight_selection.main(
            ["--output_dir", str(folder / f"{classes}.pth"), *words, "--new_head", str(classes)]
        )
        tensors = torch.load(file, weights_only=True)
        assert [key for key in tensors if key.startswith("head")] == keys
        assert all(torch.equal(tensors[key], teacher[key]) for key in tensors if key not in keys)
        return str(file), tensors

    return name, kwargs, write, keys


def test_timms_script_takes_every_tensor_as_initial_checkpoint(written):
    name, kwargs, write, _ = written
    file, tensors = write(7)
    assert_same(timm.create_model(name, num_classes=7, checkpoint_path=file, **kwargs).state_dict(), tensors)


@pytest.mark.parametrize("classes", [7, 1000])
def test_timms_script_takes_the_file_as_pretrained_path(classes, written):
    name, kwargs, write, keys = written
    file, tensors = write(classes)

    def created(**more):
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=classes, **more, **kwargs).state_dict()

    loaded = created(pretrained=True, pretrained_cfg_overlay={"file": file})
    if classes == 7:  # timm has another number in its table for this name, so it drops the classifier and keeps its own
        own = created()
        tensors = tensors | {key: own[key] for key in keys if "norm" not in key}
    assert_same(loaded, tensors)


def test_head_has_timms_values_by_the_seed_alone():
    spec = ModelSpec("vit_tiny", {**SCRIPT_STUDENT, "embed_dim": 96, "num_classes": 200})
    before = torch.get_rng_state()
    first, again, other = (fresh_head(spec, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(first, again)
    assert not torch.equal(first["head.weight"], other["head.weight"]) and not first["head.bias"].any()
    with torch.random.fork_rng():
        timms = timm.create_model("vit_tiny_patch16_224", **spec.kwargs).head.weight
    assert first["head.weight"].std() == pytest.approx(timms.std().item(), rel=0.03)


def test_file_adds_the_head_to_what_is_selected(small_teacher, tmp_path, capsys):
    words = small_pair(small_teacher[0], "--new_head", "3", "--seed", "5")
    file = weight_selection.main(["--output_dir", str(tmp_path / "x.safetensors"), *words])
    head = fresh_head(ModelSpec("vit_tiny", {**SCRIPT_STUDENT, "num_classes": 3}), 5)
    assert_same(safetensors.torch.load_file(file), selected(small_teacher[0]) | head)
    description = json.loads(file.with_suffix(".json").read_text())
    assert description["student"]["kwargs"]["num_classes"] == description["choices"]["new_head"] == 3
    assert description["left_out"] == [] and "head.weight" not in description["plan"]["tensors"]
    assert_same({key: start_from(file)[1][key] for key in head}, head)
    # main.py knows the number of classes by its data
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    options = training_options(command[2:])
    assert "num_classes" not in options.model_kwargs
    assert models.create(options.model, {**options.model_kwargs, "num_classes": 3, "img_size": options.input_size})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--new_head 3 --include_head true",
            "--new_head 3 is a head without the teacher's weights: leave out --include_head",
        ),
        ("--new_head 3 --take mlp", "--new_head 3 makes a file for readers that want every key"),
        ("--new_head 3 --take head", "--new_head 3 is a head without the teacher's weights: leave head out of --take"),
        ("--new_head 3 --student_kwargs num_classes=4", "--new_head 3 is not the num_classes=4 of --student_kwargs"),
        ("--new_head 0", "0 is not at least 1"),
    ],
)
def test_heads_that_contradict_are_usage_errors(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        weight_selection.main(["--plan", *words.split()])
    assert ended.value.code == 2 and message in capsys.readouterr().err
