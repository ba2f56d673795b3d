"""Being asked to stop: a signal asks, the run answers at its next log step, with everything saved."""

import contextlib
import os
import signal
import threading
import time

from utils import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST = 2.0  # s; a launcher passes on a signal that the whole job got, so that it comes twice
LOOK_SECONDS = 1.0  # between a worker's looks at whether its run is still there


class StopSignals:
    """Inside, SIGTERM, SIGINT and SIGUSR1 ask the run to stop, and a second one ends the process at once.

    The first raises Stopped where it finds the run, which loses nothing before training; after `defer` it only makes
    `asked` its name. The second is seen by a thread of its own, for the run may be waiting where Python's handlers have
    no turn, as for a process that hangs. Outside the main thread, where Python takes no signals, nothing is changed.
    """

    def __init__(self):
        self.asked, self._defers = "", False
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            arrived, arrives = os.pipe()
            os.set_blocking(arrives, False)
            self._restore.callback(os.close, arrives)
            self._restore.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(arrives, warn_on_full_buffer=False))
            for number in SIGNALS:
                self._restore.callback(signal.signal, number, signal.signal(number, self._take))
            threading.Thread(target=_end_at_second, args=(arrived,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._restore.close()

    def defer(self) -> None:
        """From now on, whoever asks has to wait until somebody looks at `asked`."""
        self._defers = True

    def _take(self, number: int, _) -> None:
        if self.asked:
            return
        self.asked = signal.Signals(number).name
        if not self._defers:
            raise Stopped("before the first update")
        # not by logging, which this may have interrupted; whoever reads it may be gone, by the same Ctrl-C
        with contextlib.suppress(OSError):
            os.write(2, f"{self.asked}: saving and ending at the next log step; once more ends at once\n".encode())


def _end_at_second(arrived: int) -> None:
    """End the process at the second of SIGNALS whose numbers arrive in this pipe; return when it is closed."""
    first = None
    while number := os.read(arrived, 1):
        if number[0] in SIGNALS:
            first = first or time.monotonic()
            if time.monotonic() - first >= SAME_REQUEST:
                os._exit(128 + number[0])
    os.close(arrived)


def leave_to_parent(parent: int, *_) -> None:
    """Ignore what asks a run to stop, as the start of a worker, and end when its run, the process `parent`, says so or ends.

    The signal of a terminal or a batch system goes to all processes, and the run needs its workers up to the log step
    at which it ends, and them. A worker that outlived a killed run would hold its connections to the other processes.
    """
    signal.set_wakeup_fd(-1)  # the run's own
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigtimedwait"):  # macOS has none: there a SIGTERM to all processes ends the run without a save
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    elif os.getppid() != parent:  # torch looks for the parent that it finds after this
        os._exit(1)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        asked = signal.sigtimedwait([signal.SIGTERM], LOOK_SECONDS)
        if asked and asked.si_pid == parent:
            break
    os._exit(128 + signal.SIGTERM)
