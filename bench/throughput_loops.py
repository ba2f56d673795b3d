"""The loops that bench.throughput measures: the training step, each way of the data, and the habits of the paper's code."""

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
from images.batches import AugmentedBatches, Resident, train_batches
from images.images import Images
from images.order import TrainBatches
from images.settings import Augmentation, Loading, View
from images.transforms import TransformedImages, build_mixer, train_transform
from images.workers import ahead
from optim_factory import create_optimizer, parameter_groups
from options.training import training_options
from training.distill import Distillation
from training.precision import Precision
from training.teacher import Teacher
from utils import seed_all

WAYS = {
    "timm": ("timm", "none"),
    "timm, cache ram": ("timm", "ram"),
    "device": ("device", "none"),
    "device, cache ram": ("device", "ram"),
    "device, cache device": ("device", "device"),
}
ORIGINAL = "d: the original's habits"
HOST_BATCH = 64  # the smallest of the recipes' batches


class Bench:
    """One model at one batch size on one device, and the ways of its data."""

    def __init__(self, name: str, batch_size: int, images: Images, options: argparse.Namespace):
        self.images, self.batch_size, self.options = images, batch_size, options
        self.device = torch.device(options.device)
        seed_all(0)
        kwargs = {"drop_path_rate": 0.1} if name.startswith("convnext") else {}
        self.model = models.build_model(
            name, num_classes=images.classes, input_size=options.input_size, model_kwargs=kwargs
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
        """Count a forward and a backward pass of one image: three times the forward, less the gradient of the image."""
        images = torch.zeros(1, 3, self.options.input_size, self.options.input_size, device=self.device)
        first = next(module for module in self.model.modules() if isinstance(module, torch.nn.Conv2d))
        made = []
        hook = first.register_forward_hook(lambda _, images, output: made.append(output.numel()))
        # attention by plain products: not every version of torch counts every device's fused one
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            self.model.eval()(images)
        hook.remove()
        self.model.train()
        # torch counts the backward pass of a grouped convolution too high, so multiply the forward pass instead
        return 3 * counter.get_total_flops() - 2 * made[0] * first.weight[0].numel()

    def settings(self, augment: str = "timm", cache: str = "none") -> tuple[View, Augmentation, Loading]:
        """The recipe's settings, which are the defaults of main.py's options."""
        given, words = self.options, ["--augment", augment, "--cache", cache]
        if given.cache_size and cache != "none":
            words += ["--cache_size", str(given.cache_size)]
        options = training_options(
            [*words, "--input_size", str(given.input_size), "--num_workers", str(given.num_workers)]
        )
        loading = Loading.from_options(options, device=self.device)
        return View.from_options(options), Augmentation.from_options(options), loading

    def mixer(self):
        return build_mixer(self.settings()[1], self.images.classes)

    def source(self, name: str) -> Iterator:
        """Endless batches by this way, or as the original has them; its workers stand still when this returns."""
        order = TrainBatches(len(self.images), batch_size=self.batch_size, update_freq=1, world_size=1, rank=0, seed=0)
        if name == ORIGINAL:
            view, augmentation, loading = self.settings()
            batches = DataLoader(
                TransformedImages(self.images, train_transform(view, augmentation)),
                batch_sampler=order,
                persistent_workers=loading.workers > 0,
                num_workers=loading.workers,
                pin_memory=loading.pin_memory,
            )
        else:
            batches = train_batches(self.images, order, *self.settings(*WAYS[name]))
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
        """Let the workers of this source work inside the context; outside they are stopped and disturb no measurement."""
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
        layout = ["--channels_last", str(self.channels_last)]
        options = training_options(["--lr", "1e-4", "--log_freq", str(10**6), *layout])
        return engine.Trainer(
            model=self.model,
            criterion=SoftTargetCrossEntropy(),
            optimizer=create_optimizer(parameter_groups(self.model, options), options),
            precision=Precision.choose(self.device, self.options.use_amp, self.options.amp_dtype),
            lr=np.full(10**6, options.lr),
            weight_decay=np.full(10**6, options.weight_decay),
            settings=engine.EngineSettings.from_options(options),
            mixer=self.mixer(),
        )

    def train(self, source: Iterator, teacher: str | None = None) -> Callable[[int], None]:
        """Make a function that trains for a number of steps of the engine, from the logits of a teacher too if it is named."""
        trainer = self.trainer()
        if teacher:
            model = models.build_model(teacher, num_classes=self.images.classes, input_size=self.options.input_size)
            model.to(self.device, memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
            if self.options.compile:
                model.compile()
            same = ((0.5,) * 3, (0.5,) * 3)
            taught = Teacher(model, self.images.classes, {}, same, same)
            trainer.criterion = Distillation(taught, self.model, trainer.criterion)

        def steps(count: int) -> None:
            batches = itertools.islice(source, count)  # no more than these: on a GPU one is fetched ahead
            engine.train_one_epoch(trainer, batches, engine.Progress(), steps=count, report=lambda *_: None)

        return steps

    def load(self, source: Iterator) -> Callable[[int], None]:
        """Make a function that only waits for a number of batches."""

        def steps(count: int) -> None:
            for images, _ in ahead(itertools.islice(source, count), self.device):
                images = images.contiguous()
            images[0, 0, 0, 0].item()

        return steps

    def host(self, way: str) -> Callable[[int], None] | None:
        """Make a function that does the host's part of a number of batches by this way: gather, draw, send.

        None if workers take part, as they do for images of several sizes.
        """
        batches, indices = self.batches[way], np.arange(HOST_BATCH) % len(self.images)
        if not isinstance(batches, AugmentedBatches) or not isinstance(batches.pixels, Resident):
            return None
        augment = batches.augment

        def steps(count: int) -> None:
            for number in range(count):
                images, _ = batches.pixels.batch(indices)
                for part in augment.parts(HOST_BATCH):
                    shapes = batches.shapes[indices[part]]
                    augment.to_device(*augment.plan(number, indices[part], images.shape[1:3], shapes))

        return steps

    def original(self, source: Iterator) -> Callable[[int], None]:
        """Make a function that trains with the habits of the paper's loop: several waits for the device per step.

        The model is not compiled. The all-reduce per micro-batch is left out: one process has nothing to reduce.
        """
        model = self.plain_model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
        mixer, criterion, precision = self.mixer(), SoftTargetCrossEntropy(), self.trainer().precision
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
