"""All processes of a run have the same options, data, precision and files; else all end, with a line that says what differs."""

import logging
import os
import shutil

import pytest
import torch
from conftest import assert_equal_weights, in_two_processes

import main as script
from images.images import Images
from options.table import FREE_PER_RANK, PATHS
from options.training import training_defaults, training_options
from training import agreement, distributed
from training.agreement import check_options, check_same
from utils import UserError


@pytest.fixture
def beside(monkeypatch):
    """Return a function after which this process is rank 0, and others describe themselves by these values."""

    def set_others(*others):
        monkeypatch.setattr(distributed, "of_all_ranks", lambda own, **_: [own, *others])

    return set_others


def options_of(*words):
    return vars(training_options(["--model_kwargs", "depth=2", *" ".join(words).split()]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr 5e-3", "--lr (0.004 on rank 0, 0.005 on rank 1)"),
        ("--opt sgd --seed 1", "--opt (adamw on rank 0, sgd on rank 1), --seed (0 on rank 0, 1 on rank 1): "),
        ("--model_kwargs depth=3", "--model_kwargs depth (2 on rank 0, 3 on rank 1)"),
        ("--model_kwargs num_heads=2", "--model_kwargs num_heads (unset on rank 0, 2 on rank 1)"),
        ("--log_freq 3 --disable_eval true", "--disable_eval (False on rank 0, True on rank 1), --log_freq (10 on"),
        ("--output_dir there", "--output_dir (unset on rank 0, a path on rank 1)"),
        ("--aa none", "--aa (rand-m9-mstd0.5-inc1 on rank 0, none on rank 1)"),
        ("--recipe short --warmup_epochs 5", "--recipe (paper on rank 0, short on rank 1)"),
    ],
)
def test_options_that_differ_are_named_with_ranks_and_values(words, message, monkeypatch):
    """Each rank describes its own options; what the other rank gives here is what its own call would."""
    described = []
    monkeypatch.setattr(distributed, "of_all_ranks", lambda own, **_: described.append(own) or [own])
    check_options(options_of(words))
    monkeypatch.setattr(distributed, "of_all_ranks", lambda own, **_: [own, described[0]])
    with pytest.raises(UserError) as error:
        check_options(options_of())
    said = str(error.value)
    assert said.startswith("the processes differ in --") and said.endswith(": start all with the same options")
    assert message in said and "\n" not in said


def test_what_is_a_nodes_own_affair_may_differ(monkeypatch):
    described = []
    monkeypatch.setattr(distributed, "of_all_ranks", lambda own, **_: described.append(own) or [own])
    check_options(options_of("--num_workers 1 --device cuda:0 --data_path /a --output_dir /a/out --resume a.pth"))
    check_options(options_of("--num_workers 8 --device cuda:1 --data_path /b --output_dir /b/out --resume b.pth"))
    assert described[0] == described[1]
    assert training_defaults().keys() >= FREE_PER_RANK | set(PATHS)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([1, 1, 2, 1, 1, 1, 2], r"x \(1 on ranks 0 to 2 and 4 to 6, 2 on ranks 3 and 7\)"),
        (list(range(2, 9)), r"x \(1 on rank 0, 2 on rank 1, 3 on rank 2, 4 on rank 3 and 4 more values\)"),
    ],
)
def test_many_ranks_are_listed_in_short(others, message, beside):
    beside(*({"x": value} for value in others))
    with pytest.raises(UserError, match=message):
        check_same({"x": 1}, "")


def test_long_lists_are_told_apart_by_their_first_difference(beside):
    names = [f"class {number}" for number in range(1000)]
    beside({"classes": [*names[:900], "zebra", *names[901:]]})
    message = r"classes \(1000, number 900 of them class 900 on rank 0, 1000, number 900 of them zebra on rank 1\)"
    with pytest.raises(UserError, match=message):
        check_same({"classes": names}, "")


def test_other_versions_are_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(
        distributed, "of_all_ranks", lambda own, **_: [own, own | ({"timm": "0.1"} if "timm" in own else {})]
    )
    monkeypatch.setattr(agreement, "environment", lambda *_: dict.fromkeys(agreement.VERSIONS, "1"))
    with caplog.at_level(logging.WARNING):
        check_options(options_of())
    said = "the processes differ in their version of timm (1 on rank 0, 0.1 on rank 1), and so may what they compute"
    assert caplog.messages == [said]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("the precision", "bfloat16", r"the precision \(float32 on rank 0, bfloat16 on rank 1\): give --amp_dtype"),
        ("the sha256 of --initialize", "abc", r"the sha256 of --initialize \(\w{64} on rank 0, abc on rank 1\)"),
        (
            "the checkpoint",
            "checkpoint-3.pth",
            r"the checkpoint \(None on rank 0, checkpoint-3.pth on rank 1\): all nodes must share",
        ),
        ("training images", 39, r"training images \(40 on rank 0, 39 on rank 1\), list of training images \("),
    ],
)
def test_what_is_found_on_each_node_is_compared(name, value, message, train, image_folder, tmp_path, monkeypatch):
    real = distributed.of_all_ranks
    changed = {name: value} | ({"list of training images": "x"} if name == "training images" else {})

    def differing(own, **_):
        return [own, own | changed] if isinstance(own, dict) and name in own else real(own)

    more = []
    if "initialize" in name:
        train("--epochs 1", to="first")
        weights = torch.load(tmp_path / "first" / "checkpoint-0.pth", weights_only=True)["model"]
        torch.save(weights, tmp_path / "start.pth")
        more = ["--initialize", str(tmp_path / "start.pth")]
    monkeypatch.setattr(distributed, "of_all_ranks", differing)
    with pytest.raises(UserError, match=message):
        train(*more)
    assert not (tmp_path / "run" / "log.txt").exists()


