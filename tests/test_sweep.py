"""sweep.py trains what is missing, goes on where it was stopped, and ends with a table of its own runs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, error_of, read_log, wait_for, write_run

import main
import models
import sweep
from options.training import training_options
from training import launch
from training.finished import is_finished
from utils import STOPPED, Stopped, UserError
from weightfiles import lazy

ROOT = Path(sweep.__file__).parent


@pytest.fixture
def weights(tmp_path):
    """A file of weights for the tests' tiny ViT."""
    kwargs = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}
    torch.manual_seed(0)
    tensors = models.create("vit_tiny", kwargs).state_dict()
    torch.save({name: value for name, value in tensors.items() if not name.startswith("head")}, tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


@pytest.fixture
def words(tiny_run, weights, tmp_path):
    """Return a function: the command line of a sweep over two seeds of a tiny run, and more."""
    recipe = tiny_run()
    place = recipe.index("--output_dir")
    recipe = recipe[:place] + recipe[place + 2 :]

    def command_line(*more):
        sweep_own = ["--seeds", "2", "--initialize", str(weights), "--output_dir", str(tmp_path / "out")]
        return [*sweep_own, *recipe, *map(str, more)]

    return command_line


@pytest.fixture
def called(monkeypatch):
    """The command lines of main.py that a sweep calls, here in this process."""
    calls = []

    def in_process(_, command, **__):
        assert command[:2] == [sys.executable, str(ROOT / "main.py")]
        calls.append(command[2:])
        try:
            main.main(command[2:])
        except UserError:
            return 1
        return 0

    monkeypatch.setattr(launch.Commands, "call", in_process)
    return calls


@pytest.fixture
def recorded(monkeypatch):
    """The runs that a sweep calls; each writes a finished run at once, or what `outcomes` has for it."""
    calls, outcomes = [], {}

    def pretend(_, command, **__):
        options = vars(training_options(command[command.index(str(ROOT / "main.py")) + 1 :]))
        folder, initialize = Path(options["output_dir"]), options["initialize"]
        calls.append(folder.name)
        outcome = outcomes.get(folder.name, 0)
        if outcome == "before":
            return 1
        if not (folder / "config.json").exists():
            sha256 = initialize and sweep.sha256_of(initialize, initialize)
            write_run(
                folder, [10 + options["seed"] + 5 * bool(initialize)] * options["epochs"], sha256=sha256, **options
            )
        if outcome:
            (folder / "log.txt").write_text("")
        return outcome

    monkeypatch.setattr(launch.Commands, "call", pretend)
    return calls, outcomes


def names(calls):
    return [Path(words[words.index("--output_dir") + 1]).name for words in calls]


def test_sweep_trains_once_and_ends_with_table_and_curves(words, called, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    sweep.main(words("--epochs", 1, "--log_dir", tmp_path / "events"))
    assert names(called) == ["vit-0", "random-0", "vit-1", "random-1"]
    text, table = capsys.readouterr().out, (tmp_path / "out" / "table.md").read_text()
    assert text.endswith(table)
    first, second = ([cell.strip() for cell in line.split("|")] for line in table.splitlines()[2:4])
    assert first[1:3] == ["random init", "2"] and second[1:3] == ["initialize=vit.pth", "2"] and "±" in second[-2]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "events").iterdir()) == ["random-0", "random-1", "vit-0", "vit-1"]
    sweep.main(words("--epochs", 1, "--log_dir", tmp_path / "events", "--num_workers", 1))
    assert len(called) == 4 and capsys.readouterr().out == table


