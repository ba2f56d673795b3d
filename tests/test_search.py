"""A model is found in files as other people's scripts write them, and what is another model is refused."""

import re

import pytest
import torch
from conftest import convnext_as_released
from small_models import assert_same, random_tensors

import models
from options.selection import selection_options
from options.training import training_options
from utils import UserError
from weightfiles.lazy import Weights
from weightfiles.reading import ANY_PART, Part, Wanted, coverage, log_reading
from weightfiles.search import find

KWARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 5}
MODEL = models.create("vit_tiny", KWARGS)
OWN = random_tensors(MODEL, torch.float32)
BACKBONE = {key: value for key, value in OWN.items() if not key.startswith("head.")}
WIDER = random_tensors(models.create("vit_tiny", KWARGS | {"embed_dim": 24}), torch.float32)
Z = torch.zeros(3, 3)


def under(prefix, tensors=BACKBONE):
    return {prefix + key: value for key, value in tensors.items()}


def found(tensors, part=ANY_PART, model=MODEL, **words):
    """The reading of a file of these tensors, whose nests are written as keys with dots, and the line about it."""
    wanted = Wanted(model, "tiny", "--pretrained_path x.pth", **words)
    reading = find("x.pth", tensors if isinstance(tensors, Weights) else Weights.in_memory(tensors, ""), wanted, part)
    return reading, coverage(reading, wanted, "x.pth")


# ---- a model in others, beside others ----

