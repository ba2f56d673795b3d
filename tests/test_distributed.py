"""Runs of two processes, started as users start them."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, in_two_processes, read_log, write_images

import main as script
from training import distributed
from utils import UserError

ROOT = Path(__file__).parents[1]


def launch(argv, timeout=120):
    """Two processes of main.py by torch.distributed.launch, as the paper's README starts them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.launch", f"--master_port={port}", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, str(ROOT / "main.py"), *argv]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def final(folder):
    return torch.load(Path(folder) / "checkpoint-2.pth", weights_only=True)


@pytest.fixture(scope="module")
def two_process_run(image_folder, tmp_path_factory):
    """The folder and the options of a three-epoch run of two processes, and what it printed."""
    folder = tmp_path_factory.mktemp("two") / "run"
    argv = ["--data_set", "image_folder", "--data_path", str(image_folder), *TINY_MODEL]
    argv += "--input_size 32 --device cpu --drop_path 0.1 --epochs 3 --warmup_epochs 1 --batch_size 4".split()
    argv += "--num_workers 1 --lr 1e-3".split()
    codes, said = in_two_processes([*argv, "--output_dir", folder], tmp_path_factory.mktemp("said") / "said.txt")
    assert codes == [0, 0], said
    return folder, argv, said


def test_two_processes_print_and_write_once(two_process_run):
    folder, _, said = two_process_run
    assert [line["epoch"] for line in read_log(folder)] == [0, 1, 2]
    assert said.count("epoch 2: train loss") == 1
    assert [path.name for path in folder.glob(".*")] == [".lock"]


def test_resumed_run_of_two_processes_equals_the_whole_one(two_process_run, tmp_path):
    folder, argv, _ = two_process_run
    (tmp_path / "checkpoint-0.pth").write_bytes((folder / "checkpoint-0.pth").read_bytes())
    result = launch([*argv, "--output_dir", str(tmp_path)])
    assert result.returncode == 0, result.stderr
    whole, resumed = final(folder), final(tmp_path)
    assert all(torch.equal(whole["model"][key], resumed["model"][key]) for key in whole["model"])
    assert whole["best"] == resumed["best"]


def test_one_process_with_accumulation_makes_the_same_updates(two_process_run, tmp_path):
    folder, argv, _ = two_process_run
    script.main([*argv, "--update_freq", "2", "--output_dir", str(tmp_path / "one")])
    two, one = final(folder), final(tmp_path / "one")
    for key in two["model"]:
        # the same images, mixed and dropped alike; gradients are summed in another order, and AdamW divides by their size
        torch.testing.assert_close(two["model"][key], one["model"][key], rtol=0, atol=2e-4)
    first = [
        {key: value for key, value in read_log(path)[0].items() if key.startswith("train_loss")}
        for path in (folder, tmp_path / "one")
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-4)