def test_stopped_sweep_goes_on_in_the_middle_of_its_run(words, called, tmp_path):
    """As a process, stopped by SIGTERM; then to its end in this process."""
    more = ["--epochs", 8, "--log_freq", 1, "--seeds", 1]
    command = [sys.executable, ROOT / "sweep.py", *words(*more)]
    with subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    ) as process:
        log = tmp_path / "out" / "vit-0" / "log.txt"
        wait_for(lambda: log.exists() and log.read_text().count("\n") >= 2)
        process.terminate()
        said = process.communicate(timeout=60)[0]
    assert process.returncode == STOPPED == 75
    assert "stopped by SIGTERM; the same command goes on from there" in said
    assert (tmp_path / "out" / "vit-0" / "requeue").exists()
    done = len(read_log(log.parent))
    assert 2 <= done < 8
    first = log.read_text().splitlines()[:done]
    sweep.main(words(*more))
    assert names(called) == ["vit-0", "random-0"]
    lines = log.read_text().splitlines()
    assert lines[:done] == first and [json.loads(line)["epoch"] for line in lines] == list(range(8))


def test_run_is_finished_once_its_last_state_is_saved(tmp_path):
    run = write_run(tmp_path / "run", [10, 20])
    assert is_finished(run, 2) and not is_finished(run, 3)
    (run / "checkpoint-0.pth").touch()  # killed between the last line of the log and its checkpoint
    (run / "checkpoint-best.pth").touch()
    assert not is_finished(run, 2)
    (run / "checkpoint-1.pth").touch()
    assert is_finished(run, 2)
    for damaged in ("", '{"epoch": 0}\n{"epo', "[1]", "{}"):
        (run / "log.txt").write_text(damaged)
        assert not is_finished(run, 2)
    assert not is_finished(tmp_path / "nothing", 2)


CHANGES = {
    "lr was 0.001, is 0.002": "--lr 2e-3",
    "epochs was 2, is 3": "--epochs 3",
    "mixup was 0.8, is 0.1": "--mixup 0.1",
    "images_per_update was 8, is 16": "--nproc_per_node 2",
    "start_epoch was 0, is 1": "--start_epoch 1",
}


@pytest.mark.parametrize("reason", CHANGES)
def test_other_options_in_the_same_folder_are_refused(reason, words, recorded, tmp_path):
    sweep.main(words("--seeds", 1))
    error = error_of(sweep, *words("--seeds", 1, *CHANGES[reason].split()))
    assert error == f"{tmp_path}/out/vit-0 was run with other options: {reason}; use those, or another --output_dir"
    assert len(recorded[0]) == 2


def test_another_file_of_the_same_name_is_refused(words, recorded, weights):
    sweep.main(words("--seeds", 1))
    torch.save({"other": torch.zeros(1)}, weights)
    sweep._sha256.cache_clear()
    assert "vit-0 was run with other options: initialize was sha256 " in error_of(sweep, *words("--seeds", 1))


def test_more_seeds_and_files_join_the_runs_that_are_there(words, recorded, tmp_path, capsys):
    sweep.main(words("--seeds", 1))
    (tmp_path / "other.pth").write_bytes(b"other")
    sweep.main(words("--initialize", tmp_path / "other.pth"))
    assert recorded[0] == ["vit-0", "random-0", "other-0", "vit-1", "other-1", "random-1"]
    text = capsys.readouterr().out
    assert "initialize=other.pth | 2" in text and text.count("+5.0 ± 0.0") == 2