HEAD_OF_ITS_OWN = {"head.mlp.0.weight": Z, "head.last_layer.weight_g": Z}
WRAPPED = {  # tensors, the prefix at which the model is found, what is left out
    "torch.compile": (under("_orig_mod.", OWN), "_orig_mod.", ""),
    "torch.compile of DDP": (under("module._orig_mod."), "module.", ""),
    "FSDP of blocks": ({key.replace("blocks.0", "blocks.0._fsdp_wrapped_module"): OWN[key] for key in OWN}, "", ""),
    "DINOv2's training": (
        under("teacher.backbone.", {key.replace("blocks.", "blocks.0."): OWN[key] for key in BACKBONE}),
        "teacher.backbone.",
        "",
    ),
    "Lightning": (
        under("state_dict.model.", OWN) | {"state_dict.criterion.weight": Z},
        "state_dict.model.",
        "state_dict.criterion.*",
    ),
    "average of weights": (under("module.") | {"n_averaged": torch.tensor(3)}, "module.", "n_averaged"),
    "transformers' wrapper": (under("timm_model.", OWN), "timm_model.", ""),
    "DINO": (under("teacher.backbone.") | under("teacher.", HEAD_OF_ITS_OWN), "teacher.backbone.", "teacher.head.*"),
    "DINO's backbone and head in one": (BACKBONE | HEAD_OF_ITS_OWN, "", "head.*"),
    "nests in nests": (
        under("ema.module.state_dict.") | {"ema.optimizer.state.weight": Z},
        "ema.module.state_dict.",
        "ema.optimizer.*",
    ),
    "SimMIM": (
        under("encoder.") | {"encoder.mask_token": Z, "decoder.0.weight": Z},
        "encoder.",
        "decoder.*, mask_token",
    ),
    "MAE": (
        under("model.") | {"model.mask_token": Z, "model.decoder_pos_embed": Z},
        "model.",
        "mask_token, decoder_pos_embed",
    ),
    "copy of itself": (OWN | under("target_encoder."), "", "target_encoder.*"),
    "own checkpoint": (under("model.", OWN) | under("model_ema.", OWN), "model.", "model_ema.*"),
    "what training scripts list": (under("state_dict.") | under("state_dict_ema."), "state_dict.", "state_dict_ema.*"),
    "a part of another model": ({"model.rpn.weight": Z} | under("backbone."), "backbone.", "model.*"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_model_is_found_and_what_lies_beside_it_named(kind):
    tensors, prefix, left_out = WRAPPED[kind]
    reading, line = found(tensors)
    assert reading.prefix == prefix and reading.layout == "timm"
    assert all(torch.equal(reading.weights[key], OWN[key]) for key in reading.weights)
    assert reading.weights.keys() == (OWN if "head.bias" in reading.weights else BACKBONE).keys()
    count = f"{len(BACKBONE)} of {len(BACKBONE)} tensors of tiny taken from x.pth"
    head = "5 classes" if "head.bias" in reading.weights else "none"
    said = f"; left out: {left_out}" * bool(left_out)
    assert line == f"{count} (timm layout{f' under {prefix}' * bool(prefix)}); head: {head}{said}"


def test_only_what_is_asked_for_is_read():
    read = []
    tensors = Weights({key: tuple(value.shape) for key, value in under("a.b.").items()}, lambda key: read.append(key))
    found(tensors)[0].weights["norm.bias"]
    assert read == ["a.b.norm.bias"]


def test_head_of_other_classes_counts_apart():
    reading, line = found(BACKBONE | {"head.weight": torch.ones(7, 12), "head.bias": torch.ones(7)})
    assert reading.weights["head.bias"].shape == (7,) and line.endswith("; head: 7 classes")


def test_many_groups_left_out_are_counted():
    assert found(OWN | {f"aux{number}.weight": Z for number in range(13)})[1].endswith("aux8.*, aux9.* and 3 more")


# ---- several models in a file ----

MOCO = under("state_dict.module.base_encoder.") | under("state_dict.module.momentum_encoder.")
DINO = under("student.module.backbone.") | under("teacher.backbone.") | {"teacher.head.weight": Z}
SEVERAL = {
    "MoCo": (MOCO, "--model_prefix module.base_encoder. or --model_prefix module.momentum_encoder."),
    "DINO": (DINO, "--model_prefix student.module.backbone. or --model_prefix teacher.backbone."),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_models_that_fit_are_listed(kind):
    tensors, picks = SEVERAL[kind]
    with pytest.raises(UserError, match=f"^--pretrained_path x.pth holds tiny 2 times: pick one with {picks}$"):
        found(tensors)
    if "state_dict" in next(iter(tensors)):  # the same option picks if the part is named
        with pytest.raises(UserError, match=f"pick one with {picks}$"):
            found(tensors, Part("state_dict"))


def test_pick_for_a_distillation_names_the_whole_key():
    with pytest.raises(
        UserError, match=r"pick one with --teacher_key state_dict\.module\.base_encoder or --teacher_key s"
    ):
        found(MOCO, pick="--teacher_key")
    assert found(MOCO, Part("state_dict.module.base_encoder"))[0].prefix == "state_dict.module.base_encoder."


@pytest.mark.parametrize(
    ("tensors", "part", "prefix"),
    [
        (MOCO, Part(prefix="module.base_encoder."), "state_dict.module.base_encoder."),
        (MOCO, Part(prefix="module.momentum_encoder"), "state_dict.module.momentum_encoder."),
        (MOCO, Part(prefix="state_dict.module.base_encoder."), "state_dict.module.base_encoder."),
        (DINO, Part(prefix="teacher."), "teacher.backbone."),
        (DINO, Part("teacher"), "teacher.backbone."),
        (DINO, Part("student", "module."), "student.module.backbone."),
        (MOCO, Part("state_dict", "module.base_encoder."), "state_dict.module.base_encoder."),
        (under("module._orig_mod."), Part(prefix="module._orig_mod."), "module._orig_mod."),
        (under("model.", WIDER) | under("ema.model."), Part("ema"), "ema.model."),
        (OWN | under("target_encoder."), Part(prefix="target_encoder."), "target_encoder."),
    ],
)
def test_key_and_prefix_pick_a_model(tensors, part, prefix):
    assert found(tensors, part)[0].prefix == prefix


def test_key_or_prefix_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match=r"x\.pth: no key begins with --model_prefix ema\.; its keys: student\.module"):
        found(DINO, Part(prefix="ema."))
    with pytest.raises(
        UserError, match=r"x\.pth has no weights under ema \(--model_key, --teacher_key\); its keys: stud"
    ):
        found(DINO, Part("ema"))


CUT = [  # a file, where to look in it, what to give instead
    (
        MOCO,
        Part(prefix="module.base_encoder.bl"),
        "under state_dict.module.base_encoder.: give {} module.base_encoder.",
    ),
    (
        MOCO,
        Part(prefix="module.base_encoder.norm."),
        "under state_dict.module.base_encoder.: give {} module.base_encoder.",
    ),
    (OWN, Part(prefix="blocks.1."), "at the top of the file: leave it out"),
    (under("model.", OWN), Part(prefix="model.blocks.0.attn.qkv.weight"), "under model.: leave it out"),
    (under("model.", OWN), Part("model.blocks"), "under model.: give {} model"),
    (OWN, Part("blocks"), "at the top of the file: leave it out"),
]


@pytest.mark.parametrize(("tensors", "part", "instead"), CUT)
def test_prefix_or_key_that_cuts_the_model_apart_is_said(tensors, part, instead):
    option, given = ("--model_prefix", part.prefix) if part.prefix else ("--model_key", part.key)
    line = f"--pretrained_path x.pth: {option} {given} cuts apart tiny, which lies {instead.format(option)}"
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        found(tensors, part)


def test_prefix_of_another_model_beside_cuts_nothing():
    for tensors in (OWN | under("target_encoder.", WIDER), under("model.", OWN) | under("target_encoder.", WIDER)):
        with pytest.raises(UserError, match=r"x\.pth has cls_token \[1, 1, 24\], unlike the"):
            found(tensors, Part(prefix="target_encoder."))


def test_defaults_of_both_scripts_find_the_same_part():
    several = under("state_dict.") | under("state_dict_ema.")
    keys = [selection_options(["--plan"]).model_key, training_options([]).model_key]
    assert [found(several, Part(key))[0].prefix for key in keys] == ["state_dict."] * 2
    with pytest.raises(UserError, match="holds tiny 2 times"):  # a list of one's own is no list of the usual parts
        found(several, Part("ema|model_ema"))


# ---- other models ----

ANOTHER = {  # tensors beside a whole fit, or in place of some, that make it another model
    "deeper": "blocks.2.norm1.bias",
    "LayerScale": "blocks.0.ls1.gamma",
    "norms of queries": "blocks.1.attn.q_norm.weight",
    "norm before the blocks": "norm_pre.weight",
    "norm after pooling": "fc_norm.weight",
    "registers": "reg_token",
    "registers under another name": "register_tokens",
    "distilled": "dist_token",
    "position embedding of its own": "absolute_pos_embed",
    "pooled by attention": "attn_pool.q.weight",
    "stem": "patch_embed.norm.weight",
}


@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
@pytest.mark.parametrize("kind", ANOTHER)
def test_tensors_that_change_the_function_are_not_left_out(kind, prefix):
    key = ANOTHER[kind]
    with pytest.raises(UserError, match=f"^--pretrained_path x.pth has {key}, which is no tensor of tiny; see --pretr"):
        found(under(prefix, OWN | {key: Z}))


def test_lacking_tensor_or_other_shape_stays_an_error():
    lacking = {key: value for key, value in OWN.items() if key != "blocks.1.norm1.bias"}
    for prefix in ("", "module."):
        with pytest.raises(UserError, match=r"has no blocks\.1\.norm1\.bias, unlike the \[12\] of tiny"):
            found(under(prefix, lacking) | {"ema.weight": Z})
        with pytest.raises(UserError, match=r"has norm\.bias \[3, 3\], unlike the \[12\] of tiny"):
            found(under(prefix, OWN | {"norm.bias": Z}))
    with pytest.raises(UserError, match=r"has cls_token \[1, 1, 24\]"):  # not the average, which happens to fit
        found(under("model.", WIDER) | under("model_ema.", OWN))


def test_other_family_shows_what_the_keys_look_like():
    known = "timm, its original release, transformers, torchvision, MMPretrain"
    message = rf"has no layout that tiny is known in \({known}\): its keys look like trunk\.N\.mix\.weight, trunk\.N\.mix\.bias$"
    with pytest.raises(UserError, match=message):
        found({f"trunk.{number}.mix.{part}": Z for number in range(9) for part in ("weight", "bias")})


# ---- other layouts ----


def test_classifier_beside_a_wrapped_model_is_found():
    """MMPretrain's ResNet has timm's names under backbone. and its classifier in head.fc."""
    model = models.create("resnet18", {"num_classes": 5, "channels": (4, 4, 4, 4), "layers": (1, 1, 1, 1)})
    weights = random_tensors(model, torch.float32)
    file = {f"head.{key}" if key.startswith("fc.") else f"backbone.{key}": value for key, value in weights.items()}
    reading, line = found(under("state_dict.", file), model=model)
    assert_same(dict(reading.weights), weights)
    assert "(MMPretrain layout under state_dict.); head: 5 classes" in line


def test_other_layout_is_found_under_a_prefix():
    kwargs = {"depths": (1, 1, 2, 1), "dims": (4, 6, 8, 10), "num_classes": 5}
    model = models.create("convnext_femto", kwargs)
    weights = random_tensors(model, torch.float32)
    released = convnext_as_released(weights)
    for prefix in ("", "module.", "teacher.backbone."):
        reading, line = found(under(prefix, released) | {"mask_token": Z[None]}, model=model)
        assert_same(dict(reading.weights), weights)
        assert (reading.prefix, reading.layout) == (prefix, "original") and reading.weights.whole
        assert f"(original layout{f' under {prefix}' * bool(prefix)}); head: 5 classes; left out: mask_token" in line
    with pytest.raises(
        UserError, match=r"holds tiny 2 times: pick one with --model_prefix student\. or --model_prefix te"
    ):
        found(under("student.", released) | under("teacher.", released), model=model)


def test_resized_embeddings_are_warned_of(caplog):
    other = models.create("vit_tiny", KWARGS | {"img_size": 32})
    reading, _ = found(under("model.", random_tensors(other, torch.float32)))
    assert reading.layout == "timm"
    log_reading(reading, Wanted(MODEL, "tiny", ""), "x.pth")
    assert "x.pth: timm made [1, 5, 12] of pos_embed [1, 17, 12]: is it a file of this model?" in caplog.text
