"""Mutate real files of every kind that is read from outside, read each with the project's own readers, judge what came of it.

    python bench/fuzz.py [--mutants 5000] [--seed 0] [--out results/fuzz.json] [--only KIND/NUMBER]

A mutant has to end in one line that names the file, or load: of a file of our own formats what was written, of a foreign
one the bytes that a second, independent reader finds there. Anything else is a failure: another exception, a crash,
more than 5 s or 1 GB, a process started, a connection, a file written. Failures are printed with what repeats them, and
the exit code is then 1. Mutants are read in forked processes: Linux alone.
"""

import argparse
import collections
import json
import logging
import os
import platform
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # in place of this folder, whose selection.py is not the one to import

import numpy as np
import safetensors
import timm
import torch

from bench import fuzz_bytes, fuzz_mutations, fuzz_samples, fuzz_zip
from utils import UserError, json_lines

SECONDS = 5.0  # of the processor, for one reader
HANGS = 40.0  # seconds, for all readers of a mutant and the second one
MB = 2**20
MEMORY = 1024 * MB
ADDRESSES = 8192 * MB  # more than is there at the start: an allocation beyond fails, so that a bomb takes nobody along
LONGEST_LINE = 1500
# what no reader of weights has to do, by the names of Python's audit events
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
        sys.addaudithook(self.hook)  # for ever: only in a forked process

    def hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments}"[:200])
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            self.seen.append(f"open to write {arguments[0]}")


