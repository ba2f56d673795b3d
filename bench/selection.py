"""Measure weight_selection.py against the plain way: build the teacher, load its whole file, slice, save.

    python -m bench.selection [--out results/selection.md] [--folder teachers]

Each measurement of time and memory is a process of its own, which imports everything before it begins. Needs Linux
(/proc), 7 GB of disk for the teachers' files (random values) and 13 GB of memory for the largest, loaded the plain way.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from options.parser import Parser

ROOT = Path(__file__).parents[1]
MB = 10**6


class Pair(NamedTuple):
    """A teacher by its name and its file, and the student that is cut from it."""

    title: str
    teacher: str
    kwargs: dict[str, int]
    file: str
    student: str


PAIRS = {
    "vit_s": Pair("ViT-S → ViT-T", "vit_small_patch16_224_in21k", {}, "vit_s.safetensors", "vit_tiny"),
    "vit_l": Pair("ViT-L → ViT-T", "vit_large_patch16_224", {}, "vit_l.safetensors", "vit_tiny"),
    "vit_l_pth": Pair("ViT-L → ViT-T, .pth", "vit_large_patch16_224", {}, "vit_l.pth", "vit_tiny"),
    "convnext_t": Pair(
        "ConvNeXt-T → ConvNeXt-F", "convnext_tiny_in22k", {}, "convnext_t.safetensors", "convnext_femto"
    ),
    "vit_4gb": Pair(
        "ViT of 4 GB → ViT-T",
        "vit_large_patch16_224",
        {"embed_dim": 2048, "depth": 20, "num_heads": 32},
        "vit_4gb.safetensors",
        "vit_tiny",
    ),
}
WAYS = ("plain", "ours")


# ---- one measurement, in its own process ----


def memory() -> dict[str, float]:
    """Read this process's memory in MB: RssAnon is private, VmRSS counts mapped files too, VmHWM is VmRSS at its peak."""
    with open("/proc/self/status") as file:
        values = dict(line.split(":", 1) for line in file)
    return {key: int(values[key].split()[0]) * 1024 / MB for key in ("RssAnon", "VmRSS", "VmHWM")}


@contextlib.contextmanager
def sampled(measured: dict[str, float], interval: float = 0.002) -> Iterator[None]:
    """Run the block; put its seconds, and the MB that it took at its peak, into `measured`."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, done = memory(), threading.Event()
    samples = [before["RssAnon"]]

    def sample() -> None:
        while not done.wait(interval):
            samples.append(memory()["RssAnon"])

    thread = threading.Thread(target=sample)
    thread.start()
    start = time.perf_counter()
    yield
    measured["seconds"] = time.perf_counter() - start
    done.set()
    thread.join()
    after = memory()
    measured["private_mb"] = max(*samples, after["RssAnon"]) - before["RssAnon"]
    measured["peak_rss_mb"] = after["VmHWM"] - before["VmRSS"]


def measure(way: str, pair: Pair, path: Path) -> dict[str, float]:
    """Select once, from a teacher's file, which is made if needed, to an initialization file in a folder beside it."""
    import weight_selection  # here, so that the process that starts the others stays small

    make_teacher(pair, path)

    def ours(output: Path) -> None:
        argv = ["--output_dir", str(output), "--pretrained_model", pair.teacher, "--pretrained_path", str(path)]
        words = [f"{key}={value}" for key, value in pair.kwargs.items()]
        argv += ["--pretrained_kwargs", *words] if words else []
        weight_selection.main([*argv, "--student_model", pair.student])

    gc.freeze()  # or the first garbage collection, in either way, walks through everything that was imported
    measured = {}
    with (
        tempfile.TemporaryDirectory(dir=path.parent) as output,
        contextlib.redirect_stdout(sys.stderr),  # stdout is for the JSON
        sampled(measured),
    ):
        ours(Path(output)) if way == "ours" else select_plainly(pair, path, Path(output))
    return measured


def select_plainly(pair: Pair, path: Path, output: Path) -> None:
    """Select as the paper's code does, with whole models in memory."""
    import safetensors.torch
    import timm
    import torch

    import models

    name, kwargs = models.timm_arguments(pair.teacher, pair.kwargs)
    teacher = timm.create_model(name, **kwargs)
    if path.suffix == ".safetensors":
        tensors = safetensors.torch.load_file(path)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    teacher.load_state_dict(tensors)
    name, kwargs = models.timm_arguments(pair.student, {})
    student, weights, selected = timm.create_model(name, **kwargs), teacher.state_dict(), {}
    for key, value in student.state_dict().items():
        if not key.startswith("head."):
            tensor = weights[key]
            for axis, size in enumerate(value.shape):
                indices = torch.linspace(0, tensor.shape[axis] - 1, size).round().long()
                tensor = tensor.index_select(axis, indices)
            selected[key] = tensor
    torch.save(selected, output / "student.pth")


# ---- all of them ----


