"""What a script says to a mistyped command line, and to whom; and where its output goes nowhere."""

import argparse
import gc
import io
import os
import sys

import pytest

import compare
from bench import pairs
from options.parser import boolean, keyword
from options.selection import _selection_parser, selection_options
from options.table import training_parser
from options.tools import _export_parser, _predict_parser, _sweep_parser
from options.training import remarks, training_options
from study import run as study_run
from utils import hint, run_script

END = "; -h lists the options\n"


@pytest.mark.parametrize(
    ("parse", "argv", "line"),
    [
        (training_options, "--batchsize 64", "main.py: error: unrecognized argument --batchsize; nearest: --batch_size"),
        (training_options, "–epochs 3", "main.py: error: unrecognized argument –epochs; nearest: --epochs"),  # noqa: RUF001
        (training_options, "--warmup 3", "unrecognized argument --warmup; nearest: --warmup_epochs, --warmup_steps"),
        (training_options, "--outputdir=x", "unrecognized argument --outputdir; nearest: --output_dir;"),
        (training_options, "--lr 1e-3 5e-4", "main.py: error: unrecognized argument 5e-4; -h"),
        (training_options, "--foo", "main.py: error: unrecognized argument --foo; -h"),
        (training_options, "--amp_dtype bf16", "--amp_dtype: bf16 is none of float16, bfloat16; nearest: bfloat16"),
        (selection_options, "--plan --layer_selection frist", "is none of first, last, middle, uniform; nearest: first"),
        (selection_options, "--plan --element_selection ENERGY", "coverage, magnitude_energy; nearest: energy"),
        (compare.parse, "runs --mertic x", "compare.py: error: unrecognized argument --mertic; nearest: --metric"),
        (study_run.parse, "cpus --work x", "argument study: cpus is none of cpu, "),
        (pairs.main, "--families vitt", "argument --families: vitt is none of vit, "),
    ],
)  # fmt: skip
def test_usage_error_is_one_line_with_the_nearest_names(parse, argv, line, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(argv.split())
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert line in said.err and said.err.endswith(END) and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "speaks"),
    [
        ("RANK=0", True),
        ("RANK=3", False),
        ("RANK=", True),
        ("RANK=x", True),
        ("OMPI_COMM_WORLD_RANK=1", False),
        ("PMI_RANK=2", False),
        ("SLURM_PROCID=1", False),
        ("SLURM_PROCID=1 RANK=0", True),  # the nodes of torchrun need not come in the order of SLURM's
    ],
)
def test_only_the_first_process_says_what_is_wrong(variables, speaks, monkeypatch, capsys):
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    with pytest.raises(SystemExit) as ended:
        training_options(["--epochs", "0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"main.py: error: argument --epochs: 0 is not at least 1{END}" * speaks


def test_message_with_a_line_break_stays_one_line(capsys):
    with pytest.raises(SystemExit):
        training_options(["--data_set", "a\nb"])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("parser", [training_parser, _selection_parser, _export_parser])
def test_each_boolean_alone_means_true(parser):
    parser = parser()
    names = [action.option_strings[0] for action in parser._actions if action.type is boolean]
    assert names
    unnamed = ["run", "folder"] if parser.prog == "export.py" else []
    for name in names:
        tried = ([name], [name, "false"], [name, "--model_key", "model"])
        values = [vars(parser.parse_args([*unnamed, *words]))[name[2:]] for words in tried]
        assert values == [True, False, True], name


@pytest.mark.parametrize("parser", [training_parser, _selection_parser, _sweep_parser, _export_parser, _predict_parser])
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e400"])
def test_no_number_is_infinite_or_nan(parser, value, capsys):
    parser = parser()
    kinds = ("int", "float", "epochs", "gain", "below_one")
    numbers = [action for action in parser._actions if getattr(action.type, "__name__", "") in kinds]
    assert bool(numbers) == (parser.prog != "export.py")
    for action in numbers:
        if action.dest == "ridge" and float(value) == float("inf"):
            continue
        with pytest.raises(argparse.ArgumentError):
            parser._get_values(action, [value])


def test_ridge_may_be_infinite():
    assert selection_options(["--output_dir", "x", "--ridge", "inf"]).ridge == float("inf")


def test_nearest_names_contain_the_word_or_look_alike():
    known = ["--warmup_epochs", "--epochs", "--eval", "--lr"]
    assert hint("--Epoch", known) == "; nearest: --epochs, --warmup_epochs"
    assert hint("-warmup-epoch", known) == "; nearest: --warmup_epochs"
    assert hint("--evla", known) == "; nearest: --eval"
    assert hint("--", known) == hint("zzz", known) == ""


# ---- output that goes nowhere ----


def broken_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w", encoding="utf-8")


def full_disk():
    return open("/dev/full", "w", encoding="utf-8")


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
GONE = [broken_pipe, pytest.param(full_disk, marks=needs_full)]


@pytest.mark.parametrize("opened", GONE)
def test_help_ends_quietly_where_nobody_reads_it(opened, monkeypatch):
    with opened() as stream:  # which writes what is left when it is closed, as Python does at exit
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as ended:
            training_options(["-h"])
    assert ended.value.code == 0


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_help_and_usage_errors_need_no_stream(name, monkeypatch):
    monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit):
        training_options(["-h" if name == "stdout" else "--foo"])


def test_help_is_readable_where_the_terminal_is_ascii(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit):
        training_options(["-h"])
    assert b"vit_tiny, convnext_femto, ? or any name" in stream.buffer.getvalue()


@pytest.fixture
def run_printing(monkeypatch):
    """Return a function that runs a script which prints `size` characters to a stream, and returns its exit code."""

    def run(stream, size):
        monkeypatch.setattr(sys, "stdout", stream)
        return run_script(lambda: print("x" * size))

    yield run
    gc.unfreeze()  # what run_script has frozen, because a script ends there


def test_script_runs_where_stdout_is_closed(run_printing):
    assert run_printing(None, 10) == 0


@pytest.mark.parametrize(
    ("opened", "said"),
    [
        (broken_pipe, ""),
        pytest.param(
            full_disk,
            ": error: what is printed, or a temporary file, cannot be written: No space left on device\n",
            marks=needs_full,
        ),
    ],
)
@pytest.mark.parametrize("size", [10, 100_000])  # what a buffer holds, and more
def test_script_fails_in_a_line_where_stdout_fails(opened, said, size, run_printing, capsys):
    with opened() as stream:
        assert run_printing(stream, size) == 1
    assert capsys.readouterr().err.endswith(said)


# ---- NAME=VALUE ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, True) for word in ("true", "True", "TRUE")),
        *((word, False) for word in ("false", "False", "fALSE")),
        *((word, None) for word in ("none", "None", "NONE")),
        ("[1,true,(none,)]", [1, True, (None,)]),
        ("{'a':FALSE}", {"a": False}),
        ("-1e-3", -1e-3),
        ("'false'", "false"),
        ("no", "no"),
        ("gelu", "gelu"),
        ("true.x", "true.x"),
        ("true()", "true()"),
        ("[true", "[true"),
        ("(" * 500, "(" * 500),
        ("", ""),
    ],
)
def test_true_false_and_none_are_values_in_any_case(text, value):
    name, read = keyword(f"name={text}")
    assert name == "name" and read == value and type(read) is type(value)


def test_values_that_are_text_are_said_in_one_line():
    words = "--output_dir x --model_kwargs qkv_bias=no depth=2 act_layer=gelu class_token=false --teacher_kwargs a=b"
    given = training_options([*words.split(), "--distillation", "logits", "--teacher_model", "vit_tiny"])
    assert given.model_kwargs["class_token"] is False
    listed = "--model_kwargs qkv_bias=no, --model_kwargs act_layer=gelu, --teacher_kwargs a=b"
    assert remarks(given) == [f"taken as text, not as a number, true, false or none: {listed}"]
    assert remarks(training_options(["--output_dir", "x", "--model_kwargs", "depth=2"])) == []
    none = training_options("--output_dir x --model_kwargs pos_embed=none depth=2".split())
    left = "left at the constructor's default, as timm does with None: --model_kwargs pos_embed=None"
    assert remarks(none) == [left]
