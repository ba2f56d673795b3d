import contextlib
import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import assert_equal_weights, settings
from timm.loss import SoftTargetCrossEntropy
from timm.optim import list_optimizers
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode

import datasets
import engine
import models
from engine import EngineSettings, Trainer, evaluate, train_one_epoch
from images import batches as feed
from images.order import TrainBatches
from images.transforms import build_mixer
from optim_factory import create_optimizer
from options.training import training_options
from training import meters
from training.checkpoint import Progress
from training.folder import opened
from training.log import EpochLog, summary
from training.meters import DeviceSums, count_in_top
from training.precision import Precision
from utils import UserError

CPU = torch.device("cpu")
DTYPES = [None, torch.bfloat16, torch.float16]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def tiny_model(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), *more, nn.Linear(8, 3))


def batches_of(count):
    draws = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 2, 2, generator=draws), torch.randint(3, (4,), generator=draws)) for _ in range(count)]


def make_trainer(model, words="", steps=4, *, dtype=None, device=CPU, **parts):
    """A trainer for `steps` updates with these options of main.py, and with other parts than the plain ones."""
    options = training_options(f"--lr 0.1 --momentum 0 {words}".split())
    schedules = {"lr": np.full(steps, options.lr), "weight_decay": np.zeros(steps)}
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0, "lr_scale": 1.0}]
    parts = {"criterion": nn.CrossEntropyLoss(), "settings": EngineSettings.from_options(options), **schedules, **parts}
    return Trainer(model, optimizer=create_optimizer(groups, options), precision=Precision(device, dtype), **parts)


def train(trainer, batches, report=lambda *_: None):
    steps = len(batches) // trainer.settings.update_freq
    return train_one_epoch(trainer, batches, Progress(), steps=steps, report=report)


def assert_close(model, other):
    parameters = (list(each.parameters()) for each in (model, other))
    torch.testing.assert_close(*parameters, rtol=0, atol=1e-6)  # float32: sums in another order, or rounded once less


class HostReads(TorchDispatchMode):
    """Count the operations that make the host wait for the device, and the copies to the host, which do not dispatch."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen = []
        for name in ("tolist", "cpu", "numpy", "__array__"):
            real = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, real))

    def _counted(self, name, real):
        return lambda tensor, *args, **kwargs: self.seen.append(name) or real(tensor, *args, **kwargs)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.WAITS:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_every_way_to_wait_is_counted(monkeypatch):
    with HostReads(monkeypatch) as host:
        value = torch.ones(2)
        float(value[0]), value.tolist(), value.cpu(), value.numpy(), bool(value[0] > 0), value.nonzero()
    assert len(host.seen) == 6


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def waits_in(device, monkeypatch):
    """Return a function that trains an epoch and returns the waits; on cuda, one outside a log step is an error."""
    real, mode = DeviceSums.read, torch.cuda.set_sync_debug_mode if device.type == "cuda" else lambda _: None
    monkeypatch.setattr(DeviceSums, "read", lambda self, **kwargs: mode("default") or real(self, **kwargs))

    def waits(trainer, batches, progress, steps):
        with HostReads(monkeypatch) as host:
            try:
                mode("error")
                train_one_epoch(trainer, batches, progress, steps=steps, report=lambda *_: mode("error"))
            finally:
                mode("default")
        return host.seen

    return waits


ACCUMULATED_AND_CLIPPED = "--update_freq 2 --clip_grad 1"


def mixing():
    """What mixes the batches, as the recipe does."""
    return {"mixer": build_mixer(settings()[1], num_classes=3), "criterion": SoftTargetCrossEntropy()}


def buildable_optimizers():
    """Names of timm's optimizers that need neither CUDA nor second derivatives."""
    for name in list_optimizers():
        with contextlib.suppress(UserError):
            make_trainer(tiny_model(), f"--opt {name}")
            yield name


