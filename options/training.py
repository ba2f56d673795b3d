"""The options of main.py: reading them, and the checks that need neither data nor model."""

import argparse
import re

from options.parser import changed, text_values
from options.table import DATA_SETS, FREE_IN_EVALUATION, RECIPES, SHORT_LR, WITHOUT_AUGMENTATION, training_parser


def training_options(
    argv: list[str] | None = None, run: dict | None = None, *, program: str = "main.py"
) -> argparse.Namespace:
    """Return the validated options of main.py; end the process with code 2 on a usage error, in the program's name.

    With `--eval true`, what is not given comes from the evaluated run, whose options main.py learns from the checkpoint
    and passes as `run` in a second call, {} if there is no checkpoint. Contradictions between options wait for that.
    """
    parser = training_parser()
    parser.prog = program
    taken = {name: value for name, value in (run or {}).items() if name not in FREE_IN_EVALUATION}
    first = parser.parse_args(argv, argparse.Namespace(**taken))
    recipe = RECIPES[first.recipe]
    parser.set_defaults(**recipe | (WITHOUT_AUGMENTATION if first.linear_probe else {}))
    options = parser.parse_args(argv, argparse.Namespace(**taken))
    for name, value in recipe.items():
        if callable(value) and getattr(options, name) is value:
            setattr(options, name, value(options))
    problem = _first_mistake(options)
    if not problem and (not options.eval or run is not None):
        problem = _first_conflict(options, parser)
    if problem:
        parser.error(problem)
    return options


def training_defaults() -> dict:
    """Return the default of each option of main.py."""
    return vars(training_parser().parse_args([]))


def plain(options: argparse.Namespace) -> dict:
    """Return the options as they would come back from JSON."""
    import json  # here, because -h need not wait for it

    return json.loads(json.dumps(vars(options), default=str))


def peak_lr(options: argparse.Namespace, images_per_update: int) -> float:
    """Return --lr or, if a recipe leaves it open, one in proportion to the total batch."""
    return SHORT_LR * images_per_update / 512 if options.lr is None else options.lr


def settled(options: argparse.Namespace, images_per_update: int) -> argparse.Namespace:
    """Return a run's options with its peak learning rate, and without those that have no effect."""
    # features that are computed once have no memory layout, and their classifier is too small to be compiled
    idle = {"compile": False, "channels_last": False} if computes_features_once(options) else {}
    return argparse.Namespace(**vars(options) | {"lr": peak_lr(options, images_per_update)} | idle)


def remarks(options: argparse.Namespace) -> list[str]:
    """Return what to say at the start of main.py: options without effect, that nothing is kept, values that are text."""
    idle = {"resplit": False, "dist_on_itp": False, "world_size": 1}
    if options.eval:
        idle |= {"distillation": "none"}
    if computes_features_once(options):
        idle |= {"compile": False, "channels_last": False, "augment": "timm"}
    lines = [
        f"--{name} is accepted and has no effect" for name, default in idle.items() if getattr(options, name) != default
    ]
    if not (options.output_dir or options.eval):
        lines.append("no --output_dir: nothing is kept, neither checkpoints nor log.txt")
    return lines + text_values(options)


def mixes(options: argparse.Namespace) -> bool:
    """Return whether mixup or cutmix mixes the batches."""
    return options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax is not None


def computes_features_once(options: argparse.Namespace) -> bool:
    """Return whether a linear probe trains on features that are computed once, because nothing changes the images."""
    o = options
    jitters = o.aa in ("", "none") and o.color_jitter
    augments = o.aa not in ("", "none") or jitters or o.hflip or o.reprob or mixes(o)
    return o.linear_probe and not o.eval and not augments


def unknown_data_set(name: str) -> str | None:
    """Return the message about a data set's name that is none of ours; None for ours, torch/NAME and hfds/NAME."""
    if name in DATA_SETS or re.fullmatch(r"(torch|hfds)/.+", name):
        return None
    from utils import hint

    return f"--data_set {name} is none of {', '.join(DATA_SETS)}, torch/NAME, hfds/NAME{hint(name, DATA_SETS)}"


# What follows is laid out by hand, an option or a check per line where it fits.
# fmt: off


