"""The run folder: its lock, the description of the run, and the marker of a run that was asked to stop."""

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
REQUEUE = "requeue"  # exists if the last run in the folder was asked to stop


@contextlib.contextmanager
def opened(name: str) -> Iterator[Path]:
    """Create the run folder if needed and hold its lock until the context exits or the process dies.

    UserError if another run holds the lock or the folder cannot be written to.
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
    """Lock the open file for this process; warn if the file system has no locks. UserError if another run has it."""
    try:
        # lockf, not flock: its lock belongs to this process, so a forked worker that outlives the run does not hold it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise UserError(f"--output_dir {folder} is in use by another run ({file.read().strip()})") from error
        log.warning(
            "--output_dir %s cannot be locked (%s): make sure that no other run writes to it", folder, first_line(error)
        )


def write_config(folder: Path, content: dict) -> None:
    """Write config.json: the run's options, initialization and environment."""
    write_atomically(folder / "config.json", (json.dumps({"format": RUN_FORMAT, **content}, indent=1) + "\n").encode())


def write_requeue(folder: Path, reason: str) -> None:
    """Write the marker that tells a batch script to start the same command again."""
    write_atomically(folder / REQUEUE, f"{reason}\n".encode())