def test_optimizers_draw_alike_on_every_rank(monkeypatch):
    """Leave the global generator as different ranks' forward passes do."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # kron's compilation takes minutes
    names = list(buildable_optimizers())
    assert {"adamw", "kron", "kronw", "muon"} <= set(names)
    for name in names:
        ranks = []
        for rank in range(2):
            trainer, draws = make_trainer(tiny_model(), f"--opt {name} --lr 1e-3"), torch.Generator().manual_seed(0)
            for step in range(2):
                for parameter in trainer.model.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=draws)
                trainer.precision.scaler.scale(torch.ones(()))  # what the backward pass begins with
                torch.manual_seed(rank)
                engine._update(trainer, step)
            ranks.append(trainer.model.state_dict())
        assert_equal_weights(*ranks)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_host_waits_only_at_log_steps(mixed, dtype, device, waits_in):
    model = tiny_model().to(device)
    parts = {"ema": ModelEmaV3(model, decay=0.9)} | (mixing() if mixed else {})
    trainer = make_trainer(model, f"{ACCUMULATED_AND_CLIPPED} --log_freq 4", 9, dtype=dtype, device=device, **parts)
    batches = batches_of(18)
    if device.type == "cuda":
        batches = [(images.pin_memory(), targets.pin_memory()) for images, targets in batches]
    train(trainer, batches[:2])  # first use builds handles
    # reads after updates 4, 8 and 9; float16 asks there too how many updates in a row it skipped
    per_read = ["tolist", "aten._local_scalar_dense.default"] if dtype == torch.float16 else ["tolist"]
    assert waits_in(trainer, batches[2:], Progress(done=1), steps=9) == per_read * 3


@pytest.mark.parametrize("cache", ["ram", "device"])
def test_host_waits_only_at_log_steps_of_the_whole_loop(cache, device, waits_in, image_folder):
    """The recipe augmented on the device, mixed, accumulated, averaged: two epochs of five updates, a reading each."""
    images = datasets.load_images("image_folder", str(image_folder), True)
    order = TrainBatches(40, batch_size=4, update_freq=2, world_size=1, rank=0, seed=0)
    recipe = settings("--augment", "device", "--cache", cache, "--input_size", "40", device=device.type)
    batches = feed.train_batches(images, order, *recipe)
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
    model = models.build_model("vit_tiny", num_classes=3, input_size=40, model_kwargs=shape).to(device)
    parts = {"ema": ModelEmaV3(model, decay=0.9)} | mixing()
    words = f"{ACCUMULATED_AND_CLIPPED} --lr 1e-3 --log_freq 9"
    trainer = make_trainer(model, words, 10, dtype=torch.bfloat16, device=device, **parts)
    train_one_epoch(trainer, batches, Progress(), steps=5, report=lambda *_: None)  # first use builds handles
    assert waits_in(trainer, batches, Progress(epoch=1), steps=5) == ["tolist"]


def test_accumulated_gradients_are_those_of_the_large_batch():
    small, large, batches = tiny_model(), tiny_model(), batches_of(4)
    joined = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in (batches[:2], batches[2:])]
    train(make_trainer(small, "--opt momentum --update_freq 2"), batches)
    train(make_trainer(large, "--opt momentum"), joined)
    assert_close(small, large)


def test_gradients_are_reduced_once_an_update():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        reduced, model = [], torch.nn.parallel.DistributedDataParallel(tiny_model())
        model.register_comm_hook(None, lambda _, bucket: reduced.append(bucket.index()) or allreduce_hook(None, bucket))
        train(make_trainer(model, "--update_freq 3"), batches_of(6))
    finally:
        dist.destroy_process_group()
    assert reduced == [0, 0]  # one bucket, two updates of three backward passes


def test_one_update_and_its_norm_are_torchs_own():
    model, plain = tiny_model(), tiny_model()
    (images, targets), *_ = batches = batches_of(1)
    means = train(make_trainer(model), batches)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.0)
    nn.functional.cross_entropy(plain(images), targets).backward()
    optimizer.step()
    assert_close(model, plain)
    norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in plain.parameters()))
    assert means["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clipping_bounds_the_update_in_every_precision(dtype):
    model, before = tiny_model(), tiny_model()
    means = train(make_trainer(model, "--opt momentum --lr 1 --clip_grad 0.01", 1, dtype=dtype), batches_of(1))
    pairs = zip(before.parameters(), model.parameters(), strict=True)
    moved = math.sqrt(sum((a - b).square().sum().item() for a, b in pairs))
    assert means["grad_norm"] > 0.1  # logged as it was before
    assert moved == pytest.approx(0.01, rel=1e-3)  # the parameters round at 1e-7 of values near 0.3


def test_model_draws_depend_on_the_step_alone():
    def losses(disturb):
        model, seen = tiny_model(nn.Dropout(0.5)), []
        trainer = make_trainer(model, "--log_freq 1")
        torch.manual_seed(disturb)
        train(trainer, batches_of(4), report=lambda _step, _lr, means, _rate: seen.append(means["loss"]))
        return seen

    assert losses(1) == losses(2)


def test_ema_follows_the_updates():
    model, start = tiny_model(), tiny_model()[1].weight
    ema = ModelEmaV3(model, decay=0.75)
    train(make_trainer(model, ema=ema), batches_of(1))
    torch.testing.assert_close(ema.module[1].weight, 0.75 * start + 0.25 * model[1].weight)


class BadAt(nn.Module):
    """Cross-entropy that is not finite in one call (None: in all): its value, or only its gradient."""

    def __init__(self, call, value):
        super().__init__()
        self.calls, self.call, self.value = 0, call, value

    def forward(self, logits, targets):
        loss, self.calls = nn.functional.cross_entropy(logits, targets), self.calls + 1
        if self.call not in (None, self.calls - 1):
            return loss
        if self.value == "gradient":
            return loss + 0 * (logits - logits.detach()).abs().sqrt().sum()  # value 0, gradient 0 * inf
        return loss.detach() * self.value + 0 * loss if self.value == math.inf else loss * self.value


@pytest.mark.parametrize(("value", "named"), [(math.nan, "loss"), (math.inf, "loss"), ("gradient", "gradient")])
def test_update_that_is_not_finite_is_skipped_and_ends_the_run(value, named, monkeypatch):
    model, states, real = tiny_model(), [], engine._update
    trainer = make_trainer(model, "--log_freq 4", criterion=BadAt(2, value))
    monkeypatch.setattr(
        engine, "_update", lambda *given: states.append(copy.deepcopy(model.state_dict())) or real(*given)
    )
    with pytest.raises(UserError, match=rf"{named} was not finite .*step 3 of epoch 0, at lr 0\.1"):
        train(trainer, batches_of(4))
    assert not torch.equal(states[1]["1.weight"], states[2]["1.weight"])
    assert_equal_weights(states[2], states[3])  # step 2 was the bad one
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_float16_skips_an_overflow_and_goes_on():
    model, scales = tiny_model(), []
    trainer = make_trainer(model, "--log_freq 1", dtype=torch.float16, criterion=BadAt(1, "gradient"))
    train(trainer, batches_of(4), report=lambda *_: scales.append(trainer.precision.scaler.get_scale()))
    assert scales == [65536.0, 32768.0, 32768.0, 32768.0]
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_float16_skips_in_a_row_are_counted_over_epochs(monkeypatch):
    monkeypatch.setattr(meters, "SKIPS_IN_A_ROW", 5)
    trainer = make_trainer(tiny_model(), "--log_freq 8", dtype=torch.float16, criterion=BadAt(None, "gradient"))
    train(trainer, batches_of(4))
    with pytest.raises(UserError, match="float16 gradients overflowed 8 times in a row .*try --amp_dtype bfloat16"):
        train(trainer, batches_of(4))


def test_reports_cover_the_window_and_the_result_the_epoch():
    seen, model, batches = [], tiny_model(), batches_of(5)
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(images), targets).item() for images, targets in batches]
        right = sum((model(images).argmax(1) == targets).sum().item() for images, targets in batches)
    trainer = make_trainer(model, "--log_freq 2 --lr 0", 5)
    means = train(trainer, batches, report=lambda step, _lr, means, _rate: seen.append((step, means["loss"])))
    assert [step for step, _ in seen] == [1, 3, 4]
    assert [loss for _, loss in seen] == pytest.approx([np.mean(losses[:2]), np.mean(losses[2:4]), losses[4]])
    assert means["loss"] == pytest.approx(np.mean(losses)) and means["class_acc"] == right / 20
    assert (means["lr"], means["min_lr"], means["weight_decay"]) == (0.0, 0.0, 0.0)


def test_evaluation_counts_each_image_once_whatever_the_batches():
    model, (images, targets) = tiny_model(), map(torch.cat, zip(*batches_of(5), strict=True))
    with torch.no_grad():
        logits = model(images)
    right = (logits.argmax(1) == targets).float().mean().item()
    expected = {"loss": nn.functional.cross_entropy(logits, targets).item(), "acc1": 100 * right, "acc5": 100.0}
    plain = EngineSettings.from_options(training_options([]))
    for size in (20, 7, 1):
        batches = list(zip(images.split(size), targets.split(size), strict=True))
        result = evaluate(model, batches, Precision(CPU, None), plain)
        assert result == pytest.approx(expected, rel=1e-6)


def test_top_counts_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [9.0, 0.0, 1.0, 2.0]])
    counts = count_in_top(logits, torch.tensor([1, 0, 0]), (1, 2, 9))
    assert [count.item() for count in counts] == [1, 2, 3]


def test_precision_is_chosen_by_device_and_name(monkeypatch, caplog):
    assert Precision.choose(CPU, False).dtype is None
    assert Precision.choose(CPU, True, "float16").dtype == torch.float16
    for units, dtype in (("avx512_bf16", torch.bfloat16), ("avx2", None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: {units: True})
        assert Precision.choose(CPU, True).dtype == dtype
    assert "no bfloat16 units" in caplog.text
    assert Precision.choose(CPU, True, "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "fused"), [(None, True), (torch.bfloat16, False)])
def test_attention_in_bfloat16_on_a_cpu_is_by_plain_products(dtype, fused):
    model = models.build_model("vit_tiny", num_classes=2, input_size=32, model_kwargs={"patch_size": 8, "depth": 2})
    images = torch.rand(2, 3, 32, 32)
    before = model.eval()(images)
    placed = Precision(CPU, dtype).place(model)
    assert [block.attn.fused_attn for block in placed.blocks] == [fused, fused]
    torch.testing.assert_close(placed(images), before)


def test_log_keeps_each_epoch_once_and_drops_what_a_crash_left(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text('\ufeff{"epoch": 0, "a": 1}\n{"epoch": 1, "a": 2}\n{"epoch": 2, "a"', encoding="utf-8")
    with opened(tmp_path) as folder:
        EpochLog(folder, 1).append({"epoch": 1, "a": math.nan})
    assert path.read_text() == '{"epoch": 0, "a": 1}\n{"epoch": 1, "a": null}\n'


def test_summary_shows_what_there_is():
    measured = {"test_loss": 1.0, "test_acc1": 50.0, "test_acc5": 75.0}
    assert summary(measured, {}) == "test loss 1.0000, acc1 50.00 %, acc5 75.00 %"
    assert summary({"train_loss": 2.0}, {"test_acc1": 3.0}) == "train loss 2.0000, best acc1 3.00 %"
