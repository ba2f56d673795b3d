"""What every module may use: seeding, the error a user sees, logging set-up, the record of the environment."""

import enum
import errno
import gc
import importlib.metadata
import json
import logging
import os
import platform
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

LONGEST_LINE = 1000  # of an error, in characters
STOPPED = 75  # the exit code of a run that was asked to stop: sysexits.h's EX_TEMPFAIL, "try again later"


class UserError(Exception):
    """A mistake the user can mend: its message is the one line printed before the scripts end with code 1.

    What comes from files, such as a tensor's name, is in it without line ends and a terminal's commands, and cut short.
    """

    def __init__(self, message: str):
        line = "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in message[:LONGEST_LINE])
        super().__init__(line + "…" * (len(message) > LONGEST_LINE))


class Stopped(BaseException):
    """A run was asked to stop and did, after saving: what ends it passes through every `except Exception`.

    `agreed`: all ranks ended at the same step.
    """

    def __init__(self, reason: str, *, agreed: bool = False):
        super().__init__(reason)
        self.agreed = agreed


class Stream(enum.IntEnum):
    """What a seed is derived for: the first part of every derived seed, so that no two uses of a run's seed share draws."""

    ORDER = 101  # of the images, by epoch
    IMAGE = 102  # its augmentation, by epoch and index
    MIX = 103  # mixup and cutmix, by step and chunk
    FRACTION = 104  # which images --data_fraction keeps
    SPLIT = 105  # of the data sets that have none
    MODEL = 106  # dropout and drop path, by step and chunk
    SLOTS = 107  # of an axis group, and tokens that a student begins with, by name
    AUGMENT = 108  # augmentation on the device, by epoch, then by index
    NOISE = 109  # what random erasing puts there on the device, by step and chunk


def derive_seed(stream: Stream, *parts: int) -> int:
    """A 64-bit seed that depends on the stream and the non-negative `parts` alone, on any machine."""
    return int(np.random.SeedSequence((stream, *parts)).generate_state(1, np.uint64)[0])


def permutation(count: int, stream: Stream, *parts: int) -> np.ndarray:
    """An order of `count` things from a derived seed; int64 [count]."""
    # RandomState's stream is frozen by numpy's policy, that of default_rng is not
    return np.random.RandomState(derive_seed(stream, *parts) % 2**32).permutation(count)


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's global and torch's CPU generator; the device's generators are left as they are."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def first_line(error: BaseException) -> str:
    """What an exception says, without the lines of explanation below; its class name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def json_lines(value: object, levels: int) -> str:
    """JSON with a line for each entry of the outer `levels` of objects, and what is inside them on that line."""
    if levels == 0 or not isinstance(value, dict) or not value:
        return json.dumps(value)
    entries = (f"{json.dumps(key)}: {json_lines(entry, levels - 1)}" for key, entry in value.items())
    return "{\n" + textwrap.indent(",\n".join(entries), " ") + "\n}"


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Put `content` at `path`, which holds the old or the new file whatever happens. UserError where that fails."""
    write_together({path: content})


def write_together(files: Mapping[Path, bytes | memoryview]) -> None:
    """Put each content at its path, all in one folder. UserError, and all are as before, where one cannot be written.

    Only a crash between the renamings, which follow one another in this order, leaves some old and some new ones.
    """
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, content in files.items():
            with open(temporaries[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except BaseException as error:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{path} could not be written ({first_line(error)}); what was there before is untouched"
            ) from error
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """What was renamed in the folder survives a power cut, where its file system can promise that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise UserError(f"{folder}: what was written there may not be safe yet ({first_line(error)})") from error
    finally:
        os.close(descriptor)


def start_logging(*, quiet: bool = False) -> None:
    """Log lines of `INFO` and above to stderr as they are; with `quiet` only errors, as on ranks other than 0."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger().setLevel(logging.ERROR if quiet else logging.INFO)
    for chatty in ("httpx", "huggingface_hub", "timm", "PIL", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: every retry would stand twice


def run_script(main: Callable[[], object]) -> int:
    """Run a script's `main` and return its exit code; a user's mistake is one line on stderr and code 1."""

    gc.freeze()  # what was imported lives on: the collector need not walk through it again and again, 0.2 s each time
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without "…" gets "?", not an exception

    def report(message: str) -> None:
        rank = (
            f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""
        )
        print(f"{Path(sys.argv[0]).name}: error{rank}: {message}", file=sys.stderr, flush=True)

    try:
        main()
        sys.stdout.flush()
    except (
        BrokenPipeError
    ):  # "… --plan | head": nobody reads on, and Python's own flush at the end must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        report(str(error))
        return 1
    except torch.OutOfMemoryError as error:
        report(f"the device is out of memory: lower --batch_size and raise --update_freq as much ({first_line(error)})")
        return 1
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # torch says so wherever it finds the process that trains
            raise
        report(
            f"a worker that loads images has died, as where memory is short: try fewer --num_workers ({first_line(error)})"
        )
        return 1
    except Stopped:
        return STOPPED
    except KeyboardInterrupt:
        return 130
    finally:
        gc.unfreeze()  # some extensions count what is left at the end, and complain
    return 0


def environment(device: torch.device, processes: int) -> dict:
    """What a run ran on: versions, device, processes, threads, host; plain values."""
    packages = ("torch", "torchvision", "timm", "numpy", "pillow")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "host": platform.node(),
    }


def revision() -> str | None:
    """The commit of this code, with "-dirty" where files differ from it; None outside a git checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--exclude",
        "*",
        "--abbrev=40",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
