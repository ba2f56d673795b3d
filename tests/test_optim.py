import hashlib

import numpy as np
import pytest
import torch

import models
from models.build import constructor_arguments
from optim_factory import cosine_schedule, create_optimizer, parameter_groups, set_schedules
from options.training import training_options
from utils import UserError


def groups_of(model, *words):
    return parameter_groups(model, training_options(words))


def optimizer_of(tensor, *words):
    groups = [{"params": [tensor], "weight_decay": 0.05, "lr_scale": 1.0}]
    return create_optimizer(groups, training_options(["--lr", "0.1", *words]))


def test_schedules_equal_the_originals(reference):
    settings = {  # base, final, steps, warm-up steps; from the names of the recorded schedules
        "cifar100_vit": (2e-3, 1e-6, 300 * 97, 50 * 97),
        "cifar100_convnext": (4e-3, 1e-6, 300 * 48, 50 * 48),
        "imagenet": (4e-3, 1e-6, 300 * 312, 50 * 312),
        "no warmup": (1e-3, 1e-6, 10, 0),
        "warmup_steps 3": (1e-3, 1e-6, 10, 3),
    }
    for name, recorded in reference["cosine_scheduler"].items():
        base, final, steps, warmup = settings[name.split(":")[0]]
        schedule = cosine_schedule(base, final, steps=steps, warmup_steps=warmup)
        assert len(schedule) == recorded["length"] == steps
        for step, value in recorded["at"].items():
            assert schedule[int(step)] == pytest.approx(value, rel=1e-12, abs=0), (name, step)
        assert schedule.sum() == pytest.approx(recorded["sum"], rel=1e-12)


def test_schedule_by_hand():
    # half a cosine from 2 to 0 over 4 steps: 2, 1 + cos(45 deg), 1, 1 - cos(45 deg)
    assert cosine_schedule(2, 0, steps=4) == pytest.approx([2, 1 + np.sqrt(0.5), 1, 1 - np.sqrt(0.5)])
    assert cosine_schedule(2, 2, steps=3).tolist() == [2, 2, 2]
    assert cosine_schedule(3, 0, steps=4, warmup_steps=4).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="5 updates is longer than the run of 4"):
        cosine_schedule(1, 0, steps=4, warmup_steps=5)


def test_parameter_groups_equal_the_originals(reference):
    for name, recorded in reference["parameter_groups (weight_decay 0.05)"].items():
        model = models.create(name, {"num_classes": 100}, device="meta")
        names = {id(parameter): key for key, parameter in model.named_parameters()}
        groups = {group["weight_decay"]: group for group in groups_of(model, "--weight_decay", "0.05")}
        assert len(groups) == len(recorded) == 2
        for expected in recorded:
            group = groups[expected["weight_decay"]]
            members = [names[id(parameter)] for parameter in group["params"]]
            assert group["lr_scale"] == expected["lr_scale"] and len(members) == expected["count"]
            assert members[: len(expected["first"])] == expected["first"]
            assert hashlib.sha256("\n".join(sorted(members)).encode()).hexdigest() == expected["names_sha256"]


def test_drop_path_rates_equal_the_originals(reference):
    arguments = constructor_arguments(training_options(["--model", "convnext_femto", "--drop_path", "0.1"]))
    model = models.create("convnext_femto", arguments, device="meta")
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    recorded = reference["drop_path_rates (--drop_path 0.1)"]["convnext_femto"]
    assert rates == pytest.approx(recorded, abs=5e-7)  # 6 digits recorded


@pytest.mark.parametrize(
    ("name", "head", "stem"),
    [("vit_tiny", "head.weight", "patch_embed.proj.weight"), ("convnext_femto", "head.fc.weight", "stem.0.weight")],
)
def test_layer_decay_falls_from_the_head_to_the_stem(name, head, stem):
    model = models.create(name, {"num_classes": 10}, device="meta")
    groups = groups_of(model, "--layer_decay", "0.5")
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    scale = {key: scales[id(parameter)] for key, parameter in model.named_parameters()}
    blocks = [scale[key] for key in scale if key.endswith("mlp.fc1.weight")]
    assert scale[head] == 1.0
    assert scale[stem] == min(scale.values()) < blocks[0]
    assert blocks == sorted(blocks) and blocks[-1] == 0.5


def test_schedule_values_reach_each_group_by_its_scale():
    model = models.create("vit_tiny", {"embed_dim": 16, "depth": 1, "num_heads": 2})
    options = training_options(["--layer_decay", "0.5"])
    optimizer = create_optimizer(parameter_groups(model, options), options)
    set_schedules(optimizer, 0.1, 0.3)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.1 * group["lr_scale"] and type(group["lr"]) is float
        assert group["weight_decay"] in (0.0, 0.3)


def test_adamw_is_fused_and_its_step_is_the_papers():
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = optimizer_of(weight)
    assert optimizer.defaults["fused"] and optimizer.defaults["betas"] == (0.9, 0.999)
    weight.grad = torch.tensor([[0.5, 3.0]])
    optimizer.step()
    # first step: decay by 1 - lr * wd, then lr * sign(gradient), since both moments are unbiased to the gradient
    assert weight.detach() == pytest.approx(torch.tensor([[1 - 0.005 - 0.1, -2 + 0.01 - 0.1]]), abs=1e-6)


@pytest.mark.parametrize("name", ["sgd", "lamb", "adamw", "lion", "nadamw", "lookahead_adamw"])
def test_optimizers_of_timm_step(name):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = optimizer_of(weight, "--opt", name, "--opt_betas", "0.8", "0.9")
    assert optimizer.defaults.get("betas", (0.8, 0.9)) == (0.8, 0.9)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert (weight < 1).all()


@pytest.mark.parametrize(("name", "betas", "takes"), [("lion", "0 .9 .9", 2), ("muon", ".9", 2), ("adan", ".9 .9", 3)])
def test_wrong_count_of_betas_is_named(name, betas, takes):
    betas = betas.split()
    with pytest.raises(UserError, match=f"--opt {name} takes {takes} betas, but --opt_betas gives {len(betas)}"):
        optimizer_of(torch.nn.Parameter(torch.ones(2, 2)), "--opt", name, "--opt_betas", *betas)


def test_betas_that_no_one_takes_are_said(caplog):
    optimizer_of(torch.nn.Parameter(torch.ones(2, 2)), "--opt", "sgd", "--opt_betas", "0.9")
    assert "--opt_betas has no effect: --opt sgd has no betas" in caplog.text
