"""Stopping on a signal: the signal asks, and the run answers at its next log step, with everything saved.

Standard library only when imported, because signals may come while torch is imported.
"""

import argparse
import contextlib
import logging
import os
import signal
import threading
import time
from pathlib import Path

from training.folder import STOPPED_BY, RunFolder, opened, write_requeue
from training.place import read_place
from utils import Stopped, run_script

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST = 2.0  # s; a launcher forwards a signal that the whole job got, so that it arrives twice
LOOK_SECONDS = 1.0  # between a worker's checks that its run is still alive
_before_imports = {}  # the handlers that `end_on_signals` replaced


def end_on_signals(options: argparse.Namespace) -> None:
    """Let SIGTERM, SIGINT and SIGUSR1 end this process with one line until StopSignals takes over, and unblock them.

    For the imports, and while the processes meet. The handler ends the process itself: an exception might be caught, or
    be a traceback, wherever it finds an import. After SIGUSR1 it marks the run's folder first.
    """

    def end(number: int, _) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        os._exit(run_script(lambda: _stop_first(options, signal.Signals(number).name)))

    for number in SIGNALS:
        _before_imports[number] = signal.signal(number, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _stop_first(options: argparse.Namespace, signal_name: str) -> None:
    stopped, folder = Stopped("before the first update"), None
    with contextlib.ExitStack() as stack:
        if options.output_dir and options.save_ckpt and not options.eval and signal_name == "SIGUSR1" and _is_main():
            folder = stack.enter_context(opened(Path(options.output_dir)))
        report_stop(stopped, signal_name, folder)
    raise stopped


def _is_main() -> bool:
    return read_place().rank == 0


class StopSignals:
    """A context in which SIGTERM, SIGINT and SIGUSR1 ask the run to stop, and a second one ends the process at once.

    Leaving it, a run that was stopped says why, and marks its `folder` if there is one.

    Before `defer` is called, the first signal raises Stopped wherever it finds the run; there is nothing to lose yet.
    Afterwards it only sets `asked` to its name. A process that waits in C code, as in a collective, runs no handler:
    it ends by --dist_timeout or SIGKILL. Outside the main thread, where Python takes no signals, nothing changes.
    """

    def __init__(self, folder: RunFolder | None = None):
        self.asked, self._asked_at, self._defers, self._folder = "", 0.0, False, folder
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                replaced = signal.signal(number, self._first)
                self._restore.callback(signal.signal, number, _before_imports.pop(number, replaced))
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        with self._restore:
            if isinstance(error, Stopped):
                report_stop(error, self.asked, self._folder)

    def defer(self) -> None:
        """From now on, only note the request; the run looks at `asked`."""
        self._defers = True

    def _first(self, number: int, _) -> None:
        self.asked, self._asked_at = signal.Signals(number).name, time.monotonic()
        for each in SIGNALS:
            signal.signal(each, self._second)
        if not self._defers:
            raise Stopped("before the first update")
        # Write directly: logging may be what this interrupted. The reader may be gone, by the same Ctrl-C.
        with contextlib.suppress(OSError):
            os.write(2, f"{self.asked}: saving and ending at the next log step; once more ends at once\n".encode())

    def _second(self, number: int, _) -> None:
        if time.monotonic() - self._asked_at >= SAME_REQUEST:
            os._exit(128 + number)


def report_stop(stopped: Stopped, signal_name: str, folder: RunFolder | None) -> None:
    """Say why the run stopped, and mark the folder if the same command should be started again."""
    reason = f"{STOPPED_BY}{signal_name or 'a signal to another process'} {stopped}"
    # Before there is anything to save, only SIGUSR1 requeues: it comes from a batch system. SIGTERM may come from a
    # launcher after another process failed.
    requeue = folder and (stopped.agreed or signal_name == "SIGUSR1")
    if _is_main():
        log.warning("%s%s", reason, "; the same command continues from there" if requeue else "")
        if requeue:
            write_requeue(folder, reason)
    elif not stopped.agreed:
        log.error("rank %d was %s", read_place().rank, reason)
    if stopped.agreed:  # wait for the main process to write: a launcher kills all processes once one has exited
        from training.distributed import of_all_ranks  # here, because it imports torch

        of_all_ranks(None)


def leave_to_parent(parent: int, *_) -> None:
    """Ignore the stop signals in a worker; end when its run, the process `parent`, ends or sends SIGTERM.

    A terminal or a batch system signals all processes, and the run needs its workers until the log step at which it
    ends. A worker that outlived a killed run would keep its connections to the other processes open.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigtimedwait"):  # macOS has none: there, SIGTERM to all processes ends the run without a save
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    elif os.getppid() != parent:  # torch watches only the parent that it finds after this
        os._exit(1)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        asked = signal.sigtimedwait([signal.SIGTERM], LOOK_SECONDS)
        if asked and asked.si_pid == parent:
            break
    os._exit(128 + signal.SIGTERM)
