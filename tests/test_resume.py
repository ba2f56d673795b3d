"""Going on from a checkpoint: the same weights and the same log as without a stop, or a refusal that names why."""

import pytest
import torch
from conftest import assert_equal_weights, read_log, weights_of, write_images

import engine
import main as script
from training import checkpoint
from utils import UserError

EXTRAS = {
    "plain": [],
    "everything": [
        "--model_ema true --model_ema_decay 0.9 --model_ema_eval true --update_freq 2 --clip_grad 1 --drop_path 0.2",
        "--weight_decay_end 0.2 --use_amp true --amp_dtype bfloat16 --layer_decay 0.8 --batch_size 4",
    ],
    "workers": ["--num_workers 2"],
    "device": ["--num_workers 1 --augment device --update_freq 2 --batch_size 4"],
    "cached": ["--augment device --cache device"],
    "float16": ["--use_amp true --amp_dtype float16"],
}


def pull_the_plug(monkeypatch, update):
    """Let a run die in this update, counted over the run from 0."""
    real, made = engine._update, iter(range(10**6))

    def dying(trainer):
        if next(made) == update:
            raise RuntimeError("the plug is pulled")
        return real(trainer)

    monkeypatch.setattr(engine, "_update", dying)


def timeless(folder):
    """The lines of a log without what differs from one time to another."""
    return [{key: value for key, value in line.items() if "second" not in key} for line in read_log(folder)]


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("update", [7, 9, 14])  # of five in each of three epochs
def test_resumed_run_ends_like_the_uninterrupted_one(extra, update, tiny_run, tmp_path, monkeypatch, uninterrupted):
    options = [*EXTRAS[extra], "--epochs", "3", "--save_ckpt_steps", "2", "--log_freq", "3"]
    if extra not in uninterrupted:
        uninterrupted[extra] = tmp_path / "whole"
        script.main(tiny_run(*options, output_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="plug"):
        pull_the_plug(patch, update)
        script.main(tiny_run(*options, output_dir=tmp_path / "cut"))
    newest = {7: "checkpoint-1-7.pth", 9: "checkpoint-1-9.pth", 14: "checkpoint-2-14.pth"}[update]
    assert (tmp_path / "cut" / newest).exists()
    other_workers = ["--num_workers", "1"] if extra == "workers" else []
    script.main(tiny_run(*options, *other_workers, output_dir=tmp_path / "cut"))
    folders = uninterrupted[extra], tmp_path / "cut"
    whole, cut = (torch.load(folder / "checkpoint-2.pth", weights_only=True) for folder in folders)
    for part in ("model", "model_ema") if extra == "everything" else ("model",):
        assert_equal_weights(whole[part], cut[part])
    moments = [state["optimizer"]["state"][0]["exp_avg_sq"] for state in (whole, cut)]
    assert torch.equal(*moments) and whole["scaler"] == cut["scaler"] and whole["best"] == cut["best"]
    assert whole["skips_in_a_row"] == cut["skips_in_a_row"]
    assert timeless(folders[0]) == timeless(folders[1])


@pytest.fixture(scope="module")
def uninterrupted():
    """Folders of runs without a stop, by the name of their options."""
    return {}


def test_best_is_kept_across_a_resume(tiny_run, tmp_path, monkeypatch):
    accuracies = iter([70.0, 60.0, 65.0])
    real = script.evaluate
    monkeypatch.setattr(script, "evaluate", lambda *a, **k: {**real(*a, **k), "acc1": next(accuracies)})
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="plug"):
        pull_the_plug(patch, 11)
        script.main(tiny_run("--epochs", "3"))
    script.main(tiny_run("--epochs", "3"))
    best = torch.load(tmp_path / "run" / "checkpoint-best.pth", weights_only=True)
    assert (best["epoch"], best["best"]["test_acc1"]) == (0, 70.0)
    assert torch.load(tmp_path / "run" / "checkpoint-2.pth", weights_only=True)["best"]["test_acc1"] == 70.0


def test_crash_between_log_and_checkpoint_leaves_each_epoch_once(tiny_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="plug"):
        patch.setattr(
            checkpoint, "save_checkpoint", lambda *_: (_ for _ in ()).throw(RuntimeError("the plug is pulled"))
        )
        script.main(tiny_run())
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [0]
    script.main(tiny_run())
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [0, 1]


def test_finished_run_is_left_alone(tiny_run, tmp_path, caplog):
    first = script.main(tiny_run())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("[!.]*")}
    assert script.main(tiny_run()) == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("[!.]*")}


