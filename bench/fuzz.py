"""Mutate real files of every kind that is read from outside, read each mutant with the project's readers, judge the outcome.

    python -m bench.fuzz [--mutants 5000] [--seed 0] [--out results/fuzz.json] [--only KIND/NUMBER]

A mutant must end in one line that names the file, or load: as it was written, if the format has checksums and the
mutation did not renew them, and otherwise as the plain library reads it. docs/security.md says what else is a failure.
Each is printed with the option that repeats it; then the exit code is 1. Linux only.
"""

import collections
import gc
import logging
import multiprocessing
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch

from bench import mutations
from bench.fuzz_samples import Sample, Tensors, initialize, make_samples, select
from options.parser import Parser
from utils import UserError, json_lines

SECONDS = 5.0  # of processor time, for all readers of a mutant
HANGS = 40.0  # seconds without an answer
MB = 2**20
MEMORY = 256 * MB
ALLOCATED = 8192 * MB  # an allocation beyond this fails, so that a bomb does not take the machine along
LONGEST_LINE = 1500
# Python's audit events that no reader of weights may cause, by their beginnings; and the harmless ones among them
FORBIDDEN = tuple(
    "os. subprocess. socket. shutil. webbrowser. urllib. pty. tempfile. ctypes.dlopen pickle.find_class".split()
)
HARMLESS = ("os.listdir", "os.scandir", "os.walk")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

Case = tuple[str, int, int]  # kind, number, seed


class Verdict(NamedTuple):
    """How a mutant ended: "loaded" by some reader, "refused" by all, or "failed"; with the line or the reason."""

    case: Case
    mutation: str
    outcome: str
    said: str
    seconds: float = 0.0
    memory: int = 0  # bytes


# ---- in the forked process of one mutant ----

SEEN: list[str] = []