def memory(field: str) -> int:
    """VmRSS, or VmHWM, the most that it was, of this process; bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def listing(root: Path) -> set[str]:
    return {os.path.relpath(os.path.join(folder, name), root) for folder, _, names in os.walk(root) for name in names}


def judge(case: Case, sample: fuzz_samples.Sample, root: Path, watch: Watch) -> Verdict:
    """Make the mutant in the folder root/inside/mutant and read it by every reader of its kind."""
    mutation, files = fuzz_mutations.mutant(case.kind, case.number, case.seed, sample.files)
    folder = root / "inside" / "mutant"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fuzz_bytes.put(files, folder)
    before, named, outcomes = listing(root), folder / next(iter(sample.files)), []
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    had, start = memory("VmRSS"), time.process_time()
    for name, read in sample.entries.items():
        watch.seen.clear()
        spent = time.process_time()
        pause = {"seconds": 0.0, "memory": 0}

        def truth(name=name, pause=pause) -> dict[str, torch.Tensor]:
            """The reader is done: what the second one needs is not counted."""
            watch.on, pause["memory"], began = False, memory("VmHWM") - had, time.process_time()
            try:
                with warnings.catch_warnings(action="ignore"):
                    return sample.truth(named, mutation in fuzz_mutations.REWRITING)
            except Exception as error:
                raise AssertionError(f"the second reader finds no tensors: {error!r}"[:300]) from error
            finally:
                pause["seconds"] = time.process_time() - began

        watch.on = True
        try:
            outcome, said = "loaded", f"{read(named, truth)} tensors"
        except UserError as error:
            outcome, said = "refused", str(error)
        except AssertionError as error:
            outcome, said = "failed", str(error)
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            outcome, said = "failed", f"{error!r}"[:300] + f" at {os.path.basename(last.filename)}:{last.lineno}"
        watch.on = False
        seconds, peak = time.process_time() - spent - pause["seconds"], pause["memory"] or memory("VmHWM") - had
        fault = fault_of(outcome, said, files, folder, seconds, peak, watch.seen)
        if not fault and (more := listing(root) ^ before):
            fault = f"files appeared or are gone: {sorted(more)[:3]}"
        if fault:
            return Verdict(case, mutation, "failed", f"{name}: {fault}", seconds, peak)
        outcomes.append((outcome, f"{name}: {said}"))
    outcome = "loaded" if any(outcome == "loaded" for outcome, _ in outcomes) else "refused"
    said = "; ".join(said for each, said in outcomes if each == outcome)
    return Verdict(case, mutation, outcome, said, time.process_time() - start, peak)


def fault_of(outcome: str, said: str, files: dict, folder: Path, seconds: float, peak: int, seen: list[str]) -> str:
    """Why what one reader did is a failure; "" if it is none."""
    if seen:
        return f"it did more than read: {'; '.join(seen[:3])}"
    if outcome == "failed":
        return said
    if seconds > SECONDS:
        return f"it took {seconds:.1f} s, then: {said[:200]}"
    if peak > MEMORY:
        return f"it took {peak / MB:.0f} MB, then: {said[:200]}"
    if outcome == "refused":
        if not said.isprintable() or len(said) > LONGEST_LINE:
            return f"not one short line: {said[:300]!r}"
        if str(folder) not in said and not any(name in said for name in files):
            return f"the line names no file: {said[:300]}"
    return ""


# ---- many ----


def serve(cases: list[Case], samples: dict[str, fuzz_samples.Sample], root: Path, channel: int) -> None:
    """Judge the cases in order and write a line at the start and at the end of each."""
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    (root / "inside" / "work").mkdir(parents=True, exist_ok=True)
    os.chdir(root / "inside" / "work")
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    logging.disable()
    watch = Watch()
    with os.fdopen(channel, "w", buffering=1) as lines:
        for case in cases:
            print(json.dumps({"start": case.number}), file=lines)
            with warnings.catch_warnings(action="ignore"):
                verdict = judge(case, samples[case.kind], root, watch)
            print(json.dumps({"verdict": verdict}), file=lines)


def run(cases: list[Case], samples: dict[str, fuzz_samples.Sample], root: Path) -> Iterator[Verdict]:
    """The verdict on each case. A process that dies or hangs fails its case, and another goes on behind it."""
    while cases:
        receiving, sending = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(receiving)
                serve(cases, samples, root, sending)
            finally:
                os._exit(0)
        os.close(sending)
        with os.fdopen(receiving) as lines:
            done, reason = 0, None
            while done < len(cases) and reason is None:
                ready, _, _ = select.select([lines], [], [], HANGS)
                line = lines.readline() if ready else None
                if line is None:
                    os.kill(child, signal.SIGKILL)
                    reason = f"it hangs: no end after {HANGS:.0f} s"
                elif line == "":
                    reason = "the process ended"
                elif "verdict" in (message := json.loads(line)):
                    case, *rest = message["verdict"]
                    done += 1
                    yield Verdict(Case(*case), *rest)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if reason:
            case = cases[done]
            mutation = fuzz_mutations.mutant(case.kind, case.number, case.seed, samples[case.kind].files)[0]
            yield Verdict(case, mutation, "failed", f"{reason} (status {status})")
            done += 1
        cases = cases[done:]


def fuzz(cases: list[Case]) -> list[Verdict]:
    """The verdicts, in the order of the cases."""
    torch.set_num_threads(1)  # a forked process has no threads but its own
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "made").mkdir()
        samples = fuzz_samples.make_samples(root / "made")
        fuzz_zip.zeros()  # once, before there are processes
        verdicts = []
        for verdict in run(cases, samples, root):
            verdicts.append(verdict)
            if verdict.outcome == "failed":
                print(f"--only '{verdict.case}' ({verdict.mutation}): {verdict.said}", flush=True)
    return verdicts


def all_cases(mutants: int, seed: int) -> list[Case]:
    """At least `mutants` cases, the same number of each kind."""
    each = -(-mutants // len(fuzz_mutations.MUTATIONS))
    return [Case(kind, number, seed) for kind in fuzz_mutations.MUTATIONS for number in range(each)]


def summary(verdicts: list[Verdict]) -> dict:
    kinds = {}
    for verdict in verdicts:
        counted = kinds.setdefault(verdict.case.kind, {"mutants": 0, "loaded": 0, "refused": 0, "failed": 0})
        counted["mutants"] += 1
        counted[verdict.outcome] += 1
    return kinds


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
    seconds, kinds = time.monotonic() - start, summary(verdicts)
    if options.only:
        print(*verdicts, sep="\n")
    for kind, counted in kinds.items():
        print(f"{kind}: " + ", ".join(f"{count} {name}" for name, count in counted.items()))
    failed = sum(counted["failed"] for counted in kinds.values())
    slowest, largest = max(verdict.seconds for verdict in verdicts), max(verdict.memory for verdict in verdicts)
    print(
        f"{len(verdicts)} mutants, {failed} failed; {seconds:.0f} s, the slowest {slowest:.1f} s, {largest / MB:.0f} MB"
    )
    if options.out:
        packages = {module.__name__: module.__version__ for module in (torch, timm, safetensors, np)}
        result = {
            "command": f"python bench/fuzz.py --mutants {options.mutants} --seed {options.seed}",
            "versions": {"python": platform.python_version(), **packages},
            "mutants": len(verdicts),
            "failed": failed,
            "seconds": round(seconds, 1),
            "slowest_seconds": round(slowest, 2),
            "most_memory_mb": round(largest / MB),
            "kinds": kinds,
            "mutations": dict(collections.Counter(verdict.mutation for verdict in verdicts).most_common()),
        }
        Path(options.out).write_text(json_lines(result, levels=2) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
