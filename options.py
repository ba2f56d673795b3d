"""The options of the scripts: names, types, defaults, and the checks that need neither data nor model.

Standard library only, and imported before torch, so that `-h` and usage errors answer at once.
"""

import argparse
import os
import re

DATA_SETS = (
    "CIFAR10 CIFAR100 IMNET image_folder flowers pets stl10 food101 dtd svhn eurosat fashion_mnist digits".split()
)
LAYER_RULES = ("first", "last", "middle", "uniform")
ACTIVATION_RULES = ("energy", "coverage", "magnitude_energy")  # element rules that need images
# element rules that need a score for each index
SCORED_RULES = ("magnitude", "magnitude_inconsistent", "l1_inconsistent", *ACTIVATION_RULES)
# element rules by which each axis of each tensor chooses for itself
INCONSISTENT_RULES = ("random_inconsistent", "magnitude_inconsistent", "l1_inconsistent")
ELEMENT_RULES = ("uniform", "consecutive", "random", "random_inconsistent", *SCORED_RULES)
HEAD_RULES = ("blend", "keep")
PARTS = ("patch_embed", "tokens", "pos_embed", "attention", "conv", "mlp", "norm", "downsample", "head")  # of models
REFIT_TARGETS = ("stream", "outputs")
LEAST_IMAGES = 16
SELECTION_FAMILIES = ("vit", "convnext", "eva", "swin", "mixer", "resnet")
# What may change when a run is resumed. Every other option decides which weights come out. bad_images is here because
# both its values give the same weights up to the first bad image, which ends a run with `fail`.
FREE_ON_RESUME = frozenset(
    "auto_resume bad_images data_path device disable_eval dist_eval dist_on_itp dist_timeout dist_url enable_wandb "
    "eval eval_data_path local_rank log_dir log_freq num_workers output_dir pin_mem progress project recipe resplit "
    "resume save_ckpt save_ckpt_freq save_ckpt_num save_ckpt_steps start_epoch teacher_path wandb_ckpt world_size".split()
)
# What an evaluation does not take from the run that it evaluates: where and how fast this process computes, what it
# reads and writes.
FREE_IN_EVALUATION = frozenset(
    "auto_resume compile compile_mode deterministic device disable_eval dist_on_itp dist_timeout dist_url enable_wandb "
    "eval initialize local_rank log_dir log_freq output_dir progress project resplit resume save_ckpt save_ckpt_freq "
    "save_ckpt_num save_ckpt_steps start_epoch wandb_ckpt world_size".split()
)


# What may differ between the processes of one run: where each node has its files, how it reads them, and what the first
# process alone writes.
FREE_PER_RANK = frozenset(
    "data_path device dist_on_itp dist_timeout dist_url enable_wandb eval_data_path local_rank log_dir num_workers pin_mem "
    "progress project resplit save_ckpt_freq save_ckpt_num teacher_path wandb_ckpt world_size".split()
)
PATHS = ("initialize", "output_dir", "resume")  # may differ too, but all processes have one or none


# What --recipe sets of main.py, each only if it is not given itself. A function takes the other options.
RECIPES = {
    "paper": {},  # 300 epochs: the defaults
    "short": {  # up to some 30 epochs: random crops and flips are augmentation enough
        "epochs": 30,
        "warmup_epochs": lambda options: options.epochs / 10,
        "lr": None,  # SHORT_LR per 512 images
        "aa": "none",
        "color_jitter": 0.0,
        "reprob": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
    },
}
SHORT_LR = 1e-3
# What --linear_probe sets, each only if it is not given itself: every epoch then has the same images.
WITHOUT_AUGMENTATION = {"aa": "none", "color_jitter": 0.0, "hflip": 0.0, "reprob": 0.0, "mixup": 0.0, "cutmix": 0.0}


class Settings:
    """The base of dataclasses whose fields are options of the same names: what one part of a run takes of them."""

    @classmethod
    def from_options(cls, options: argparse.Namespace, **others):
        """Take the fields' values from the options, or from `others` if they are there."""
        from dataclasses import fields  # here, because -h need not wait for it

        names = [field.name for field in fields(cls) if field.name not in others]
        return cls(**{name: getattr(options, name) for name in names}, **others)


