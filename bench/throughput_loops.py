"""The loops that throughput.py measures: the training step, each way of the data, and the habits of the paper's code."""

import argparse
import contextlib
import copy
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator

import numpy as np
import torch
from timm.loss import SoftTargetCrossEntropy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import engine
import models
from images import batches as feed
from images import workers
from images.images import Images
from images.order import TrainBatches
from images.transforms import TransformedImages, build_mixer, mean_and_std, train_transform
from optim_factory import create_optimizer, parameter_groups
from utils import seed_all

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
ORIGINAL = "d: the original's habits"
HOST_BATCH = 64  # the smallest of the recipes'


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
        self.plain_model = copy.deepcopy(self.model) if options.compile else self.model
        if options.compile:
            self.model.compile(mode=options.compile_mode)
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

    def source(self, name: str) -> Iterator:
        """Batches by this way, or as the original has them, without end; their workers stand still when it returns."""
        options, size, on_cpu = self.options, self.options.input_size, self.device.type == "cpu"
        mean, std = mean_and_std(True)
        order = TrainBatches(len(self.images), batch_size=self.batch_size, update_freq=1, world_size=1, rank=0, seed=0)
        how = {"num_workers": options.num_workers, "pin_memory": self.device.type == "cuda"}
        if name == ORIGINAL:
            transformed = TransformedImages(self.images, train_transform(size, mean, std, **RECIPE))
            batches = DataLoader(transformed, batch_sampler=order, persistent_workers=options.num_workers > 0, **how)
        else:
            augment, cache = WAYS[name]
            batches = feed.train_batches(
                self.images, order, augment=augment, cache=cache, cache_size=options.cache_size if cache != "none" else None,
                input_size=size, mean=mean, std=std, augmentation=RECIPE, seed=0, device=self.device,
                workers=how | {"yielding": on_cpu}
            )  # fmt: skip
        source, others = _endless(batches), set(multiprocessing.active_children())
        next(source)
        self.batches[name], self.sources[name] = batches, source
        self.workers[name] = set(multiprocessing.active_children()) - others
        self._send(name, signal.SIGSTOP)
        return source

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
            weight_decay=np.full(10**6, 0.05), mixer=build_mixer(num_classes=self.images.classes, seed=0, **MIXING),
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

    def host(self, way: str) -> Callable[[int], None] | None:
        """A function that does what is left to the host by this way for so many batches: gathering, drawing, sending.

        None where workers have a part in it, as with images of several sizes.
        """
        batches, indices = self.batches[way], np.arange(HOST_BATCH) % len(self.images)
        if not isinstance(batches, feed.AugmentedBatches) or not isinstance(batches.pixels, feed.Resident):
            return None
        augment = batches.augment

        def steps(count: int) -> None:
            for number in range(count):
                images, _ = batches.pixels.batch(indices)
                for part in augment.parts(HOST_BATCH):
                    augment.to_device(*augment.plan(number, indices[part], *images.shape[1:3]))

        return steps

    def original(self, source: Iterator) -> Callable[[int], None]:
        """Training with the habits of the paper's loop: a DataLoader's batches, several waits for the device a step.

        It is not compiled. Its all-reduce on each micro-batch has nothing to do in one process, and is left out.
        """
        model = self.plain_model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
        mixer = build_mixer(num_classes=self.images.classes, seed=0, **MIXING)
        criterion, precision = SoftTargetCrossEntropy(), self.trainer().precision
        scaler = torch.amp.GradScaler(self.device.type, enabled=precision.scales_loss)

        def steps(count: int) -> None:
            for step in range(count):
                images, targets = (part.to(self.device, non_blocking=True) for part in next(source))
                labels = targets
                images, targets = mixer(images, targets, (step, 0))
                with precision.autocast():
                    logits = model(images)
                    loss = criterion(logits, targets)
                if not np.isfinite(loss.item()):
                    raise RuntimeError("the loss is not finite")
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
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
