"""--take: the parts of each family, what a file of some of them says, and who takes it."""

import json
import re
from argparse import Namespace

import pytest
import safetensors.torch
import torch
from conftest import error_of, weights_of
from small_models import PAIRS, SCRIPT_STUDENT, assert_same, layout, plan_of, small_pair

import models
import weight_selection
from options.selection import PARTS
from selection.families import FAMILIES
from selection.pair import take_parts
from training.inherited import load_initialization
from utils import UserError
from weightfiles.initialization import read_description, write_initialization

VIT_PARTS = {"patch_embed", "tokens", "pos_embed", "attention", "mlp", "norm", "head"}


@pytest.mark.parametrize("kind", PAIRS)
def test_each_tensor_is_in_one_part_and_parts_sum_to_the_whole(kind):
    teacher, sizes, student, smaller = PAIRS[kind]
    pair = layout(teacher, include_head=True, **sizes), layout(student, include_head=True, **smaller)
    name = models.family_of(models.create(student, smaller, device="meta"))
    for shapes in (pair[0][0].shapes, pair[1][0].shapes):
        for key in shapes:
            found = [part for pattern, part in FAMILIES[name].parts.items() if re.fullmatch(pattern, key)]
            assert len(found) == 1 and found[0] in PARTS, key
    plan, taken = plan_of(*pair), []
    for part in PARTS:
        taken += take_parts(plan, (part,), name)[0].sources
    assert sorted(taken) == sorted(plan.sources)


@pytest.mark.parametrize(
    ("kind", "key", "part"),
    [
        ("vit", "blocks.0.attn.qkv.weight", "attention"),
        ("vit", "norm.bias", "norm"),
        ("vit norms in each head", "blocks.0.attn.q_norm.weight", "attention"),
        ("deit distilled", "head_dist.weight", "head"),
        ("dinov2", "reg_token", "tokens"),
        ("convnext", "stages.1.downsample.0.weight", "downsample"),
        ("convnext", "stages.0.blocks.0.conv_dw.weight", "conv"),
        ("convnext", "head.norm.weight", "head"),
        ("swin", "layers.0.blocks.0.attn.relative_position_bias_table", "pos_embed"),
        ("resnet basic", "layer1.0.bn1.running_mean", "norm"),
        ("resnet basic", "bn1.weight", "patch_embed"),
        ("seresnet", "layer1.0.se.fc1.weight", "conv"),
    ],
)
def test_tensors_are_in_the_part_of_their_module(kind, key, part):
    model = models.create(*PAIRS[kind][:2], device="meta")
    assert key in model.state_dict()
    assert FAMILIES[models.family_of(model)].part_of(key) == part


def write(path, name, *more):
    """Write a file of some of the small student; return its path."""
    return weight_selection.main(["--output_dir", str(path / name), *small_pair(*more)])


def read(path):
    return safetensors.torch.load_file(path)


def test_files_of_the_parts_hold_the_values_of_the_whole(small_teacher, tmp_path):
    words = [small_teacher[0], "--element_selection", "magnitude", "--include_head"]
    whole, parts = read(write(tmp_path, "whole.safetensors", *words)), {}
    for part in sorted(VIT_PARTS):
        taken = read(write(tmp_path, f"{part}.safetensors", *words, "--take", part))
        assert taken and not taken.keys() & parts.keys()
        parts |= taken
    assert_same(parts, whole)


def test_head_is_a_part_like_any_other(small_teacher, tmp_path):
    file = write(tmp_path, "head.safetensors", small_teacher[0], "--take", "head", "norm")
    assert {key.partition(".")[0] for key in read(file)} == {"head", "norm", "blocks"}
    assert torch.equal(read(file)["head.bias"], small_teacher[1]["head.bias"])


