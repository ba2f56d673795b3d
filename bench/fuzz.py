"""Mutate real files of every kind that is read from outside, read each mutant with the project's readers, judge the outcome.

    python -m bench.fuzz [--mutants 5000] [--seed 0] [--out results/fuzz.json] [--only KIND/NUMBER]

A mutant must end in one line that names the file, or load: as it was written, if the format has checksums and the
mutation did not renew them, and otherwise as the plain library reads it. docs/security.md says what else is a failure.
Each is printed with the option that repeats it; then the exit code is 1. Linux only.
"""

import argparse
import collections
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
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch

from bench import mutations
from bench.fuzz_samples import Sample, Tensors, make_samples, select
from utils import UserError, json_lines

SECONDS = 5.0  # of processor time, per reader
HANGS = 40.0  # seconds without an answer
MB = 2**20
MEMORY = 256 * MB
ADDRESSES = 8192 * MB  # an allocation beyond this fails, so that a bomb does not take the machine along
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


# ---- one mutant, in a forked process ----

SEEN: list[str] = []


def hook(event: str, arguments: tuple) -> None:
    """Note what a reader does besides reading."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    if writes or (event.startswith(FORBIDDEN) and event not in HARMLESS):
        SEEN.append(f"{event} {'to write ' * bool(writes)}{arguments}"[:200])


def memory(field: str) -> int:
    """VmRSS of this process, or VmHWM, the largest that it was; bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def listing(root: Path) -> set[str]:
    return {os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names}


def judge(case: Case, sample: Sample, root: Path) -> Verdict:
    """Make the mutant in the folder root/inside/mutant and read it with every reader of its kind."""
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
    path, verdict = folder / next(iter(files)), Verdict(case, mutation.__name__, "refused", "")
    for reader in sample.readers:
        tensors, said, fault, seconds, peak = watched(reader, path, root)
        if tensors is not None and not fault:
            fault = fault_of_tensors(tensors, reader, sample, path, mutation in mutations.FITTING)
        verdict = verdict._replace(seconds=verdict.seconds + seconds, memory=max(verdict.memory, peak))
        if fault:
            return verdict._replace(outcome="failed", said=f"{reader.__name__}: {fault}")
        verdict = verdict._replace(outcome="loaded") if tensors is not None else verdict._replace(said=said)
    return verdict


def watched(reader: Callable, path: Path, root: Path) -> tuple[Tensors | None, str, str, float, int]:
    """The tensors or the line that refuses them, what the reader did wrong, its seconds, and its bytes."""
    tensors, said, fault, before = None, "", "", listing(root)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    had, start = memory("VmRSS"), time.process_time()
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
    seconds, peak = time.process_time() - start, memory("VmHWM") - had
    if SEEN:
        fault = f"it did more than read: {'; '.join(SEEN[:3])}"
    elif changed := listing(root) ^ before:
        fault = f"files appeared or are gone: {sorted(changed)[:3]}"
    elif seconds > SECONDS:
        fault = f"it took {seconds:.1f} s"
    elif peak > MEMORY:
        fault = f"it took {peak / MB:.0f} MB"
    return tensors, said, fault, seconds, peak


def fault_of_tensors(tensors: Tensors, reader: Callable, sample: Sample, path: Path, fitting: bool) -> str:
    """How the tensors that a reader found differ from what they must be, bit for bit, or ""."""
    try:
        expected = sample.intact if sample.intact and not fitting else sample.reference(path)
        if reader is select:  # from a file that is surely what it says
            whole = {key: tensor.clone() for key, tensor in expected.items()}
            safetensors.torch.save_file(whole, path.parent.parent / "whole.safetensors")
            expected = select(path.parent.parent / "whole.safetensors")
    except Exception as error:
        return f"the library finds no tensors: {error!r}"[:300]
    mine, theirs = described(tensors), described(expected)
    differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    return f"not the tensors of the file: {differing[:3]}" if differing else ""


