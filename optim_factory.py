"""Parameter groups, the optimizer, and schedules as arrays over optimizer steps."""

import argparse
import inspect
import logging

import numpy as np
import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_class,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn

from utils import UserError, first_line, hint

log = logging.getLogger(__name__)


def parameter_groups(model: nn.Module, options: argparse.Namespace) -> list[dict]:
    """Group the trainable parameters by weight decay and, with a layer decay, by depth; each group has an `lr_scale`.

    1-d tensors, biases and the model's own exceptions (tokens, position embedding) have no weight decay.
    """
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    given = {"weight_decay": options.weight_decay, "no_weight_decay_list": exempt}
    if options.layer_decay < 1:
        groups = param_groups_layer_decay(model, layer_decay=options.layer_decay, **given)
    else:
        groups = param_groups_weight_decay(model, **given)
    return [{"lr_scale": 1.0, **group} for group in groups if group["params"]]


def create_optimizer(groups: list[dict], options: argparse.Namespace) -> torch.optim.Optimizer:
    """Build timm's optimizer named by `--opt`, fused if possible: plain AdamW reads 32 scalars back per step, fused none."""
    name, betas = options.opt, options.opt_betas
    if "adahessian" in name:
        raise UserError("--opt adahessian needs second derivatives, which this training loop does not compute")
    given = {"eps": options.opt_eps, "betas": betas and tuple(betas)}
    inner = name.lower().removeprefix("lookahead_")
    try:
        accepted = inspect.signature(get_optimizer_class(inner, bind_defaults=False).__init__).parameters
        kwargs = {key: value for key, value in given.items() if value is not None and key in accepted}
        if "fused" in accepted:
            kwargs["fused"] = True
        kwargs |= {"lr": options.lr, "momentum": options.momentum}
        _check_betas(name, betas, accepted.get("betas"))
        return create_optimizer_v2(groups, opt=name, weight_decay=0.0, **kwargs)
    except (ValueError, TypeError, AssertionError, IndexError, ImportError) as error:
        known = list_optimizers()
        similar = "" if inner in known else hint(name, known)
        raise UserError(f"--opt {name} cannot be built: {first_line(error)}{similar}") from error


def _check_betas(name: str, betas: list[float] | None, parameter: inspect.Parameter | None) -> None:
    """UserError unless an optimizer's parameter has as many betas by default; a warning if it has no such parameter."""
    if betas and parameter is None:
        log.warning("--opt_betas has no effect: --opt %s has no betas", name)
    elif betas and parameter.default and len(parameter.default) != len(betas):  # Adafactor's default is None
        raise UserError(f"--opt {name} takes {len(parameter.default)} betas, but --opt_betas gives {len(betas)}")


def cosine_schedule(base: float, final: float, *, steps: int, warmup_steps: int = 0) -> np.ndarray:
    """Return a value per update, float64 [steps]: linear from 0 to `base`, then half a cosine towards `final`.

    The warm-up ends at `base` and the cosine starts there again, as in the paper's code (utils.py, `cosine_scheduler`,
    at e9b6d0c). ValueError if the warm-up is longer than the run.
    """
    if warmup_steps > steps:
        raise ValueError(f"a warm-up of {warmup_steps} updates is longer than the run of {steps}")
    rest = steps - warmup_steps
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(rest) / max(rest, 1)))
    return np.concatenate([np.linspace(0, base, warmup_steps), cosine])


def set_schedules(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set each group's learning rate for the next update, and its weight decay if it has any."""
    for group in optimizer.param_groups:
        group["lr"] = float(lr) * group["lr_scale"]
        if group["weight_decay"] > 0:
            group["weight_decay"] = float(weight_decay)
