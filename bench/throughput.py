"""Measure images per second: the model alone, each way of the data alone, training by each way, and training with the
habits of the paper's code. All take turns in one run, so that ratios compare the same machine in the same minutes.

    python -m bench.throughput [--data FOLDER] [--out results/throughput/NAME]

FOLDER is an image folder (train/<class>/*.jpg); without it, JPEG files of noise are made, 32 px as CIFAR's. A whole run
takes under 9 minutes on a GPU, and with fewer images and rounds on two CPU cores too.
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

import numpy as np
import timm
import torch
from PIL import Image

import datasets
from bench.selection import hardware
from bench.throughput_loops import HOST_BATCH, ORIGINAL, WAYS, Bench
from images.images import Images
from options.parser import Parser, number
from training import distributed
from training.precision import Precision
from utils import UserError, first_line, revision

RECIPE_BATCHES = {"vit_tiny": [64, 512, 1024], "convnext_femto": [128, 1024]}
ON_CPU = ("timm", "timm, cache ram", "device, cache ram")
WITHOUT_WORKERS = (("device", "ram"), ("device", "device"))
HOST_PART = f"b: the host's part alone, batch {HOST_BATCH}"
CIFAR_IMAGES, CIFAR_EPOCHS = 50_000, 300


def make_images(folder: Path, count: int, size: int) -> None:
    """Write JPEG files of two classes: smooth noise, which compresses like a photograph."""
    generator = np.random.default_rng(0)
    for index in range(count):
        place = folder / f"class{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(place / f"{index:05}.jpg", quality=90)


def rate(steps: Callable[[int], None], batch_size: int, seconds: float) -> float:
    """Measure images per second over `seconds` or one step, whichever is longer."""
    count, chunk, start = 0, 1, time.perf_counter()
    while True:
        steps(chunk)
        count += chunk
        spent = time.perf_counter() - start
        if spent >= seconds:
            return count * batch_size / spent
        # at most double the count: the first batches may have been ready, and then they say nothing about the next
        chunk = max(1, min(count, int((seconds - spent) * count / spent)))


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure floating point operations per second of a large matrix product, the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure(name: str, batch_size: int, images: Images, options: argparse.Namespace, ways: list[str]) -> dict:
    """Measure one model at one batch size; return its part of the JSON.

    All tasks take turns; every other round runs backwards. Each training loop has its own workers, which are stopped
    outside its turns. A turn goes on where the loop's last one ended, so turns can be short, and the turns of a round
    lie within the same minute.
    """
    bench, left_out, compile_seconds = Bench(name, batch_size, images, options), {}, None
    resident = bench.train(bench.resident())
    loops, alone = {"a: bare step": (resident, None)}, {}
    if options.teacher:
        loops[f"t: bare step, teacher {options.teacher}"] = bench.train(bench.resident(), options.teacher), None
    if options.compile:
        start = time.perf_counter()
        resident(1)
        compile_seconds = time.perf_counter() - start
    for way in [*ways, ORIGINAL]:
        try:
            source = bench.source(way)
        except (UserError, RuntimeError) as error:  # no room for it, or images of several sizes: go on with the others
            left_out[way] = first_line(error)
            continue
        alone[f"b: data alone, {way.removeprefix('d: ')}"] = bench.load(source), way
        if way == ORIGINAL:
            loops[ORIGINAL] = bench.original(source), ORIGINAL
            continue
        loops[f"c: training, {way}"] = bench.train(source), way
        if host := bench.host(way):
            alone[f"{HOST_PART}, {way}"] = host, way
    rates = take_turns(bench, alone, min(options.rounds, 8), 0.5) | take_turns(
        bench, loops, options.rounds, options.seconds
    )
    bench.close()
    return {
        "model": name,
        "batch_size": batch_size,
        "flops": bench.flops,
        "images_per_second": dict(sorted(rates.items())),
        "left_out": left_out,
        "compile_seconds": compile_seconds,
    }


def take_turns(bench: Bench, tasks: dict[str, tuple], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Measure each task's images per second in each round."""
    for steps, source in tasks.values():
        with bench.awake(source):
            if bench.workers.get(source):
                bench.load(bench.sources[source])(2 * bench.options.num_workers)  # use up what lay ready
            steps(3)  # until workers make as much as is used
    rates = {name: [] for name in tasks}
    for turn in range(rounds):
        for name in list(tasks)[:: -1 if turn % 2 else 1]:
            steps, source = tasks[name]
            with bench.awake(source):
                size = HOST_BATCH if name.startswith(HOST_PART) else bench.batch_size
                rates[name].append(rate(steps, size, seconds))
    return rates