def _first_mistake(options: argparse.Namespace) -> str | None:
    """Return a message about the first option that is wrong whatever an evaluated run adds; None if there is none."""
    o = options
    checks = [
        (not (o.eval and o.disable_eval), "--eval true and --disable_eval true leave nothing to do"),
        (o.eval or o.smoothing < 1 or mixes(o), "--smoothing 1 leaves nothing of the labels: give less than 1"),
        *((not place.startswith("http") or re.fullmatch(r"https://[^#]+#sha256=[0-9a-fA-F]{64}", place),
           f"--{name} {place}: a URL must be https://…#sha256=<64 hex digits>")
          for name, place in (("resume", o.resume), ("initialize", o.initialize))),
    ]
    return next((message for holds, message in checks if not holds), None)


def _first_conflict(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str | None:
    """Return a message about the first contradiction among the options; None if there is none."""
    o, mixing, probes = options, mixes(options), options.linear_probe and not options.eval
    of_teacher = [name for name in vars(o) if name.startswith(("teacher_", "distillation_"))]
    idle = next((f"--{name} {getattr(o, name)}" for name in changed(o, of_teacher, parser)), None)
    unknown = unknown_data_set(o.data_set)
    checks = [
        (unknown is None, unknown),
        (o.warmup_steps > 0 or o.warmup_epochs <= o.epochs or o.eval,
         f"--warmup_epochs {o.warmup_epochs} is longer than the run, --epochs {o.epochs}: give one up to {o.epochs} "
         "(0: none), or --recipe short"),
        (not mixing or o.batch_size % 2 == 0 or o.eval,
         f"--batch_size {o.batch_size} is odd, but mixup and cutmix pair the images of a batch; make it even or set "
         "--mixup 0 --cutmix 0"),
        (o.cutmix_minmax is None or (len(o.cutmix_minmax) == 2 and 0 <= o.cutmix_minmax[0] < o.cutmix_minmax[1] <= 1),
         "--cutmix_minmax takes two numbers from 0 to 1, the least and the most"),
        (o.weight_decay > 0 or not o.weight_decay_end,
         f"--weight_decay_end {o.weight_decay_end} needs a --weight_decay above 0"),
        (o.model_ema or not o.model_ema_eval, "--model_ema_eval true needs --model_ema true"),
        (not (o.model_ema_eval and o.model_ema_force_cpu),
         "--model_ema_eval needs the average on the device: leave out --model_ema_force_cpu"),
        (not o.wandb_ckpt or (o.enable_wandb and o.output_dir and not o.disable_eval),
         "--wandb_ckpt true stores the best checkpoint: it needs --enable_wandb true, an --output_dir and evaluation"),
        (o.data_set.startswith(("torch/", "hfds/"))
         or not (o.train_split or o.val_split or o.input_key or o.target_key),
         "--train_split, --val_split, --input_key and --target_key are for torch/NAME and hfds/NAME, "
         f"not for {o.data_set}"),
        (o.init == "timm" or not o.initialize, f"--init {o.init} is for random init, not with --initialize"),
        (o.compile_mode == "default" or o.update_freq == 1,
         f"--compile_mode {o.compile_mode} replays CUDA graphs, which overwrite accumulated gradients: it needs "
         "--update_freq 1"),
        (o.compile or o.compile_mode == "default", f"--compile_mode {o.compile_mode} needs --compile"),
        (o.cache != "none" or o.cache_size is None, f"--cache_size {o.cache_size} is for --cache ram or device"),
        (o.cache != "device" or o.augment == "device",
         "--cache device needs --augment device: timm's transforms take images on the host"),
        (o.distillation == "none" or o.teacher_model or o.teacher_path or o.eval,
         f"--distillation {o.distillation} needs a teacher: --teacher_model NAME or --teacher_path FILE"),
        (o.distillation != "none" or not idle, f"{idle} is for --distillation logits or features"),
        (o.distillation != "features" or o.distillation_tau == 1,
         f"--distillation_tau {o.distillation_tau} is for --distillation logits: features have no temperature"),
        (not probes or o.distillation == "none",
         f"--linear_probe true learns from the labels alone, not by --distillation {o.distillation}"),
        (not probes or not o.drop_path, f"--drop_path {o.drop_path} is for blocks that --linear_probe true freezes"),
        (not probes or o.layer_decay == 1, f"--layer_decay {o.layer_decay} is for layers that --linear_probe true freezes"),
        (o.cache == "none" or not computes_features_once(o),
         f"--cache {o.cache} has nothing to speed up: --linear_probe true without augmentation reads each image once"),
        (o.start_epoch < o.epochs or o.eval,
         f"--start_epoch {o.start_epoch} is not before the end, --epochs {o.epochs}"),
    ]
    return next((message for holds, message in checks if not holds), None)
