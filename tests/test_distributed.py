"""Runs of two processes, started as users start them."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, assert_equal_weights, error_of, in_two_processes, read_log, start, write_images

import datasets
import main as script
from training import distributed
from utils import Stopped, UserError

ROOT = Path(__file__).parents[1]


def final(folder):
    return torch.load(Path(folder) / "checkpoint-2.pth", weights_only=True)


@pytest.fixture(scope="module")
def recipe(image_folder):
    """The options of a three-epoch run, without those of the model."""
    words = "--data_set image_folder --input_size 32 --device cpu --drop_path 0.1 --epochs 3 --warmup_epochs 1"
    return f"{words} --batch_size 4 --num_workers 1 --lr 1e-3 --data_path {image_folder}".split()


@pytest.fixture(scope="module")
def two_process_run(recipe, tmp_path_factory):
    """The folder and the options of that run of two processes, and what it printed."""
    folder, argv = tmp_path_factory.mktemp("two") / "run", [*recipe, *TINY_MODEL]
    codes, said = in_two_processes([*argv, "--output_dir", folder], folder.parent / "said.txt")
    assert codes == [0, 0], said
    return folder, argv, said


@pytest.fixture
def in_two(recipe, tmp_path):
    """Return a function that makes that run with more options, in this folder of `tmp_path`, and returns its output."""

    def run(more="", to="run", model=TINY_MODEL, codes=(0, 0)):
        argv = [*recipe, *model, *more.split(), "--output_dir", tmp_path / to]
        ended, said = in_two_processes(argv, tmp_path / "said.txt")
        assert ended == [*codes], said
        return said

    return run


def test_resumed_run_of_two_processes_equals_the_whole_one(two_process_run, tmp_path):
    """Started by torch.distributed.launch, as the paper's README does."""
    folder, argv, _ = two_process_run
    (tmp_path / "checkpoint-0.pth").write_bytes((folder / "checkpoint-0.pth").read_bytes())
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        launcher = f"-m torch.distributed.launch --master_port={probe.getsockname()[1]} --nproc_per_node=2".split()
    run = start([*argv, "--output_dir", tmp_path], *launcher)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert_equal_weights(final(folder)["model"], final(tmp_path)["model"])
    assert final(folder)["best"] == final(tmp_path)["best"]


@pytest.mark.parametrize(
    "more",
    ["", "--augment device --cache ram --reprob 0"],  # the noise of erasing is drawn by chunk
)
def test_one_process_with_accumulation_makes_the_same_updates(more, two_process_run, in_two, tmp_path):
    folder, argv, _ = two_process_run
    if more:
        folder = tmp_path / "run"
        assert in_two(more).count("40 images decoded") == 1
    script.main([*argv, *more.split(), "--update_freq", "2", "--output_dir", str(tmp_path / "one")])
    two, one = final(folder), final(tmp_path / "one")
    for key in two["model"]:
        # the same images, mixed and dropped alike; gradients are summed in another order, and AdamW divides by their size
        torch.testing.assert_close(two["model"][key], one["model"][key], rtol=0, atol=2e-4)
    logs = read_log(folder), read_log(tmp_path / "one")
    for name, epoch, rel in (("train_loss", 0, 1e-4), ("test_loss", 2, 1e-3)):
        assert logs[0][epoch][name] == pytest.approx(logs[1][epoch][name], rel=rel)