def ratio(rates: dict[str, list[float]], task: str, other: str) -> str:
    """Divide a task's speed by another's in the same round: the median over rounds, and its 95 % interval.

    The median forgets the turns that something else on the host disturbed.
    """
    if other not in rates:
        return ""
    ratios = sorted(mine / its for mine, its in zip(rates[task], rates[other], strict=True))
    count = len(ratios)
    # ranks between which the median lies, by the binomial distribution; of few rounds all
    least = max(0, int((count - 1.96 * count**0.5) / 2))
    return f"{statistics.median(ratios):.3f} ({ratios[least]:.3f}..{ratios[-1 - least]:.3f})"


def table(result: dict, peak_rate: float) -> list[str]:
    """Format what `measure` returns as a Markdown table."""
    rates, flops, compile_seconds = result["images_per_second"], result["flops"], result["compile_seconds"]
    middle = {task: statistics.median(values) for task, values in rates.items()}
    lines = [
        f"### {result['model']}, batch {result['batch_size']}",
        "",
        f"{flops / 1e9:.2f} GFLOP per image, forward and backward; a large matrix product here: {peak_rate / 1e12:.2f} TFLOP/s.",
        "",
        "| what | images/s, median (least..most) | c/a or t/a, median of rounds (95 % interval) | c/d | share of that product's speed |",
        "|---|---:|---:|---:|---:|",
    ]
    for task, values in rates.items():
        shares = [ratio(rates, task, other) if task[0] in "ct" else "" for other in ("a: bare step", ORIGINAL)]
        share = "" if task.startswith("b") else f"{100 * middle[task] * flops / peak_rate:.1f} %"
        shown = f"{middle[task]:.1f} ({min(values):.1f}..{max(values):.1f})"
        if task.startswith(HOST_PART):
            shown += f", {1000 / middle[task]:.4f} ms per image"
        lines.append(f"| {task} | {shown} | {shares[0]} | {shares[1]} | {share} |")
    lines += ["", *(f"Left out, {way}: {reason}." for way, reason in result["left_out"].items())]
    if compile_seconds is not None:
        lines += [f"Compiled in the first {compile_seconds:.0f} s, which count nowhere."]
    best = max(value for task, value in middle.items() if task.startswith("c"))
    hours = CIFAR_IMAGES * CIFAR_EPOCHS / best / 3600
    return [
        *lines,
        f"300 epochs of CIFAR's 50,000 images at the best of c: {60 * hours:.0f} minutes ({hours:.1f} h).",
        "",
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options and fill in the defaults that depend on the device."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="an image folder")
    add("--device", default="auto")
    add("--models", nargs="+", default=["vit_tiny", "convnext_femto"])
    add("--batch_sizes", nargs="+", type=int, help="(default: the recipes' on a GPU, 16 on a CPU)")
    add("--ways", nargs="+", choices=WAYS, help="(default: all on a GPU, what a CPU is trained by on a CPU)")
    add("--input_size", type=int, default=224)
    add("--teacher", help="measure the step with the logits of this model, of random weights, too")
    add("--num_workers", type=int, help="(default: cores - 1; on a CPU all, that the data takes from each alike)")
    add("--use_amp", action=argparse.BooleanOptionalAction, help="(default: on a GPU)")
    add("--amp_dtype", choices=("float16", "bfloat16"))
    add("--compile", action="store_true", help="everything but the loop with the original's habits")
    add("--compile_mode", default="default", help="of torch.compile, as in main.py")
    add("--cache_size", type=int, help="side of the cached images, as in main.py, for images of several sizes")
    add("--rounds", type=int, help="(default: 4 on a GPU, 32 on a CPU)")
    add(
        "--seconds",
        type=number(float, 0),
        help="per loop and round, but at least one step (default: 2 on a GPU, a step on a CPU)",
    )
    add("--out", type=Path, help="write OUT.md and OUT.json")
    options = parser.parse_args(argv)
    device = distributed.pick_device(options.device)
    options.device, on_gpu = str(device), device.type == "cuda"
    options.use_amp = on_gpu if options.use_amp is None else options.use_amp
    options.rounds = options.rounds or (4 if on_gpu else 32)
    options.seconds = 2.0 * on_gpu if options.seconds is None else options.seconds
    if options.num_workers is None:
        options.num_workers = max(1, len(os.sched_getaffinity(0)) - on_gpu)
    options.ways = options.ways or [way for way in WAYS if on_gpu or way in ON_CPU]
    return options


def main(argv: list[str] | None = None) -> dict:
    """Run the benchmark; returns what the JSON holds."""
    options = parse(argv)
    logging.basicConfig(format="%(message)s")
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True
    dtype = Precision.choose(device, options.use_amp, options.amp_dtype).dtype or torch.float32
    start, code = time.monotonic(), revision()  # before anything is written
    with contextlib.ExitStack() as stack:
        folder = options.data
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            make_images(folder / "train", 50_000 if device.type == "cuda" else 4096, 32)
        images = datasets.load_images("image_folder", str(folder), True)
        peak_rate, lines, results = peak(device, dtype), [], []
        for name in options.models:
            for number, batch_size in enumerate(options.batch_sizes or default_sizes(name, device.type == "cuda")):
                # the speed of workers does not depend on the batch: measure their ways at the first size only
                ways = [way for way in options.ways if number == 0 or WAYS[way] in WITHOUT_WORKERS]
                results.append(measure(name, batch_size, images, options, ways))
                shown = table(results[-1], peak_rate)
                lines += shown
                print("\n".join(shown), flush=True)
                notes = conditions(options, images, dtype, time.monotonic() - start, code, argv)
                result = {"peak": peak_rate, "notes": notes, "results": results}
                if options.out:  # after each model: a crash in a later one loses nothing
                    write_results(options.out, [*lines, *notes], result)
    print("\n".join(notes))
    return result


def write_results(out: Path, lines: list[str], result: dict) -> None:
    """Write OUT.md and OUT.json."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


def default_sizes(name: str, on_gpu: bool) -> list[int]:
    return RECIPE_BATCHES.get(name, [64]) if on_gpu else [16]


def conditions(
    options, images: Images, dtype: torch.dtype, seconds: float, code: str | None, argv: list[str] | None
) -> list[str]:
    """List what was measured, on which hardware, with which versions."""
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    gpu = f"{torch.cuda.get_device_name(device)}, " if on_gpu else ""
    compiled = f"compiled ({options.compile_mode})" if options.compile else "not compiled"
    turns = f"{options.seconds:g} s" if options.seconds else "one step"
    return [
        f"Hardware: {gpu}{hardware()}, {options.num_workers} workers, "
        f"{torch.get_num_threads()} threads; {str(dtype).removeprefix('torch.')}; {compiled}.",
        f"{len(images)} images of {options.data.name if options.data else '32 px noise'}; n = {options.rounds} rounds in "
        f"turns of {turns}; {seconds:.0f} s in all.",
        f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}; this code {code}.",
        f"Command: `python -m bench.throughput {' '.join(sys.argv[1:] if argv is None else argv)}`",
    ]


if __name__ == "__main__":
    main()
