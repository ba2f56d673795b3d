import contextlib
import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import settings
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import datasets
import engine
import models
from engine import Precision, Progress, Trainer, evaluate, train_one_epoch
from images import batches as feed
from images.order import TrainBatches
from images.transforms import build_mixer
from optim_factory import create_optimizer
from training.log import EpochLog, summary
from training.meters import DeviceSums, count_in_top
from utils import UserError

CPU = torch.device("cpu")


def tiny_model(seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), *kwargs.values(), nn.Linear(8, 3))


def batches_of(count, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 2, 2, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def optimizer_of(model, opt="adamw", lr=0.1):
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0, "lr_scale": 1.0}]
    return create_optimizer(groups, opt, lr=lr, momentum=0.0, eps=1e-8)


def make_trainer(model, steps=4, *, dtype=None, opt="adamw", lr=0.1, device=CPU, **settings):
    settings = {
        "criterion": nn.CrossEntropyLoss(),
        "lr": np.full(steps, lr),
        "weight_decay": np.zeros(steps),
        **settings,
    }
    return Trainer(model, optimizer=optimizer_of(model, opt, lr), precision=Precision(device, dtype), **settings)


def train(trainer, batches, steps=None, report=lambda *_: None):
    return train_one_epoch(
        trainer, batches, Progress(), steps=steps or len(batches) // trainer.update_freq, report=report
    )


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for the device, and the copies to the host, which do not dispatch."""

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


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_host_waits_only_at_log_steps(mixed, dtype, monkeypatch):
    reads, real = [], DeviceSums.read
    monkeypatch.setattr(DeviceSums, "read", lambda self, **kwargs: reads.append(1) or real(self, **kwargs))
    model = tiny_model()
    mixing = (
        {"mixer": build_mixer(settings()[1], num_classes=3), "criterion": SoftTargetCrossEntropy()} if mixed else {}
    )
    training = {"update_freq": 2, "clip_grad": 1.0, "ema": ModelEmaV3(model, decay=0.9), "log_freq": 4}
    trainer = make_trainer(model, 8, dtype=dtype, **training, **mixing)
    with HostReads(monkeypatch) as host:
        train(trainer, batches_of(16))
    # two reads, one every 4 of the 8 updates; float16 asks there too how many updates in a row it skipped
    per_read = ["tolist", "aten._local_scalar_dense.default"] if dtype == torch.float16 else ["tolist"]
    assert len(reads) == 2 and host.seen == per_read * 2


@pytest.mark.parametrize("cache", ["ram", "device"])
@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_host_waits_only_at_log_steps_of_the_whole_loop(name, cache, image_folder, monkeypatch):
    """The recipe augmented on the device, mixed, accumulated, averaged: two epochs of five updates, a reading each."""
    device, reads, real = torch.device(name), [], DeviceSums.read
    images = datasets.load_images("image_folder", str(image_folder), True)
    order = TrainBatches(40, batch_size=4, update_freq=2, world_size=1, rank=0, seed=0)
    recipe = settings("--augment", "device", "--cache", cache, "--input_size", "40", device=name)
    batches = feed.train_batches(images, order, *recipe)
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
    model = models.build_model("vit_tiny", num_classes=3, input_size=40, model_kwargs=shape).to(device)
    mixing = {"mixer": build_mixer(settings()[1], num_classes=3), "criterion": SoftTargetCrossEntropy()}
    training = {"update_freq": 2, "clip_grad": 1.0, "ema": ModelEmaV3(model, decay=0.9), "log_freq": 9}
    trainer = make_trainer(model, 10, dtype=torch.bfloat16, lr=1e-3, device=device, **training, **mixing)

    def read(self, **kwargs):
        if name == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        reads.append(1)
        return real(self, **kwargs)

    monkeypatch.setattr(DeviceSums, "read", read)
    train_one_epoch(trainer, batches, Progress(), steps=5, report=lambda *_: None)  # first use builds handles
    with HostReads(monkeypatch) as host:
        try:
            if name == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            train_one_epoch(trainer, batches, Progress(epoch=1), steps=5, report=lambda *_: None)
        finally:
            if name == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert len(reads) == 2 and host.seen == ["tolist"]


def test_accumulated_gradients_are_those_of_the_large_batch():
    small, large = tiny_model(), tiny_model()
    batches = batches_of(4)
    joined = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in (batches[:2], batches[2:])]
    train(make_trainer(small, opt="momentum", update_freq=2), batches)
    train(make_trainer(large, opt="momentum"), joined)
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # sums in another order, float32


def test_gradients_are_reduced_once_an_update(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        reduced = []

        def count(_state, bucket):
            reduced.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model = torch.nn.parallel.DistributedDataParallel(tiny_model())
        model.register_comm_hook(None, count)
        train(make_trainer(model, update_freq=3), batches_of(6))
    finally:
        dist.destroy_process_group()
    assert reduced == [0, 0]  # one bucket, two updates of three backward passes


def test_one_update_is_torchs_own():
    model, plain = tiny_model(), tiny_model()
    (images, targets), *_ = batches = batches_of(1)
    train(make_trainer(model), batches)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.0)
    nn.functional.cross_entropy(plain(images), targets).backward()
    optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # the fused kernel rounds once less


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_clipping_bounds_the_update_in_every_precision(dtype):
    model = tiny_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = make_trainer(model, 1, dtype=dtype, opt="momentum", lr=1.0, clip_grad=0.01)
    images, targets = batches_of(1)[0]
    means = train(trainer, [(images, targets)])
    moved = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(before, model.parameters(), strict=True)))
    assert means["grad_norm"] > 0.1  # logged as it was before
    assert moved == pytest.approx(0.01, rel=1e-3)  # the parameters round at 1e-7 of values near 0.3


def test_grad_norm_is_that_of_the_gradients():
    model, plain = tiny_model(), tiny_model()
    images, targets = batches_of(1)[0]
    means = train(make_trainer(model), [(images, targets)])
    nn.functional.cross_entropy(plain(images), targets).backward()
    expected = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in plain.parameters()))
    assert means["grad_norm"] == pytest.approx(expected, rel=1e-5)


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
def test_update_that_is_not_finite_is_skipped_and_ends_the_run(value, named):
    model = tiny_model()
    trainer = make_trainer(model, 4, log_freq=4)
    trainer.criterion = BadAt(2, value)
    states, real = [], engine._update

    def watched(trainer):
        states.append(copy.deepcopy(model.state_dict()))
        return real(trainer)

    engine._update = watched
    try:
        with pytest.raises(UserError, match=rf"{named} was not finite .*step 3 of epoch 0, at lr 0\.1"):
            train(trainer, batches_of(4))
    finally:
        engine._update = real
    assert not torch.equal(states[1]["1.weight"], states[2]["1.weight"])
    assert all(torch.equal(states[2][key], states[3][key]) for key in states[2])  # step 2 was the bad one
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_float16_skips_an_overflow_and_goes_on():
    model = tiny_model()
    trainer = make_trainer(model, 4, dtype=torch.float16, log_freq=1)
    trainer.criterion = BadAt(1, "gradient")
    scales = []
    train(trainer, batches_of(4), report=lambda *_: scales.append(trainer.precision.scaler.get_scale()))
    assert scales == [65536.0, 32768.0, 32768.0, 32768.0]
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_float16_skips_in_a_row_are_counted_over_epochs(monkeypatch):
    monkeypatch.setattr(engine, "SKIPS_IN_A_ROW", 5)
    trainer = make_trainer(tiny_model(), 8, dtype=torch.float16, log_freq=8)
    trainer.criterion = BadAt(None, "gradient")
    train(trainer, batches_of(4))
    with pytest.raises(UserError, match="overflowed 8 times in a row"):
        train(trainer, batches_of(4))


def test_float16_that_overflows_for_ever_ends_the_run(monkeypatch):
    monkeypatch.setattr(engine, "SKIPS_IN_A_ROW", 2)
    trainer = make_trainer(tiny_model(), 8, dtype=torch.float16, log_freq=8)
    trainer.criterion = BadAt(None, "gradient")
    with pytest.raises(UserError, match="float16 gradients overflowed 8 times in a row"):
        train(trainer, batches_of(8))


def test_model_draws_depend_on_the_step_alone():
    def losses(disturb):
        model, seen = tiny_model(dropout=nn.Dropout(0.5)), []
        trainer = make_trainer(model, log_freq=1)
        torch.manual_seed(disturb)
        train(trainer, batches_of(4), report=lambda _step, _lr, means, _rate: seen.append(means["loss"]))
        return seen

    assert losses(1) == losses(2)


def test_ema_follows_the_updates():
    model = tiny_model()
    start = model[1].weight.detach().clone()
    ema = ModelEmaV3(model, decay=0.75)
    train(make_trainer(model, 1, ema=ema), batches_of(1))
    torch.testing.assert_close(ema.module[1].weight, 0.75 * start + 0.25 * model[1].weight)


def test_reports_cover_the_window_and_the_result_the_epoch():
    seen = []
    model = tiny_model()
    trainer = make_trainer(model, 5, log_freq=2, lr=0.0)
    batches = batches_of(5)
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(images), targets).item() for images, targets in batches]
        right = sum((model(images).argmax(1) == targets).sum().item() for images, targets in batches)
    means = train(trainer, batches, report=lambda step, _lr, means, _rate: seen.append((step, means["loss"])))
    assert [step for step, _ in seen] == [1, 3, 4]
    assert [loss for _, loss in seen] == pytest.approx([np.mean(losses[:2]), np.mean(losses[2:4]), losses[4]])
    assert means["loss"] == pytest.approx(np.mean(losses))
    assert means["class_acc"] == right / 20
    assert (means["lr"], means["min_lr"], means["weight_decay"]) == (0.0, 0.0, 0.0)


def test_evaluation_counts_each_image_once_whatever_the_batches():
    model = tiny_model()
    images = torch.cat([batch[0] for batch in batches_of(5)])
    targets = torch.cat([batch[1] for batch in batches_of(5)])
    with torch.no_grad():
        logits = model(images)
    expected = {
        "loss": nn.functional.cross_entropy(logits, targets).item(),
        "acc1": 100 * (logits.argmax(1) == targets).float().mean().item(),
        "acc5": 100.0,
    }
    for size in (20, 7, 1):
        result = evaluate(model, list(zip(images.split(size), targets.split(size), strict=True)), Precision(CPU, None))
        assert result == pytest.approx(expected, rel=1e-6)


def test_top_counts_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [9.0, 0.0, 1.0, 2.0]])
    counts = count_in_top(logits, torch.tensor([1, 0, 0]), (1, 2, 9))
    assert [count.item() for count in counts] == [1, 2, 3]


def test_precision_is_chosen_by_device_and_name(monkeypatch, caplog):
    assert Precision.choose(CPU, False).dtype is None
    assert Precision.choose(CPU, True, "float16").dtype == torch.float16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert Precision.choose(CPU, True).dtype == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert Precision.choose(CPU, True).dtype is None
    assert "no bfloat16 units" in caplog.text
    assert Precision.choose(CPU, True, "bfloat16").dtype == torch.bfloat16


def test_log_keeps_each_epoch_once_and_drops_what_a_crash_left(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text('{"epoch": 0, "a": 1}\n\x00garbage\n{"epoch": 1, "a": 2}\n{"epoch": 2, "a"')
    log = EpochLog(path, 1)
    log.append({"epoch": 1, "a": math.nan})
    assert path.read_text() == '{"epoch": 0, "a": 1}\n{"epoch": 1, "a": null}\n'


def test_summary_shows_what_there_is():
    assert (
        summary({"test_loss": 1.0, "test_acc1": 50.0, "test_acc5": 75.0}, {})
        == "test loss 1.0000, acc1 50.00 %, acc5 75.00 %"
    )
    assert summary({"train_loss": 2.0}, {"test_acc1": 3.0}) == "train loss 2.0000, best acc1 3.00 %"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_host_waits_only_at_log_steps_on_cuda(dtype):
    device = torch.device("cuda")
    model = tiny_model().to(device)
    trainer = make_trainer(model, 9, dtype=dtype, device=device, log_freq=4, clip_grad=1.0)
    batches = [(images.pin_memory(), targets.pin_memory()) for images, targets in batches_of(9)]
    real = DeviceSums.read

    def read(self, **kwargs):
        torch.cuda.set_sync_debug_mode("default")
        return real(self, **kwargs)

    def report(*_):
        torch.cuda.set_sync_debug_mode("error")

    with contextlib.ExitStack() as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        stack.callback(setattr, DeviceSums, "read", real)
        DeviceSums.read = read
        train_one_epoch(trainer, batches[:1], Progress(), steps=1, report=report)  # first use builds handles
        train_one_epoch(trainer, batches[1:], Progress(done=1), steps=9, report=report)