def boolean(text: str) -> bool:
    """Parse true/false, yes/no, t/f, y/n or 1/0, in any case."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


BOOLEAN = {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}  # the option alone means true


def keyword(text: str) -> tuple[str, object]:
    """Parse `name=value`: the value as a Python literal, with true, false and none in any case, or else as text."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    return name, _literal(value)


def _literal(text: str) -> object:
    """Return the value of a Python literal in which true, false and none have any case; other text as it is."""
    import ast  # here, because -h need not wait for it

    class Words(ast.NodeTransformer):
        def visit_Name(self, node):
            words = {"true": True, "false": False, "none": None}
            return ast.Constant(words[node.id.lower()]) if node.id.lower() in words else node

    try:
        return ast.literal_eval(Words().visit(ast.parse(text.strip(), mode="eval")))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # what literal_eval raises
        return text


def keyword_text(name: str, value: object) -> str:
    """Write `name=value` so that `keyword` reads it back."""
    text = f"{name}={value}"
    return text if isinstance(value, str) and keyword(text) == (name, value) else f"{name}={value!r}"


class Keywords(argparse.Action):
    """Collect `name=value …` into a dict."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), **dict(values)})


def text_values(options: argparse.Namespace) -> list[str]:
    """Return a line that lists the NAME=VALUE that are text, and one for those that are None; none if there are none.

    Text is no number, true or false, and timm drops arguments that are None.
    """
    given = [
        (f"--{option} {name}={value}", value)
        for option, values in vars(options).items()
        if option.endswith("_kwargs") and values
        for name, value in values.items()
    ]
    text = [shown for shown, value in given if isinstance(value, str)]
    dropped = [shown for shown, value in given if value is None]
    return [
        *([f"taken as text, not as a number, true, false or none: {', '.join(text)}"] if text else []),
        *([f"left at the constructor's default, as timm does with None: {', '.join(dropped)}"] if dropped else []),
    ]


def number(kind: type, low: float, high: float = float("inf")):
    """Return a parser for numbers of `kind` from `low` to `high`, both included."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            wanted = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    parse.__name__ = kind.__name__
    return parse


def epochs(text: str) -> float:
    """Parse a number of epochs, at least 0; a whole one is an int."""
    value = number(float, 0)(text)
    return int(value) if value.is_integer() else value


def expression(text: str) -> str:
    """Return a regular expression that compiles."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is not a regular expression: {error}") from None
    return text


def gain(text: str) -> float:
    """Parse a power from -10 to 10, or `width`: 0.5, which keeps the variance of what independent inputs add up to."""
    try:
        return 0.5 if text == "width" else number(float, -10, 10)(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither width nor a number from -10 to 10") from None


def _keywords(group, name: str, help: str) -> None:
    group.add_argument(name, type=keyword, action=Keywords, nargs="+", default={}, metavar="NAME=VALUE", help=help)


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Add the default to every help text that has a use for it."""

    def _get_help_string(self, action):
        if action.default in (None, "", {}) or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """The parser of each script. A usage error is one line, which names what is nearest to a mistyped word."""

    def __init__(self, **given) -> None:
        super().__init__(allow_abbrev=False, **given)  # an abbreviation would let a mistyped option pass as another one

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            from utils import hint  # here, because -h need not wait for it

            dashes = ("-", "–", "—")  # noqa: RUF001 (word processors make such dashes)
            word = next((word for word in unknown if word.startswith(dashes)), unknown[0]).partition("=")[0]
            self.error(f"unrecognized argument {word}{hint(word, self._option_string_actions)}")
        return options

    def error(self, message: str) -> None:
        """End the process with code 2 and a line, which only the first process of several prints."""
        from utils import UserError, is_first_process

        line = f"{self.prog}: error: {UserError(message)}; -h lists the options\n"
        self.exit(2, line if is_first_process() else None)

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            from utils import hint

            known = list(map(str, action.choices))
            message = f"{value} is none of {', '.join(known)}{hint(str(value), known)}"
            raise argparse.ArgumentError(action, message)

    def _print_message(self, message: str, file=None) -> None:
        """Write what the stream can show. It is None if it is closed; its reader may have gone, as in `-h | head -1`."""
        if not (message and file):
            return
        encoding = file.encoding or "utf-8"
        try:
            file.write(message.encode(encoding, "replace").decode(encoding))
            file.flush()
        except OSError:  # Python flushes once more at exit, which must not fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def selection_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the validated options of weight_selection.py; end the process with code 2 on a usage error."""
    parser = _selection_parser()
    options = parser.parse_args(argv)
    if not (options.output_dir or options.plan):
        parser.error("the following arguments are required: --output_dir")
    if needs_images(options) and not options.data_path:
        cause = "--refit true" if options.refit else f"--element_selection {options.element_selection}"
        parser.error(f"{cause} needs --data_path: images to run the teacher on")
    problem = _selection_conflict(options)
    if problem:
        parser.error(problem)
    return options


