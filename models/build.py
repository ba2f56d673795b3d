"""Build models by name. The paper's short names come before timm's."""

import argparse
import contextlib
import inspect
import warnings
from dataclasses import dataclass, field

import timm
import torch
from timm.models import get_deprecated_models, get_pretrained_cfg, is_model, list_models, list_pretrained
from torch import nn
from torch.overrides import TorchFunctionMode

from models.pixels import image_channels
from utils import UserError, first_line, hint

# timm builds its smaller ConvNeXts with 1x1 convolutions. The paper's have linear layers (conv_mlp=False) in every size,
# so that the weights of the larger ones fit
VARIANTS = {
    **{f"vit_{size}": (f"vit_{size}_patch16_224", {}) for size in ("tiny", "small", "base", "large")},
    **{
        f"convnext_{size}": (f"convnext_{size}", {"conv_mlp": False})
        for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "xlarge")
    },
}
# arguments of timm's factory that load weights or place the model: only weightfiles/ may read a file
RESERVED = frozenset(
    "cache_dir checkpoint_path device features_only pretrained pretrained_cfg pretrained_cfg_overlay".split()
)
# names of timm 0.6.12 that timm 1.x neither has nor maps to a new one
WITHOUT_SUCCESSOR = frozenset(
    "beit_base_patch16_224_in22k beit_large_patch16_224_in22k beitv2_base_patch16_224_in22k "
    "beitv2_large_patch16_224_in22k densenet121d densenet264 densenet264d_iabn ese_vovnet99b_iabn gluon_xception65 "
    "maxvit_base_224 maxvit_large_224 maxvit_small_224 maxvit_tiny_224 maxvit_xlarge_224 regnety_040s_gn "
    "resnetv2_50d_evob semobilevit_s".split()
)


@dataclass(frozen=True)
class ModelSpec:
    """A model by its name and the arguments for its constructor."""

    name: str
    kwargs: dict = field(default_factory=dict)


def timm_arguments(name: str, kwargs: dict) -> tuple[str, dict]:
    """Translate a model's name and arguments into timm's. `kwargs` override the defaults of our short names.

    Names of timm 0.6.12 become their successors in timm 1.x. An unknown name raises a UserError with the nearest ones.
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
    reason = "was dropped by timm 1.x without a successor" if name in WITHOUT_SUCCESSOR else "is not a model"
    raise UserError(f"{name} {reason} (timm {timm.__version__}){hint(name, known)}")


def our_name(architecture: str, arguments: dict) -> str:
    """Return a name for timm's own `architecture`, with a tag where ours of that name has other defaults."""
    _, defaults = VARIANTS.get(architecture, (None, {}))
    tag = "" if defaults.keys() <= arguments.keys() else f".{get_pretrained_cfg(architecture).tag}"
    return architecture + tag


class _WithoutValues(TorchFunctionMode):
    """Skip the calls by which constructors fill tensors: on the meta device they change nothing but take most of the time.

    CPU time to build, with this class and without: ViT-L 15 and 95 ms, ViT-S 8 and 49, ViT-T 8 and 47 (medians of 7).
    A whole selection of ViT-T from ViT-S builds both and takes 200 ms.
    """

    FILLING = frozenset(
        "add_ clamp_ constant_ copy_ div_ erfinv_ fill_ kaiming_normal_ kaiming_uniform_ mul_ normal_ ones_ sub_ "
        "trunc_normal_ uniform_ xavier_uniform_ zero_ zeros_".split()
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.FILLING:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def create(name: str, kwargs: dict, *, device: str = "cpu", short: bool = True) -> nn.Module:
    """Build the model `name` with `kwargs`. On device "meta" it has shapes but no values.

    With `short` false, the name is timm's own, even if it is one of our short names too, as convnext_femto is. Raises
    UserError for an unknown name and for arguments that the constructor rejects.
    """
    timm_name, arguments = timm_arguments(name, kwargs) if short else (name, kwargs)
    for reserved in RESERVED & kwargs.keys():
        raise UserError(f"{reserved}={kwargs[reserved]} is not an argument of a model's shape; leave it out")
    try:
        values = _WithoutValues() if device == "meta" else contextlib.nullcontext()
        with torch.device(device), values, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # timm warns of its old names, which timm_arguments handles
            return timm.create_model(timm_name, **arguments)
    except (TypeError, AssertionError, LookupError, ValueError, ArithmeticError, RuntimeError, OSError) as error:
        # timm's constructors raise the first five; its name look-up and hub client raise the last two
        if name.startswith("hf-hub:"):
            raise UserError(f"{name} cannot be loaded: {first_line(error)}; give --pretrained_path FILE") from error
        raise UserError(
            f"{name} cannot be built{f' with {arguments}' * bool(arguments)}: {first_line(error)}"
        ) from error


def constructor_arguments(options: argparse.Namespace) -> dict:
    """Return the arguments that main.py's options set in the model's constructor.

    The two ConvNeXt options apply to our short names only: timm's variants have their own values, which
    `--model_kwargs` can change.
    """
    arguments = {"drop_path_rate": options.drop_path} if options.drop_path else {}
    if options.model in VARIANTS and options.model.startswith("convnext_"):
        arguments |= {"ls_init_value": options.layer_scale_init_value, "head_init_scale": options.head_init_scale}
    elif (options.head_init_scale, options.layer_scale_init_value) != (1.0, 1e-6):
        raise UserError(
            f"--head_init_scale and --layer_scale_init_value are for convnext_* only, but --model is {options.model}"
        )
    if "num_classes" in options.model_kwargs:
        raise UserError("--model_kwargs num_classes: the number of classes comes from the data; --nb_classes checks it")
    return arguments | options.model_kwargs


def build_model(name: str, *, num_classes: int, input_size: int, model_kwargs: dict | None = None) -> nn.Module:
    """Build a model to train, with random weights from torch's global generator.

    `input_size` (pixels) is passed on to models that ask for an image size.
    """
    given = {"num_classes": num_classes, **(model_kwargs or {})}
    if "img_size" not in given and takes_image_size(create(name, given, device="meta")):
        given["img_size"] = input_size
    model = create(name, given)
    shape = (image_channels(given, "--model_kwargs"), input_size, input_size)
    check_forward(model, f"--model {name}", shape, num_classes)
    return model


def takes_image_size(model: nn.Module) -> bool:
    """Tell whether the model's constructor, or a base class's, has a parameter for the image size."""
    return any("img_size" in inspect.signature(kind.__init__).parameters for kind in type(model).__mro__[:-1])


@torch.no_grad()
def check_forward(
    model: nn.Module,
    name: str,
    image_shape: tuple[int, int, int],
    num_classes: int | None,
    arguments: str = "--model_kwargs",
) -> int:
    """Return how many outputs the model gives for an image of `image_shape`: channels, height and width.

    Raises UserError unless it takes such images and the outputs are `num_classes` (None: any number). `name` and
    `arguments` are the options that name the model and its arguments.
    """
    try:
        shape = list(model.eval()(torch.zeros(2, *image_shape)).shape)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        size = " x ".join(map(str, image_shape[1:]))
        reason = f"{name} does not take images of {size}: {first_line(error)}"
        raise UserError(f"{reason}; see --input_size and {arguments}") from error
    if shape != [2, num_classes or shape[-1]]:
        raise UserError(f"{name} gives {shape} for 2 images, not [2, {num_classes or 'features'}]; see {arguments}")
    model.train()
    return shape[1]
