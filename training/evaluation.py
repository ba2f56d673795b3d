"""An evaluation (`--eval true`): the options that it takes from its checkpoint's run, and which checkpoint that is."""

import argparse
import logging
from pathlib import Path

from options.table import FREE_IN_EVALUATION
from options.training import plain, training_defaults, training_options
from training.checkpoint import BEST_CHECKPOINTS, options_of
from training.log import summary
from training.start import Start
from utils import UserError

log = logging.getLogger(__name__)


def evaluation_options(argv: list[str] | None, given: argparse.Namespace, start: Start) -> argparse.Namespace:
    """Return the options of an evaluation from `start`: those in `argv`, the others as in the checkpoint's run.

    `given` is what `argv` alone says. A `--data_path` in it also replaces the run's `--eval_data_path`.
    Log which checkpoint it is, and the given options that differ from the run's. Without a checkpoint the others have
    their defaults, and the log says that the weights are random unless they are those of `--initialize`. UserError if an
    `--output_dir` is given and has none.
    """
    if not start.state:
        if given.output_dir and not start.path:
            raise UserError(f"--output_dir {given.output_dir} has no checkpoint to evaluate")
        if not start.path:
            log.warning("--eval true without --resume, --initialize or a checkpoint in --output_dir: random weights")
        return training_options(argv, run={})
    run = vars(options_of(start.path, start.state))
    moved = given.data_path != training_defaults()["data_path"]
    options = training_options(argv, run | ({"eval_data_path": None} if moved else {}))
    log.info("%s", which_checkpoint(start.path, start.state))
    differing = [
        f"--{name} was {run[name]}, is {value}"
        for name, value in plain(options).items()
        if name not in FREE_IN_EVALUATION and run[name] != value
    ]
    if differing:
        log.warning("evaluated otherwise than its run: %s", ", ".join(differing))
    return options


def which_checkpoint(path: Path, state: dict) -> str:
    """Say in a line which checkpoint is evaluated, and how to have the best one."""
    line = f"evaluating {path}, of epoch {state['epoch']}" + ", which it is in the middle of" * bool(state["sums"])
    if path.name in BEST_CHECKPOINTS.values():
        return f"{line}, the best of its run"
    names = zip(("the best", "the best average of the weights"), BEST_CHECKPOINTS.values(), strict=True)
    best = [f"for {what}: --resume {path.with_name(name)}" for what, name in names if path.with_name(name).exists()]
    none = f"there is no {BEST_CHECKPOINTS['test_acc1']} beside it"
    return f"{line}; {', '.join(best) or none}"


def reported(record: dict, images: int) -> dict:
    """Log the figures of an evaluation of so many images, and return them."""
    log.info("%d images: %s", images, summary(record, {}))
    return record