def described(tensors: Tensors) -> dict[str, tuple]:
    """The dtype, shape and bytes of each tensor."""
    flat = {key: tensor.detach().contiguous().reshape(-1).view(torch.uint8) for key, tensor in tensors.items()}
    return {key: (tensor.dtype, tensor.shape, flat[key].numpy().tobytes()) for key, tensor in tensors.items()}


# ---- many ----


def serve(samples: dict[str, Sample], root: Path, channel: Connection) -> None:
    """Judge each case that arrives and send the verdict."""
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    (root / "inside" / "work").mkdir(parents=True, exist_ok=True)
    os.chdir(root / "inside" / "work")
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    logging.disable()
    warnings.simplefilter("ignore")
    sys.addaudithook(hook)  # it cannot be removed, hence in the forked process
    while case := channel.recv():
        channel.send(judge(case, samples[case[0]], root))


def run(cases: list[Case], samples: dict[str, Sample], root: Path) -> Iterator[Verdict]:
    """The verdict on each case. If the process dies or hangs, its case fails and another process goes on."""
    child = None
    for case in cases:
        if not child:
            channel, other_end = multiprocessing.Pipe()
            child = multiprocessing.get_context("fork").Process(target=serve, args=(samples, root, other_end))
            child.start()
            other_end.close()
        channel.send(case)
        reason = f"it hangs: no end after {HANGS:.0f} s"
        try:
            if channel.poll(HANGS):
                yield channel.recv()
                continue
        except (EOFError, ConnectionError):
            reason = "the process ended"
        child.kill()
        child.join()
        mutation, _ = mutations.mutant(*case, samples[case[0]].files)
        yield Verdict(case, mutation.__name__, "failed", f"{reason} (status {child.exitcode})")
        child = None
    if child:
        channel.send(None)
        child.join()


def fuzz(cases: list[Case]) -> list[Verdict]:
    """The verdicts, in the order of the cases; failures are printed."""
    torch.set_num_threads(1)  # a forked process has no other threads
    with tempfile.TemporaryDirectory() as name:
        root, verdicts = Path(name), []
        (root / "made").mkdir()
        for verdict in run(cases, make_samples(root / "made"), root):
            verdicts.append(verdict)
            if verdict.outcome == "failed":
                kind, number, _ = verdict.case
                print(f"--only '{kind}/{number}' ({verdict.mutation}): {verdict.said}", flush=True)
    return verdicts


def all_cases(mutants: int, seed: int) -> list[Case]:
    """At least `mutants` cases, equally many of each kind."""
    each = -(-mutants // len(mutations.MUTATIONS))
    return [(kind, number, seed) for kind in mutations.MUTATIONS for number in range(each)]


def summary(verdicts: list[Verdict], seconds: float) -> dict:
    """The counts and extremes that are printed, and written to `--out`."""
    kinds = {kind: [each.outcome for each in verdicts if each.case[0] == kind] for kind in mutations.MUTATIONS}
    outcomes = ("loaded", "refused", "failed")
    return {
        "mutants": len(verdicts),
        "failed": sum(ends.count("failed") for ends in kinds.values()),
        "seconds": round(seconds, 1),
        "slowest_seconds": round(max(verdict.seconds for verdict in verdicts), 2),
        "most_memory_mb": round(max(verdict.memory for verdict in verdicts) / MB),
        "kinds": {kind: {outcome: ends.count(outcome) for outcome in outcomes} for kind, ends in kinds.items() if ends},
        "mutations": dict(collections.Counter(verdict.mutation for verdict in verdicts).most_common()),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=5000, help="at least this many (5000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="a .json for the counts")
    parser.add_argument("--only", metavar="KIND/NUMBER", help="one mutant, as a failure is printed")
    options = parser.parse_args(argv)
    cases = all_cases(options.mutants, options.seed)
    if options.only:
        kind, _, number = options.only.rpartition("/")
        cases = [(kind, int(number), options.seed)]
    start = time.monotonic()
    verdicts = fuzz(cases)
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
