"""Runs what is missing of a study, through weight_selection.py and main.py, one run after the other.

    python study/run.py cpu --data FOLDER --work FOLDER

FOLDER of --data holds tiny-imagenet-200/ and cifar10-jpeg/, each as train/CLASS/IMAGE and val/CLASS/IMAGE. Weights and
messages go to --work; config.json and log.txt of each finished run to results/study-cpu/.

It may be stopped at any time, by any signal: the same command goes on in the middle of the run that was cut off. Started
twice it shares the work, a run each: on two cores two calls with OMP_NUM_THREADS=1 do more than one with two threads.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from arms import STUDENT_DATA, STUDIES, TEACHER_DATA, Run, runs_of

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 5.0  # between looks at what another call works on


class StudyError(Exception):
    """Why the study cannot go on, in one line."""


@dataclass(frozen=True)
class Place:
    """The two folders of a study: `work` with weights, `results` with the logs of finished runs.

    Commands run in `work` and name what is there by relative paths, so that no config.json tells where that is.
    """

    work: Path
    results: Path

    def epochs_done(self, run: Run) -> int:
        """How many epochs the run's log in `work` has."""
        log = self.work / run.name / "log.txt"
        return len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0

    def finished(self, run: Run) -> bool:
        """Whether its log is in `results`, whole."""
        log = self.results / run.name / "log.txt"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        return bool(lines) and json.loads(lines[-1])["epoch"] == run.epochs - 1

    def can_teach(self, run: Run) -> bool:
        """Whether it is finished and its weights are in `work`.

        StudyError where `results` has the log of a teacher that is not the one in `work`: a new one, trained here, would
        stand beside students of the old.
        """
        if not self.finished(run):
            return False
        logs = [folder / run.name / "log.txt" for folder in (self.work, self.results)]
        here = (self.work / run.checkpoint).exists() and logs[0].exists()
        if not here or logs[0].read_bytes() != logs[1].read_bytes():
            raise StudyError(
                f"{logs[1]} is of a {run.name} whose weights are not in --work {self.work}: more students of it cannot be "
                f"made; choose another --results for students of a new one"
            )
        return True

    def commands(self, run: Run) -> list[list[str]]:
        """What makes the run, in the order in which it is to be run."""
        train = [sys.executable, str(ROOT / "main.py"), *run.command]
        if run.teacher is None:
            return [train]
        source, file = run.teacher.checkpoint, f"{run.name}.pth"
        shuffle = []
        if run.shuffled:
            source = f"{run.teacher.name}_shuffled.pth"
            shuffle = [[sys.executable, str(ROOT / "study" / "shuffle.py"), run.teacher.checkpoint, source]]
        script = str(ROOT / "weight_selection.py")
        select = [sys.executable, script, *run.selection, "--pretrained_path", source, "--output_dir", file]
        return [*shuffle, select, [*train, "--initialize", file]]

    def lock(self, run: Run) -> int | None:
        """A file descriptor that holds the run's lock, or None where another call, or what it left, has it.

        The run's processes inherit it: one that outlives a killed call keeps the next call away from its folder.
        """
        path = self.work / f"{run.name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def make(self, run: Run, lock: int) -> None:
        """Carry out the run's commands, their messages in a file beside its folder, and keep its log."""
        messages = self.work / f"{run.name}.txt"
        for command in self.commands(run):
            with open(messages, "a", encoding="utf-8") as file:
                done = subprocess.run(command, cwd=self.work, stdout=file, stderr=file, pass_fds=[lock])
            if done.returncode:
                last = messages.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                raise StudyError(f"{run.name} failed with code {done.returncode}: {' '.join(last)} (see {messages})")
        self.keep(run)

    def keep(self, run: Run) -> None:
        """Copy config.json, then log.txt, by which a run counts as finished, each whole or not at all."""
        target = self.results / run.name
        target.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "log.txt"):
            temporary = target / f".{name}.tmp"
            temporary.write_bytes((self.work / run.name / name).read_bytes())
            os.replace(temporary, target / name)


