"""A resumed run gives the weights and the log of an uninterrupted one, or is refused with the reason."""

import contextlib
import logging
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, assert_equal_weights, read_log, weights_of, write_images

import engine
import main as script
from bench import survive
from training import checkpoint
from utils import UserError

EXTRAS = {
    "plain": "",
    "everything": "--model_ema true --model_ema_decay 0.9 --model_ema_eval true --update_freq 2 --batch_size 4 "
    "--clip_grad 1 --drop_path 0.2 --weight_decay_end 0.2 --use_amp true --amp_dtype bfloat16 --layer_decay 0.8",
    "workers": "--num_workers 2",
    "device": "--num_workers 1 --augment device --update_freq 2 --batch_size 4",
    "cached": "--augment device --cache device",
    "float16": "--use_amp true --amp_dtype float16",
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
OPTIMIZERS = {name: f"--opt {name}" for name in ("sgd", "lamb", "adafactor", "adafactorbv", "lookahead_adamw")}


@contextlib.contextmanager
def plug_pulled(update):
    """Make a run die in this update, counted from 0 over the whole run."""
    real, made = engine._update, iter(range(10**6))

    def dying(trainer, step):
        if next(made) == update:
            raise RuntimeError("the plug is pulled")
        return real(trainer, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="plug"):
        patch.setattr(engine, "_update", dying)
        yield


def state_in(folder, name="checkpoint-2.pth"):
    return torch.load(folder / name, weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted():
    """The folders of uninterrupted runs, by the name of their options."""
    return {}


@pytest.mark.parametrize(
    ("extra", "update"),  # of five in each of three epochs
    [*((extra, update) for extra in EXTRAS for update in (7, 9, 14)), *((name, 7) for name in OPTIMIZERS)],
)
def test_resumed_run_ends_like_the_uninterrupted_one(extra, update, train, tmp_path, uninterrupted):
    options = [(EXTRAS | OPTIMIZERS)[extra], "--epochs 3 --save_ckpt_steps 2 --log_freq 3"]
    if extra not in uninterrupted:
        uninterrupted[extra] = tmp_path / "whole"
        train(*options, to="whole")
    with plug_pulled(update):
        train(*options, to="cut")
    newest = {7: "checkpoint-1-7.pth", 9: "checkpoint-1-9.pth", 14: "checkpoint-2-14.pth"}[update]
    assert (tmp_path / "cut" / newest).exists()
    train(*options, *(["--num_workers 1"] if extra == "workers" else []), to="cut")
    whole, cut = (state_in(folder) for folder in (uninterrupted[extra], tmp_path / "cut"))
    assert whole.keys() == cut.keys() and ("model_ema" in whole) == (extra == "everything")
    other = {"options", "metrics"}  # the output folder and the epoch's seconds
    assert not [key for key in whole.keys() - other if not survive.same(whole[key], cut[key])]
    assert survive.log_of(uninterrupted[extra]) == survive.log_of(tmp_path / "cut")


def test_crash_between_log_and_checkpoint_leaves_each_epoch_once(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(checkpoint, "to_bytes", lambda *_: 1 / 0)
        train()
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [0]
    train()
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [0, 1]


def test_finished_run_is_left_alone_whatever_decides_nothing(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = train()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("[!.]*")}
    assert train() == train("--num_workers 1 --log_freq 3 --progress false") == first
    assert re.search(
        r"nothing is left to do: \S+-1\.pth is of .*; to train longer, .* --initialize \S+-1\.pth", caplog.text
    )
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("[!.]*")}


def test_command_with_resume_starts_a_folder_and_continues_in_it(train, tmp_path):
    train("--epochs 3", to="a")
    again = "--epochs 3 --resume", tmp_path / "a" / "checkpoint-0.pth"
    with plug_pulled(7):
        train(*again, to="b")
    assert (tmp_path / "b" / "checkpoint-1.pth").exists()
    train(*again, to="b")
    assert [line["epoch"] for line in read_log(tmp_path / "b")] == [1, 2]
    assert_equal_weights(*(weights_of(tmp_path / name, "checkpoint-2.pth") for name in "ab"))


@pytest.fixture
def accuracies(monkeypatch):
    """Return a list; evaluations report its values as accuracy, one by one."""
    real, values = script.evaluate, []
    monkeypatch.setattr(script, "evaluate", lambda *a, **k: {**real(*a, **k), "acc1": values.pop(0)})
    return values


def test_best_is_kept_across_a_resume(train, tmp_path, accuracies):
    accuracies += [70.0, 60.0, 65.0]
    with plug_pulled(11):
        train("--epochs 3")
    train("--epochs 3")
    best = state_in(tmp_path / "run", "checkpoint-best.pth")
    assert (best["epoch"], best["best"]["test_acc1"]) == (0, 70.0)
    assert state_in(tmp_path / "run")["best"]["test_acc1"] == 70.0


def test_best_checkpoint_comes_along_into_another_folder(train, tmp_path, accuracies):
    accuracies += [70.0, 60.0, 65.0, 50.0, 55.0]
    train("--epochs 3", to="a")
    for name, best in (("b", 70.0), ("c", 55.0)):
        train("--epochs 3 --resume", tmp_path / "a" / "checkpoint-1.pth", to=name)
        assert state_in(tmp_path / name, "checkpoint-best.pth")["metrics"]["test_acc1"] == best
        # without its file the best figure starts anew
        (tmp_path / "a" / "checkpoint-best.pth").unlink(missing_ok=True)


def test_other_settings_are_named_and_nothing_changes(train, tmp_path):
    amp = "--use_amp true --amp_dtype"
    train(amp, "bfloat16")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for more, message in (
        ("bfloat16 --lr 0.5 --mixup 0", r"other settings: --mixup was 0\.8, is 0\.0, --lr was 0\.001, is 0\.5"),
        ("bfloat16 --initialize vit.pth", r"--initialize was , is vit\.pth"),
        ("bfloat16 --update_freq 2", "processes x --update_freq was 1 x 1, is 1 x 2"),
        (
            "bfloat16 --epochs 3",
            r"--epochs was 2, is 3; use those, or another --output_dir; to train longer, start another run from its "
            r"weights: --initialize .*/run/checkpoint-1\.pth and another --output_dir",
        ),
        ("float16", r"the precision was bfloat16, is float16 \(--device, --use_amp, --amp_dtype\)"),
    ):
        with pytest.raises(UserError, match=message):
            train(amp, more)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_log_without_its_checkpoints_is_not_overwritten(train, tmp_path):
    train("--save_ckpt false", to="never")
    train(to="deleted")
    for path in (tmp_path / "deleted").glob("checkpoint-?.pth"):
        path.unlink()
    before = [(tmp_path / name / "log.txt").read_bytes() for name in ("never", "deleted")]
    for more, name in (("--save_ckpt false", "never"), ("--lr 0.5", "never"), ("", "deleted")):
        with pytest.raises(UserError, match=rf"{name} has the log\.txt of another run: name another folder"):
            train(more, to=name)
    assert [(tmp_path / name / "log.txt").read_bytes() for name in ("never", "deleted")] == before


@pytest.fixture
def copied(image_folder, tmp_path):
    """A copy of the images, elsewhere."""
    return shutil.copytree(image_folder, tmp_path / "copied")


OTHER_DATA = {
    "an image less": ("rm train/light/000.jpg", r"training images \(40, here 39\)"),
    "another name": ("mv train/light/000.jpg train/light/zzz.jpg", r"list of training images \(\w{16}, here \w{16}\)"),
    "another label": ("mv train/light/000.jpg train/grey/999.jpg", r"list of training images \("),
    "an image less to evaluate": ("rm val/light/000.jpg", r"evaluation images \(11, here 10\)"),
    "other names to evaluate": ("mv val/light/000.jpg val/light/zzz.jpg", r"list of evaluation images \("),
    "other classes": (
        "mv train/dark train/a ; mv val/dark val/a",
        r"classes \(\['dark', .*, here \['a', 'grey', 'light'\]\)",
    ),
}


@pytest.fixture(scope="module")
def finished(image_folder, tmp_path_factory):
    """The folder of a run, and its options but those of the data."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = "--input_size 32 --epochs 1 --warmup_epochs 0 --batch_size 8 --num_workers 0 --device cpu --output_dir"
    argv = [*TINY_MODEL, "--data_set", "image_folder", *recipe.split(), str(folder)]
    script.main([*argv, "--data_path", str(image_folder)])
    return argv


@pytest.mark.parametrize("change", OTHER_DATA)
def test_resuming_on_other_data_names_the_difference(change, finished, copied):
    commands, message = OTHER_DATA[change]
    script.main([*finished, "--data_path", str(copied)])  # the same images at another place
    subprocess.run(commands, shell=True, check=True, cwd=copied)
    with pytest.raises(UserError, match=f"checkpoint-0.pth belongs to a run on other data: {message}"):
        script.main([*finished, "--data_path", str(copied)])


def test_evaluation_may_be_of_other_images_of_the_same_classes(finished, copied):
    shutil.rmtree(copied / "train")
    (copied / "val" / "light" / "000.jpg").unlink()
    assert "test_acc1" in script.main([*finished, "--eval", "true", "--data_path", str(copied)])
    write_images(copied / "other", "val", {"a": 4, "b": 4, "c": 3})
    with pytest.raises(UserError, match=r"classes \(\['dark', .*, here \['a', 'b', 'c'\]"):
        script.main([*finished, "--eval", "true", "--data_path", str(copied / "other")])


def test_older_checkpoint_compares_what_it_has(finished, copied, tmp_path, caplog):
    state = state_in(Path(finished[-1]), "checkpoint-0.pth")
    del state["threads"]
    state["data"] = {name: state["data"][name] for name in ("classes", "training images")}
    torch.save(state, tmp_path / "checkpoint-0.pth")
    (copied / "train" / "light" / "000.jpg").rename(copied / "train" / "light" / "zzz.jpg")
    argv = [*finished[:-1], str(tmp_path), "--data_path", str(copied)]
    assert script.main(argv) == state["metrics"]
    assert "threads" not in caplog.text
    (copied / "train" / "light" / "zzz.jpg").unlink()
    with pytest.raises(UserError, match=r"training images \(40, here 39\)"):
        script.main(argv)


def test_resuming_with_other_threads_is_said(train, tmp_path, caplog):
    train("--epochs 1")
    state = state_in(tmp_path / "run", "checkpoint-0.pth")
    assert state["threads"] == torch.get_num_threads()
    train("--epochs 1")
    assert "OMP_NUM_THREADS" not in caplog.text
    torch.save(state | {"threads": 3}, tmp_path / "run" / "checkpoint-0.pth")
    train("--epochs 1")
    said = "1 threads per process instead of 3 (OMP_NUM_THREADS): the weights will differ in their last bits"
    assert said in caplog.text


def test_optimizer_state_of_other_shapes_is_refused(train, tmp_path):
    train()
    (tmp_path / "run" / "checkpoint-1.pth").unlink()
    state = state_in(tmp_path / "run", "checkpoint-0.pth")
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)
    torch.save(state, tmp_path / "run" / "checkpoint-0.pth")
    with pytest.raises(UserError, match=r"checkpoint-0\.pth: the optimizer's state does not fit"):
        train()


@pytest.mark.parametrize(("update_freq", "processes", "kept"), [(1, 2, False), (2, 2, True), (2, 4, False)])
def test_other_number_of_processes_keeps_the_total_batch(update_freq, processes, kept, train, monkeypatch, caplog):
    options = f"--epochs 1 --batch_size {8 // update_freq} --update_freq {update_freq}"
    train(options)
    monkeypatch.setattr(script.distributed, "world_size", lambda: processes)
    refused = rf"processes x --update_freq was 1 x {update_freq}, is {processes} x"
    with contextlib.nullcontext() if kept else pytest.raises(UserError, match=refused):
        assert train(options)["epoch"] == 0
    said = "the run continues on 2 processes instead of 1: --update_freq 1 instead of 2 keeps the 8 images"
    assert (said in caplog.text) == kept  # True if some --update_freq keeps the total batch


def test_one_process_goes_on_with_the_images_of_two(train, tmp_path):
    """Resume one process with accumulation from a state that two processes left inside an epoch."""
    options = "--epochs 1 --batch_size 4 --save_ckpt_steps 2 --save_ckpt_num 9 --update_freq"
    train(options, "2", to="whole")
    state = state_in(tmp_path / "whole", "checkpoint-0-2.pth")
    (tmp_path / "other").mkdir()
    state |= {"processes": 2, "update_freq": 1, "options": state["options"] | {"update_freq": 1}}
    torch.save(state, tmp_path / "other" / "checkpoint-0-2.pth")
    train(options, "1", to="other")
    assert_equal_weights(*(weights_of(tmp_path / name, "checkpoint-0.pth") for name in ("whole", "other")))
    assert survive.log_of(tmp_path / "whole") == survive.log_of(tmp_path / "other")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("amp", ["", "--use_amp true", "--use_amp true --amp_dtype bfloat16 --compile"])
def test_deterministic_run_on_cuda_is_resumed_bit_for_bit(amp, train, tmp_path):
    options = "--device cuda --deterministic --augment device --cache device --drop_path 0.2 --model_ema true"
    options = f"{options} --save_ckpt_steps 2 {amp}"
    train(options, to="whole")
    with plug_pulled(8):
        train(options)
    train(options)
    assert_equal_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "run"))


@pytest.mark.gpu
@needs_gpu
def test_replayed_graphs_train_as_calls_do(train):
    graphs = train("--device cuda --epochs 3 --compile --compile_mode reduce-overhead", to="graphs")
    calls = train("--device cuda --epochs 3", to="calls")
    assert graphs["train_loss"] == pytest.approx(calls["train_loss"], rel=0.02)