def test_resume_names_a_file_and_starts_a_new_folder(tiny_run, tmp_path):
    script.main(tiny_run(output_dir=tmp_path / "a"))
    script.main(tiny_run("--resume", tmp_path / "a" / "checkpoint-0.pth", output_dir=tmp_path / "b"))
    assert [line["epoch"] for line in read_log(tmp_path / "b")] == [1]
    assert_equal_weights(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))


def test_command_with_resume_continues_its_own_run(tiny_run, tmp_path, monkeypatch):
    script.main(tiny_run("--epochs", "3", output_dir=tmp_path / "a"))
    again = tiny_run("--epochs", "3", "--resume", tmp_path / "a" / "checkpoint-0.pth", output_dir=tmp_path / "b")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="plug"):
        pull_the_plug(patch, 7)
        script.main(again)
    assert (tmp_path / "b" / "checkpoint-1.pth").exists()
    script.main(again)
    assert_equal_weights(*(weights_of(tmp_path / name, "checkpoint-2.pth") for name in "ab"))


def test_other_settings_are_named_and_nothing_changes(tiny_run, tmp_path):
    script.main(tiny_run("--epochs", "2"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match=r"other settings: --mixup was 0\.8, is 0\.0, --lr was 0\.001, is 0\.5"):
        script.main(tiny_run("--lr", "0.5", "--mixup", "0"))
    with pytest.raises(UserError, match=r"--initialize was , is vit\.pth"):
        script.main(tiny_run("--initialize", "vit.pth"))
    with pytest.raises(UserError, match=r"processes x --update_freq was 1 x 1, is 1 x 2"):
        script.main(tiny_run("--update_freq", "2"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_run_of_another_precision_is_not_resumed(tiny_run):
    amp = ["--use_amp", "true", "--epochs", "1"]
    script.main(tiny_run(*amp, "--amp_dtype", "bfloat16"))
    with pytest.raises(UserError, match=r"the precision was bfloat16, is float16 \(--device, --use_amp, --amp_dtype\)"):
        script.main(tiny_run(*amp, "--amp_dtype", "float16"))


def test_log_of_a_run_without_checkpoints_is_not_overwritten(tiny_run, tmp_path):
    script.main(tiny_run("--save_ckpt", "false"))
    before = (tmp_path / "run" / "log.txt").read_bytes()
    for more in (["--save_ckpt", "false"], ["--lr", "0.5"]):
        with pytest.raises(UserError, match=r"run has the log\.txt of another run: name another folder"):
            script.main(tiny_run(*more))
    assert (tmp_path / "run" / "log.txt").read_bytes() == before


def test_log_without_its_checkpoints_is_not_overwritten(tiny_run, tmp_path):
    script.main(tiny_run())
    before = (tmp_path / "run" / "log.txt").read_bytes()
    for path in (tmp_path / "run").glob("checkpoint-?.pth"):
        path.unlink()
    with pytest.raises(UserError, match=r"run has the log\.txt of another run: name another folder"):
        script.main(tiny_run())
    assert (tmp_path / "run" / "log.txt").read_bytes() == before


@pytest.mark.parametrize("name", ["sgd", "lamb", "adafactor", "adafactorbv", "lookahead_adamw"])
def test_run_of_another_optimizer_is_resumed(name, tiny_run, tmp_path, monkeypatch):
    options = ["--opt", name, "--save_ckpt_steps", "2", "--log_freq", "2"]
    script.main(tiny_run(*options, output_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="plug"):
        pull_the_plug(patch, 7)
        script.main(tiny_run(*options))
    script.main(tiny_run(*options))
    assert_equal_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "run"))


def test_best_checkpoint_comes_along_into_another_folder(tiny_run, tmp_path, monkeypatch):
    real, accuracies = script.evaluate, iter([70.0, 60.0, 65.0, 50.0, 55.0])
    monkeypatch.setattr(script, "evaluate", lambda *a, **k: {**real(*a, **k), "acc1": next(accuracies)})
    script.main(tiny_run("--epochs", "3", output_dir=tmp_path / "a"))
    script.main(tiny_run("--epochs", "3", "--resume", tmp_path / "a" / "checkpoint-1.pth", output_dir=tmp_path / "b"))
    assert torch.load(tmp_path / "b" / "checkpoint-best.pth", weights_only=True)["metrics"]["test_acc1"] == 70.0
    (tmp_path / "a" / "checkpoint-best.pth").unlink()  # without it the best is counted anew, with a file to show
    script.main(tiny_run("--epochs", "3", "--resume", tmp_path / "a" / "checkpoint-1.pth", output_dir=tmp_path / "c"))
    assert torch.load(tmp_path / "c" / "checkpoint-best.pth", weights_only=True)["metrics"]["test_acc1"] == 55.0


def test_resuming_on_other_data_names_the_difference(tiny_run, tmp_path, image_folder):
    script.main(tiny_run("--epochs", "2"))
    write_images(tmp_path / "d", "train", {"dark": 14, "grey": 13, "light": 12})
    write_images(tmp_path / "d", "val", {"dark": 4, "grey": 4, "light": 3})
    with pytest.raises(UserError, match="other data: its training images were 40, not 39"):
        script.main(tiny_run("--data_path", tmp_path / "d"))
    write_images(tmp_path / "e", "val", {"a": 4, "b": 4, "c": 3})
    with pytest.raises(UserError, match="its classes were .*dark.*, not .*'a', 'b', 'c'"):
        script.main(tiny_run("--data_path", tmp_path / "e", "--eval", "true"))


def test_optimizer_state_of_other_shapes_is_refused(tiny_run, tmp_path):
    script.main(tiny_run("--epochs", "2"))
    (tmp_path / "run" / "checkpoint-1.pth").unlink()
    state = torch.load(tmp_path / "run" / "checkpoint-0.pth", weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)
    torch.save(state, tmp_path / "run" / "checkpoint-0.pth")
    with pytest.raises(UserError, match=r"checkpoint-0\.pth: the optimizer's state does not fit"):
        script.main(tiny_run("--epochs", "2"))


def test_evaluation_makes_no_folder(tiny_run, tmp_path):
    script.main(tiny_run("--eval", "true", output_dir=tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()


def test_settings_that_decide_nothing_may_change(tiny_run):
    script.main(tiny_run("--epochs", "1"))
    script.main(tiny_run("--epochs", "1", "--num_workers", "1", "--log_freq", "3", "--progress", "false"))


# ---- another number of processes ----


@pytest.mark.parametrize(
    ("batch_size", "update_freq", "processes", "kept"),
    [("8", "1", 2, None), ("4", "2", 2, 1), ("4", "2", 4, None)],  # None: no number keeps the total batch
)
def test_other_number_of_processes_keeps_the_total_batch(
    batch_size, update_freq, processes, kept, tiny_run, monkeypatch, caplog
):
    options = tiny_run("--epochs", "1", "--batch_size", batch_size, "--update_freq", update_freq)
    script.main(options)
    monkeypatch.setattr(script.distributed, "world_size", lambda: processes)
    if kept is None:
        with pytest.raises(UserError, match=rf"processes x --update_freq was 1 x {update_freq}, is {processes} x"):
            script.main(options)
    else:
        assert script.main(options)["epoch"] == 0
        assert (
            f"the run continues on 2 processes instead of 1: --update_freq {kept} instead of 2 keeps the 8 images"
            in caplog.text
        )


def test_one_process_goes_on_with_the_images_of_two(tiny_run, tmp_path):
    """The state within an epoch that two processes would have left makes the updates of one with accumulation."""
    options = "--epochs 1 --batch_size 4 --update_freq 2 --save_ckpt_steps 2 --save_ckpt_num 9".split()
    script.main(tiny_run(*options, output_dir=tmp_path / "whole"))
    state = torch.load(tmp_path / "whole" / "checkpoint-0-2.pth", weights_only=True)
    (tmp_path / "other").mkdir()
    state |= {"processes": 2, "update_freq": 1, "options": state["options"] | {"update_freq": 1}}
    torch.save(state, tmp_path / "other" / "checkpoint-0-2.pth")
    options[5] = "1"
    script.main(tiny_run(*options, output_dir=tmp_path / "other"))
    assert_equal_weights(
        weights_of(tmp_path / "whole", "checkpoint-0.pth"), weights_of(tmp_path / "other", "checkpoint-0.pth")
    )
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "other")


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "amp", [[], ["--use_amp", "true"], ["--use_amp", "true", "--amp_dtype", "bfloat16", "--compile"]]
)
def test_deterministic_run_on_cuda_is_resumed_bit_for_bit(amp, tiny_run, tmp_path, monkeypatch):
    options = ["--device cuda --deterministic --augment device --cache device --drop_path 0.2", *amp]
    options += ["--model_ema true --save_ckpt_steps 2"]
    script.main(tiny_run(*options, output_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="plug"):
        pull_the_plug(patch, 8)
        script.main(tiny_run(*options))
    script.main(tiny_run(*options))
    assert_equal_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "run"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_graphs_train_as_calls_do(tiny_run, tmp_path):
    more = ["--device", "cuda", "--epochs", "3"]
    graphs = script.main(
        tiny_run(*more, "--compile", "--compile_mode", "reduce-overhead", output_dir=tmp_path / "graphs")
    )
    calls = script.main(tiny_run(*more, output_dir=tmp_path / "calls"))
    assert graphs["train_loss"] == pytest.approx(calls["train_loss"], rel=0.02)
