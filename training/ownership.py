"""What is a run's own in its folder: it overwrites and removes nothing else."""

from pathlib import Path

from files import read_text
from options.table import FREE_ON_RESUME
from options.training import training_defaults
from training.checkpoint import BEST_CHECKPOINTS, begins_as_checkpoint, check_checkpoint, numbered_checkpoints
from training.folder import LOG, not_own, read_config
from utils import UserError
from weightfiles.lazy import read_mapped


def differing(then: dict, now: dict) -> list[str]:
    """List the options that decide the weights and differ between two runs, each as a phrase."""
    names = [name for name in now if name not in FREE_ON_RESUME and then.get(name) != now[name]]
    return [f"--{name} was {then.get(name)}, is {now[name]}" for name in names]


def check_own(folder: Path, options: dict, first_epoch: int) -> None:
    """UserError naming a file that this run would overwrite or remove, and that it did not write itself.

    `first_epoch` is where the run starts.
    """
    read_config(folder)
    best = [path for name in BEST_CHECKPOINTS.values() if (path := folder / name).exists()]
    numbered = numbered_checkpoints(folder)
    for path in [*best, *numbered]:
        if not begins_as_checkpoint(path):
            raise not_own(path)
    for path in best:
        try:
            state = check_checkpoint(path, read_mapped(path) or {})
        except UserError:
            continue  # damaged, and no loss
        then = training_defaults() | state["options"]
        # a crash may come between this file and the numbered one of the same epoch, but not after that
        due = then["save_ckpt_freq"] * (first_epoch // then["save_ckpt_freq"] + 1)
        gone = state["epoch"] >= due and not numbered
        if gone or differing(then, options):
            raise UserError(f"--output_dir {folder} has the {path.name} of another run: name another folder")


def check_log(folder: Path, options: dict) -> None:
    """UserError if a folder without checkpoints has another run's log, which this run would overwrite.

    A log may be overwritten if its run had the same settings and ended before its first numbered checkpoint.
    """
    try:
        log_file = folder / LOG
        epochs = len(read_text(log_file).splitlines()) if log_file.exists() else 0
        if not epochs:
            return
        then = read_config(folder)["options"]
        # a crash can come between the last line and its checkpoint
        lost = not then["save_ckpt"] or epochs > then["save_ckpt_freq"] or differing(then, options)
    except (OSError, ValueError, KeyError, TypeError):
        lost = True
    if lost:
        raise UserError(f"--output_dir {folder} has the log.txt of another run: name another folder")


def way_on(folder: Path | None) -> str:
    """Say, after an update that was not finite, what is saved and where other settings may be tried."""
    saved = numbered_checkpoints(folder) if folder else []
    if saved:
        return (
            f"nothing of that was saved, and the same command goes on from {saved[0]}; a lower --lr or --clip_grad 1 needs "
            f"another --output_dir, where --initialize {saved[0]} would start from its weights"
        )
    logged = folder and (folder / LOG).exists() and (folder / LOG).stat().st_size
    where = "which needs another --output_dir" if logged else "in the same --output_dir or another"
    return f"nothing of that was saved: try a lower --lr or --clip_grad 1, {where}"
