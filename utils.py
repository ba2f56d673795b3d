"""What every module may use: errors and exit codes, seeds, atomic files, logging, the record of the environment.

Only the standard library is imported here, so that compare.py and the study's scripts answer at once and run without
torch. The functions that need torch or numpy import them.
"""

from __future__ import annotations

import enum
import errno
import gc
import json
import logging
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

LONGEST_ERROR = 1000  # characters
# errors of a file system that the code around a file did not expect: no permission, a name too long, a disk that failed
REFUSED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EROFS, errno.ELOOP, errno.EIO, errno.ESTALE)
STOPPED = 75  # the exit code of a run that was asked to stop: EX_TEMPFAIL of sysexits.h, "try again later"


class UserError(Exception):
    """A mistake that the user can mend. `run_script` prints its message as one line and returns exit code 1."""

    def __init__(self, message: str):
        super().__init__(escaped(message[:LONGEST_ERROR]) + "…" * (len(message) > LONGEST_ERROR))


def escaped(text: str) -> str:
    """Escape what is not printable in text from an untrusted file: it would break the line or command the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class Stopped(BaseException):
    """Ends a run that was asked to stop, after it has saved. `agreed`: all ranks ended at the same step.

    Not an `Exception`, so that no `except Exception` on the way catches it.
    """

    def __init__(self, reason: str, *, agreed: bool = False):
        super().__init__(reason)
        self.agreed = agreed


class Stream(enum.IntEnum):
    """The purposes of random draws. Each derived seed starts with one, so that no two purposes share draws."""

    ORDER = 101  # order of the images, per epoch
    IMAGE = 102  # augmentation of one image on the host, per epoch and index
    MIX = 103  # mixup and cutmix, per step and chunk
    FRACTION = 104  # which images --data_fraction keeps
    SPLIT = 105  # train/val split of data sets without one of their own
    MODEL = 106  # dropout and drop path, per step and chunk
    SLOTS = 107  # indices that a random element rule takes from an axis group, per name of the group
    AUGMENT = 108  # augmentation on the device, per epoch and index
    NOISE = 109  # pixels that random erasing fills in on the device, per step and chunk
    CALIBRATION = 110  # images that a refit and the rules by activation see
    ROWS = 111  # places in these images that take part in a layer's regression, per layer and batch
    DISTILLER = 112  # initial weights of the MLP from a student's features to its teacher's
    HEAD = 113  # initial weights of the head that --new_head adds
    OPTIMIZER = 114  # what an optimizer draws in an update, per step


def derive_seed(stream: Stream, *parts: int) -> int:
    """Return a 64-bit seed that depends only on the stream and the non-negative `parts`, on any machine."""
    import numpy as np

    return int(np.random.SeedSequence((stream, *parts)).generate_state(1, np.uint64)[0])


def permutation(count: int, stream: Stream, *parts: int) -> np.ndarray:
    """Return a random order of range(count) from a derived seed; int64 [count]."""
    import numpy as np

    # RandomState, because numpy promises never to change its stream. default_rng has no such promise.
    return np.random.RandomState(derive_seed(stream, *parts) % 2**32).permutation(count)


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch's CPU. Leave the devices' generators alone."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return up to three of `names` that may be meant by `name`: that contain it, or else are spelt much like it.

    Case, dashes and underscores do not count.
    """
    import difflib  # here, because only mistakes need it

    def plain(name: str) -> str:
        return name.lower().lstrip("-–—").replace("-", "_")  # noqa: RUF001 (word processors make such dashes)

    wanted, known = plain(name), {plain(each): each for each in names}
    alike = [each for each in known if len(wanted) > 2 and wanted in each]
    alike.sort(key=lambda each: not each.startswith(wanted))
    return [known[each] for each in (alike or difflib.get_close_matches(wanted, known))[:3]]


def hint(name: str, names: Iterable[str]) -> str:
    """Return "; nearest: a, b" for the end of a message about a mistyped name; "" if no name is near."""
    alike = ", ".join(nearest(name, names))
    return alike and f"; nearest: {alike}"


def few(names: Iterable[str], most: int = 5) -> str:
    """Return the first names as text, and how many more there are."""
    names = list(names)
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def json_lines(value: object, levels: int) -> str:
    """Return JSON with one line per entry of the outer `levels` of objects. Deeper values share their entry's line."""
    if levels == 0 or not isinstance(value, dict) or not value:
        return json.dumps(value)
    entries = (f"{json.dumps(key)}: {json_lines(entry, levels - 1)}" for key, entry in value.items())
    return "{\n" + textwrap.indent(",\n".join(entries), " ") + "\n}"