def carry_out(runs: list[Run], place: Place) -> None:
    """Make what is missing of `runs`, in their order; what another call works on is waited for."""
    while left := [run for run in runs if not place.finished(run)]:
        ready = (run for run in left if run.teacher is None or place.can_teach(run.teacher))
        run, lock = next(((run, lock) for run in ready if (lock := place.lock(run)) is not None), (None, None))
        if run is None:
            time.sleep(POLL_SECONDS)
            continue
        try:
            if not place.finished(run):  # another call may just have ended it
                say(f"{run.name}, about {run.minutes:.0f} minutes; {len(left)} runs are left")
                place.make(run, lock)
        finally:
            os.close(lock)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def listing(runs: list[Run], place: Place) -> str:
    """A line for each run: its state and the minutes to expect; and those of all that is left."""
    lines, left = [], 0.0
    for run in runs:
        done = place.epochs_done(run)
        state = "finished" if place.finished(run) else f"epoch {done} of {run.epochs}" if done else "to do"
        left += 0 if state == "finished" else run.minutes * (1 - done / run.epochs)
        lines.append(f"{run.name:32}{state:18}{run.minutes:6.1f} min")
    return "\n".join([*lines, f"{len(runs)} runs, {left / 60:.1f} hours are left"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="study/run.py",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("study", choices=STUDIES)
    add("--data", type=Path, metavar="FOLDER", help=f"with {TEACHER_DATA}/ and {STUDENT_DATA}/ in it")
    add("--work", type=Path, required=True, metavar="FOLDER", help="for weights, checkpoints and messages")
    add("--results", type=Path, metavar="FOLDER", help="for config.json and log.txt (default: results/study-<study>)")
    add("--only", default="", metavar="REGEX", help="these runs alone, and the teachers that they need")
    add("--list", action="store_true", help="show each run's state and minutes, and stop")
    add("--dry_run", action="store_true", help="show the commands of what is missing, and stop")
    wanted = parser.parse_args(argv)
    if not (wanted.data or wanted.list or wanted.dry_run):
        parser.error("the following arguments are required: --data")
    return wanted


def chosen(runs: list[Run], pattern: str) -> list[Run]:
    """The runs whose names match, each with its teacher before it."""
    try:
        found = [run for run in runs if re.search(pattern, run.name)]
    except re.error as error:
        raise StudyError(f"--only {pattern} is not a regular expression: {error}") from error
    if not found:
        raise StudyError(f"--only {pattern}: no run has such a name; --list shows them")
    needed = {*found, *(run.teacher for run in found)}
    return [run for run in runs if run in needed]


def link_data(data: Path, work: Path) -> None:
    """Make work/data the folder of the two sets; StudyError if one is not there, or `work` has others."""
    for name in (TEACHER_DATA, STUDENT_DATA):
        for part in ("train", "val"):
            if not (data / name / part).is_dir():
                raise StudyError(f"--data {data}: no folder {name}/{part} in it")
    work.mkdir(parents=True, exist_ok=True)
    link = work / "data"
    with contextlib.suppress(FileExistsError):  # another call's
        link.symlink_to(data.resolve(), target_is_directory=True)
    if link.resolve() != data.resolve():
        raise StudyError(
            f"--data {data}: runs in --work {work} have images of {link.resolve()}; remove {link} to change them"
        )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0, or 1 after a one-line error. Usage errors exit with 2."""
    wanted = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the run is ended too
    place = Place(wanted.work.resolve(), (wanted.results or ROOT / "results" / f"study-{wanted.study}").resolve())
    try:
        runs = chosen(runs_of(STUDIES[wanted.study]), wanted.only)
        if wanted.list:
            print(listing(runs, place))
        elif wanted.dry_run:
            for run in runs:
                if not place.finished(run):
                    print("\n".join(shlex.join(command) for command in place.commands(run)))
        else:
            link_data(wanted.data, place.work)
            carry_out(runs, place)
    except (StudyError, OSError) as error:
        print(f"study/run.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
