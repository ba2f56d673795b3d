"""A trained model apart from the run that trained it, described as timm and the Hugging Face Hub describe one."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import timm
from torch import Tensor, nn
from torchvision import transforms

import models
from images.settings import View
from images.transforms import eval_config
from models.build import constructor_arguments
from training.checkpoint import checkpoint_of, options_of, read_checkpoint
from utils import UserError
from weightfiles.folder import MARK, WEIGHTS, mark_of, read_config
from weightfiles.lazy import check_described, open_file
from weightfiles.read import check_finite, flatten

ONNX = "model.onnx"
# Arguments of a constructor that main.py's options set and that change the training alone
TRAINING_ONLY = ("drop_path_rate", "head_init_scale")


@dataclass(frozen=True)
class Exported:
    """A trained model: `config` is the content of its config.json, `tensors` are its weights by timm's names.

    `source` is the file that holds them.
    """

    source: Path
    config: dict
    tensors: dict[str, Tensor]

    @property
    def labels(self) -> list[str]:
        """The names of the classes, or their numbers."""
        return self.config.get("label_names") or [str(number) for number in range(self.config["num_classes"])]

    @property
    def mode(self) -> str:
        """The mode of Pillow's images that the transform takes."""
        return "L" if self.config["pretrained_cfg"]["input_size"][0] == 1 else "RGB"

    @property
    def upright(self) -> bool:
        """Whether images are first turned as their EXIF orientation says, as in a run with --exif true."""
        return mark_of(self.config).get("exif") is True

    def build(self) -> nn.Module:
        """Build the model with its weights, to evaluate. UserError if the weights are another model's."""
        name, arguments = self.config["architecture"], self.config["model_args"]
        model = models.create(name, {"num_classes": self.config["num_classes"], **arguments}, short=False)
        models.check_fit(self.tensors, model, f"{self.source} does not fit the model that is described, {name}")
        model.load_state_dict(self.tensors)
        return model.eval()

    def transform(self) -> transforms.Compose:
        """Build the transform of the images, PIL image of this `mode` to float [channels, S, S]."""
        seen = timm.data.resolve_data_config(pretrained_cfg=self.config["pretrained_cfg"])
        return timm.data.create_transform(**seen)


def from_run(path: Path, state: dict, key: str) -> Exported:
    """Describe the model in a checkpoint of main.py as it was evaluated; `key` is "model" or "model_ema".

    UserError if it has no such weights or is damaged.
    """
    options, classes = options_of(path, state), state["data"].get("classes")
    if not (isinstance(classes, int) or (isinstance(classes, list) and classes)):
        raise UserError(f"{path}: the classes in this checkpoint are damaged")
    if not isinstance(state.get(key), dict):
        raise UserError(f"{path} has no moving average of the weights: its run had no --model_ema true")
    names = [str(number) for number in range(classes)] if isinstance(classes, int) else list(map(str, classes))
    tensors = flatten(state[key])
    check_finite(tensors, path)
    architecture, arguments = _constructor(options)
    own = models.create(architecture, arguments, device="meta", short=False).pretrained_cfg
    kept = {name: own.get(name) for name in ("first_conv", "classifier", "fixed_input_size")}
    config = {
        "architecture": architecture,
        "num_classes": len(names),
        "label_names": names,
        "model_args": arguments,
        "pretrained_cfg": {"num_classes": len(names)} | eval_config(View.from_options(options)) | kept,
        MARK: {"exif": options.exif},
    }
    return Exported(path, config, tensors)


def _constructor(options: argparse.Namespace) -> tuple[str, dict]:
    """Return timm's name of a run's model, and the arguments that decide what it computes in evaluation.

    The image size is one of them even where it is the name's own: transformers builds the model from these alone.
    """
    given = constructor_arguments(options)
    given = {key: given[key] for key in given if key not in TRAINING_ONLY or key in options.model_kwargs}
    name, arguments = models.timm_arguments(options.model, given)
    if models.takes_image_size(models.create(options.model, given, device="meta")):
        arguments.setdefault("img_size", options.input_size)
    if name.startswith("hf-hub:"):
        _, name, saved = timm.models.load_model_config_from_hf(name.removeprefix("hf-hub:"))
        arguments = (saved or {}) | arguments
    return name.partition(".")[0], arguments


def read_exported(location: Path, key: str) -> Exported:
    """Read the model of a run of main.py, of one of its checkpoints, or of a folder of export.py. UserError if there is none."""
    config = read_config(location)
    if config is None:
        path = checkpoint_of(location, key)
        return from_run(path, read_checkpoint(path), key)
    if key != "model":
        raise UserError(f"--model_key {key} is for runs of main.py: {location} holds a single set of weights")
    weights = location / WEIGHTS
    tensors = dict(open_file(weights))
    check_finite(tensors, weights)
    check_described(weights, config)
    return Exported(weights, config, tensors)
