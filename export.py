"""Write a trained model as a folder that timm, transformers and the Hugging Face Hub take, and check it in each of these ways."""

import sys

try:
    from options.tools import export_options
except ImportError as error:  # Python was told not to look beside this file
    sys.exit(f"export.py: error: {error}: unset PYTHONSAFEPATH, and start python without -P and -I")

if __name__ == "__main__":
    export_options()  # answer -h and usage errors before importing torch
    from requirements import require_packages  # here, because -h need not wait for it

    require_packages()

import argparse
import hashlib
import logging
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from datasets import FOLDERS, load_images
from deploy.exported import ONNX, Exported, from_run
from deploy.ways import Way, accuracies, differences, missing, open_ways, write_onnx
from files import check_creatable, write_together
from images.images import Images
from images.settings import View
from images.transforms import eval_transform
from models.build import build_model, constructor_arguments
from models.fit import check_fit
from training.checkpoint import checkpoint_of, options_of, read_checkpoint
from training.teacher import check_same_classes
from utils import UserError, json_lines, run_script, start_logging
from weightfiles.folder import CONFIG, MARK, WEIGHTS, mark_of, read_config

log = logging.getLogger(__name__)

EXPORT_FORMAT = "weight-selection export 1"
CHECKED = 64  # images whose logits are compared
FAR = 0.5  # percentage points between accuracies that should be equal but for the precision of the run


def main(argv: list[str] | None = None) -> Path:
    """Run the script. Return the folder that it wrote."""
    options = export_options(argv)
    start_logging()
    folder = Path(options.folder)
    check_replaceable(folder, options.onnx)
    absent = missing("onnx", "onnxscript") if options.onnx else []
    if absent:
        raise UserError(f"--onnx needs the packages onnx and onnxscript: pip install {' '.join(absent)}")
    path = checkpoint_of(Path(options.run), options.model_key)
    state = read_checkpoint(path)
    exported = from_run(path, state, options.model_key)
    run = options_of(path, state)
    with tempfile.TemporaryDirectory() as scratch:  # checked there, so that a folder is either right or not written
        files = write(Path(scratch), exported, options, state)
        check(Path(scratch), exported, options, run, state["metrics"])
        contents = {folder / name: Path(scratch, name).read_bytes() for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from error
    write_together(contents)
    about = f"{exported.config['architecture']} of {exported.config['num_classes']} classes"
    print(f"{folder}: {about} from {path} (epoch {state['epoch']}), {', '.join(files)}")
    return folder


def check_replaceable(folder: Path, onnx: bool) -> None:
    """UserError if writing to `folder` would destroy what export.py has not written, or leave another model's ONNX file."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    check_creatable(folder / CONFIG, f"{folder} cannot be written to")
    there = [name for name in (CONFIG, WEIGHTS, ONNX) if (folder / name).exists()]
    if there and mark_of(read_config(folder) or {}).get("format") != EXPORT_FORMAT:
        raise UserError(f"{folder / there[0]} was not written by export.py and would be lost: name another folder")
    if ONNX in there and not onnx:
        raise UserError(f"{folder / ONNX} would be left from the export before: name another folder, or give --onnx")


def write(folder: Path, exported: Exported, options: argparse.Namespace, state: dict) -> list[str]:
    """Write the files of the model; return their names, config.json last."""
    # safetensors refuses another order of memory, as --channels_last leaves it, and tensors that share theirs
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in exported.tensors.items()}
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    (folder / WEIGHTS).write_bytes(weights)
    if options.onnx:
        write_onnx(exported.build(), exported.config["pretrained_cfg"]["input_size"], folder / ONNX)
    origin = {"checkpoint": exported.source.name, "epoch": state["epoch"], "weights": options.model_key}
    mark = {"format": EXPORT_FORMAT, "sha256": hashlib.sha256(weights).hexdigest(), **origin}
    text = json_lines(exported.config | {MARK: mark | exported.config[MARK]}, levels=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return [WEIGHTS, *([ONNX] if options.onnx else []), CONFIG]


def check(
    folder: Path, exported: Exported, options: argparse.Namespace, run: argparse.Namespace, metrics: dict
) -> None:
    """Compare each way to load the folder with the run: logits of some images and, if there are labels, accuracy.

    Log what was measured and what was not. UserError if logits differ.
    """
    ways, left_out = open_ways(folder, options.onnx)
    mode, images = exported.mode, evaluation_images(options, run, exported)
    shown = images or random_images(run.input_size)
    indices = np.unique(np.linspace(0, len(shown) - 1, CHECKED).astype(int)).tolist()
    largest = differences(ways, main_way(exported, run), shown, indices, mode)
    measured = {}
    if images and options.check_accuracy:
        log.info("accuracy on %d images by %s; --check_accuracy false skips it", len(images), ", ".join(largest))
        measured = accuracies(ways, images, mode)
    name = {"model": "test_acc1", "model_ema": "test_acc1_ema"}[options.model_key]
    logged = f"the log: {metrics[name]:.2f} %" if name in metrics else "the log has none"
    for way, difference in largest.items():
        compared = f"logits of {len(indices)} {'' if images else 'random '}images within {difference:.1g} of main.py's"
        log.info("%s: %s%s", way, compared, f", accuracy {measured[way]:.2f} % ({logged})" if measured else "")
        if measured and abs(measured[way] - metrics.get(name, measured[way])) > FAR:
            log.warning("%s: the accuracy is not the log's; are these the images that the run was evaluated on?", way)
    for text in left_out:
        log.info("not checked: %s", text)


def main_way(exported: Exported, run: argparse.Namespace) -> Way:
    """Build the model and the transform as main.py does for an evaluation."""
    arguments = constructor_arguments(run)
    count = exported.config["num_classes"]
    model = build_model(run.model, num_classes=count, input_size=run.input_size, model_kwargs=arguments)
    check_fit(exported.tensors, model, f"{exported.source} does not fit its options")
    model.load_state_dict(exported.tensors)
    transform = eval_transform(View.from_options(run))
    return Way("main.py", lambda image: transform(image.convert("RGB")), model.eval())


def evaluation_images(options: argparse.Namespace, run: argparse.Namespace, exported: Exported) -> Images | None:
    """Load the images of --data_path, or those that the run was evaluated on; None, and a warning, if these are gone.

    UserError if --data_path has none or has other classes.
    """
    root, for_evaluation = run.data_path, run.eval_data_path
    if options.data_path:
        root = options.data_path
        has_parts = run.data_set not in FOLDERS or Path(root, "val").is_dir()
        for_evaluation = None if has_parts else root  # the classes may lie in it, as in main.py's --eval_data_path
    keys = {"split": run.val_split, "input_key": run.input_key, "target_key": run.target_key}
    try:
        images = load_images(run.data_set, root, False, eval_data_path=for_evaluation, **keys)
        check_same_classes(exported.labels, images.class_names or images.classes, str(exported.source))
    except UserError as error:
        if options.data_path:
            raise
        log.warning("the run's data cannot be used, so random images alone are checked; see --data_path (%s)", error)
        return None
    images = images.upright() if run.exif else images
    return images.skipping_bad() if run.bad_images == "skip" else images


def random_images(size: int) -> Images:
    """Make images of noise, of sides from half to twice `size`."""
    random = np.random.RandomState(0)
    sides = random.randint(max(1, size // 2), 2 * size + 1, (CHECKED, 2))
    pixels = (random.randint(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sides)
    return Images("random images", [0] * CHECKED, source=[(Image.fromarray(each),) for each in pixels])


if __name__ == "__main__":
    sys.exit(run_script(main))
