"""The run folder: its lock, what is written there, and the marker of a run that was asked to stop."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from files import InUse, Lock, read_text, regular, write_atomically
from utils import UserError, first_line

log = logging.getLogger(__name__)

RUN_FORMAT = "weight-selection run 1"
CONFIG = "config.json"
LOG = "log.txt"
REQUEUE = "requeue"  # exists if the last run in the folder was asked to stop
STOPPED_BY = "stopped by "  # how the marker begins
WANDB_ID = "wandb_id.txt"
# what a killed run may have left of a file that it was writing
TEMPORARY = re.compile(
    r"\.(config\.json|log\.txt|requeue|wandb_id\.txt|checkpoint-(best|best-ema|\d+|\d+-\d+)\.pth)\.\d+\.tmp"
)


class RunFolder:
    """A run's folder, locked by this process. All that a run writes there goes through it.

    Each method raises UserError if the folder is no longer the one that was locked, because it was removed, renamed or
    replaced: what is at its path now may belong to another run.
    """

    def __init__(self, path: Path, lock: Lock):
        self.path, self._lock, self._stay = path, lock, set()

    def check_held(self) -> None:
        """UserError if the path no longer leads to what was locked."""
        if not self._lock.is_held():
            raise UserError(
                f"--output_dir {self.path} is no longer the folder of this run: it, or its {self._lock.path.name}, was "
                "removed or replaced; nothing is written to what is there now"
            )

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file, completely or not at all. UserError if that fails."""
        self.check_held()
        write_atomically(self.path / name, content)

    def append(self, name: str, text: str) -> None:
        """Add text to the end of a file and wait until it is safe. UserError if that fails."""
        self.check_held()
        try:
            with open(self.path / name, "a", encoding="utf-8", opener=regular) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{self.path / name} could not be written: {reason}") from error

    def remove(self, name: str) -> None:
        """Remove a file; warn, once, if it cannot be removed."""
        self.check_held()
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            if name not in self._stay:
                log.warning("%s stays: it could not be removed (%s)", self.path / name, first_line(error))
            self._stay.add(name)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[RunFolder]:
    """Create the run folder if needed and hold its lock until the context exits or the process dies.

    Remove what a killed run left half written, and the marker of one that was asked to stop. UserError if another run
    holds the lock or the folder cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = Lock(path / ".lock")
    except InUse as holder:
        raise UserError(f"--output_dir {path} is in use by another run ({holder})") from holder
    except OSError as error:
        raise UserError(f"--output_dir {path} cannot be written to: {error.strerror}") from error
    with contextlib.closing(lock):
        folder = RunFolder(path, lock)
        for name in filter(TEMPORARY.fullmatch, os.listdir(path)):
            folder.remove(name)
        _remove_requeue(path / REQUEUE)
        yield folder


def _remove_requeue(marker: Path) -> None:
    try:
        text = read_text(marker)
        if text.strip() and not text.startswith(STOPPED_BY):
            raise not_own(marker)
        marker.unlink()  # not `RunFolder.remove`: a marker that stays would start the run again for ever
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{marker} cannot be removed: {error.strerror}") from error
    except ValueError as error:
        raise not_own(marker) from error


def not_own(file: Path) -> UserError:
    """Return the error about a file that a run would overwrite or remove, and that no run wrote."""
    return UserError(
        f"--output_dir {file.parent} has a {file.name} that no run of this project wrote: move it away, or name another folder"
    )


def read_config(path: Path) -> dict | None:
    """Read a run's config.json; None if there is none. UserError if the file is not one of `write_config`'s."""
    file = path / CONFIG
    try:
        text = read_text(file)
        content = json.loads(text) if text else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise not_own(file) from error
    if text and not (isinstance(content, dict) and content.get("format") == RUN_FORMAT):
        raise not_own(file)
    return content


def write_config(folder: RunFolder, content: dict) -> None:
    """Write config.json: the run's options, initialization and environment."""
    folder.write(CONFIG, (json.dumps({"format": RUN_FORMAT, **content}, indent=1) + "\n").encode())


def write_requeue(folder: RunFolder, reason: str) -> None:
    """Write the marker that tells a batch script to start the same command again."""
    folder.write(REQUEUE, f"{reason}\n".encode())