def test_folders_and_equal_names_of_files_give_distinct_folders(tmp_path):
    for name in ("a", "b.1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vit.pth").touch()
    a, b = str(tmp_path / "a"), str(tmp_path / "b.1")
    assert sweep.arm_names([a, b, "https://x.org/y/deit.pth#sha256=" + "0" * 64]) == ["a", "b.1", "deit"]
    assert sweep.arm_names([f"{a}/vit.pth", f"{b}/vit.pth"]) == ["a_vit", "b.1_vit"]
    assert sweep.arm_names([f"{a}/random.pth"]) == ["a_random"]
    with pytest.raises(UserError, match=f"--initialize {a} {a}/../a: {a} is given twice"):
        sweep.arm_names([a, f"{a}/../a"])
    assert sweep.sha256_of(a, "elsewhere/vit.pth") == sweep.sha256_of(f"{b}/vit.pth", "")
    assert sweep.sha256_of(a, "gone.pth") == "missing"


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["/x/a/vit.pth", "/y/a/vit.pth"], ["x_a_vit", "y_a_vit"]),  # folders of one name, too
        (["https://x.org/vit.pth#sha256=0", "https://y.org/vit.pth#sha256=1"], ["x.org_vit", "y.org_vit"]),
        (["/a/vit.pth", "/a/vit.safetensors"], ["vit-fb77771d", "vit-a1de63ad"]),  # sha256 of the paths
        (["/a/b_c.pth", "/a_b/c.pth"], ["b_c", "c"]),
        (["/x/ViT.pth", "/y/vit.pth"], ["x_ViT", "y_vit"]),  # one folder on a Mac
        (["/x/e\u0301.pth", "/y/\u00e9.pth"], ["x_e\u0301", "y_\u00e9"]),
        (["/x/RANDOM.pth", "/y/vit.pth"], ["x_RANDOM", "y_vit"]),
        (["/random.pth"], ["random-f8eda500"]),
        (["/x/a\nb.pth", "/y/a\tb.pth"], ["x_a_b", "y_a_b"]),  # equal once they can be printed
        (["/x/-v.pth"], ["_v"]),
        (["/x/\udcff.pth"], ["_"]),
    ],
    ids=ascii,
)
def test_every_file_has_a_folder_of_its_own(files, names, tmp_path, monkeypatch):
    assert sweep.arm_names(files) == names
    monkeypatch.chdir(tmp_path)
    assert sweep.arm_names(files) == names and sweep.arm_names(files[::-1]) == names[::-1]


def test_long_names_leave_room_and_stay_distinct(tmp_path):
    long = ["ä" * 122 + end for end in ("b", "c")]  # 245 bytes
    names = sweep.arm_names([f"/x/{name}.pth" for name in long])
    assert len(set(names)) == 2 and all(name.startswith("ä" * 110) for name in names)
    for name in names:
        (tmp_path / f"{name}-999.lock").touch()
    assert sweep.arm_names([f"/x/{'ä' * 120}.pth"]) == ["ä" * 120]


