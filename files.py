"""Files: read as text, written completely or not at all, and locked against other processes."""

import contextlib
import errno
import fcntl
import logging
import os
import platform
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from utils import UserError, first_line

log = logging.getLogger(__name__)


def read_text(path: Path, errors: str = "strict") -> str:
    """Return the content of a text file, without the byte order mark that editors put first.

    Raises OSError, or ValueError if it is not text or not a regular file: reading a pipe would never end.
    """
    with open(path, encoding="utf-8-sig", errors=errors, opener=regular) as file:
        return file.read()


def regular(path: str, flags: int) -> int:
    """Open a regular file, as the opener of `open`; ValueError if it is another kind: a pipe or a device may never answer."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)  # opening a pipe would wait for its other end
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno != errno.ENXIO:  # of a socket, or a pipe to write to that nobody reads
            raise
    raise ValueError("it is not a regular file")


def check_creatable(path: Path, problem: str) -> None:
    """UserError that begins with `problem` if `path` cannot be written: no permission, or a name that is too long."""
    # os.path.exists, because Path's raises without permission and for names that are too long
    nearest = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if not (os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK)):
        raise UserError(f"{problem}: {nearest} is not a folder that can be written to")
    try:
        new = *path.absolute().relative_to(nearest).parts, _temporary(path).name
        for each in (path, *(nearest / name for name in new)):  # each name alone: a missing folder above would hide it
            with contextlib.suppress(FileNotFoundError):
                os.lstat(each)
    except OSError as error:
        raise UserError(f"{problem}: {error.strerror}") from error


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write `content` to `path`, which at any moment holds either the old or the new file. UserError if that fails."""
    write_together({path: content})


def write_together(files: Mapping[Path, bytes | memoryview]) -> None:
    """Write each content to its path, all in one folder. UserError, with all files as before, if one cannot be written.

    All temporary files are complete before the first is renamed. So only a crash between two renames, which follow the
    order of `files`, can leave some files old and some new.
    """
    try:
        for path, content in files.items():
            with open(_temporary(path), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(_temporary(path), path)
    except BaseException as error:
        for each in files:
            with contextlib.suppress(OSError):  # on a disk that failed, removing fails too
                _temporary(each).unlink()
        if isinstance(error, OSError):
            raise UserError(
                f"{path} could not be written ({first_line(error)}); what was there before is untouched"
            ) from error
        raise
    _sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    """Name the file that becomes `path` once it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync_folder(folder: Path) -> None:
    """Make the renames in the folder survive a power cut, if its file system can promise that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise UserError(f"{folder}: what was written there may not be safe yet ({first_line(error)})") from error


class InUse(Exception):
    """Another process holds the lock; the message says which."""


class Lock:
    """A lock file at `path`, made if needed and held from now on.

    Raises InUse if another process holds it, OSError if the file cannot be opened or written, UserError if the file
    there is not a lock. A file system without locks is warned of.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open()
        while not self.is_held():  # its last holder removed the file after we opened it
            self.close()
            self._open()
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}\n")
        self._file.flush()

    def _open(self) -> None:
        not_own = UserError(f"{self.path} is not a lock file of this project: move it away, or name another folder")
        try:
            self._file = open(self.path, "a+", errors="replace", opener=regular)  # noqa: SIM115
        except (IsADirectoryError, ValueError) as error:
            raise not_own from error
        self._file.seek(0)
        holder = self._file.read(1000).strip()
        try:
            # lockf, not flock: its lock belongs to this process, so a forked worker that outlives the run does not hold it
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self.close()
                raise InUse(holder) from error
            text = "%s cannot be locked (%s): make sure that no other process writes there"
            log.warning(text, self.path.parent, first_line(error))
        if holder and not re.fullmatch(r"process \d+ on .*", holder):
            self.close()
            raise not_own

    def is_held(self) -> bool:
        """Return whether the file at `path` is still the one that was locked, not removed or replaced since."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except OSError:
            return False

    def close(self) -> None:
        """Release the lock; the file stays."""
        self._file.close()

    def remove(self) -> None:
        """Remove the file, then release the lock: a process that has opened the file meanwhile sees that it is gone."""
        self.path.unlink(missing_ok=True)
        self.close()
