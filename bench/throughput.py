"""Images a second of training: the model alone, each way of the data alone, the whole loop by each way, and a loop with
the habits of the paper's code. Everything in one run, in turns, so that the ratios are of one machine in one hour.

    python bench/throughput.py [--data FOLDER] [--out results/throughput/NAME]

FOLDER is an image folder (train/<class>/*.jpg); without it, JPEG files of noise are made, 32 px as CIFAR's. On a GPU a
whole run takes under 9 minutes, on two CPU cores as well, at reduced counts.
"""

import argparse
import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import timm
import torch
from PIL import Image
from timm.loss import SoftTargetCrossEntropy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import datasets
import distributed
import engine
import feed
import loader
import models
import workers
from images import Images
from optim_factory import create_optimizer, parameter_groups
from utils import revision, seed_all

WAYS = {
    "timm": ("timm", "none"),
    "timm, cache ram": ("timm", "ram"),
    "device": ("device", "none"),
    "device, cache ram": ("device", "ram"),
    "device, cache device": ("device", "device"),
}
RECIPE = {"hflip": 0.5, "color_jitter": 0.4, "aa": "rand-m9-mstd0.5-inc1", "train_interpolation": "bicubic",
    "reprob": 0.25, "remode": "pixel", "recount": 1}  # fmt: skip
MIXING = {"mixup": 0.8, "cutmix": 1.0, "cutmix_minmax": None, "mixup_prob": 1.0, "mixup_switch_prob": 0.5,
    "mixup_mode": "batch", "smoothing": 0.1}  # fmt: skip
RECIPE_BATCHES = {"vit_tiny": [64, 512, 1024], "convnext_femto": [128, 1024]}
ON_CPU = ("timm", "timm, cache ram", "device, cache ram")
WITH_WORKERS = ("timm", "timm, cache ram", "device")
ORIGINAL = "d: the original's habits"
HOST_BATCH = 64  # the smallest of the recipes'
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


