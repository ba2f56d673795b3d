"""Kill training runs by SIGKILL at random moments, resume each to its end, and compare the weights bit for bit.

    python -m bench.survive [--runs 100] [--out results/survive.json]

Each run is killed one to three times: half of the kills at a random moment, half while a file is being written. Of two
processes, one or both are killed; the other must end by itself, and so must all workers. This process has imported
everything and forks the runs, so that a start takes no time and a run takes seconds: small models on images of noise,
four epochs, saved every second update.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import platform
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import main as script
from bench.selection import hardware
from bench.throughput import make_images
from options.parser import Parser
from training.checkpoint import numbered_checkpoints, read_checkpoint
from utils import UserError, revision, run_script

MODEL = "--model vit_tiny --model_kwargs embed_dim=32 depth=2 num_heads=2 patch_size=8 --input_size 32 --drop_path 0.1"
SCHEDULE = "--epochs 4 --warmup_epochs 1 --lr 1e-3 --save_ckpt_steps 2 --log_freq 3 --device cpu --progress false --dist_timeout 20"
EXTRAS = "--model_ema true --model_ema_decay 0.9 --model_ema_eval true --clip_grad 1"
VARIANTS = {
    "1 process": (1, "--batch_size 8 --num_workers 0"),
    "1 process, 2 workers": (1, "--batch_size 8 --num_workers 2"),
    "1 process, augmented on the device": (1, "--batch_size 4 --update_freq 2 --num_workers 1 --augment device"),
    "2 processes, accumulating": (2, "--batch_size 2 --update_freq 2 --num_workers 0"),
    "2 processes, worker, cache": (2, "--batch_size 4 --num_workers 1 --augment device --cache ram"),
}
END_SECONDS = 60  # for the other process to end after a kill
WORKERS_END_SECONDS = 10  # for all workers to end once their runs have


class Job:
    """A run of main.py in one or several processes, started as a launcher would; their output goes to a file."""

    def __init__(self, argv: list[str], processes: int, said: Path):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        self.said, self.processes = said, []
        for rank in range(processes):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in group.items()} if processes > 1 else {}
            process = fork.Process(target=_run, args=(argv, environment, said))
            process.start()
            self.processes.append(process)

    def send(self, number: int, ranks: list[int] | None = None) -> None:
        for rank, process in enumerate(self.processes):
            if process.is_alive() and (ranks is None or rank in ranks):
                os.kill(process.pid, number)

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float) -> list[int | None]:
        """Return the exit codes once all have ended. RuntimeError with their output if they do not end."""
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:  # join would wait for their workers, too
            time.sleep(0.005)
        if self.running():
            self.send(signal.SIGKILL)
            raise RuntimeError(f"still running after {seconds:g} s:\n{self.said.read_text()}")
        end = time.monotonic() + WORKERS_END_SECONDS
        while left := [pid for process in self.processes for pid in members(process.pid)]:
            if time.monotonic() > end:
                raise RuntimeError(f"processes {left} have outlived their run:\n{self.said.read_text()}")
            time.sleep(0.05)
        return [process.exitcode for process in self.processes]


def members(group: int) -> list[int]:
    """List the processes of a group that have not ended."""
    running = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            running += [int(path.parent.name)] if int(its_group) == group and state != "Z" else []
    return running


def _run(argv: list[str], environment: dict[str, str], said: Path) -> None:
    os.setpgid(0, 0)  # it and its workers, so that those can be found
    os.environ |= environment
    file = open(said, "a", buffering=1)  # noqa: SIM115
    for descriptor in (1, 2):
        os.dup2(file.fileno(), descriptor)
    sys.stdout = sys.stderr = file
    logging.root.handlers.clear()
    sys.argv[0] = "main.py"
    sys.exit(run_script(lambda: script.main(argv)))


def weights(folder: Path) -> dict:
    """Return what the last checkpoint holds of the training itself."""
    state = read_checkpoint(numbered_checkpoints(folder)[0])
    return {
        name: state[name] for name in ("epoch", "step", "model", "model_ema", "optimizer", "scaler", "best", "sums")
    }


def same(a, b) -> bool:
    """Return whether two nested values are equal, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def log_of(folder: Path) -> list[dict]:
    """Return the lines of log.txt without what differs each time."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def being_written(folder: Path) -> Iterator[str]:
    """List the temporary files."""
    return (path.name for path in folder.glob(".*.tmp"))


def kill(job: Job, folder: Path, draws: random.Random, longest: float) -> dict | None:
    """Kill a run at a random moment; return what was done, or None if it had ended before."""
    in_write, ranks = draws.random() < 0.5, list(range(len(job.processes)))
    if len(ranks) > 1 and draws.random() < 0.5:
        ranks = [draws.choice(ranks)]
    moment, passed = time.monotonic() + draws.uniform(0, longest), draws.randrange(8)
    written, before = None, set()
    while job.running():
        if not in_write and time.monotonic() >= moment:
            break
        if in_write:
            now = set(being_written(folder))
            passed, written, before = passed - len(now - before), next(iter(now), None), now
            if passed < 0 and now:
                break
        else:
            time.sleep(0.001)
    else:
        return None
    job.send(signal.SIGKILL, ranks)
    start = time.monotonic()
    done = {"ranks": ranks, "in_write": written if in_write else None, "codes": job.wait(END_SECONDS)}
    return done | {"left": sorted(being_written(folder)), "seconds": time.monotonic() - start}


def survive(name: str, data: Path, reference: Path, work: Path, seed: int, longest: float) -> list[dict]:
    """Kill and resume one run until it is through; return its kills. RuntimeError unless it ends as if never killed."""
    processes, options = VARIANTS[name]
    draws, kills = random.Random(seed), []
    folder, said = work / f"run-{seed}", work / f"run-{seed}.txt"
    argv = command(data, options, folder)
    for _ in range(draws.randint(1, 3)):
        while not (done := kill(Job(argv, processes, said), folder, draws, longest)):
            shutil.rmtree(folder)  # it had ended before: start again
            kills.clear()
        kills.append(done)
        for path in [*numbered_checkpoints(folder), *folder.glob("checkpoint-best*.pth")]:
            try:
                read_checkpoint(path)
            except UserError as error:
                raise RuntimeError(f"run {seed} ({name}): {error}") from error
    codes = Job(argv, processes, said).wait(300)
    if any(codes):
        raise RuntimeError(f"run {seed} ({name}) ended with {codes}:\n{said.read_text()}")
    if not (same(weights(folder), weights(reference)) and log_of(folder) == log_of(reference)):
        raise RuntimeError(f"run {seed} ({name}): other weights or another log than without a kill, {kills}")
    return kills


def command(data: Path, options: str, folder: Path) -> list[str]:
    fixed = f"{MODEL} {SCHEDULE} {EXTRAS} {options} --data_set image_folder --data_path {data} --output_dir {folder}"
    return fixed.split()


def main(argv: list[str] | None = None) -> dict:
    """Run the benchmark; return what the JSON holds."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", type=int, default=100)
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--seed", type=int, default=0)
    add("--out", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # this process forks: it must not have a pool of threads
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        kills = survive_all(options.variants, options.runs, options.seed, Path(temporary))
    result = {
        "runs": {name: figures(kills_of_runs, VARIANTS[name][0]) for name, kills_of_runs in kills.items()},
        "all": "every run ended with the weights, the average, the optimizer and the log of the run that was not killed; "
        f"every checkpoint found after a kill could be read; no process outlived its run by {WORKERS_END_SECONDS} s",
        "hardware": hardware(),
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}, this code {revision()}",
        "seconds": round(time.monotonic() - start),
        "command": f"python -m bench.survive {' '.join(sys.argv[1:] if argv is None else argv)}".strip(),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def survive_all(variants: list[str], runs: int, seed: int, work: Path) -> dict[str, list[list[dict]]]:
    """Make a run of each variant without a kill, then `runs` runs with kills; return these kills, per variant and run."""
    data, references, seconds = work / "images", {}, {}
    for split, count in (("train", 48), ("val", 12)):
        make_images(data / split, count, size=32)
    for name in variants:
        processes, options = VARIANTS[name]
        references[name], began = work / f"reference-{len(references)}", time.monotonic()
        if any(Job(command(data, options, references[name]), processes, work / "reference.txt").wait(300)):
            raise RuntimeError((work / "reference.txt").read_text())
        seconds[name] = time.monotonic() - began
    kills = {name: [] for name in variants}
    for number in range(runs):
        name = variants[number % len(variants)]
        kills[name].append(survive(name, data, references[name], work, seed + number, seconds[name]))
        print(f"run {number}: {name}: {len(kills[name][-1])} kills, weights and log equal", flush=True)
    return kills


def figures(runs: list[list[dict]], processes: int) -> dict:
    """Summarize the kills of a variant's runs."""
    kills = [each for run in runs for each in run]
    alone = [each["seconds"] for each in kills if len(each["ranks"]) < processes]
    return {
        "runs": len(runs),
        "kills": len(kills),
        "in a write": sum(each["in_write"] is not None for each in kills),
        "of them leaving half a file": sum(bool(each["left"]) for each in kills),
        "one of two killed": len(alone),
        "longest until the other ended, s": round(max(alone, default=0.0), 1),
    }


if __name__ == "__main__":
    main()
