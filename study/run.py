"""Run what is missing of a study, with weight_selection.py and main.py, one run after the other.

    python -m study.run cpu --data FOLDER --work FOLDER

FOLDER of --data holds tiny-imagenet-200/ and cifar10-jpeg/, each as train/CLASS/IMAGE and val/CLASS/IMAGE. Weights and
messages go to --work, config.json and log.txt of each finished run to results/study-cpu/.

Any signal may stop it at any time: the same command continues in the middle of the interrupted run. Start it twice to
share the work: on two cores, two calls with OMP_NUM_THREADS=1 get more done than one call with two threads.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from files import read_text, write_atomically
from options.parser import Parser
from study.arms import STUDENT_DATA, TEACHER_DATA
from study.runs import Run, arm_and_rate, runs_of
from study.studies import RATE_SEED, STUDIES
from training.finished import is_finished
from training.launch import say, work_off
from utils import UserError, run_script

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Place:
    """The two folders of a study: `work` holds weights, `results` the logs of finished runs.

    Commands run in `work` and use relative paths, so that no config.json reveals the machine's folders.
    """

    work: Path
    results: Path

    def epochs_done(self, run: Run) -> int:
        """Count the epochs in the run's log in `work`."""
        log = self.work / run.name / "log.txt"
        return len(read_text(log).splitlines()) if log.exists() else 0

    def finished(self, run: Run) -> bool:
        """Return whether the run's whole log is in `results`."""
        return is_finished(self.results / run.name, run.epochs)

    def lock_file(self, run: Run) -> Path:
        return self.work / f"{run.name}.lock"

    def ends(self, section: str, arm: str) -> dict[str, float]:
        """Return where an arm ended on RATE_SEED with each learning rate that was tried."""
        logs = (self.results / section).glob(f"{arm}@*-{RATE_SEED}/log.txt")
        last = {log.parent.name: json.loads(read_text(log).splitlines()[-1]) for log in logs}
        return {arm_and_rate(name)[1]: record["test_acc1"] for name, record in last.items()}

    def can_teach(self, run: Run) -> bool:
        """Return whether this teacher is finished. UserError if it is, but its weights are not in `work`.

        Else `work` would get a new teacher of that name, and its students would join the old one's in `results`.
        """
        if not self.finished(run):
            return False
        own, published = (folder / run.name / "log.txt" for folder in (self.work, self.results))
        has_weights = (self.work / run.checkpoint).exists() and own.exists()
        if not has_weights or own.read_bytes() != published.read_bytes():
            raise UserError(
                f"{published} is of a {run.name} whose weights are not in --work {self.work}: more students of it "
                "cannot be made; choose another --results for students of a new one"
            )
        return True

    def commands(self, run: Run) -> list[list[str]]:
        """Return the commands that make the run, in their order."""
        train = [sys.executable, str(ROOT / "main.py"), *run.command]
        if run.teacher is None and not run.weights:
            return [train]
        source, file = run.weights or run.teacher.checkpoint, f"{run.name}.pth"
        if run.selection is None:
            return [[*train, "--initialize", source]]
        script, selected, change = str(ROOT / "weight_selection.py"), file, []
        if run.control:
            selected = f"{run.name}.selected.pth"
            change = [[sys.executable, "-m", "study.controls", *run.control, selected, file]]
        select = [sys.executable, script, *run.selection, "--pretrained_path", source, "--output_dir", selected]
        measure = []
        if run.untrained:
            options = [*run.command[: run.command.index("--output_dir")], "--initialize", file]
            measure = [[sys.executable, "-m", "study.untrained", f"{run.name}.untrained.json", *options]]
        return [select, *change, *measure, [*train, "--initialize", file]]

    def make(self, run: Run, call: Callable[..., int]) -> None:
        """Run the commands, with their messages in a file beside the run's folder, and publish the log."""
        messages = self.work / f"{run.name}.txt"
        environment = os.environ | {"PYTHONPATH": python_path()}
        for command in self.commands(run):
            with open(messages, "a", encoding="utf-8") as file:
                code = call(command, cwd=self.work, env=environment, stdout=file, stderr=file)
            if code:
                last = messages.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                raise UserError(f"{run.name} failed with code {code}: {' '.join(last)} (see {messages})")
        self.publish(run)

    def publish(self, run: Run) -> None:
        """Copy config.json to `results`, then log.txt, which marks the run as finished."""
        target, source = self.results / run.name, self.work / run.name
        files = {"untrained.json": Path(f"{source}.untrained.json")} if run.untrained else {}
        target.mkdir(parents=True, exist_ok=True)
        for name, file in (files | {name: source / name for name in ("config.json", "log.txt")}).items():
            write_atomically(target / name, file.read_bytes())


