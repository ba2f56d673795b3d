"""Images a second of training: the model alone, each way of the data alone, the whole loop by each way, and a loop with
the habits of the paper's code. Everything in one run, in turns, so that the ratios are of one machine in one hour.

    python bench/throughput.py [--data FOLDER] [--out results/throughput/NAME]

FOLDER is an image folder (train/<class>/*.jpg); without it, JPEG files of noise are made, 32 px as CIFAR's. On a GPU a
whole run takes under 9 minutes, on two CPU cores as well, at reduced counts.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # in place of this folder, whose selection.py is not the one to import

import numpy as np
import timm
import torch
from PIL import Image

import datasets
import engine
from bench.throughput_loops import HOST_BATCH, ORIGINAL, WAYS, Bench
from training import distributed
from utils import UserError, first_line, revision

RECIPE_BATCHES = {"vit_tiny": [64, 512, 1024], "convnext_femto": [128, 1024]}
ON_CPU = ("timm", "timm, cache ram", "device, cache ram")
WITHOUT_WORKERS = (("device", "ram"), ("device", "device"))
HOST_PART = f"b: the host's part alone, batch {HOST_BATCH}"
CIFAR_IMAGES, CIFAR_EPOCHS = 50_000, 300


def make_images(folder: Path, count: int, size: int) -> None:
    """JPEG files of two classes, of smooth noise as a photograph's."""
    generator = np.random.default_rng(0)
    for number in range(count):
        place = folder / "train" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(place / f"{number:05}.jpg", quality=90)


def rate(steps: Callable[[int], None], batch_size: int, seconds: float) -> float:
    """Images a second over `seconds` or one step, whichever is longer."""
    count, chunk, start = 0, 1, time.perf_counter()
    while True:
        steps(chunk)
        count += chunk
        spent = time.perf_counter() - start
        if spent >= seconds:
            return count * batch_size / spent
        # no more than before at once: the first batches may have been ready, and say nothing of those that are not
        chunk = max(1, min(count, int((seconds - spent) * count / spent)))


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of a large matrix product, the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Measured(NamedTuple):
    """Of one model at one batch size: images a second by what was measured, for each round; the ways left out, and why."""

    rates: dict[str, list[float]]
    left_out: dict[str, str]
    compile_seconds: float | None


def measure(bench: Bench, options: argparse.Namespace, ways: list[str]) -> Measured:
    """All in turns; every other round goes the other way.

    What is a training loop has workers of its own, which stand still outside its turns: each turn goes on where the one
    before it ended, so that turns may be short, and those of a round are of the same minute.
    """
    resident = bench.train(bench.resident())
    loops, alone, left_out, compile_seconds = {"a: bare step": (resident, None)}, {}, {}, None
    if options.compile:
        start = time.perf_counter()
        resident(1)
        compile_seconds = time.perf_counter() - start
    for way in [*ways, ORIGINAL]:
        try:
            source = bench.source(way)
        except (UserError, RuntimeError) as error:  # no room for it, or images of several sizes; the others go on
            left_out[way] = first_line(error)
            continue
        alone[f"b: data alone, {way.removeprefix('d: ')}"] = bench.load(source), way
        if way == ORIGINAL:
            loops[ORIGINAL] = bench.original(source), ORIGINAL
            continue
        loops[f"c: training, {way}"] = bench.train(source), way
        if host := bench.host(way):
            alone[f"{HOST_PART}, {way}"] = host, way
    rates = {name: [] for name in sorted([*alone, *loops])}
    for tasks, seconds in ((alone, 0.5), (loops, options.seconds)):
        for steps, source in tasks.values():
            with bench.awake(source):
                if bench.workers.get(source):
                    bench.load(bench.sources[source])(2 * options.num_workers)  # what lies ready is not their speed
                steps(3)  # until as much is made as is used up
        for number in range(options.rounds if tasks is loops else min(options.rounds, 8)):
            for name in list(tasks)[:: -1 if number % 2 else 1]:
                steps, source = tasks[name]
                with bench.awake(source):
                    size = HOST_BATCH if name.startswith(HOST_PART) else bench.batch_size
                    rates[name].append(rate(steps, size, seconds))
    return Measured(rates, left_out, compile_seconds)


def ratio(rates: dict[str, list[float]], task: str, other: str) -> str:
    """A task's speed over another's in the same round: the median, and between which two rounds it lies by 95 %.

    Other machines on the same host may take away a turn or two, which a mean would not forget.
    """
    if other not in rates:
        return ""
    ratios = sorted(mine / its for mine, its in zip(rates[task], rates[other], strict=True))
    count = len(ratios)
    least = max(0, int((count - 1.96 * count**0.5) / 2))  # as often as heads in so many throws; of few rounds all
    return f"{statistics.median(ratios):.3f} ({ratios[least]:.3f}..{ratios[-1 - least]:.3f})"