def make_teacher(pair: Pair, path: Path) -> None:
    """Write the teacher's file, of random values, unless it exists."""
    if path.exists():
        return
    import safetensors.torch
    import torch

    import models

    shapes = models.create(pair.teacher, pair.kwargs, device="meta").state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.empty(value.shape).uniform_(-0.05, 0.05, generator=generator) for key, value in shapes.items()
    }
    temporary = path.with_name(f"{path.name}.tmp")
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(tensors, temporary)
    os.replace(temporary, path)


def measure_in_own_process(way: str, name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.selection", "--one", way, name, "--folder", str(folder.resolve())]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{run.stderr}")
    return json.loads(run.stdout)


def compare(names: list[str], repeat: int, folder: Path, log: Path | None) -> dict[str, dict[str, list[dict]]]:
    """Measure each pair in both ways in turn, `repeat` rounds after one that warms the page cache."""
    results = {name: {way: [] for way in WAYS} for name in names}
    for name in names:
        for round_ in range(repeat + 1):
            for way in WAYS:
                measured = measure_in_own_process(way, name, folder)
                print(f"{name} {way} round {round_}: {json.dumps(measured)}", file=sys.stderr, flush=True)
                if round_:
                    results[name][way].append(measured)
                    if log:
                        with open(log, "a") as file:
                            file.write(json.dumps({"pair": name, "way": way, "round": round_, **measured}) + "\n")
    return results


def median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def spread(runs: list[dict], key: str, digits: int) -> str:
    """Write the median, with minimum and maximum in brackets."""
    values = [run[key] for run in runs]
    return f"{median(runs, key):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def table(results: dict[str, dict[str, list[dict]]]) -> list[str]:
    """Make a Markdown table with a row per pair."""
    lines = [
        "| pair | plain, s | ours, s | ratio | plain RssAnon, MB | ours | plain peak RSS, MB | ours |",
        "|---" * 8 + "|",
    ]
    for name, ways in results.items():
        ratio = median(ways["plain"], "seconds") / median(ways["ours"], "seconds")
        times = [spread(ways[way], "seconds", digits) for way, digits in (("plain", 2), ("ours", 3))]
        sizes = [spread(ways[way], key, 0) for key in ("private_mb", "peak_rss_mb") for way in WAYS]
        lines.append(f"| {' | '.join([PAIRS[name].title, *times, f'{ratio:.1f} x', *sizes])} |")
    return lines


def targets(results: dict[str, dict[str, list[dict]]]) -> list[str]:
    """Compare the medians with their targets."""
    ours = {name: median(ways["ours"], "seconds") for name, ways in results.items()}
    lines = []
    if "vit_l" in results:
        ratio = median(results["vit_l"]["plain"], "seconds") / ours["vit_l"]
        private = median(results["vit_l"]["ours"], "private_mb")
        lines += [f"- ViT-L → ViT-T: {ratio:.1f} x as fast as the plain way (target: 15 x at least)"]
        lines += [f"- ViT-L → ViT-T: {private:.0f} MB of private memory (target: 150 MB at most)"]
    for name, most in (("vit_l", 2), ("vit_4gb", 4)):
        if name in results and "vit_s" in results:
            growth = ours[name] / ours["vit_s"]
            lines.append(f"- {PAIRS[name].title}: {growth:.2f} x the time of ViT-S → ViT-T (target: {most} x at most)")
    return lines


def hardware() -> str:
    """Name the processor, the cores and the memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")] or [platform.machine()]
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 10**9
    return f"{names[0]}, {len(os.sched_getaffinity(0))} cores, {gigabytes:.0f} GB"


def report(results: dict[str, dict[str, list[dict]]], repeat: int) -> str:
    """Write the table, the targets and the environment in Markdown."""
    from utils import revision

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "timm", "safetensors"))
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    lines = [
        *table(results),
        "",
        f"Median of n = {repeat} (least..most) after one run that warms the page cache; time and memory from after the",
        "imports to the written file. RssAnon: peak private memory, sampled every 2 ms. Peak RSS counts mapped files too.",
        "",
        *targets(results),
        "",
        f"Hardware: {hardware()}; {platform.system()} {platform.release()}; OMP_NUM_THREADS {threads}.",
        f"Versions: Python {platform.python_version()}, {versions}; this code {revision() or 'outside git'}.",
        f"Command: `python -m bench.selection {shlex.join(sys.argv[1:])}`",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="recorded runs of each pair in each way")
    parser.add_argument("--out", type=Path, help="a Markdown file for the report; single runs go to .jsonl beside it")
    parser.add_argument("--folder", type=Path, help="for the teachers' files, kept; default: a temporary one, removed")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--one", nargs=2, metavar=("WAY", "PAIR"), help="measure once and print a line of JSON")
    options = parser.parse_args()
    if options.one and not options.folder:
        parser.error("--one needs --folder")
    if options.one:
        way, pair = options.one[0], PAIRS[options.one[1]]
        print(json.dumps(measure(way, pair, options.folder / pair.file)))
    else:
        log = options.out.with_suffix(".jsonl") if options.out else None
        if log:
            log.unlink(missing_ok=True)
        with contextlib.ExitStack() as stack:
            folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            text = report(compare(options.pairs, options.repeat, folder, log), options.repeat)
        print(text)
        if options.out:
            options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
