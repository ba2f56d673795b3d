"""Train from random init and from selected weights with several seeds, one run after the other, and compare them.

    python sweep.py --seeds 3 --initialize FILE --output_dir FOLDER [options of main.py]

Each run is a process of main.py with its own folder in --output_dir. The same command goes on where it was stopped.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import signal
import sys
import unicodedata
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

try:
    from options.tools import sweep_options
    from options.training import peak_lr, plain, training_options
except ImportError as error:  # Python was told not to look beside this file
    sys.exit(f"sweep.py: error: {error}: unset PYTHONSAFEPATH, and start python without -P and -I")
import compare
from files import read_text
from training.finished import is_finished, settings_of
from training.launch import say, work_off
from utils import UserError, is_first_process, run_script

LONGEST = 240  # bytes of a folder's name without the seed and .lock; file systems take 255
DIGITS = 8  # of a digest in a name
MAIN = Path(__file__).with_name("main.py")
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node {} --signals-to-handle=SIGTERM,SIGINT,SIGUSR1"
SIZES = (
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
)  # of a group of processes, as torchrun and MPI's launchers say it


class Run(NamedTuple):
    folder: Path
    words: list[str]  # the options of main.py as they are given to it
    options: dict  # all of them, as they will stand in config.json

    @property
    def name(self) -> str:
        return self.folder.name

    def is_finished(self) -> bool:
        return is_finished(self.folder, self.options["epochs"])


def planned(files: list[str], seeds: int, words: list[str], output_dir: Path) -> list[Run]:
    """Return the runs in order: seed by seed, and random init last, so that a file that does not fit fails at once."""
    log_dir, runs = training_options(words).log_dir, []
    for seed in range(seeds):
        for arm, file in [*zip(arm_names(files), files, strict=True), ("random", "")]:
            folder = output_dir / f"{arm}-{seed}"
            own = ["--seed", str(seed), "--output_dir", str(folder)]
            own += ["--initialize", file] if file else []
            own += ["--log_dir", str(Path(log_dir, folder.name))] if log_dir else []
            runs.append(Run(folder, [*words, *own], plain(training_options([*words, *own], program="sweep.py"))))
    return runs


def arm_names(files: list[str]) -> list[str]:
    """Return distinct names of folders for the files: without their endings, and with as many of the folders above as needed.

    They depend on the files alone. Names that a file system may take for the same, and "random", are not distinct. If no
    folders help, a digest of the path does.
    """
    paths = [os.path.abspath(re.sub("^https://", "/", file.partition("#")[0])) for file in files]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"--initialize {' '.join(files)}: {path} is given twice")
    parts = [Path(path).parts[1:] or ("",) for path in paths]
    stems = [Path(path).name if os.path.isdir(path) else Path(path).stem for path in paths]
    for folders in range(max(len(each) for each in parts)):
        names = [_cleaned("_".join([*each[-1 - folders : -1], stem])) for each, stem in zip(parts, stems, strict=True)]
        if len({_folded(name) for name in [*names, "random"]}) == len(names) + 1:
            return names
    return [_cleaned(f"{stem}-{_digest(path)}") for stem, path in zip(stems, paths, strict=True)]


def _cleaned(name: str) -> str:
    """Return a name for a folder that can be printed, is no option, and leaves room for a seed and an ending."""
    name = re.sub("^-", "_", "".join(each if each.isprintable() else "_" for each in name)) or "weights"
    if len(os.fsencode(name)) <= LONGEST:
        return name
    start = name.encode()[: LONGEST - DIGITS - 1].decode(errors="ignore")
    return f"{start}-{_digest(name)}"


def _folded(name: str) -> str:
    """Return what names have in common that differ in case or in the code points of accents alone."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:DIGITS]


# ---- checks before the first run ----


def check_launched_once() -> None:
    """UserError, from the first process alone, if a launcher started several processes, or torchrun one."""
    if "TORCHELASTIC_RUN_ID" in os.environ or any(os.environ.get(size, "") not in ("", "1") for size in SIZES):
        if not is_first_process():
            raise SystemExit(1)
        raise UserError(
            "sweep.py starts its runs itself: start it once, without torchrun or mpirun; --nproc_per_node N trains "
            "each run on N processes"
        )


def check_files(files: list[str]) -> None:
    for file in files:
        if not file.startswith("https://") and not Path(file).exists():
            raise UserError(f"--initialize {file}: there is no such file or folder")