def start_logging(*, quiet: bool = False) -> None:
    """Log to stderr, without prefixes, from level INFO on; with `quiet`, as on ranks other than 0, only errors."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger().setLevel(logging.ERROR if quiet else logging.INFO)
    for chatty in ("httpx", "huggingface_hub", "timm", "PIL", "matplotlib", "onnxscript", "onnx_ir"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # its own handler prints them already


def is_first_process() -> bool:
    """Return whether this is the first of the processes that a launcher started, or the only one."""
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):  # torchrun's before those around it
        if os.environ.get(name):
            return not os.environ[name].isdecimal() or int(os.environ[name]) == 0
    return True


def run_script(main: Callable[[], object]) -> int:
    """Run a script's `main` and return its exit code.

    0 on success, 1 after a one-line error on stderr or if stdout cannot be written to, 75 for a run that was asked to
    stop, 130 after Ctrl-C. An error that the user cannot mend is raised, for its traceback.
    """
    # The imported libraries hold 400,000 objects that live to the end. Spare the collector its full passes over them:
    # weight_selection.py's work for ViT-S -> ViT-T takes 0.15 s of CPU time, not 0.37 s. They also stay frozen at exit,
    # where one more pass and the destruction of what it finds would take 0.9 s.
    gc.freeze()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by `require_packages`, for the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (it is None if it is closed, as by >&-)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that has no "…" shows "?", where it would raise
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as in "… --plan | head"
        _discard_stdout()
        return 1
    except Stopped:
        return STOPPED
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        if isinstance(error, OSError) and not exhausted_limit(error):  # which would leave no descriptor for it
            _discard_stdout()
        rank, processes = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        rank = f" (rank {rank})" if rank and processes not in (None, "", "1") else ""
        print(f"{Path(sys.argv[0]).name}: error{rank}: {message}", file=sys.stderr, flush=True)
        return 1
    return 0


def _discard_stdout() -> None:
    """Lead stdout nowhere: Python flushes it once more at exit, and that must not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: Exception) -> str | None:
    """Return what the user can do about the error, in one line; None for a defect of ours."""
    if isinstance(error, UserError):
        return str(error)
    if ran_out_of_memory(error):
        return f"out of memory ({first_line(error)})"
    if limit := exhausted_limit(error):
        return f"{limit} ({first_line(error)})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"what is printed, or a temporary file, cannot be written: {error.strerror}"
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename:
        return f"{error.filename}: {error.strerror}"
    # torch raises this in whatever line the training process is at when a worker dies
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        cause = first_line(error)
        return f"a worker that loads images has died, perhaps for lack of memory: try fewer --num_workers ({cause})"
    return None


def exhausted_limit(error: BaseException) -> str | None:
    """Say which limit of the system on a process is exhausted, and what to do; None if the error is of another kind."""
    code, text = getattr(error, "errno", None), str(error).lower()
    # torch says the first two in words: of shared memory, whose descriptors travel through a socket
    files = ("too many open files", "received 0 items of ancdata", "unable to open shared memory")
    if code in (errno.EMFILE, errno.ENFILE) or any(words in text for words in files):
        return "too many open files: raise the limit (ulimit -n), or give fewer --num_workers"
    if isinstance(error, BlockingIOError) or "can't start new thread" in text or "resource temporarily" in text:
        return "no further process or thread can be started: raise the limit (ulimit -u), or give fewer --num_workers"
    return None


def lacked_resources(error: BaseException | None) -> bool:
    """Return whether an error, or one that it came from, says that memory or a limit was exhausted."""
    while error and not (ran_out_of_memory(error) or exhausted_limit(error)):
        error = error.__cause__
    return error is not None


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether the memory of a device or of the host was exhausted, as torch, its libraries and Python say it."""
    # torch's own error is known by its name because torch is not imported here; MPS, the host's allocator, cuBLAS and
    # cuDNN raise a bare RuntimeError
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text
        for words in (
            "out of memory",
            "can't allocate memory",
            "cannot allocate memory",
            "alloc_failed",
            "size calculation overflowed",
        )
    )


def environment(device: torch.device, processes: int) -> dict:
    """Return what a run runs on, as plain values: versions, device, processes, threads, host."""
    import platform
    from importlib.metadata import version

    import torch

    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "timm", "numpy", "pillow")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "host": platform.node(),
    }


def revision() -> str | None:
    """Return the commit of this code, with "-dirty" if files differ from it; None outside a git checkout."""
    import subprocess

    command = "git describe --always --dirty --exclude * --abbrev=40".split()
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