def python_path() -> str:
    """Return the PYTHONPATH with which `-m study.controls` finds this code from any folder."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def make_missing(runs: Callable[[], list[Run]], place: Place) -> None:
    """Make the runs that are not finished, in their order, and wait for those that another call works on.

    `runs` lists them anew after each, because the best learning rate of an arm may be known then.
    """

    def left() -> list[Run]:
        return [run for run in runs() if not place.finished(run)]

    def ready() -> list[Run]:
        return [run for run in left() if all(map(place.can_teach, run.needs))]

    def make(run: Run, call: Callable[..., int]) -> None:
        say(f"{run.name}, about {run.minutes:.0f} minutes; {len(left())} runs are left")
        place.make(run, call)

    work_off(ready, place.lock_file, make)


def listing(runs: list[Run], place: Place) -> str:
    """Return a line for each run, with its state and the minutes to expect, and a line with the hours left."""
    lines, left = [], 0.0
    for run in runs:
        done = place.epochs_done(run)
        state = "finished" if place.finished(run) else f"epoch {done} of {run.epochs}" if done else "to do"
        left += 0 if state == "finished" else run.minutes * (1 - done / run.epochs)
        lines.append(f"{run.name:32}{state:18}{run.minutes:6.1f} min")
    return "\n".join([*lines, f"{len(runs)} runs, {left / 60:.1f} hours are left"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m study.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("study", choices=STUDIES)
    add("--data", type=Path, metavar="FOLDER", help=f"folder with {TEACHER_DATA}/ and {STUDENT_DATA}/ in it")
    add("--work", type=Path, required=True, metavar="FOLDER", help="for weights, checkpoints and messages")
    add("--results", type=Path, metavar="FOLDER", help="for config.json and log.txt (default: results/study-<study>)")
    add("--only", default="", metavar="REGEX", help="only runs whose names match, and the teachers they need")
    add("--list", action="store_true", help="show each run's state and minutes, and stop")
    add("--dry_run", action="store_true", help="show the commands of the missing runs, and stop")
    options = parser.parse_args(argv)
    if not (options.data or options.list or options.dry_run):
        parser.error("the following arguments are required: --data")
    return options


def chosen(runs: list[Run], pattern: str) -> list[Run]:
    """Return the runs whose names match, each with its teacher before it."""
    try:
        matching = [run for run in runs if re.search(pattern, run.name)]
    except re.error as error:
        raise UserError(f"--only {pattern} is not a regular expression: {error}") from error
    if not matching:
        raise UserError(f"--only {pattern}: no run has such a name; --list shows them")
    needed = {*matching, *(teacher for run in matching for teacher in run.needs)}
    return [run for run in runs if run in needed]


def link_data(data: Path, work: Path) -> None:
    """Link `data` as work/data. UserError if a set is missing there, or if `work` already uses other data."""
    for name in (TEACHER_DATA, STUDENT_DATA):
        for part in ("train", "val"):
            if not (data / name / part).is_dir():
                raise UserError(f"--data {data}: no folder {name}/{part} in it")
    work.mkdir(parents=True, exist_ok=True)
    link = work / "data"
    with contextlib.suppress(FileExistsError):  # a call before this one made it
        link.symlink_to(data.resolve(), target_is_directory=True)
    if link.resolve() != data.resolve():
        raise UserError(
            f"--data {data}: runs in --work {work} have images of {link.resolve()}; remove {link} to change them"
        )


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    try:
        carry_out(options)
    except OSError as error:
        raise UserError(str(error)) from error


def carry_out(options: argparse.Namespace) -> None:
    place = Place(options.work.resolve(), (options.results or ROOT / "results" / f"study-{options.study}").resolve())
    study = STUDIES[options.study]

    def planned() -> list[Run]:
        return chosen(runs_of(study, place.ends), options.only)

    runs = planned()
    if options.list:
        print(listing(runs, place))
    elif options.dry_run:
        print(f"# in {place.work}, with PYTHONPATH={python_path()}")
        for run in runs:
            if not place.finished(run):
                print("\n".join(shlex.join(command) for command in place.commands(run)))
    else:
        link_data(options.data, place.work)
        make_missing(planned, place)


if __name__ == "__main__":
    sys.exit(run_script(main))
