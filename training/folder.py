"""The folder of a run: one run's at a time, its description, and the marker of a run that was asked to stop."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from utils import UserError, first_line, write_atomically

log = logging.getLogger(__name__)

RUN_FORMAT = "weight-selection run 1"
REQUEUE = "requeue"  # there while the last run in the folder is one that was asked to stop


@contextlib.contextmanager
def opened(name: str) -> Iterator[Path]:
    """The folder, made where it lacks, for this process alone until it leaves or ends, in whatever way.

    Raises UserError where another run has it or it cannot be written to.
    """
    folder = Path(name)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / ".lock", "a+"))
            lock(folder, file)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            for unfinished in folder.glob(".*.tmp"):
                unfinished.unlink(missing_ok=True)
            (folder / REQUEUE).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {folder} cannot be written to: {error.strerror}") from error
        yield folder


def lock(folder: Path, file: TextIO) -> None:
    """Lock the open file for this process, with a warning where that cannot be; UserError if another run has it."""
    try:
        # of this process, not of the file as it is open: a forked worker that outlives the run does not hold it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise UserError(f"--output_dir {folder} is in use by another run ({file.read().strip()})") from error
        log.warning("--output_dir %s cannot be locked (%s): let no other run write to it", folder, first_line(error))


def write_config(folder: Path, content: dict) -> None:
    """Write config.json: what a run is made from, and ran on."""
    write_atomically(folder / "config.json", (json.dumps({"format": RUN_FORMAT, **content}, indent=1) + "\n").encode())


def ask_for_more(folder: Path, reason: str) -> None:
    """Leave the marker by which a batch script sees that the same command has to be started again."""
    write_atomically(folder / REQUEUE, f"{reason}\n".encode())