def test_compiled_run_of_two_processes_is_equal_and_resumes(in_two, tmp_path, monkeypatch):
    """Train in bfloat16 with accumulation and EMA, traced as for DDP. The trace is not compiled to C++ here."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, mode: real(model, backend="aot_eager"))
    more = "--batch_size 2 --update_freq 2 --model_ema true --model_ema_decay 0.9 --drop_path 0 --use_amp true"
    more += " --amp_dtype bfloat16 --save_ckpt_num 9"
    in_two(more, to="plain")
    in_two(more + " --compile", to="whole")
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "checkpoint-1.pth").write_bytes((tmp_path / "whole" / "checkpoint-1.pth").read_bytes())
    in_two(more + " --compile", to="resumed")
    plain, whole, resumed = (final(tmp_path / name) for name in ("plain", "whole", "resumed"))
    for part in ("model", "model_ema"):
        assert_equal_weights(whole[part], resumed[part])
        for key, value in whole[part].items():
            # bfloat16 has 8 bits, and AdamW divides by the size of a gradient
            torch.testing.assert_close(value, plain[part][key], rtol=0, atol=5e-3)


def test_two_processes_write_once_and_evaluate_exactly(two_process_run):
    folder, argv, said = two_process_run
    assert [line["epoch"] for line in read_log(folder)] == [0, 1, 2] and said.count("epoch 2: train loss") == 1
    assert [path.name for path in folder.glob(".*")] == [".lock"]
    logged = read_log(folder)[-1]
    measured = script.main(
        [*argv, "--eval", "true", "--resume", str(folder / "checkpoint-2.pth")]
    )  # 11 images, not 6 + 5
    assert (measured["test_acc1"], measured["test_acc5"]) == (logged["test_acc1"], logged["test_acc5"])
    assert measured["test_loss"] == pytest.approx(logged["test_loss"], rel=1e-6)


def test_processes_measure_one_model_where_it_keeps_statistics(recipe, in_two, tmp_path):
    more = "--model resnet18 --model_kwargs layers=[1,1,1,1] --drop_path 0 --epochs 1 --model_ema true"
    more += " --model_ema_decay 0.5 --model_ema_eval true"
    in_two(more, model=[])
    measured = script.main([*recipe, *more.split(), "--eval", "true", "--output_dir", str(tmp_path / "run")])
    logged = read_log(tmp_path / "run")[0]
    for name in ("test_loss", "test_loss_ema"):
        # both runs normalize batches of 6 and 5, so the sums have the same order
        assert measured[name] == pytest.approx(logged[name], rel=1e-5)


def test_failure_of_one_rank_ends_all_with_its_reason(in_two, tmp_path):
    write_images(tmp_path / "d", "train", {"cat": 8, "dog": 8})
    write_images(tmp_path / "d", "val", {"cat": 2, "dog": 2})
    broken = tmp_path / "d" / "train" / "dog" / "003.jpg"
    broken.write_bytes(b"")
    said = in_two(f"--data_path {tmp_path}/d", codes=(1, 1))
    lines = [line for line in said.splitlines() if line.startswith("main.py: error (rank ")]
    reasons = [line for line in lines if "another process failed" not in line]
    assert len(reasons) == 1 and str(broken) in reasons[0] and len(lines) <= 2
    assert "Traceback" not in said
    assert not list((tmp_path / "run").glob("checkpoint*"))


@pytest.mark.parametrize("script_name", ["main.py", "weight_selection.py"])
@pytest.mark.parametrize(("option", "code"), [("-h", 0), ("--nonsense", 2)])
def test_help_and_usage_errors_need_no_torch(script_name, option, code):
    watch = "import sys, runpy; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    watch += "except SystemExit as end: print('torch' in sys.modules, end.code)"
    command = [sys.executable, "-c", watch, str(ROOT / script_name), option]
    result = subprocess.run(command, capture_output=True, text=True)
    assert re.search(rf"^False {code}$", result.stdout, re.M), result.stdout + result.stderr


def test_user_error_is_one_line_and_exit_code_1(tmp_path):
    options = ["--output_dir", str(tmp_path), "--pretrained_path", "none.pth"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "weight_selection.py"), *options], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "weight_selection.py: error: --pretrained_path none.pth does not exist\n"


@pytest.fixture
def second_of_two(monkeypatch):
    """Return a socket bound to where this process, the second of two, is to meet the first."""
    with socket.socket() as meeting:
        meeting.bind(("127.0.0.1", 0))
        place = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": meeting.getsockname()[1]}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        yield meeting


@pytest.mark.parametrize("store", ["of the launcher", "of the first process"])
def test_launcher_that_died_is_waited_for_no_longer_than_asked(store, second_of_two, tiny_run, monkeypatch):
    if store == "of the launcher":
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    began = time.monotonic()
    said = error_of(script, *tiny_run("--dist_timeout 1"))
    assert re.match(r"nothing listens at 127\.0\.0\.1:\d+ for --dist_timeout 1 s: the launcher or the first", said)
    assert time.monotonic() - began < 10  # it listens to nobody, so each try is refused at once


@pytest.mark.parametrize("where", ["env://", "tcp://127.0.0.1:{}"])
def test_service_that_never_answers_is_not_waited_for(where, second_of_two, tiny_run):
    second_of_two.listen()
    url = where.format(second_of_two.getsockname()[1])
    said = error_of(script, *tiny_run("--dist_timeout 1 --dist_url", url))
    assert said.startswith(
        "the processes did not meet within twice --dist_timeout 1 s: one of them is missing, or what"
    )


def test_signals_are_handled_while_the_processes_meet():
    def handle(number, _):
        raise Stopped("now")

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with pytest.raises(Stopped):
            distributed._in_time(lambda: os.kill(os.getpid(), signal.SIGUSR1) or threading.Event().wait(60), 60)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_rank_0_goes_first_and_the_others_after_it(monkeypatch):
    for rank, expected in ((0, ["body", "told", "told"]), (1, ["told", "body", "told"])):
        seen = []
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "of_all_ranks", lambda failed, seen=seen, **_: seen.append("told") or [failed])
        with distributed.main_first():
            seen.append("body")
        assert seen == expected


def test_where_rank_0_fails_first_the_others_end_without_a_word(monkeypatch):
    said = []
    monkeypatch.setattr(distributed, "of_all_ranks", lambda failed, **_: said.append(failed) or [True])
    with pytest.raises(UserError, match="no such set"), distributed.main_first():
        raise UserError("no such set")
    assert said == [True]
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with pytest.raises(SystemExit), distributed.main_first():
        raise AssertionError("the body must not run")


def test_only_rank_0_downloads(tiny_run, monkeypatch):
    asked, real = [], datasets.load_images
    monkeypatch.setattr(datasets, "load_images", lambda *a, **k: asked.append(k["download"]) or real(*a, **k))
    for is_main in (True, False):
        monkeypatch.setattr(distributed, "is_main", lambda is_main=is_main: is_main)
        script.load_data(script.training_options(tiny_run()))
    assert asked == [True, True, False, False]


@pytest.mark.parametrize(
    ("device", "gpus", "environment", "message"),
    [
        ("cuda", 0, "", "--device cuda: torch sees no GPU here"),
        ("cuda", 2, "LOCAL_RANK=2 LOCAL_WORLD_SIZE=4", "4 processes on this node, but 2 GPUs: start at most 2"),
        ("cuda:5", 2, "", "--device cuda:5: the GPUs here are cuda:0 to cuda:1"),
        ("cuda:0", 2, "LOCAL_WORLD_SIZE=2", "--device cuda:0 names one GPU for 2 processes"),
        ("cpu", 0, "SLURM_NTASKS=4 SLURM_STEP_ID=0", "use srun torchrun"),
    ],
)
def test_devices_and_launchers_that_do_not_fit_are_named(device, gpus, environment, message, train, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for variable in environment.split():
        monkeypatch.setenv(*variable.split("="))
    with pytest.raises(UserError, match=message):
        train("--device", device)