def _selection_conflict(options: argparse.Namespace) -> str | None:
    """Return a message about the first contradiction among weight_selection.py's options; None if there is none."""
    o, rule, take = options, options.element_selection, options.take or ()
    classes = o.student_kwargs.get("num_classes", o.new_head)
    checks = [
        (
            not o.refit or rule not in INCONSISTENT_RULES,
            f"--refit true needs channels that agree between tensors, not --element_selection {rule}",
        ),
        (
            not (o.refit and take),
            "--refit true fits the whole student, of which --take leaves out parts: give one of them",
        ),
        (
            not (o.new_head and o.include_head),
            f"--new_head {o.new_head} is a head without the teacher's weights: leave out --include_head",
        ),
        (
            not (o.new_head and "head" in take),
            f"--new_head {o.new_head} is a head without the teacher's weights: leave head out of --take",
        ),
        (
            not o.new_head or classes == o.new_head,
            f"--new_head {o.new_head} is not the num_classes={classes} of --student_kwargs",
        ),
    ]
    return next((message for holds, message in checks if not holds), None)


def needs_images(options: argparse.Namespace) -> bool:
    """Return whether weight_selection.py has to run the models."""
    return options.refit or options.element_selection in ACTIVATION_RULES


def given_in_vain(options: argparse.Namespace) -> list[str]:
    """Return a line for each option of weight_selection.py that is given and has no effect."""
    about_images = "ridge refit_target refit_layers data_set data_path calibration_images input_size"
    names = [] if needs_images(options) else f"{about_images} imagenet_default_mean_and_std".split()
    changed = _changed(options, names, _selection_parser())
    lines = [f"--{name} has no effect without --refit true or a rule by activation" for name in changed]
    if options.plan and options.output_dir:
        lines.append("--output_dir has no effect with --plan: nothing is written there")
    return lines