def test_compiled_run_of_two_processes_is_equal_and_resumes(two_process_run, tmp_path, monkeypatch):
    """In bfloat16, with accumulation and an average, as traced for DDP; what is traced is not made into C++ here."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, mode: real(model, backend="aot_eager"))
    _, argv, _ = two_process_run
    more = "--batch_size 2 --update_freq 2 --model_ema true --model_ema_decay 0.9 --drop_path 0 --use_amp true"
    more = [*argv, *more.split(), "--amp_dtype", "bfloat16", "--save_ckpt_num", "9"]
    for name, words in (("plain", []), ("whole", ["--compile"]), ("resumed", ["--compile"])):
        if name == "resumed":
            (tmp_path / name).mkdir()
            (tmp_path / name / "checkpoint-1.pth").write_bytes((tmp_path / "whole" / "checkpoint-1.pth").read_bytes())
        codes, said = in_two_processes([*more, *words, "--output_dir", tmp_path / name], tmp_path / "said.txt")
        assert codes == [0, 0], said
    plain, whole, resumed = (final(tmp_path / name) for name in ("plain", "whole", "resumed"))
    for part in ("model", "model_ema"):
        for key, value in whole[part].items():
            assert torch.equal(value, resumed[part][key])
            # bfloat16 has 8 bits, and AdamW divides by the size of a gradient
            torch.testing.assert_close(value, plain[part][key], rtol=0, atol=5e-3)


def test_evaluation_is_exact_over_any_number_of_processes(two_process_run):
    folder, argv, _ = two_process_run
    logged = read_log(folder)[-1]
    measured = script.main(
        [*argv, "--eval", "true", "--resume", str(folder / "checkpoint-2.pth")]
    )  # 11 images: 6 + 5 or 11
    assert (measured["test_acc1"], measured["test_acc5"]) == (logged["test_acc1"], logged["test_acc5"])
    assert measured["test_loss"] == pytest.approx(logged["test_loss"], rel=1e-6)


def test_processes_measure_one_model_where_it_keeps_statistics(two_process_run, tmp_path):
    _, argv, _ = two_process_run
    place = argv.index("--model_kwargs")
    argv = [*argv[:place], *argv[place + 5 :], "--model", "resnet18", "--model_kwargs", "layers=[1,1,1,1]"]
    argv += "--drop_path 0 --epochs 1 --model_ema true --model_ema_decay 0.5 --model_ema_eval true".split()
    argv += ["--output_dir", str(tmp_path)]
    codes, said = in_two_processes(argv, tmp_path / "said.txt")
    assert codes == [0, 0], said
    logged, measured = read_log(tmp_path)[0], script.main([*argv, "--eval", "true"])
    for name in ("test_loss", "test_loss_ema"):  # batch norm in batches of 6 and 5 or 6 and 5 sums in the same order
        assert measured[name] == pytest.approx(logged[name], rel=1e-5)


def test_failure_of_one_rank_ends_all_with_its_reason(two_process_run, tmp_path):
    _, argv, _ = two_process_run
    write_images(tmp_path / "d", "train", {"cat": 8, "dog": 8})
    write_images(tmp_path / "d", "val", {"cat": 2, "dog": 2})
    broken = tmp_path / "d" / "train" / "dog" / "003.jpg"
    broken.write_bytes(b"")
    more = ["--data_path", tmp_path / "d", "--output_dir", tmp_path / "run"]
    codes, said = in_two_processes([*argv, *more], tmp_path / "said.txt")
    assert codes == [1, 1]
    lines = [line for line in said.splitlines() if line.startswith("main.py: error (rank ")]
    reasons = [line for line in lines if "another process failed" not in line]
    assert len(reasons) == 1 and str(broken) in reasons[0] and len(lines) <= 2
    assert "Traceback" not in said
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_help_and_usage_errors_need_no_torch():
    watch = "import sys; sys.argv = sys.argv[1:]; import runpy\ntry:\n  runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as end:\n  print('torch' in sys.modules, end.code)"
    for script_name in ("main.py", "weight_selection.py"):
        for option, code in (("-h", "0"), ("--nonsense", "2")):
            result = subprocess.run(
                [sys.executable, "-c", watch, str(ROOT / script_name), option], capture_output=True, text=True
            )
            assert re.search(rf"^False {code}$", result.stdout, re.M), result.stdout + result.stderr


def test_user_error_is_one_line_and_exit_code_1(tmp_path):
    options = ["--output_dir", str(tmp_path), "--pretrained_path", "none.pth"]
    command = [sys.executable, str(ROOT / "weight_selection.py"), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "weight_selection.py: error: --pretrained_path none.pth does not exist\n"


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
    import datasets

    asked, real = [], datasets.load_images
    monkeypatch.setattr(datasets, "load_images", lambda *a, **k: asked.append(k["download"]) or real(*a, **k))
    for is_main in (True, False):
        monkeypatch.setattr(distributed, "is_main", lambda is_main=is_main: is_main)
        script.load_data(script.training_options(tiny_run()))
    assert asked == [True, True, False, False]


def test_processes_that_find_different_checkpoints_are_stopped(tiny_run, monkeypatch):
    monkeypatch.setattr(
        distributed,
        "of_all_ranks",
        lambda value, patiently=False: [value, value if patiently else ("checkpoint-3.pth", 20)],
    )
    with pytest.raises(UserError, match=r"checkpoints \(none, checkpoint-3\.pth\): all nodes must share --output_dir"):
        script.main(tiny_run())


def test_two_processes_share_a_cache_and_make_the_updates_of_one(two_process_run, tmp_path):
    _, argv, _ = two_process_run
    more = [*argv, "--augment", "device", "--cache", "ram", "--reprob", "0"]  # the noise of erasing is drawn by chunk
    codes, said = in_two_processes([*more, "--output_dir", tmp_path / "two"], tmp_path / "said.txt")
    assert codes == [0, 0], said
    assert said.count("40 images decoded") == 1
    script.main([*more, "--update_freq", "2", "--output_dir", str(tmp_path / "one")])
    two, one = final(tmp_path / "two"), final(tmp_path / "one")
    for key in two["model"]:
        torch.testing.assert_close(two["model"][key], one["model"][key], rtol=0, atol=2e-4)
    assert read_log(tmp_path / "two")[-1]["test_loss"] == pytest.approx(
        read_log(tmp_path / "one")[-1]["test_loss"], rel=1e-3
    )


# ---- devices ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_named(tiny_run):
    with pytest.raises(UserError, match="--device cuda: torch sees no GPU here"):
        script.main(tiny_run("--device", "cuda"))


def test_more_processes_than_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes on this node, but 2 GPUs: start at most 2"):
        distributed.pick_device("cuda")


def test_one_gpu_for_two_processes_and_a_missing_gpu_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--device cuda:5: the GPUs here are cuda:0 to cuda:1"):
        distributed.pick_device("cuda:5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device cuda:0 names one GPU for 2 processes"):
        distributed.pick_device("cuda:0")


def test_processes_of_srun_without_torchrun_are_refused(tiny_run, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with pytest.raises(UserError, match="use srun torchrun"):
        script.main(tiny_run())
