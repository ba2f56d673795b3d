"""Print the likeliest classes of images by a trained model: a run of main.py, or a folder of export.py."""

import sys

try:
    from options.tools import predict_options
except ImportError as error:  # Python was told not to look beside this file
    sys.exit(f"predict.py: error: {error}: unset PYTHONSAFEPATH, and start python without -P and -I")

if __name__ == "__main__":
    predict_options()  # answer -h and usage errors before importing torch
    from requirements import require_packages  # here, because -h need not wait for it

    require_packages()

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from deploy.exported import Exported, read_exported
from images.folders import ENDINGS, Listing
from images.images import BadImage, Images, printable
from training.distributed import pick_device
from utils import UserError, run_script, start_logging

log = logging.getLogger(__name__)

BATCH = 32


def main(argv: list[str] | None = None) -> None:
    """Run the script: print a line per image."""
    options = predict_options(argv)
    start_logging()
    device = pick_device(options.device)
    paths = [path for name in options.images for path in image_files(name)]
    exported = read_exported(Path(options.model), options.model_key)
    labels = exported.labels
    bad = 0
    for path, probabilities in zip(paths, predict(exported, paths, device), strict=True):
        if isinstance(probabilities, BadImage):
            bad += 1
            log.error("%s", probabilities)
            continue
        values, classes = probabilities.topk(min(options.top, len(labels)))
        likeliest = [(labels[number], value) for number, value in zip(classes.tolist(), values.tolist(), strict=True)]
        if options.json:
            entries = [{"class": label, "probability": value} for label, value in likeliest]
            print(json.dumps({"image": path, "classes": entries}))
        else:
            print(f"{printable(path)}: {', '.join(f'{label} {100 * value:.1f} %' for label, value in likeliest)}")
    if bad:
        raise UserError(f"{bad} of {len(paths)} images could not be read")


def image_files(name: str) -> list[str]:
    """Return the image file `name`, or all those in and below the folder `name`; UserError if there are none."""
    if not os.path.isdir(name):
        if not os.path.isfile(name):
            raise UserError(f"{name} is neither an image nor a folder")
        return [name]
    listing = Listing()
    files = listing.images(name)
    if not files:
        raise UserError(f"{name}: no file in this folder ends in {ENDINGS}")
    listing.report()
    return files


@torch.inference_mode()
def predict(exported: Exported, paths: list[str], device: torch.device) -> Iterator[Tensor | BadImage]:
    """Yield the probabilities [classes] of each image, in order, or the error of one that cannot be read."""
    model, transform = exported.build().to(device), exported.transform()
    images = Images("images", [0] * len(paths), paths=paths)
    images = images.upright() if exported.upright else images

    def pixels(index: int) -> Tensor | BadImage:
        try:
            return transform(images[index][0].convert(exported.mode))
        except BadImage as error:
            return error

    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without Python's lock
        for start in range(0, len(paths), BATCH):
            batch = list(pool.map(pixels, range(len(paths))[start : start + BATCH]))
            readable = [each for each in batch if isinstance(each, Tensor)]
            answers = iter(model(torch.stack(readable).to(device)).float().softmax(1).cpu() if readable else ())
            yield from (next(answers) if isinstance(each, Tensor) else each for each in batch)


if __name__ == "__main__":
    sys.exit(run_script(main))
