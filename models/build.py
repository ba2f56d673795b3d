"""Models by name, the paper's short names before timm's, and the fit of weights to them."""

import contextlib
import difflib
import inspect
import warnings

import timm
import torch
from timm.models import (
    get_deprecated_models,
    is_model,
    list_models,
    list_pretrained,
)
from torch import nn
from torch.overrides import TorchFunctionMode

from utils import UserError, first_line

# timm builds its smaller ConvNeXts with 1x1 convolutions; the paper's have linear layers throughout (conv_mlp=False),
# which is what the weights of the larger ones fit
VARIANTS = {
    **{f"vit_{size}": (f"vit_{size}_patch16_224", {}) for size in ("tiny", "small", "base", "large")},
    **{
        f"convnext_{size}": (f"convnext_{size}", {"conv_mlp": False})
        for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "xlarge")
    },
}
# arguments of timm's factory that load weights or place the model: files are read by weights.py alone
RESERVED = {
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "device",
    "features_only",
}

# names of timm 0.6.12 that timm 1.x neither has nor maps to a new one
WITHOUT_SUCCESSOR = frozenset(
    "beit_base_patch16_224_in22k beit_large_patch16_224_in22k beitv2_base_patch16_224_in22k "
    "beitv2_large_patch16_224_in22k densenet121d densenet264 densenet264d_iabn ese_vovnet99b_iabn gluon_xception65 "
    "maxvit_base_224 maxvit_large_224 maxvit_small_224 maxvit_tiny_224 maxvit_xlarge_224 regnety_040s_gn "
    "resnetv2_50d_evob semobilevit_s".split()
)


def timm_arguments(name: str, kwargs: dict) -> tuple[str, dict]:
    """timm's name and constructor arguments of the model `name`, `kwargs` before the defaults of our short names.

    Names of timm 0.6.12 are mapped to their successors. Raises UserError with the nearest names for an unknown one.
    """
    if name in VARIANTS:
        timm_name, defaults = VARIANTS[name]
        return timm_name, {**defaults, **kwargs}
    if name.startswith("hf-hub:"):
        return name, dict(kwargs)
    name = get_deprecated_models().get(name) or name
    if is_model(name.partition(".")[0]) and name not in get_deprecated_models():
        return name, dict(kwargs)
    known = [*VARIANTS, *list_models(), *list_pretrained()]
    nearest = ", ".join(difflib.get_close_matches(name, sorted(set(known)), n=3, cutoff=0.4)) or "none"
    reason = "was dropped by timm 1.x without a successor" if name in WITHOUT_SUCCESSOR else "is not a model"
    raise UserError(f"{name} {reason} (timm {timm.__version__}); nearest names: {nearest}")


class _WithoutValues(TorchFunctionMode):
    """Leaves out what constructors do to fill tensors: on the meta device it changes nothing and takes most of the time."""

    FILLING = frozenset(
        "add_ clamp_ constant_ copy_ div_ erfinv_ fill_ kaiming_normal_ kaiming_uniform_ mul_ normal_ ones_ sub_ "
        "trunc_normal_ uniform_ xavier_uniform_ zero_ zeros_".split()
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.FILLING:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def create(name: str, kwargs: dict, *, device: str = "cpu") -> nn.Module:
    """The model `name` built with `kwargs`; on device "meta" it has shapes and no values.

    Raises UserError for an unknown name and for arguments that the constructor does not take.
    """
    timm_name, arguments = timm_arguments(name, kwargs)
    for reserved in RESERVED & kwargs.keys():
        raise UserError(f"{reserved}={kwargs[reserved]} is not an argument of a model's shape; leave it out")
    try:
        values = _WithoutValues() if device == "meta" else contextlib.nullcontext()
        with torch.device(device), values, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # timm on its own old names, handled above
            return timm.create_model(timm_name, **arguments)
    except (TypeError, AssertionError, LookupError, ValueError, ArithmeticError, RuntimeError, OSError) as error:
        # timm's constructors raise the first five, its look-up of names and its hub client the last two
        if name.startswith("hf-hub:"):
            raise UserError(f"{name} cannot be loaded: {first_line(error)}; give --pretrained_path FILE") from error
        raise UserError(
            f"{name} cannot be built{f' with {arguments}' * bool(arguments)}: {first_line(error)}"
        ) from error


def build_model(
    name: str,
    *,
    num_classes: int,
    input_size: int,
    drop_path: float = 0.0,
    layer_scale_init_value: float = 1e-6,
    head_init_scale: float = 1.0,
    model_kwargs: dict | None = None,
) -> nn.Module:
    """A model to train, randomly initialized from torch's global generator.

    `input_size` (pixels) reaches every model whose positions depend on it. The two ConvNeXt settings reach the
    short names alone: timm's variants bring their own (`model_kwargs` changes them).
    """
    kwargs = {"num_classes": num_classes}
    if drop_path:
        kwargs["drop_path_rate"] = drop_path
    if name in VARIANTS and name.startswith("convnext_"):
        kwargs |= {"ls_init_value": layer_scale_init_value, "head_init_scale": head_init_scale}
    elif (head_init_scale, layer_scale_init_value) != (1.0, 1e-6):
        raise UserError(
            f"--head_init_scale and --layer_scale_init_value are for convnext_* only, but --model is {name}"
        )
    if "num_classes" in (model_kwargs or {}):
        raise UserError("--model_kwargs num_classes: the number of classes comes from the data; --nb_classes checks it")
    given = {**kwargs, **(model_kwargs or {})}
    if "img_size" not in given and takes_image_size(create(name, given, device="meta")):
        given["img_size"] = input_size
    model = create(name, given)
    check_forward(model, f"--model {name}", input_size, num_classes)
    return model


def takes_image_size(model: nn.Module) -> bool:
    """Whether the model's constructor, or one that it passes its arguments on to, asks for the size of its images."""
    return any("img_size" in inspect.signature(kind.__init__).parameters for kind in type(model).__mro__[:-1])


@torch.no_grad()
def check_forward(model: nn.Module, name: str, input_size: int, num_classes: int) -> None:
    """UserError unless the model turns images of `input_size` pixels into `num_classes` logits each."""
    try:
        shape = list(model.eval()(torch.zeros(2, 3, input_size, input_size)).shape)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{name} does not take images of {input_size} x {input_size}: {first_line(error)}"
        raise UserError(f"{reason}; see --input_size and --model_kwargs") from error
    if shape != [2, num_classes]:
        raise UserError(f"{name} gives {shape} for 2 images, not [2, {num_classes}]; see --model_kwargs")
    model.train()