def hook(event: str, arguments: tuple) -> None:
    """Note what a reader does besides reading."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    if writes or (event.startswith(FORBIDDEN) and event not in HARMLESS):
        SEEN.append(f"{event} {'to write ' * bool(writes)}{arguments}"[:200])


def listing(root: Path) -> set[str]:
    return {os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names}


def judge(sample: Sample, path: Path, fitting: bool, root: Path) -> tuple[str, str]:
    """Read a mutant with every reader of its kind; how it ended, and the line or the reason."""
    outcome, said = "refused", ""
    for reader in sample.readers:
        tensors, fault, before = None, "", listing(root)
        SEEN.clear()
        try:
            tensors = dict(reader(path))
        except UserError as error:
            said = str(error)
            if not said.isprintable() or len(said) > LONGEST_LINE:
                fault = f"not one short line: {said[:300]!r}"
            elif not any(name in said for name in os.listdir(path.parent)):
                fault = f"the line names no file: {said[:300]}"
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            fault = f"{error!r}"[:300] + f" at {os.path.basename(last.filename)}:{last.lineno}"
        if SEEN:
            fault = f"it did more than read: {'; '.join(SEEN[:3])}"
        elif changed := listing(root) ^ before:
            fault = f"files appeared or are gone: {sorted(changed)[:3]}"
        elif tensors is not None:
            outcome, fault = "loaded", fault_of_tensors(tensors, reader, sample, path, fitting)
        if fault:
            return "failed", f"{reader.__name__}: {fault}"
    return outcome, said


def fault_of_tensors(tensors: Tensors, reader: Callable, sample: Sample, path: Path, fitting: bool) -> str:
    """How the tensors that a reader returned differ from what they must be, bit for bit, or ""."""
    try:
        expected = sample.intact if sample.intact and not fitting else sample.reference(path)
        if reader in (select, initialize):  # from a file that is surely what it says
            whole = Path(f"{path.stem}.safetensors")
            safetensors.torch.save_file({key: tensor.clone() for key, tensor in expected.items()}, whole)
            expected = reader(whole)
    except Exception as error:
        return f"the library finds no tensors: {error!r}"[:300]
    mine, theirs = described(tensors), described(expected)
    differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    return f"not the tensors of the file: {differing[:3]}" if differing else ""


def described(tensors: Tensors) -> dict[str, tuple]:
    """The dtype, shape and bytes of each tensor."""
    flat = {key: tensor.detach().contiguous().reshape(-1).view(torch.uint8) for key, tensor in tensors.items()}
    return {key: (tensor.dtype, tensor.shape, flat[key].numpy().tobytes()) for key, tensor in tensors.items()}


def serve(sample: Sample, path: Path, fitting: bool, root: Path, channel: Connection) -> None:
    """Judge a mutant and send how it ended, with the seconds and bytes that it took."""
    resource.setrlimit(resource.RLIMIT_DATA, (ALLOCATED, ALLOCATED))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(root / "inside" / "work")
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    gc.disable()  # a collection would copy all memory that this process shares with its parent
    logging.disable()
    sys.addaudithook(hook)
    before = resource.getrusage(resource.RUSAGE_SELF)
    outcome, said = judge(sample, path, fitting, root)
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    memory = (after.ru_maxrss - before.ru_maxrss) * 1024
    if outcome != "failed" and (seconds > SECONDS or memory > MEMORY):
        outcome, said = "failed", f"it took {seconds:.1f} s and {memory / MB:.0f} MB"
    channel.send((outcome, said, seconds, memory))


# ---- all of them ----


def run(case: Case, sample: Sample, root: Path) -> Verdict:
    """Make a mutant in the folder root/inside/mutant and judge it in a process of its own, which may die or hang."""
    mutation, files = mutations.mutant(*case, sample.files)
    folder = root / "inside" / "mutant"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content is None:
            os.mkfifo(folder / name)
        else:
            (folder / name).symlink_to(content)
    channel, other_end = multiprocessing.Pipe(duplex=False)
    arguments = sample, folder / next(iter(files)), mutation in mutations.FITTING, root, other_end
    child = multiprocessing.get_context("fork").Process(target=serve, args=arguments)
    child.start()
    other_end.close()
    ended, reason = None, f"it hangs: no end after {HANGS:.0f} s"
    try:
        if channel.poll(HANGS):
            ended = channel.recv()
    except EOFError:
        reason = "the process ended"
    child.kill()
    child.join()
    return Verdict(case, mutation.__name__, *(ended or ("failed", f"{reason} (status {child.exitcode})")))


def fuzz(mutants: int, seed: int, only: str | None = None) -> list[Verdict]:
    """Judge at least `mutants` mutants, equally many of each kind, or the one named "KIND/NUMBER"; print failures."""
    torch.set_num_threads(1)  # a forked process has no other threads
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(action="ignore"):
        root, verdicts = Path(name), []
        (root / "made").mkdir()
        (root / "inside" / "work").mkdir(parents=True)
        samples = make_samples(root / "made")
        cases = [(kind, number) for kind in samples for number in range(-(-mutants // len(samples)))]
        if only:
            kind, _, number = only.rpartition("/")
            cases = [(kind, int(number))]
        for kind, number in cases:
            verdict = run((kind, number, seed), samples[kind], root)
            verdicts.append(verdict)
            if verdict.outcome == "failed":
                print(f"--only '{kind}/{number}' ({verdict.mutation}): {verdict.said}", flush=True)
    return verdicts


def summary(verdicts: list[Verdict], seconds: float) -> dict:
    """The counts and extremes that are printed, and written to `--out`."""
    counts = collections.Counter((verdict.case[0], verdict.outcome) for verdict in verdicts)
    kinds = dict.fromkeys(verdict.case[0] for verdict in verdicts)
    return {
        "mutants": len(verdicts),
        "failed": sum(counts[kind, "failed"] for kind in kinds),
        "seconds": round(seconds, 1),
        "slowest_seconds": round(max(verdict.seconds for verdict in verdicts), 2),
        "most_memory_mb": round(max(verdict.memory for verdict in verdicts) / MB),
        "kinds": {kind: {name: counts[kind, name] for name in ("loaded", "refused", "failed")} for kind in kinds},
        "mutations": dict(collections.Counter(verdict.mutation for verdict in verdicts).most_common()),
    }


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=5000, help="at least this many (5000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="a .json for the counts")
    parser.add_argument("--only", metavar="KIND/NUMBER", help="one mutant, as a failure is printed")
    options = parser.parse_args(argv)
    start = time.monotonic()
    verdicts = fuzz(options.mutants, options.seed, options.only)
    counts = summary(verdicts, time.monotonic() - start)
    if options.only:
        print(*verdicts, sep="\n")
    print(json_lines(counts, levels=2))
    if options.out:
        versions = {"python": platform.python_version()}
        versions |= {module.__name__: module.__version__ for module in (torch, timm, safetensors, np)}
        command = f"python -m bench.fuzz --mutants {options.mutants} --seed {options.seed}"
        Path(options.out).write_text(json_lines({"command": command, "versions": versions, **counts}, levels=2) + "\n")
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