def _changed(options: argparse.Namespace, names: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return those of `names` whose values are not the parser's defaults."""
    return [name for name in names if getattr(options, name) != parser.get_default(name)]


def training_options(
    argv: list[str] | None = None, run: dict | None = None, *, program: str = "main.py"
) -> argparse.Namespace:
    """Return the validated options of main.py; end the process with code 2 on a usage error, in the program's name.

    With `--eval true`, what is not given comes from the evaluated run, whose options main.py learns from the checkpoint
    and passes as `run` in a second call, {} if there is no checkpoint. Contradictions between options wait for that.
    """
    parser = _training_parser()
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


def sweep_options(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return the validated options of sweep.py, and those that it hands on to main.py, as words.

    End the process with code 2 on a usage error of either.
    """
    parser = _sweep_parser()
    options, words = parser.parse_known_args(argv)
    training = training_options(words, program=parser.prog)
    refused = [
        (options.seed is not None, "--seed is set for each run: --seeds N takes the seeds from 0 to N-1"),
        (training.resume, "--resume is for one run: a sweep resumes each of its runs by itself"),
        (training.eval, "--eval true trains nothing"),
        (training.disable_eval, "--disable_eval true leaves nothing to compare"),
        (not training.save_ckpt, "--save_ckpt false: a run could not be resumed; --save_ckpt_num 1 keeps the newest"),
        (not training.auto_resume, "--auto_resume false: a sweep goes on where it was stopped"),
    ]
    problem = next((message for is_given, message in refused if is_given), None)
    if problem:
        parser.error(problem)
    return options, words


def export_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of export.py; end the process with code 2 on a usage error."""
    return _export_parser().parse_args(argv)


def predict_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of predict.py; end the process with code 2 on a usage error."""
    return _predict_parser().parse_args(argv)


def training_defaults() -> dict:
    """Return the default of each option of main.py."""
    return vars(_training_parser().parse_args([]))


def peak_lr(options: argparse.Namespace, images_per_update: int) -> float:
    """Return --lr or, if a recipe leaves it open, one in proportion to the total batch."""
    return SHORT_LR * images_per_update / 512 if options.lr is None else options.lr


def settled(options: argparse.Namespace, images_per_update: int) -> argparse.Namespace:
    """Return a run's options with its peak learning rate, and without those that have no effect."""
    # features that are computed once have no memory layout, and their classifier is too small to be compiled
    idle = {"compile": False, "channels_last": False} if computes_features_once(options) else {}
    return argparse.Namespace(**vars(options) | {"lr": peak_lr(options, images_per_update)} | idle)


def unknown_data_set(name: str) -> str | None:
    """Return the message about a data set's name that is none of ours; None for ours, torch/NAME and hfds/NAME."""
    if name in DATA_SETS or re.fullmatch(r"(torch|hfds)/.+", name):
        return None
    from utils import hint

    return f"--data_set {name} is none of {', '.join(DATA_SETS)}, torch/NAME, hfds/NAME{hint(name, DATA_SETS)}"


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


# The tables below are laid out by hand, an option or a check per line where it fits.
# fmt: off


def _pair_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model_type", choices=SELECTION_FAMILIES, help="family; picks a pair of models if none is named "
        "(default: vit, from ViT-S to ViT-T)")
    add("--pretrained_model", metavar="NAME",
        help="teacher: a name of timm 0.6.12 or 1.x, hf-hub:USER/NAME, or one of ours (default: "
        "vit_small_patch16_224_in21k, convnext_tiny_in22k, …)")
    add("--pretrained_path", metavar="FILE", help="read the teacher's weights from this file instead of the network: "
        ".safetensors, .pth, .pt, .bin, an .index.json of these, .npz, a folder with model.safetensors or "
        "pytorch_model.bin; or the folder or a checkpoint of a run of main.py, which says what model it is")
    add("--model_key", default="model|module|state_dict", help="where in the file to look first; a single name, e.g. "
        "model_ema, must be there")
    add("--model_prefix", default="", help="take only keys that begin with it (default: what fits the teacher)")
    _keywords(group, "--pretrained_kwargs", "arguments of the teacher's constructor, for a custom size")
    add("--student_model", metavar="NAME", help="any smaller model of the same family")
    _keywords(group, "--student_kwargs", "arguments of the student's constructor")


def _selection_parser() -> argparse.ArgumentParser:
    description = "Cut a larger pretrained model's weights into the shape of a smaller one."
    parser = Parser(prog="weight_selection.py", description=description, formatter_class=Formatter)
    add = parser.add_argument
    add("--output_dir", help="folder for <family>.pth, or a file ending in .pth, .pt or .safetensors")

    _pair_options(parser.add_argument_group("the two models"))
    _add_choices(parser)
    _add_refit(parser)

    add = parser.add_argument_group("showing the plan").add_argument
    add("--plan", action="store_true", help="print the plan as JSON and stop; reads no weights except for the element rules by "
        "norm, and weights and images for the rules by activation")
    add("--plot", metavar="FILE.png", help="draw the plan")
    return parser


def _add_choices(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to select").add_argument
    add("--layer_selection", choices=LAYER_RULES, default="first",
        help="which of the teacher's layers, in each stage")
    add("--element_selection", choices=ELEMENT_RULES, help="which indices of each axis group; magnitude: those "
        "with the largest weights; …_inconsistent: each axis of each tensor chooses for itself, at random, by L2 norm "
        "(magnitude) or by L1 norm (l1); energy, coverage, magnitude_energy: by activations on the images of "
        "--data_path (default: uniform, as in the paper; energy with --refit)")
    add("--heads", choices=HEAD_RULES,
        help="a student's head takes channels from several of the teacher's heads, or one whole head (default: "
        "blend, as in the paper; keep with --refit or if heads cannot be mixed)")
    add("--seed", default=0, type=number(int, 0, 2**63 - 1), help="for the random rules, the choice of images and the "
        "new head")
    add("--take", choices=PARTS, nargs="+", action="extend", metavar="PART",
        help=f"take only these parts of the student and leave the rest to random init: {', '.join(PARTS)} (default: all "
        "but head)")
    add("--gain", type=gain, default=0.0, metavar="width|NUMBER",
        help="multiply the weight of each dense layer and convolution by (teacher's inputs / student's inputs) to the power "
        "NUMBER; width: 0.5; 0: leave them")
    add("--include_head", **BOOLEAN, default=False,
        help="select the classifier too; the numbers of classes must agree")
    add("--new_head", type=number(int, 1), metavar="N", help="add a head of N classes with timm's own initial values, "
        "for readers that want every key")


def _add_refit(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("refit, and rules by activation").add_argument
    add("--refit", **BOOLEAN, default=False,
        help="after the selection, fit each layer so that the student's activations are the teacher's; no labels needed")
    add("--ridge", type=number(float, 0), default=0.01,
        help="how strongly the refit holds on to the selected weights, from 0 to inf")
    add("--refit_target", choices=REFIT_TARGETS, default="stream", help="what a layer that writes to the stream "
        "should give: what the student's stream lacks of the teacher's, or what the teacher's layer gives")
    add("--refit_layers", type=expression, default="", metavar="REGEX",
        help="refit only layers whose weights have such a name; the others stay as selected (default: all)")
    add("--data_set", default="image_folder", help="whose training images to use, as in main.py")
    add("--data_path", metavar="FOLDER", help="where they are; of image_folder, with or without folders of classes")
    add("--calibration_images", type=number(int, LEAST_IMAGES), default=1024, metavar="N",
        help="how many to use; a fifth of them measures the refit")
    add("--input_size", type=number(int, 1), metavar="PIXELS", help="side of the images (default: the student's, or the "
        "teacher's run's)")
    add("--exif", **BOOLEAN, default=False, help="turn images as their EXIF orientation says, as in main.py")
    add("--imagenet_default_mean_and_std", **BOOLEAN, default=True, help="false: mean and std of 0.5")


def _sweep_parser() -> argparse.ArgumentParser:
    description = ("Train from random init and from selected weights with several seeds, then compare the runs. All other "
        "options go to main.py: python main.py -h lists them.")
    parser = Parser(prog="sweep.py", description=description, formatter_class=Formatter)
    add = parser.add_argument
    add("--initialize", required=True, nargs="+", action="extend", metavar="FILE",
        help="start from these weights, as in main.py; each FILE is compared with random init")
    add("--output_dir", required=True, metavar="FOLDER", help="for the runs, table.md and curves.png; the same command "
        "goes on there")
    add("--seeds", default=3, type=number(int, 1), metavar="N", help="how many")
    add("--nproc_per_node", default=1, type=number(int, 1), metavar="N",
        help="train each run on N processes, by torchrun")
    add("--seed", help=argparse.SUPPRESS)
    return parser


def _export_parser() -> argparse.ArgumentParser:
    description = "Write a trained model as a folder that timm, transformers and the Hugging Face Hub take."
    parser = Parser(prog="export.py", description=description, formatter_class=Formatter)
    add = parser.add_argument
    add("run", metavar="RUN", help="the folder of a run of main.py (its best checkpoint), or a checkpoint")
    add("folder", metavar="OUT", help="folder to write")
    add("--model_key", default="model", choices=("model", "model_ema"), help="the weights, or their moving average")
    add("--onnx", **BOOLEAN, default=False, help="write model.onnx too, for any batch size")
    add("--data_path", metavar="FOLDER", help="where the evaluation data is (default: where the run had it)")
    add("--check_accuracy", **BOOLEAN, default=True,
        help="measure the accuracy on all of the evaluation data; false: compare the logits of 64 images alone")
    return parser


def _predict_parser() -> argparse.ArgumentParser:
    description = "Print the likeliest classes of images, a line per image."
    parser = Parser(prog="predict.py", description=description, formatter_class=Formatter)
    add = parser.add_argument
    add("model", metavar="RUN_OR_FOLDER", help="the folder of a run of main.py (its best checkpoint), a checkpoint, or a "
        "folder of export.py")
    add("images", metavar="IMAGE", nargs="+", help="images, and folders of images")
    add("--model_key", default="model", choices=("model", "model_ema"), help="a run's weights, or their moving average")
    add("--top", default=5, type=number(int, 1), metavar="N", help="classes per image")
    add("--json", action="store_true", help="a JSON object per line")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), cuda, cuda:1, mps or cpu")
    return parser


def _first_mistake(options: argparse.Namespace) -> str | None:
    """Return a message about the first option that is wrong whatever an evaluated run adds; None if there is none."""
    o = options
    checks = [
        (not (o.eval and o.disable_eval), "--eval true and --disable_eval true leave nothing to do"),
        *((not place.startswith("http") or re.fullmatch(r"https://[^#]+#sha256=[0-9a-fA-F]{64}", place),
           f"--{name} {place}: a URL must be https://…#sha256=<64 hex digits>")
          for name, place in (("resume", o.resume), ("initialize", o.initialize))),
    ]
    return next((message for holds, message in checks if not holds), None)


def _first_conflict(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str | None:
    """Return a message about the first contradiction among the options; None if there is none."""
    o, mixing, probes = options, mixes(options), options.linear_probe and not options.eval
    of_teacher = [name for name in vars(o) if name.startswith(("teacher_", "distillation_"))]
    idle = next((f"--{name} {getattr(o, name)}" for name in _changed(o, of_teacher, parser)), None)
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


def _training_parser() -> argparse.ArgumentParser:
    description = "Train a small model, from selected weights (--initialize) or from random init."
    parser = Parser(prog="main.py", description=description, formatter_class=Formatter)
    positive, count, share = number(int, 1), number(int, 0), number(float, 0, 1)

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", default="convnext_tiny", metavar="NAME", help="vit_tiny, convnext_femto, … or any name of timm")
    _keywords(group, "--model_kwargs", "arguments of the model's constructor")
    add("--input_size", default=224, type=positive, metavar="PIXELS", help="side of the images the model sees")
    add("--drop_path", default=0.0, type=share, help="stochastic depth rate of the last block")
    add("--layer_scale_init_value", default=1e-6, type=float, help="ConvNeXt: initial value of its layer scales")
    add("--head_init_scale", default=1.0, type=float, help="ConvNeXt: factor on the classifier's initial weights")

    add = parser.add_argument_group("initialization").add_argument
    add("--initialize", default="", metavar="FILE", help="a file of weight_selection.py, the folder it wrote to, or "
        "https://…#sha256=…; leave it out for the random-init baseline")
    add("--init", choices=("timm", "xavier", "kaiming", "mimetic"), default="timm", help="random init: timm's own, or "
        "a baseline of the paper's comparison; mimetic is for ViTs")
    add("--model_key", default="model|module", help="where in the file to look first; a single name, e.g. model_ema, "
        "must be there")
    add("--model_prefix", default="", help="take only keys that begin with it (default: what fits the model)")

    add = parser.add_argument_group("data").add_argument
    add("--data_set", default="IMNET", help=f"{', '.join(DATA_SETS)}, torch/NAME or hfds/NAME")
    add("--data_path", default="/datasets01/imagenet_full_size/061417/",
        help="where the data is, or will be downloaded to")
    add("--eval_data_path", help="another place for the evaluation data")
    add("--nb_classes", type=positive, metavar="N", help="checked against the data (default: what the data has)")
    add("--data_fraction", default=1.0, type=number(float, 1e-9, 1), help="train on this seeded, class-balanced share")
    add("--train_split", help="split to train on, for torch/NAME and hfds/NAME (default: train)")
    add("--val_split", help="split to evaluate on, for torch/NAME and hfds/NAME (default: validation)")
    add("--input_key", help="column of the images, for hfds/NAME")
    add("--target_key", help="column of the labels, for hfds/NAME")
    add("--imagenet_default_mean_and_std", **BOOLEAN, default=True, help="false: mean and std of 0.5")
    add("--num_workers", default=10, type=count, help="processes that load images, per training process")
    add("--pin_mem", **BOOLEAN, default=True, help="pinned memory for copies to a GPU")

    add("--exif", **BOOLEAN, default=False, help="turn images as their EXIF orientation says; torchvision does not")
    add("--bad_images", default="fail", choices=("fail", "skip"),
        help="an image that cannot be read ends the run, or is replaced by the next readable one and counted in the "
        "log")
    add("--cache", default="none", choices=("none", "ram", "device"), help="decode all images once and keep them in "
        "memory that the processes of a node share, or on the training device")
    add("--cache_size", type=positive, metavar="PIXELS", help="shrink the short side of cached images to this; "
        "with --cache device both sides (default: as stored)")

    add = parser.add_argument_group("augmentation").add_argument
    add("--augment", default="timm", choices=("timm", "device"), help="image by image in workers, as the paper's code "
        "does, or in batches on the training device, with the same distribution")
    add("--hflip", type=share, default=0.5, help="probability of a horizontal flip; 0 for digits and letters")
    add("--color_jitter", type=float, default=0.4, help="strength, if --aa is off")
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's AutoAugment policy, or none")
    add("--train_interpolation", default="bicubic", choices=("random", "bilinear", "bicubic"),
        help="for the random crop")
    add("--smoothing", type=share, default=0.1, help="label smoothing")
    add("--reprob", type=share, default=0.25, help="random erasing probability")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="random erasing fill")
    add("--recount", type=positive, default=1, help="random erasing: most boxes per image")
    add("--crop_pct", type=number(float, 0.01, 1), help="evaluation: crop side / resized side (default: 224/256)")
    add("--mixup", type=number(float, 0), default=0.8, help="mixup alpha; 0: no mixup")
    add("--cutmix", type=number(float, 0), default=1.0, help="cutmix alpha; 0: no cutmix")
    add("--cutmix_minmax", type=float, nargs="+", metavar="SHARE",
        help="least and greatest side of the cutmix box, instead of alpha")
    add("--mixup_prob", type=share, default=1.0, help="probability that a batch is mixed")
    add("--mixup_switch_prob", type=share, default=0.5, help="probability of cutmix if both are on")
    add("--mixup_mode", default="batch", choices=("batch", "pair", "elem"), help="what shares one draw")

    add = parser.add_argument_group("optimization").add_argument
    add("--recipe", choices=tuple(RECIPES), default="paper", help="defaults of the options: paper, for 300 epochs, or "
        "short, for up to some 30: --epochs 30, --warmup_epochs a tenth of them, --lr 1e-3 per 512 images of the total "
        "batch, and --aa none --color_jitter 0 --reprob 0 --mixup 0 --cutmix 0")
    add("--linear_probe", **BOOLEAN, default=False, help="train the classifier alone, on "
        "features of the rest in evaluation mode; sets --aa none and --color_jitter, --hflip, --reprob, --mixup, --cutmix "
        "to 0 unless given: images are then cropped as in the evaluation, and their features computed once. With "
        "any augmentation they are cropped at random too, and have a forward pass per step")
    add("--epochs", default=300, type=positive, help="length of the run")
    add("--batch_size", default=64, type=positive, help="images per process and backward pass")
    add("--update_freq", default=1, type=positive, help="backward passes per update: gradient accumulation")
    add("--opt", default="adamw", metavar="NAME", help="optimizer, by its name in timm")
    add("--opt_eps", default=1e-8, type=float, help="optimizer epsilon")
    add("--opt_betas", type=float, nargs="+", metavar="BETA", help="optimizer betas (default: the optimizer's)")
    add("--momentum", type=float, default=0.9, help="for optimizers with momentum")
    add("--lr", type=number(float, 0), default=4e-3, help="peak learning rate for the total batch; never rescaled")
    add("--min_lr", type=number(float, 0), default=1e-6, help="learning rate at the end of the cosine")
    add("--warmup_epochs", type=epochs, default=50, help="linear warm-up; may be a fraction")
    add("--warmup_steps", type=int, default=-1, help="linear warm-up in updates; replaces --warmup_epochs if above 0")
    add("--weight_decay", type=number(float, 0), default=0.05, help="for matrices; biases, norms and tokens have none")
    add("--weight_decay_end", type=number(float, 0), help="cosine to this value (default: constant)")
    add("--layer_decay", type=number(float, 0, 1), default=1.0,
        help="learning rate factor from each layer to the one below")
    add("--clip_grad", type=number(float, 0), metavar="NORM", help="greatest gradient norm (default: no clipping)")
    add("--model_ema", **BOOLEAN, default=False, help="keep a moving average of the weights")
    add("--model_ema_decay", type=share, default=0.9999, help="its decay per update")
    add("--model_ema_force_cpu", **BOOLEAN, default=False, help="keep it in host memory")
    add("--model_ema_eval", **BOOLEAN, default=False, help="evaluate it too")

    group = parser.add_argument_group("distillation")
    add = group.add_argument
    add("--distillation", default="none", choices=("none", "logits", "features"), help="learn from a teacher too: from "
        "its logits, if it has the data's classes, or from its pooled features, through an MLP")
    add("--teacher_model", metavar="NAME", help="any name as for --model; its weights are timm's without "
        "--teacher_path")
    _keywords(group, "--teacher_kwargs", "arguments of its constructor")
    add("--teacher_path", metavar="FILE", help="a file of its weights, or the folder or a checkpoint of a run of "
        "main.py, which says what model it is")
    add("--teacher_key", default="model|module|state_dict", help="where in the file its weights are, e.g. model_ema")
    add("--distillation_alpha", type=number(float, 0), default=1.0, help="weight of its loss beside the task's")
    add("--distillation_tau", type=number(float, 1e-3), default=1.0, help="temperature of the logits")

    add = parser.add_argument_group("device and speed").add_argument
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), cuda, cuda:1, mps or cpu")
    add("--use_amp", **BOOLEAN, default=False, help="mixed precision")
    add("--amp_dtype", choices=("float16", "bfloat16"),
        help="(default: float16 on cuda, with loss scaling; else bfloat16)")
    add("--compile", **BOOLEAN, default=False, help="torch.compile the model")
    add("--compile_mode", choices=("default", "reduce-overhead", "max-autotune"), default="default", help="of "
        "torch.compile; reduce-overhead replays CUDA graphs, for small batches")
    add("--channels_last", **BOOLEAN, default=False,
        help="memory layout, faster for ConvNeXt on GPUs")
    add("--deterministic", **BOOLEAN, default=False,
        help="same weights every time on a GPU too; slower")
    add("--seed", default=0, type=number(int, 0, 2**63 - 1), help="all randomness comes from it")

    add = parser.add_argument_group("evaluation, logs, checkpoints").add_argument
    add("--output_dir", default="", help="folder for config.json, log.txt and checkpoints; empty: keep nothing")
    add("--eval", **BOOLEAN, default=False, help="evaluate and stop")
    add("--disable_eval", **BOOLEAN, default=False, help="train without evaluation")
    add("--dist_eval", **BOOLEAN, default=True, help="share the evaluation among the processes")
    add("--resume", default="", metavar="FILE", help="continue from this checkpoint")
    add("--auto_resume", **BOOLEAN, default=True, help="continue from the newest checkpoint in --output_dir")
    add("--start_epoch", default=0, type=count, help="number of the first epoch if nothing is resumed")
    add("--save_ckpt", **BOOLEAN, default=True, help="write checkpoints")
    add("--save_ckpt_freq", default=1, type=positive, metavar="EPOCHS", help="between checkpoints")
    add("--save_ckpt_steps", type=positive, metavar="UPDATES",
        help="between checkpoints within an epoch (default: none)")
    add("--save_ckpt_num", default=3, type=positive, help="how many to keep besides the best")
    add("--log_freq", default=10, type=positive, metavar="UPDATES",
        help="between log lines, the only waits for the device")
    add("--progress", **BOOLEAN, help="a progress bar instead of log lines (default: on a terminal)")
    add("--log_dir", help="folder for TensorBoard")
    add("--enable_wandb", **BOOLEAN, default=False, help="log to Weights & Biases")
    add("--project", default="convnext", help="its project")
    add("--wandb_ckpt", **BOOLEAN, default=False, help="store the best checkpoint there")

    add("--dist_timeout", default=600.0, type=number(float, 1), metavar="SECONDS",
        help="end the run if a process does not answer the others for this long")
    for name, kind, default in (
        ("world_size", {"type": int}, 1),
        ("dist_url", {}, "env://"),
        ("resplit", BOOLEAN, False),
        ("dist_on_itp", BOOLEAN, False),
    ):
        parser.add_argument(f"--{name}", **kind, default=default, help=argparse.SUPPRESS)
    # launchers use both spellings; the environment says the same
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


# fmt: on


def plain(options: argparse.Namespace) -> dict:
    """Return the options as they would come back from JSON."""
    import json  # here, because -h need not wait for it

    return json.loads(json.dumps(vars(options), default=str))