class Bench:
    """One model at one batch size on one device, and the ways of its data."""

    def __init__(self, name: str, batch_size: int, images: Images, options: argparse.Namespace):
        self.images, self.batch_size, self.options = images, batch_size, options
        self.device = torch.device(options.device)
        seed_all(0)
        self.model = models.build_model(
            name, num_classes=images.classes, input_size=options.input_size, drop_path=0.1 * name.startswith("convnext")
        )
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=layout)
        self.flops = self._flops()
        if options.compile:
            self.model.compile()
        self.batches, self.sources, self.workers = {}, {}, {}

    @property
    def channels_last(self) -> bool:
        return self.device.type == "cuda" and type(self.model).__name__ == "ConvNeXt"

    def _flops(self) -> float:
        """Of a forward and a backward pass, for one image: twice the forward again, but no gradient of the image."""
        images = torch.zeros(1, 3, self.options.input_size, self.options.input_size, device=self.device)
        first = next(module for module in self.model.modules() if isinstance(module, torch.nn.Conv2d))
        made = []
        hook = first.register_forward_hook(lambda _, images, output: made.append(output.numel()))
        # by plain products: not every version of torch counts the fused attention of every device
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            self.model.eval()(images)
        hook.remove()
        self.model.train()
        # torch counts too much for the backward pass of a grouped convolution: what the forward takes is right
        return 3 * counter.get_total_flops() - 2 * made[0] * first.weight[0].numel()

    def source(self, way: str, name: str | None = None) -> Iterator:
        """Batches by this way without end; the same iterator, and workers, each time it is asked for by that name."""
        name = name or way
        if name not in self.sources:
            augment, cache = WAYS[way]
            order = loader.TrainBatches(
                len(self.images), batch_size=self.batch_size, update_freq=1, world_size=1, rank=0, seed=0
            )
            mean, std = loader.mean_and_std(True)
            how = {"num_workers": self.options.num_workers, "pin_memory": self.device.type == "cuda"}
            if name == ORIGINAL:
                transform = loader.train_transform(self.options.input_size, mean, std, **RECIPE)
                batches = DataLoader(
                    loader.TransformedImages(self.images, transform),
                    batch_sampler=order,
                    persistent_workers=how["num_workers"] > 0,
                    **how,
                )
            else:
                how["yielding"] = self.device.type == "cpu"
                batches = feed.train_batches(
                    self.images, order, augment=augment, cache=cache, cache_size=None, input_size=self.options.input_size,
                    mean=mean, std=std, augmentation=RECIPE, seed=0, device=self.device, workers=how
                )  # fmt: skip
            self.batches[name], self.sources[name] = batches, _endless(batches)
            others = set(multiprocessing.active_children())
            next(self.sources[name])
            self.workers[name] = set(multiprocessing.active_children()) - others
            self._send(name, signal.SIGSTOP)
        return self.sources[name]

    def _send(self, source: str | None, number: int) -> None:
        for worker in self.workers.get(source, ()):
            os.kill(worker.pid, number)

    @contextlib.contextmanager
    def awake(self, source: str | None):
        """Inside, the workers of this source work; outside they stand still, and take nothing from other measurements."""
        self._send(source, signal.SIGCONT)
        yield
        self._send(source, signal.SIGSTOP)

    def close(self) -> None:
        """End all workers."""
        for source in self.workers:
            self._send(source, signal.SIGCONT)
        self.batches.clear(), self.sources.clear(), self.workers.clear()

    def resident(self) -> Iterator:
        shape = (self.batch_size, 3, self.options.input_size, self.options.input_size)
        batch = (
            torch.randn(shape, device=self.device),
            torch.zeros(self.batch_size, dtype=torch.int64, device=self.device),
        )
        return itertools.repeat(batch)

    def trainer(self) -> engine.Trainer:
        optimizer = create_optimizer(
            parameter_groups(self.model, 0.05, 1.0), "adamw", lr=1e-4, momentum=0.9, eps=1e-8, betas=None
        )
        steps = np.full(10**6, 1e-4)
        return engine.Trainer(
            model=self.model, criterion=SoftTargetCrossEntropy(), optimizer=optimizer,
            precision=engine.Precision.choose(self.device, self.options.use_amp, self.options.amp_dtype), lr=steps,
            weight_decay=np.full(10**6, 0.05), mixer=loader.build_mixer(num_classes=self.images.classes, seed=0, **MIXING),
            log_freq=10**6, channels_last=self.channels_last,
        )  # fmt: skip

    def train(self, source: Iterator) -> Callable[[int], None]:
        """A function that trains for so many steps of the engine."""
        trainer = self.trainer()

        def steps(count: int) -> None:
            batches = itertools.islice(source, count)  # no more than these: on a GPU one is fetched ahead
            engine.train_one_epoch(trainer, batches, engine.Progress(), steps=count, report=lambda *_: None)

        return steps

    def load(self, source: Iterator) -> Callable[[int], None]:
        """A function that only waits for so many batches."""

        def steps(count: int) -> None:
            for images, _ in workers.ahead(itertools.islice(source, count), self.device):
                images = images.contiguous()
            images[0, 0, 0, 0].item()

        return steps

    def host(self, way: str) -> Callable[[int], None]:
        """A function that does what is left to the host by this way for so many batches: gathering and drawing."""
        batches, indices = self.batches[way], np.arange(HOST_BATCH)

        def steps(count: int) -> None:
            for number in range(count):
                images, _ = batches.pixels.batch(indices)
                batches.augment.plan(number, indices, *images.shape[1:3])

        return steps

    def original(self, source: Iterator) -> Callable[[int], None]:
        """Training with the habits of the paper's loop: a DataLoader's batches, several waits for the device a step."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.05)
        mixer = loader.build_mixer(num_classes=self.images.classes, seed=0, **MIXING)
        criterion, precision = SoftTargetCrossEntropy(), self.trainer().precision
        scaler = torch.amp.GradScaler(self.device.type, enabled=precision.scales_loss)

        def steps(count: int) -> None:
            for step in range(count):
                images, targets = (part.to(self.device, non_blocking=True) for part in next(source))
                labels = targets
                images, targets = mixer(images, targets, (step, 0))
                with precision.autocast():
                    logits = self.model(images)
                    loss = criterion(logits, targets)
                if not np.isfinite(loss.item()):
                    raise RuntimeError("the loss is not finite")
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), float("inf"))
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                _ = loss.item(), norm.item(), (logits.argmax(1) == labels).float().mean().item()

        return steps


def _endless(batches) -> Iterator:
    for epoch in itertools.count():
        batches.batch_sampler.set_epoch(epoch)
        yield from batches


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


def measure(bench: Bench, options: argparse.Namespace, ways: list[str]) -> dict[str, list[float]]:
    """Images a second, by what was measured, for each round; every other round goes the other way.

    What is a training loop has workers of its own, which stand still outside its turns: each turn goes on where the one
    before it ended, so that turns may be short, and those of a round are of the same minute.
    """
    loops, alone = {"a: bare step": (bench.train(bench.resident()), None)}, {}
    for way in ways:
        source = bench.source(way)
        alone[f"b: data alone, {way}"] = bench.load(source), way
        if way not in WITH_WORKERS:
            alone[f"{HOST_PART}, {way}"] = bench.host(way), way
        loops[f"c: training, {way}"] = bench.train(source), way
    if "timm" in ways:
        source = bench.source("timm", ORIGINAL)
        alone[f"b: data alone, {ORIGINAL.removeprefix('d: ')}"] = bench.load(source), ORIGINAL
        loops[ORIGINAL] = bench.original(source), ORIGINAL
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
    return rates


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


def table(name: str, bench: Bench, rates: dict[str, list[float]], peak_rate: float) -> list[str]:
    """A Markdown table of one model at one batch size."""
    middle = {task: statistics.median(values) for task, values in rates.items()}
    lines = [
        f"### {name}, batch {bench.batch_size}",
        "",
        f"{bench.flops / 1e9:.2f} GFLOP an image, forward and backward; a large matrix product here: {peak_rate / 1e12:.2f} TFLOP/s.",
        "",
        "| what | images/s, median (least..most) | c/a, median of rounds (95 % interval) | c/d | share of that product's speed |",
        "|---|---:|---:|---:|---:|",
    ]
    for task, values in rates.items():
        shares = [ratio(rates, task, other) if task.startswith("c") else "" for other in ("a: bare step", ORIGINAL)]
        share = "" if task.startswith("b") else f"{100 * middle[task] * bench.flops / peak_rate:.1f} %"
        shown = f"{middle[task]:.1f} ({min(values):.1f}..{max(values):.1f})"
        if task.startswith(HOST_PART):
            shown += f", {1000 / middle[task]:.4f} ms an image"
        lines.append(f"| {task} | {shown} | {shares[0]} | {shares[1]} | {share} |")
    best = max(value for task, value in middle.items() if task.startswith("c"))
    hours = CIFAR_IMAGES * CIFAR_EPOCHS / best / 3600
    return [
        *lines,
        "",
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
    add("--compile", action="store_true")
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
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = options.data
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            make_images(folder, 50_000 if on_gpu else 4096, 32)
        images = datasets.load_images("image_folder", str(folder), True)
        peak_rate, lines, results = peak(device, dtype), [], []
        for name in options.models:
            sizes = []
            for batch_size in options.batch_sizes or (RECIPE_BATCHES.get(name, [64]) if on_gpu else [16]):
                bench = Bench(name, batch_size, images, options)
                # the speed of workers does not depend on the batch: they are measured at the first alone
                ways = [way for way in options.ways if not (sizes and way in WITH_WORKERS)]
                sizes.append(batch_size)
                rates = measure(bench, options, ways)
                results.append(
                    {"model": name, "batch_size": batch_size, "flops": bench.flops, "images_per_second": rates}
                )
                lines += table(name, bench, rates, peak_rate)
                print("\n".join(table(name, bench, rates, peak_rate)), flush=True)
                bench.close()
    hardware = torch.cuda.get_device_name(device) if on_gpu else f"{platform.processor() or platform.machine()} CPU"
    notes = [
        f"Hardware: {hardware}, {len(os.sched_getaffinity(0))} cores, {options.num_workers} workers, "
        f"{torch.get_num_threads()} threads; {str(dtype).removeprefix('torch.')}; {'compiled' if options.compile else 'not compiled'}.",
        f"{len(images)} images of {folder.name if options.data else '32 px noise'}; n = {options.rounds} rounds in turns of "
        f"{f'{options.seconds:g} s' if options.seconds else 'one step'}; {time.monotonic() - start:.0f} s in all.",
        f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}; this code {revision()}.",
        f"Command: `python bench/throughput.py {' '.join(sys.argv[1:] if argv is None else argv)}`",
    ]
    print("\n".join(notes))
    result = {"peak": peak_rate, "notes": notes, "results": results}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".md").write_text("\n".join([*lines, *notes]) + "\n")
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