def test_what_is_left_out_is_named_in_json_and_metadata(small_teacher, tmp_path, caplog):
    caplog.set_level("INFO")
    file = write(tmp_path, "x.safetensors", small_teacher[0], "--take", "mlp", "norm", "tokens", "--take", "attention")
    left_out = ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    description = read_description(file)
    assert description["left_out"] == left_out
    assert description["choices"]["take"] == ["tokens", "attention", "mlp", "norm"]
    with safetensors.safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["left_out"]) == left_out
    assert description["plan"]["tensors"].keys() == read(file).keys()
    assert "--take: 3 tensors of other parts are left out" in caplog.text
    whole = write(tmp_path, "whole.safetensors", small_teacher[0])
    assert read_description(whole)["left_out"] == []
    with safetensors.safe_open(whole, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_plan_shows_the_parts_that_are_taken(small_teacher, capsys):
    words = ["--take", "attention", "--student_kwargs", "img_size=16", "init_values=1e-5"]
    weight_selection.main(["--plan", *small_pair(small_teacher[0], *words)])
    description = json.loads(capsys.readouterr().out)
    plan = description["plan"]
    assert {key.split(".")[2] for key in plan["tensors"]} == {"attn", "ls1"} and "norm.weight" in description[
        "left_out"
    ]
    assert plan["groups"].keys() == {"stream", "blocks.0.attn", "blocks.1.attn"}
    # neither the position embedding, which is resampled, nor ls2
    assert plan["notes"] == {"blocks.*.ls1.gamma begins at 1, which changes nothing: the teacher has none": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--model_type mixer --take mlp conv",
            "--take conv: the family mixer has no conv: its parts are patch_embed, mlp, norm, head",
        ),
        ("--model_type resnet --take pos_embed", "the family resnet has no pos_embed: its parts are patch_embed, conv"),
        (
            "--student_kwargs class_token=False global_pool=avg --take tokens",
            "the student has no tokens: its parts are patch_embed, pos_embed, attention, mlp, norm, head",
        ),
    ],
)
def test_parts_that_a_model_lacks_are_refused_by_name(words, message):
    student = [] if "--model_type" in words else ["--student_model", "vit_tiny"]
    assert message in error_of(weight_selection, "--plan", *student, *words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--take attn", "attn is none of patch_embed, tokens, pos_embed, attention"),
        (
            "--take mlp --refit true --data_path x",
            "--refit true fits the whole student, of which --take leaves out parts",
        ),
    ],
)
def test_wrong_parts_are_usage_errors(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        weight_selection.main(["--plan", *words.split()])
    assert ended.value.code == 2 and message in capsys.readouterr().err


# ---- --initialize ----


def start_from(path, **sizes):
    """Start the small student, or one of other sizes, from a file; return its tensors before and after."""
    torch.manual_seed(0)
    model = models.create("vit_tiny", {**SCRIPT_STUDENT, "num_classes": 3, **sizes})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_initialization(path, model, Namespace(model="vit_tiny", model_key="model|module", model_prefix=""))
    return before, model.state_dict()


@pytest.mark.parametrize(("name", "with_json"), [("x.pth", True), ("x.safetensors", True), ("x.safetensors", False)])
def test_what_a_file_says_is_left_out_starts_at_random(name, with_json, small_teacher, tmp_path):
    file = write(tmp_path, name, small_teacher[0], "--take", "attention", "norm")
    tensors = read(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    if not with_json:
        file.with_suffix(".json").unlink()
    before, after = start_from(file)
    assert "pos_embed" not in tensors and "blocks.0.norm1.weight" in tensors
    assert_same(dict(after), before | tensors)


def test_without_a_word_a_missing_key_stays_an_error(small_teacher, tmp_path):
    file = write(tmp_path, "x.pth", small_teacher[0], "--take", "mlp")
    file.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"x\.pth has no cls_token, unlike the \[1, 1, 24\] of vit_tiny"):
        start_from(file)


@pytest.mark.parametrize("name", ["y.pth", "y.safetensors"])
def test_no_other_key_may_be_missing(name, small_teacher, tmp_path):
    file = write(tmp_path, "x.safetensors", small_teacher[0], "--take", "mlp")
    tensors, description = read(file), read_description(file)
    del tensors["blocks.1.mlp.fc2.bias"], description["sha256"]
    write_initialization(tmp_path / name, tensors, description)
    if name.endswith(".safetensors"):
        (tmp_path / "y.json").unlink()
    with pytest.raises(UserError, match=r"has no blocks\.1\.mlp\.fc2\.bias, unlike the \[24\] of vit_tiny"):
        start_from(tmp_path / name)
    with pytest.raises(UserError, match=r"has no blocks\.2\.norm1\.weight"):  # a layer that the file does not know
        start_from(file, depth=3)


def test_file_of_the_head_alone_starts_the_head(small_teacher, tmp_path):
    file = write(tmp_path, "x.safetensors", small_teacher[0], "--take", "head")
    before, after = start_from(file, num_classes=5)
    assert_same(dict(after), before | read(file))


def test_position_embedding_without_its_tokens_is_resampled(small_teacher, tmp_path):
    file = write(tmp_path, "x.pth", small_teacher[0], "--take", "pos_embed")
    taken = torch.load(file, weights_only=True)["pos_embed"]
    after = start_from(file, img_size=64)[1]["pos_embed"]
    assert taken.shape == (1, 17, 24) and after.shape == (1, 65, 24) and torch.equal(after[:, 0], taken[:, 0])


@pytest.mark.parametrize("left_out", ["norm.weight", [1], None])
def test_what_is_left_out_has_to_be_a_list_of_keys(left_out, small_teacher, tmp_path):
    tensors = {"norm.weight": torch.ones(24)}
    for name, where in (("x.pth", "x.json"), ("y.safetensors", "its metadata")):
        write_initialization(tmp_path / name, tensors, {"left_out": left_out})
        if name == "y.safetensors":
            safetensors.torch.save_file(tensors, tmp_path / name, metadata={"left_out": json.dumps(left_out) + "x"})
            (tmp_path / "y.json").unlink()
        with pytest.raises(UserError, match=f"{where} holds what weight_selection.py does not write"):
            start_from(tmp_path / name)


def test_training_starts_from_the_parts(small_teacher, train, tmp_path, caplog):
    caplog.set_level("INFO")
    file = write(tmp_path, "x.pth", small_teacher[0], "--take", "attention")
    sizes = [f"{name}={SCRIPT_STUDENT[name]}" for name in ("embed_dim", "depth", "num_heads", "patch_size")]
    train("--epochs 1 --warmup_epochs 0 --lr 0 --min_lr 0 --initialize", file, "--model_kwargs", *sizes)
    assert "its selection left out 22 tensors, which start from random values" in caplog.text
    trained, tensors = weights_of(tmp_path / "run", "checkpoint-0.pth"), torch.load(file, weights_only=True)
    assert_same({key: trained[key] for key in tensors}, tensors)
    source = json.loads((tmp_path / "run" / "config.json").read_text())["initialization"]
    assert len(source["left_out"]) == 22 and source["choices"]["take"] == ["attention"]
