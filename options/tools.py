"""The options of sweep.py, export.py and predict.py."""

import argparse

from options.parser import BOOLEAN, Formatter, Parser, number
from options.training import training_options


def sweep_options(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return the validated options of sweep.py, and those that it hands on to main.py, as words.

    End the process with code 2 on a usage error of either.
    """
    parser = _sweep_parser()
    options, words = parser.parse_known_args(argv)
    training = training_options(words, program=parser.prog)
    refused = [
        (options.seed is not None, "--seed is set for each run: --seeds N takes the seeds from 0 to N-1"),
        (training.resume, "--resume is for one run: a sweep resumes each of its runs by itself"),
        (training.eval, "--eval true trains nothing"),
        (training.disable_eval, "--disable_eval true leaves nothing to compare"),
        (not training.save_ckpt, "--save_ckpt false: a run could not be resumed; --save_ckpt_num 1 keeps the newest"),
        (not training.auto_resume, "--auto_resume false: a sweep goes on where it was stopped"),
    ]
    problem = next((message for is_given, message in refused if is_given), None)
    if problem:
        parser.error(problem)
    return options, words


def export_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of export.py; end the process with code 2 on a usage error."""
    return _export_parser().parse_args(argv)


def predict_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of predict.py; end the process with code 2 on a usage error."""
    return _predict_parser().parse_args(argv)


# What follows is laid out by hand, an option or a check per line where it fits.
# fmt: off


def _sweep_parser() -> argparse.ArgumentParser:
    description = ("Train from random init and from selected weights with several seeds, then compare the runs. All other "
        "options go to main.py: python main.py -h lists them.")
    parser = Parser(prog="sweep.py", description=description, formatter_class=Formatter)
    add = parser.add_argument
    add("--initialize", required=True, nargs="+", action="extend", metavar="FILE",
        help="start from these weights, as in main.py; each FILE is compared with random init")
    add("--output_dir", required=True, metavar="FOLDER", help="for the runs, table.md and curves.png; the same command "
        "goes on there")
    add("--seeds", default=3, type=number(int, 1), metavar="N", help="how many")
    add("--nproc_per_node", default=1, type=number(int, 1), metavar="N",
        help="train each run on N processes, by torchrun")
    add("--seed", help=argparse.SUPPRESS)
    return parser


def _export_parser() -> argparse.ArgumentParser:
    description = "Write a trained model as a folder that timm, transformers and the Hugging Face Hub take."
    parser = Parser(prog="export.py", description=description, formatter_class=Formatter)
    add = parser.add_argument
    add("run", metavar="RUN", help="the folder of a run of main.py (its best checkpoint), or a checkpoint")
    add("folder", metavar="OUT", help="folder to write")
    add("--model_key", default="model", choices=("model", "model_ema"), help="the weights, or their moving average")
    add("--onnx", **BOOLEAN, default=False, help="write model.onnx too, for any batch size")
    add("--data_path", metavar="FOLDER", help="where the evaluation data is (default: where the run had it)")
    add("--check_accuracy", **BOOLEAN, default=True,
        help="measure the accuracy on all of the evaluation data; false: compare the logits of 64 images alone")
    return parser


def _predict_parser() -> argparse.ArgumentParser:
    description = "Print the likeliest classes of images, a line per image."
    parser = Parser(prog="predict.py", description=description, formatter_class=Formatter)
    add = parser.add_argument
    add("model", metavar="RUN_OR_FOLDER", help="the folder of a run of main.py (its best checkpoint), a checkpoint, or a "
        "folder of export.py")
    add("images", metavar="IMAGE", nargs="+", help="images, and folders of images")
    add("--model_key", default="model", choices=("model", "model_ema"), help="a run's weights, or their moving average")
    add("--top", default=5, type=number(int, 1), metavar="N", help="classes per image")
    add("--json", action="store_true", help="a JSON object per line")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), cuda, cuda:1, mps or cpu")
    return parser
