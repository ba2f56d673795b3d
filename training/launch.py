"""Run commands one after the other, for sweep.py and study/run.py: under locks, so that several calls share the work,
and with signals passed on, so that a call can be stopped at any time. Standard library only.
"""

import contextlib
import errno
import fcntl
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from utils import STOPPED, Stopped, first_line

POLL_SECONDS = 5.0  # how often to check on jobs that another call works on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

Job = TypeVar("Job")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def hold(path: Path) -> int | None:
    """Return a file descriptor that holds the lock; None if another call or a process that it left behind has it.

    Processes that inherit the descriptor hold the lock too. So one that outlives a killed call keeps the next call out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(descriptor)
            return None
        say(f"warning: {path} cannot be locked ({first_line(error)}): make sure that no other call works there")
    return descriptor


def work_off(
    left: Callable[[], list[Job]], lock_of: Callable[[Job], Path], work: Callable[[Job, Callable[..., int]], None]
) -> None:
    """Do the jobs that are left, the first first, and wait for those that another call works on.

    `left` lists them anew after each. `work(job, call)` does one, under its lock; `call` is that of `Commands`. Raises
    Stopped after a signal.
    """
    waits = False
    with Commands() as commands:
        while jobs := left():
            job, lock = next(((job, lock) for job in jobs if (lock := hold(lock_of(job))) is not None), (None, None))
            if lock is None:
                if not waits:
                    say(f"waiting for {', '.join(lock_of(job).stem for job in jobs)}, which another process works on")
                waits = True
                time.sleep(POLL_SECONDS)
                continue
            try:
                if job in left():  # another call may have done it before the lock was free
                    work(job, functools.partial(commands.call, pass_fds=[lock]))
            finally:
                os.close(lock)
            waits = False


class Commands:
    """A context in which SIGTERM, SIGINT and SIGUSR1 go to the running command, and raise Stopped once it has ended."""

    def __init__(self):
        self._asked, self._starts, self._command = "", False, None
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> "Commands":
        for number in SIGNALS:
            self._restore.callback(signal.signal, number, signal.signal(number, self._pass_on))
        return self

    def __exit__(self, *_) -> None:
        self._restore.close()

    def call(self, command: list[str], **options) -> int:
        """Run the command to its end, with these options of subprocess.Popen; return its exit code.

        Raises Stopped if it was asked to stop, by this process or by another one.
        """
        self._starts = True
        # A terminal sends Ctrl-C to the command as well, which would print a traceback while a launcher imports torch
        with subprocess.Popen(command, preexec_fn=_ignore_ctrl_c, **options) as self._command:
            self._starts = False
            if self._asked:
                self._command.terminate()
            code = self._command.wait()
        self._command = None
        if self._asked or code == STOPPED:
            self._stop()
        return code

    def _pass_on(self, number: int, _) -> None:
        self._asked = signal.Signals(number).name
        if self._command:
            self._command.send_signal(signal.SIGTERM if number == signal.SIGINT else number)
        elif not self._starts:
            self._stop()

    def _stop(self) -> None:
        say(f"stopped by {self._asked or 'a signal to the run'}; the same command goes on from there")
        raise Stopped(self._asked)


def _ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited; main.py replaces it
