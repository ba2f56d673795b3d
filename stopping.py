"""Being asked to stop: a signal asks, the run answers at its next log step, with everything saved."""

import os
import signal
import threading
import time

from utils import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST = 2.0  # s; a launcher passes on a signal that the whole job got, so that it comes twice


class StopSignals:
    """Inside, SIGTERM, SIGINT and SIGUSR1 ask the run to stop, and a second one ends the process at once.

    The first raises Stopped where it finds the run, which loses nothing before training; after `defer` it only makes
    `asked` its name. Outside the main thread, where Python takes no signals, nothing is changed.
    """

    def __init__(self):
        self.asked, self._since, self._defers, self._before = "", 0.0, False, {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on, whoever asks has to wait until somebody looks at `asked`."""
        self._defers = True

    def _take(self, number: int, _) -> None:
        name = signal.Signals(number).name
        if self.asked and time.monotonic() - self._since < SAME_REQUEST:
            return
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked, self._since = name, time.monotonic()
        if not self._defers:
            raise Stopped("before the first update")
        # not by logging, which this may have interrupted
        os.write(2, f"{name}: saving and ending at the next log step; once more ends at once\n".encode())


def leave_to_parent(*_) -> None:
    """Ignore what asks a run to stop, as the start of a worker, but for the parent's own SIGTERM.

    The signal of a terminal or a batch system goes to all processes, and the run needs its workers up to the log step
    at which it ends, and them.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none: there a SIGTERM to all processes ends the run without a save
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_by_parent, args=(os.getppid(),), daemon=True).start()


def _end_by_parent(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)