def check_settings(runs: list[Run], processes: int) -> None:
    """UserError if a run in the folder was made with other options, or from a file that has changed since."""
    for run in runs:
        try:
            config = json.loads(read_text(run.folder / "config.json"))
            then = compared(config)
            path_then = (config["initialization"] or {"path": ""})["path"]
        except (OSError, AttributeError, LookupError, TypeError, ValueError, RecursionError):
            continue  # nothing to compare with: main.py writes a new one, or compare.py names the folder
        now = compared(expected(run, processes, path_then))
        differing = [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]
        if differing:
            raise UserError(
                f"{run.folder} was run with other options: {', '.join(differing)}; use those, or another --output_dir"
            )


def expected(run: Run, processes: int, path_then: str) -> dict:
    """Return what the run's config.json will say. `path_then`: where an earlier call read the weights."""
    options, file = run.options, run.options["initialize"]
    images = options["batch_size"] * options["update_freq"] * processes
    return {
        "options": options,
        "initialization": {"sha256": sha256_of(file, path_then)} if file else None,
        "in_effect": {"lr": peak_lr(argparse.Namespace(**options), images), "images_per_update": images},
        "environment": {"processes": processes},
    }


def compared(config: dict) -> dict[str, str]:
    """Return what has to agree between the calls of a sweep; of the teacher, where it is."""
    settings = settings_of(config)
    start = f"sha256 {settings['initialize']:.12}"
    return settings | {"initialize": start, "teacher_path": str(config["options"]["teacher_path"])}


def sha256_of(location: str, path_then: str) -> str:
    """Return the sha256 of what `--initialize` names now: the file, or that of the same name as then in the folder."""
    if location.startswith("https://"):
        return location.rpartition("=")[2].lower()
    path = Path(location, Path(path_then).name) if Path(location).is_dir() else Path(location)
    return _sha256(path) if path.is_file() else "missing"


@functools.cache
def _sha256(path: Path) -> str:
    from weightfiles import lazy  # here, because it imports torch, and only a sweep that goes on compares

    return lazy.sha256_of(path)


# ---- the runs ----


def train_missing(runs: list[Run], processes: int) -> dict[str, str]:
    """Train the runs that are not finished; return {name: how it ended} of those that failed."""
    failed: dict[str, str] = {}
    tried: set[str] = set()

    def left() -> list[Run]:
        return [run for run in runs if run.name not in tried and not run.is_finished()]

    def train(run: Run, call: Callable[..., int]) -> None:
        check_settings(runs, processes)  # again: another call may have begun here since
        say(f"{run.name}: {len(left())} of {len(runs)} runs are left")
        tried.add(run.name)
        code = call(command(run, processes))
        if code and not (run.folder / "config.json").exists():
            raise UserError(f"{run.name} failed before it trained ({ending(code)}), as others would; see its message")
        if code or not run.is_finished():
            failed[run.name] = ending(code) if code else "log.txt does not have its last epoch"
            say(f"{run.name} failed ({failed[run.name]}), see its message")

    work_off(left, lambda run: run.folder.with_name(f"{run.name}.lock"), train)
    return failed


def ending(code: int) -> str:
    return f"code {code}" if code > 0 else signal.Signals(-code).name


def command(run: Run, processes: int) -> list[str]:
    return [sys.executable, *(TORCHRUN.format(processes).split() if processes > 1 else []), str(MAIN), *run.words]


def main(argv: list[str] | None = None) -> None:
    options, words = sweep_options(argv)
    try:
        sweep(options, words)
    except OSError as error:
        raise UserError(str(error)) from error


def sweep(options: argparse.Namespace, words: list[str]) -> None:
    check_launched_once()
    check_files(options.initialize)
    output_dir = Path(options.output_dir)
    runs = planned(options.initialize, options.seeds, words, output_dir)
    check_settings(runs, options.nproc_per_node)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written to: {error.strerror}") from error
    failed = train_missing(runs, options.nproc_per_node)
    finished = [str(run.folder) for run in runs if run.is_finished()]
    if finished:
        curves = ["--plot", str(output_dir / "curves.png")] if find_spec("matplotlib") else []
        if not curves:
            say("no curves: they need the package matplotlib")
        compare.main([*finished, "--markdown", str(output_dir / "table.md"), *curves])
    if failed:
        listed = ", ".join(f"{name} ({how})" for name, how in failed.items())
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {listed}; the same command tries them again")


if __name__ == "__main__":
    sys.exit(run_script(main))
