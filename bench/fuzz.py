"""Mutate real files of every kind that is read from outside, read each mutant with the project's readers, judge the outcome.

    python -m bench.fuzz [--mutants 5000] [--seed 0] [--out results/fuzz.json] [--only KIND/NUMBER]

A mutant must end in one line that names the file, or load. What loads must be what was written, if the format has
checksums and the mutation did not renew them, and otherwise what the plain library reads. Anything else is a failure:
another exception, a crash, more than 5 s or 256 MB, a process started, a connection, a file written. A failure is
printed with the option that repeats it, and the exit code is 1. Mutants are read in a forked process: Linux only.
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
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import timm
import torch

from bench import fuzz_samples, mutations
from utils import UserError, json_lines

SECONDS = 5.0  # of processor time, per reader
HANGS = 40.0  # seconds without an answer
MB = 2**20
MEMORY = 256 * MB
ADDRESSES = 8192 * MB  # an allocation beyond this fails, so that a bomb does not take the machine along
LONGEST_LINE = 1500
# Python's audit events that no reader of weights may cause
FORBIDDEN = frozenset(
    "os.system os.exec os.posix_spawn os.fork os.forkpty os.mkdir os.rename os.remove os.rmdir os.symlink os.link os.truncate "
    "os.chmod os.putenv subprocess.Popen socket.connect socket.bind socket.getaddrinfo ctypes.dlopen shutil.rmtree "
    "shutil.move webbrowser.open urllib.Request pty.spawn tempfile.mkdtemp tempfile.mkstemp pickle.find_class".split()
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Case(NamedTuple):
    kind: str
    number: int
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}/{self.number}"


class Verdict(NamedTuple):
    """How a mutant ended: "loaded" by some reader, "refused" by all, or "failed"; with the line or the reason."""

    case: Case
    mutation: str
    outcome: str
    said: str
    seconds: float = 0.0
    memory: int = 0  # bytes


# ---- one mutant, in a forked process ----


class Watch:
    """What the readers did besides reading, while `on`: names of audit events."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self.hook)  # it can never be removed, hence only in a forked process

    def hook(self, event: str, arguments: tuple) -> None:
        if self.on and event in FORBIDDEN:
            self.seen.append(f"{event} {arguments}"[:200])
        elif self.on and event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            self.seen.append(f"open to write {arguments[0]}")


