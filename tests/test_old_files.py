"""Files that earlier versions wrote still load; tests/old holds one of each kind.

The checkpoint is the last of `python main.py` with RUN below, `--model_ema true --epochs 1`. The initialization file was
selected from it, for a student of half its width.
"""

import gzip
from pathlib import Path

import pytest
import torch

import main as script

OLD = Path(__file__).parent / "old"
MODEL = "--model vit_tiny --model_kwargs patch_size=4 depth=1 num_heads=1 mlp_ratio=1"
RUN = f"{MODEL} embed_dim=4 --input_size 8 --data_set digits --batch_size 64 --warmup_epochs 0 --device cpu --num_workers 0"
LOGGED = {"test_acc1": 9.444444444444445, "test_acc5": 46.388888888888886, "test_loss": 2.306207699245877}


@pytest.fixture
def old_run(tmp_path):
    """The options of the run, and its folder with the checkpoint."""
    (tmp_path / "checkpoint-0.pth").write_bytes(gzip.decompress((OLD / "checkpoint-0.pth.gz").read_bytes()))
    return [*RUN.split(), "--epochs", "1", "--model_ema", "true", "--output_dir", str(tmp_path)], tmp_path


def test_old_checkpoint_evaluates_and_a_finished_run_is_left(old_run):
    argv, folder = old_run
    measured = script.main([*argv, "--eval", "true"])
    assert measured == pytest.approx(LOGGED, rel=1e-6)  # float32 sums, on whatever machine
    assert script.main(argv)["test_loss"] == LOGGED["test_loss"]
    assert not (folder / "checkpoint-1.pth").exists()


def test_old_checkpoint_restores_all_and_training_continues(old_run):
    """Turn the checkpoint into one of a half-finished run of two epochs; the rest stays as written."""
    argv, folder = old_run
    state = torch.load(folder / "checkpoint-0.pth", weights_only=True)
    torch.save(state | {"options": state["options"] | {"epochs": 2}}, folder / "checkpoint-0.pth")
    record = script.main([*argv, "--epochs", "2", "--lr", "0.004"])
    new = torch.load(folder / "checkpoint-1.pth", weights_only=True)
    assert (record["epoch"], record["step"]) == (1, 44)
    steps = [values["step"].item() for values in new["optimizer"]["state"].values()]
    assert set(steps) == {44.0} and new["optimizer"]["state"].keys() == state["optimizer"]["state"].keys()
    assert new["model_ema"].keys() == state["model_ema"].keys() and new["best"].keys() == state["best"].keys()


def test_old_initialization_file_starts_a_run(tmp_path):
    frozen = "--epochs 1 --lr 0 --min_lr 0 --model_kwargs embed_dim=2 --initialize"
    script.main([*RUN.split(), *frozen.split(), str(OLD), "--output_dir", str(tmp_path)])
    trained = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)
    weights = torch.load(OLD / "vit.pth", weights_only=True)
    assert weights and all(torch.equal(trained["model"][key], value) for key, value in weights.items())
    assert trained["initialization"]["family"] == "vit"