# ---- the digest of the data ----


def listed(root, names, labels):
    return Images("x", labels, paths=[root + name for name in names], classes=3)


NAMES = ["cat/1.png", "cat/2.png", "dog/1.png", "ship/deep/1.png"]


def test_digest_is_of_names_order_and_labels_not_of_the_place():
    images = listed("/a/", NAMES, [0, 0, 1, 2])
    same = [listed("/a/much longer/", NAMES, [0, 0, 1, 2]), listed("", NAMES, [0, 0, 1, 2])]
    others = [
        listed("/a/", [*NAMES[:3], "ship/deep/2.png"], [0, 0, 1, 2]),
        listed("/a/", NAMES, [0, 0, 2, 1]),
        listed("/a/", [NAMES[1], NAMES[0], *NAMES[2:]], [0, 0, 1, 2]),
        listed("/a/", NAMES[:3], [0, 0, 1]),
        images.subset(torch.arange(3).numpy()),
    ]
    assert {each.digest() for each in same} == {images.digest()}
    assert images.digest() not in {each.digest() for each in others}


def test_digest_of_one_folder_of_images_is_of_their_names():
    names = [f"/a/only/{number:05}.png" for number in range(3)]
    digests = {Images("x", [0, 1, 2], paths=paths).digest() for paths in (names, names[::-1], [n + "x" for n in names])}
    assert len(digests) == 3


# ---- two processes ----


@pytest.fixture
def in_two(tiny_run, tmp_path, monkeypatch):
    """Return a function that makes a tiny run of two processes, the second with more options; return codes and output."""
    real = script.training_options

    def run(*more, second=()):
        monkeypatch.setattr(
            script, "training_options", lambda argv: real([*argv, *(second if os.environ["RANK"] == "1" else ())])
        )
        argv = tiny_run("--epochs 1 --batch_size 4 --dist_timeout 20", *more)
        return in_two_processes(argv, tmp_path / "said.txt")

    return run


def one_line_each(said, message):
    """Tell whether each rank has said this, in a line, and nothing else."""
    lines = [f"main.py: error (rank {rank}): the processes differ in {message}" for rank in (0, 1)]
    said = said.splitlines()
    return len(said) == 2 and all(sum(each.startswith(line) for each in said) == 1 for line in lines)


def test_two_processes_end_where_their_options_differ(in_two, tmp_path):
    codes, said = in_two(second=["--lr", "5e-3"])
    assert codes == [1, 1] and one_line_each(said, "--lr (0.001 on rank 0, 0.005 on rank 1): start all"), said
    assert not (tmp_path / "run").exists()


def test_two_processes_end_where_their_data_differ(in_two, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "other")
    (tmp_path / "other" / "train" / "dark" / "000.jpg").rename(tmp_path / "other" / "train" / "dark" / "zzz.jpg")
    codes, said = in_two(second=["--data_path", str(tmp_path / "other")])
    said = said[said.index("main.py:") :]  # rank 0 counts its images before
    assert codes == [1, 1] and one_line_each(said, "list of training images ("), said


def test_optimizer_that_draws_keeps_two_processes_equal(in_two, tmp_path, monkeypatch):
    """Its state has random numbers of its own too: a run resumed after the first epoch has to go on with them."""
    real = script.train

    def keeping(options, folder, trainer, *rest):
        record = real(options, folder, trainer, *rest)
        torch.save(trainer.bare_model.state_dict(), f"{options.output_dir}/rank{distributed.rank()}.pth")
        return record

    monkeypatch.setattr(script, "train", keeping)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # kron's compilation takes minutes
    for name in ("run", "resumed"):
        # small kernels: without the package opt_einsum, kron multiplies out all their axes
        model = "--model_kwargs embed_dim=8 depth=1 patch_size=4"
        codes, said = in_two(model, "--opt kron --epochs 2 --warmup_epochs 0 --output_dir", tmp_path / name)
        assert codes == [0, 0], said
        (tmp_path / "resumed").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "run" / "checkpoint-0.pth", tmp_path / "resumed")
    ends = [torch.load(tmp_path / name / f"rank{rank}.pth") for name in ("run", "resumed") for rank in (0, 1)]
    for end in ends[1:]:
        assert_equal_weights(ends[0], end)
