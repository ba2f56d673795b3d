"""The ways to load an exported folder, each with the pixels that it makes of an image, and what they give side by side."""

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from deploy.exported import ONNX
from images.images import Images
from utils import UserError, first_line

BATCH = 32
TOLERANCE = 1e-4  # of the largest logit, or of 1


class Way(NamedTuple):
    """A model and its transform, as somebody would use them. Each returns on the CPU what it computed there."""

    name: str
    pixels: Callable[[Image.Image], Tensor]  # [channels, S, S]
    logits: Callable[[Tensor], Tensor]  # [batch, channels, S, S] -> [batch, classes]


def missing(*packages: str) -> list[str]:
    """Return those of the packages that cannot be imported."""
    absent = []
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError:
            absent.append(name)
    return absent


def open_ways(folder: Path, onnx: bool) -> tuple[list[Way], list[str]]:
    """Load the folder in each way whose package is installed; return them, and what is left out and why."""
    ways, left_out = [by_timm(folder)], []
    if missing("transformers"):
        left_out.append("transformers (not installed)")
    elif not hasattr(importlib.import_module("transformers"), "TimmWrapperConfig"):
        left_out.append("transformers (the installed version cannot load models of timm; 4.48 and later can)")
    else:
        ways.append(by_transformers(folder))
    if onnx and missing("onnxruntime"):
        left_out.append(f"{ONNX} (onnxruntime is not installed)")
    elif onnx:
        ways.append(by_onnx(folder, ways[0].pixels))
    return ways, left_out


def by_timm(folder: Path) -> Way:
    """Load the folder by timm."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return Way("timm", transform, model)


def by_transformers(folder: Path) -> Way:
    """Load the folder by transformers, which must be installed."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)

    def pixels(image: Image.Image) -> Tensor:
        return processor(image, return_tensors="pt")["pixel_values"][0]

    return Way("transformers", pixels, lambda batch: model(pixel_values=batch).logits)


def by_onnx(folder: Path, pixels: Callable[[Image.Image], Tensor]) -> Way:
    """Load the folder's ONNX file by onnxruntime, which must be installed; it has no transform of its own."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / ONNX, settings, providers=["CPUExecutionProvider"])
    return Way("ONNX", pixels, lambda batch: torch.from_numpy(session.run(None, {"pixel_values": batch.numpy()})[0]))


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a message of onnxscript's optimizer is more than a node that it leaves as it is."""
    return not record.getMessage().startswith("Skipping constant folding")


def write_onnx(model: nn.Module, shape: Sequence[int], path: Path) -> None:
    """Write a model as ONNX that takes `pixel_values` [batch, *shape], for any batch, and returns `logits` [batch, classes].

    UserError if torch cannot export the model.
    """
    example = (torch.zeros(2, *shape),)  # of two images: torch takes a size of 1 for one that never changes
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    batch = ({0: torch.export.Dim("batch")},)
    logging.getLogger("onnxscript.optimizer._constant_folding").addFilter(_is_news)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of its own deprecated functions
            # in one file: what is published together should not come apart
            torch.onnx.export(
                model, example, path, dynamo=True, dynamic_shapes=batch, external_data=False, verbose=False, **names
            )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"--onnx: torch cannot export this {type(model).__name__}: {first_line(error)}") from error


@torch.inference_mode()
def outputs(
    ways: Sequence[Way], images: Images, indices: Sequence[int], mode: str
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield ({name of a way: logits [batch, classes]}, class numbers [batch]) for these images, converted to Pillow's `mode`.

    The first batch is of one image, so that no way works for a single size of batches alone.
    """
    batches = [indices[:1], *(indices[start : start + BATCH] for start in range(1, len(indices), BATCH))]
    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without Python's lock
        for batch in batches:
            pictures, labels = zip(*pool.map(images.__getitem__, batch), strict=True)
            pictures = [picture.convert(mode) for picture in pictures]
            yield (
                {way.name: way.logits(torch.stack(list(pool.map(way.pixels, pictures)))) for way in ways},
                torch.tensor(labels),
            )


def differences(ways: Sequence[Way], reference: Way, images: Images, indices: Sequence[int], mode: str) -> dict:
    """Return {name of a way: the largest difference of its logits from the reference's}.

    UserError if one is above TOLERANCE.
    """
    given = list(outputs([reference, *ways], images, indices, mode))
    logits = {name: torch.cat([batch[name] for batch, _ in given]) for name in given[0][0]}
    wanted = logits.pop(reference.name)
    largest = {name: float((each - wanted).abs().max()) for name, each in logits.items()}
    limit = TOLERANCE * max(1.0, float(wanted.abs().max()))
    for name, difference in largest.items():
        if not difference <= limit:
            where = f"logits of {len(indices)} images differ by up to {difference:.2g} from {reference.name}'s"
            raise UserError(f"{name} would not compute what {reference.name} does: {where}; nothing was written")
    return largest


def accuracies(ways: Sequence[Way], images: Images, mode: str) -> dict[str, float]:
    """Return {name of a way: its top-1 accuracy on all of the images, in percent}."""
    correct = dict.fromkeys((way.name for way in ways), 0)
    for logits, labels in outputs(ways, images, np.arange(len(images)), mode):
        for name, each in logits.items():
            correct[name] += int((each.argmax(1) == labels).sum())
    return {name: 100 * count / len(images) for name, count in correct.items()}