def memory(field: str) -> int:
    """VmRSS of this process, or VmHWM, the largest that it was; bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def listing(root: Path) -> set[str]:
    return {os.path.relpath(os.path.join(folder, name), root) for folder, _, names in os.walk(root) for name in names}


def judge(case: Case, sample: fuzz_samples.Sample, root: Path, watch: Watch) -> Verdict:
    """Make the mutant in the folder root/inside/mutant and read it with every reader of its kind."""
    mutation, files = mutations.mutant(case.kind, case.number, case.seed, sample.files)
    folder = root / "inside" / "mutant"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mutations.write(files, folder)
    path, before, outcomes = folder / next(iter(sample.files)), listing(root), []
    total, peak, said = 0.0, 0, ""
    for reader in sample.readers:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        had, start, found = memory("VmRSS"), time.process_time(), None
        watch.seen.clear()
        watch.on = True
        try:
            found, fault = reader.read(path), ""
        except UserError as error:
            said = str(error)
            fault = fault_of_line(said, folder, files)
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            fault = f"{error!r}"[:300] + f" at {os.path.basename(last.filename)}:{last.lineno}"
        watch.on = False
        seconds, peak = time.process_time() - start, memory("VmHWM") - had
        total += seconds
        fault = fault_of_deeds(seconds, peak, watch.seen, sorted(listing(root) ^ before)) or fault
        if found is not None and not fault:
            fault = fault_of_tensors(found, reader, sample, path, hasattr(mutation, "repacks"))
        if fault:
            return Verdict(case, mutation.__name__, "failed", f"{reader.name}: {fault}", seconds, peak)
        outcomes.append("refused" if found is None else "loaded")
    outcome = "loaded" if "loaded" in outcomes else "refused"
    return Verdict(case, mutation.__name__, outcome, said, total, peak)


def fault_of_line(said: str, folder: Path, files: dict) -> str:
    """What is wrong with the line that refuses a file, or ""."""
    if not said.isprintable() or len(said) > LONGEST_LINE:
        return f"not one short line: {said[:300]!r}"
    if str(folder) not in said and not any(name in said for name in files):
        return f"the line names no file: {said[:300]}"
    return ""


def fault_of_deeds(seconds: float, peak: int, seen: list[str], changed: list[str]) -> str:
    """What a reader did or took beyond reading, or ""."""
    if seen:
        return f"it did more than read: {'; '.join(seen[:3])}"
    if changed:
        return f"files appeared or are gone: {changed[:3]}"
    if seconds > SECONDS:
        return f"it took {seconds:.1f} s"
    return f"it took {peak / MB:.0f} MB" if peak > MEMORY else ""


def fault_of_tensors(
    found: dict, reader: fuzz_samples.Reader, sample: fuzz_samples.Sample, path: Path, renewed: bool
) -> str:
    """How the tensors that a reader found differ from what they must be, bit for bit, or ""."""
    try:
        with warnings.catch_warnings(action="ignore"):
            expected = sample.intact if sample.intact and not renewed else sample.reference(path)
            expected = reader.expected(expected)
    except Exception as error:
        return f"the library finds no tensors: {error!r}"[:300]
    if found.keys() != expected.keys():
        return f"keys differ: {sorted(found.keys() ^ expected.keys())[:3]}"
    for key, tensor in found.items():
        other = expected[key]
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            return f"{key}: {tensor.dtype} {tensor.shape}"
        mine, theirs = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (tensor, other))
        if not torch.equal(mine, theirs):
            return f"{key} has other values than the file"
    return ""


# ---- many ----


def serve(cases: list[Case], samples: dict[str, fuzz_samples.Sample], root: Path, channel: Connection) -> None:
    """Judge the cases in order and send each verdict."""
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    (root / "inside" / "work").mkdir(parents=True, exist_ok=True)
    os.chdir(root / "inside" / "work")
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    logging.disable()
    warnings.simplefilter("ignore")
    watch = Watch()
    for case in cases:
        channel.send(judge(case, samples[case.kind], root, watch))


def run(cases: list[Case], samples: dict[str, fuzz_samples.Sample], root: Path) -> Iterator[Verdict]:
    """The verdict on each case. If the process dies or hangs, its case fails and another process goes on."""
    processes = multiprocessing.get_context("fork")
    while cases:
        answers, channel = processes.Pipe(duplex=False)
        child = processes.Process(target=serve, args=(cases, samples, root, channel))
        child.start()
        channel.close()
        while cases:
            case, cases = cases[0], cases[1:]
            try:
                if answers.poll(HANGS):
                    yield answers.recv()
                    continue
                reason = f"it hangs: no end after {HANGS:.0f} s"
            except EOFError:
                reason = "the process ended"
            child.kill()
            child.join()
            mutation, _ = mutations.mutant(*case, samples[case.kind].files)
            yield Verdict(case, mutation.__name__, "failed", f"{reason} (status {child.exitcode})")
            break
        child.join()


def fuzz(cases: list[Case]) -> list[Verdict]:
    """The verdicts, in the order of the cases; failures are printed."""
    torch.set_num_threads(1)  # a forked process has no other threads
    with tempfile.TemporaryDirectory() as name:
        root, verdicts = Path(name), []
        (root / "made").mkdir()
        for verdict in run(cases, fuzz_samples.make_samples(root / "made"), root):
            verdicts.append(verdict)
            if verdict.outcome == "failed":
                print(f"--only '{verdict.case}' ({verdict.mutation}): {verdict.said}", flush=True)
    return verdicts


def all_cases(mutants: int, seed: int) -> list[Case]:
    """At least `mutants` cases, equally many of each kind."""
    each = -(-mutants // len(mutations.MUTATIONS))
    return [Case(kind, number, seed) for kind in mutations.MUTATIONS for number in range(each)]


def summary(verdicts: list[Verdict], seconds: float) -> dict:
    """The counts and extremes that are printed, and written to `--out`."""
    kinds = {}
    for verdict in verdicts:
        counted = kinds.setdefault(verdict.case.kind, {"mutants": 0, "loaded": 0, "refused": 0, "failed": 0})
        counted["mutants"] += 1
        counted[verdict.outcome] += 1
    return {
        "mutants": len(verdicts),
        "failed": sum(counted["failed"] for counted in kinds.values()),
        "seconds": round(seconds, 1),
        "slowest_seconds": round(max(verdict.seconds for verdict in verdicts), 2),
        "most_memory_mb": round(max(verdict.memory for verdict in verdicts) / MB),
        "kinds": kinds,
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
        cases = [Case(kind, int(number), options.seed)]
    start = time.monotonic()
    verdicts = fuzz(cases)
    counts = summary(verdicts, time.monotonic() - start)
    if options.only:
        print(*verdicts, sep="\n")
    print(json_lines(counts, levels=2))
    if options.out:
        packages = {module.__name__: module.__version__ for module in (torch, timm, safetensors, np)}
        result = {
            "command": f"python -m bench.fuzz --mutants {options.mutants} --seed {options.seed}",
            "versions": {"python": platform.python_version(), **packages},
            **counts,
        }
        Path(options.out).write_text(json_lines(result, levels=2) + "\n")
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