def test_sharded_start_counts_as_main_counts_it(tmp_path):
    """An index and its files, so that a sweep from it goes on."""
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    for key, tensor in tensors.items():
        torch.save({key: tensor}, tmp_path / f"{key}.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {key: f"{key}.bin" for key in tensors}}))
    before = sweep.sha256_of(str(index), "")
    assert before == lazy.sha256_of(index)
    torch.save({"b": torch.ones(3)}, tmp_path / "b.bin")
    sweep._sha256.cache_clear()
    assert sweep.sha256_of(str(index), "") not in (before, "missing")


def test_failed_run_is_named_and_the_others_go_on(words, recorded, capsys):
    calls, outcomes = recorded
    outcomes |= {"vit-0": 1, "random-1": -9}
    error = error_of(sweep, *words())
    assert error == "2 of 4 runs failed: vit-0 (code 1), random-1 (SIGKILL); the same command tries them again"
    assert calls == ["vit-0", "random-0", "vit-1", "random-1"]
    assert "(0 of 1 seeds)" in capsys.readouterr().out
    outcomes.clear()
    calls.clear()
    # these write nothing either: their config.json is there
    assert "vit-0 (log.txt does not have its last epoch)" in error_of(sweep, *words())
    assert calls == ["vit-0", "random-1"]


def test_run_that_fails_before_it_trains_ends_the_sweep(words, recorded, called, tmp_path):
    """The weights do not fit the model: the first run finds out."""
    error = error_of(sweep, *words("--model_kwargs", "embed_dim=16"))
    assert error == "vit-0 failed before it trained (code 1), as others would; see its message"
    assert names(called) == ["vit-0"]


USAGE = {
    "unrecognized argument --epoch; nearest: --epochs": "--epoch 3",
    "--warmup_epochs 9 is longer than the run, --epochs 2": "--warmup_epochs 9",
    "--seed is set for each run: --seeds N takes the seeds from 0 to N-1": "--seed 3",
    "--resume is for one run": "--resume x.pth",
    "--eval true trains nothing": "--eval true",
    "--disable_eval true leaves nothing to compare": "--disable_eval true",
    "--save_ckpt false: a run could not be resumed": "--save_ckpt false",
    "--init xavier is for random init, not with --initialize": "--init xavier",
    "--auto_resume false": "--auto_resume false",
    "argument --seeds: 0 is not at least 1": "--seeds 0",
}


@pytest.mark.parametrize("message", USAGE)
def test_usage_errors_come_before_the_first_run(message, words, recorded, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        sweep.main(words(*USAGE[message].split()))
    assert exit_.value.code == 2 and not recorded[0] and not (tmp_path / "out").exists()
    assert f"sweep.py: error: {message}" in capsys.readouterr().err


def test_missing_file_bad_folder_and_launchers_are_refused(words, recorded, tmp_path, monkeypatch):
    assert error_of(sweep, *words("--initialize", "x.pth")) == "--initialize x.pth: there is no such file or folder"
    (tmp_path / "file").touch()
    error = error_of(sweep, *words("--output_dir", tmp_path / "file"))
    assert error == f"--output_dir {tmp_path}/file cannot be written to: File exists"
    for environment in (
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"WORLD_SIZE": "1", "RANK": "0", "TORCHELASTIC_RUN_ID": "x"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "4", "PMI_RANK": "0"},
    ):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert error_of(sweep, *words()).startswith(
                "sweep.py starts its runs itself: start it once, without torchrun"
            )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")  # rank 0 says why
    with pytest.raises(SystemExit):
        sweep.main(words())
    assert not recorded[0] and not (tmp_path / "out").exists()


def test_several_processes_are_started_by_torchrun(words):
    runs = sweep.planned(["vit.pth"], 1, [*TINY_MODEL], Path("out"))
    _, dash_m, module, *others = sweep.command(runs[0], 4)
    assert (dash_m, module) == ("-m", "torch.distributed.run")
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(others)
    assert (given.nproc_per_node, given.standalone, given.training_script) == ("4", True, str(ROOT / "main.py"))
    assert training_options(given.training_script_args).output_dir == "out/vit-0"


# ---- commands, locks and signals ----

PROGRAM = "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
PROGRAM += "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, flush=True); time.sleep(60)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_passed_on_and_ends_in_stopped(number, capsys):
    handler = signal.getsignal(number)
    reading, writing = os.pipe()
    ignores_ctrl_c = []

    def send():
        ignores_ctrl_c.append(said.readline())  # waits until the command is ready
        signal.pthread_kill(threading.main_thread().ident, number)

    with open(reading) as said, open(writing, "w") as output:
        sender = threading.Thread(target=send)
        sender.start()
        with pytest.raises(Stopped, match=signal.Signals(number).name), launch.Commands() as commands:
            commands.call([sys.executable, "-c", PROGRAM], stdout=output)
        sender.join()
    assert signal.getsignal(number) is handler and ignores_ctrl_c == ["True\n"]
    assert f"stopped by {signal.Signals(number).name}; the same command goes on" in capsys.readouterr().out


def test_signal_between_commands_stops():
    with pytest.raises(Stopped), launch.Commands():
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    with launch.Commands() as commands:
        assert commands.call([sys.executable, "-c", "raise SystemExit(3)"]) == 3
        with pytest.raises(Stopped):
            commands.call([sys.executable, "-c", "raise SystemExit(75)"])


def test_job_of_another_call_is_waited_for(tmp_path, monkeypatch, capsys):
    """Its lock is held at first. Once it is free, the other call has done the job."""
    locks, left = [launch.hold(tmp_path / "a.lock")], ["a", "b"]
    done = []

    def wait(_):
        os.close(locks.pop())
        left.remove("a")

    def work(job, call):
        done.append(job)
        left.remove(job)

    monkeypatch.setattr(launch.time, "sleep", wait)
    launch.work_off(lambda: list(left), lambda job: tmp_path / f"{job}.lock", work)
    assert done == ["b"] and not locks
    assert "waiting for a, which another process works on" in capsys.readouterr().out


def test_place_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(launch.fcntl, "flock", refuse)
    with contextlib.closing(os.fdopen(launch.hold(tmp_path / "a.lock"))):
        assert "a.lock cannot be locked" in capsys.readouterr().out