def table(name: str, batch_size: int, flops: float, measured: Measured, peak_rate: float) -> list[str]:
    """A Markdown table of one model at one batch size."""
    rates = measured.rates
    middle = {task: statistics.median(values) for task, values in rates.items()}
    lines = [
        f"### {name}, batch {batch_size}",
        "",
        f"{flops / 1e9:.2f} GFLOP an image, forward and backward; a large matrix product here: {peak_rate / 1e12:.2f} TFLOP/s.",
        "",
        "| what | images/s, median (least..most) | c/a, median of rounds (95 % interval) | c/d | share of that product's speed |",
        "|---|---:|---:|---:|---:|",
    ]
    for task, values in rates.items():
        shares = [ratio(rates, task, other) if task.startswith("c") else "" for other in ("a: bare step", ORIGINAL)]
        share = "" if task.startswith("b") else f"{100 * middle[task] * flops / peak_rate:.1f} %"
        shown = f"{middle[task]:.1f} ({min(values):.1f}..{max(values):.1f})"
        if task.startswith(HOST_PART):
            shown += f", {1000 / middle[task]:.4f} ms an image"
        lines.append(f"| {task} | {shown} | {shares[0]} | {shares[1]} | {share} |")
    lines += ["", *(f"Left out, {way}: {reason}." for way, reason in measured.left_out.items())]
    if measured.compile_seconds is not None:
        lines += [f"Compiled in the first {measured.compile_seconds:.0f} s, which count nowhere."]
    best = max(value for task, value in middle.items() if task.startswith("c"))
    hours = CIFAR_IMAGES * CIFAR_EPOCHS / best / 3600
    return [
        *lines,
        f"300 epochs of CIFAR's 50,000 images at the best of c: {60 * hours:.0f} minutes ({hours:.1f} h).",
        "",
    ]


def main(argv: list[str] | None = None) -> dict:
    """Run the benchmark; returns what the JSON holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="an image folder")
    add("--device", default="auto")
    add("--models", nargs="+", default=["vit_tiny", "convnext_femto"])
    add("--batch_sizes", nargs="+", type=int, help="(default: the recipes' on a GPU, 16 on a CPU)")
    add("--ways", nargs="+", choices=WAYS, help="(default: all on a GPU, what a CPU is trained by on a CPU)")
    add("--input_size", type=int, default=224)
    add("--num_workers", type=int, help="(default: cores - 1; on a CPU all, that the data takes from each alike)")
    add("--use_amp", action=argparse.BooleanOptionalAction, help="(default: on a GPU)")
    add("--amp_dtype", choices=("float16", "bfloat16"))
    add("--compile", action="store_true", help="all but the loop with the original's habits")
    add("--compile_mode", default="default", help="of torch.compile, as of main.py")
    add("--cache_size", type=int, help="of the cached images, as of main.py, for images of several sizes")
    add("--rounds", type=int, help="(default: 4 on a GPU, 32 on a CPU)")
    add(
        "--seconds",
        type=float,
        help="for each loop in each round, at least a step (default: 2 on a GPU, a step on a CPU)",
    )
    add("--out", type=Path, help="writes OUT.md and OUT.json")
    options = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    device = distributed.pick_device(options.device)
    options.device, on_gpu = str(device), device.type == "cuda"
    options.use_amp = on_gpu if options.use_amp is None else options.use_amp
    options.rounds = options.rounds or (4 if on_gpu else 32)
    options.seconds = 2.0 * on_gpu if options.seconds is None else options.seconds
    if options.num_workers is None:
        options.num_workers = max(1, len(os.sched_getaffinity(0)) - on_gpu)
    options.ways = options.ways or [way for way in WAYS if on_gpu or way in ON_CPU]
    torch.backends.cudnn.benchmark = True
    dtype = engine.Precision.choose(device, options.use_amp, options.amp_dtype).dtype or torch.float32
    start, code = time.monotonic(), revision()  # before anything is written
    with contextlib.ExitStack() as stack:
        folder = options.data
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            make_images(folder, 50_000 if on_gpu else 4096, 32)
        images = datasets.load_images("image_folder", str(folder), True)
        peak_rate, lines, results = peak(device, dtype), [], []
        for name in options.models:
            for number, batch_size in enumerate(options.batch_sizes or default_sizes(name, on_gpu)):
                bench = Bench(name, batch_size, images, options)
                # the speed of workers does not depend on the batch: their ways are measured at the first alone
                ways = [way for way in options.ways if number == 0 or WAYS[way] in WITHOUT_WORKERS]
                measured = measure(bench, options, ways)
                results.append({"model": name, "batch_size": batch_size, "flops": bench.flops,
                    "images_per_second": measured.rates, "left_out": measured.left_out,
                    "compile_seconds": measured.compile_seconds})  # fmt: skip
                lines += (shown := table(name, batch_size, bench.flops, measured, peak_rate))
                print("\n".join(shown), flush=True)
                bench.close()
                # after each, so that what ends a later one loses nothing
                notes = conditions(options, images, device, dtype, time.monotonic() - start, code, argv)
                result = {"peak": peak_rate, "notes": notes, "results": results}
                if options.out:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.with_suffix(".md").write_text("\n".join([*lines, *notes]) + "\n")
                    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(notes))
    return result


def default_sizes(name: str, on_gpu: bool) -> list[int]:
    return RECIPE_BATCHES.get(name, [64]) if on_gpu else [16]


def conditions(
    options, images, device: torch.device, dtype: torch.dtype, seconds: float, code: str | None, argv: list[str] | None
) -> list[str]:
    """What it was measured on and with, in lines."""
    on_gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if on_gpu else f"{platform.processor() or platform.machine()} CPU"
    compiled = f"compiled ({options.compile_mode})" if options.compile else "not compiled"
    turns = f"{options.seconds:g} s" if options.seconds else "one step"
    return [
        f"Hardware: {hardware}, {len(os.sched_getaffinity(0))} cores, {options.num_workers} workers, "
        f"{torch.get_num_threads()} threads; {str(dtype).removeprefix('torch.')}; {compiled}.",
        f"{len(images)} images of {options.data.name if options.data else '32 px noise'}; n = {options.rounds} rounds in "
        f"turns of {turns}; {seconds:.0f} s in all.",
        f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}; this code {code}.",
        f"Command: `python bench/throughput.py {' '.join(sys.argv[1:] if argv is None else argv)}`",
    ]


if __name__ == "__main__":
    main()
