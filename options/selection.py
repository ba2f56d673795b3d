"""The options of weight_selection.py: the names of rules and parts, and the checks that need neither weights nor images."""

import argparse

from options.parser import BOOLEAN, MODEL_KEY, Formatter, Parser, add_keywords, changed, expression, gain, number

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
            not (o.new_head and take),
            f"--new_head {o.new_head} makes a file for readers that want every key, and --take leaves some out: give one of "
            "them",
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
    given = changed(options, names, _selection_parser())
    lines = [f"--{name} has no effect without --refit true or a rule by activation" for name in given]
    if options.plan and options.output_dir:
        lines.append("--output_dir has no effect with --plan: nothing is written there")
    return lines


# What follows is laid out by hand, an option or a check per line where it fits.
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
        "pytorch_model.bin; or a run of main.py (its folder or a checkpoint) or a folder of export.py, which say what model "
        "it is")
    add("--model_key", default=MODEL_KEY, help="where in the file to look first; a single name, e.g. "
        "model_ema, must be there")
    add("--model_prefix", default="", help="take only keys that begin with it (default: what fits the teacher)")
    add_keywords(group, "--pretrained_kwargs", "arguments of the teacher's constructor, for a custom size")
    add("--student_model", metavar="NAME", help="any smaller model of the same family")
    add_keywords(group, "--student_kwargs", "arguments of the student's constructor")


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
    add("--ridge", type=number(float, 0, or_inf=True), default=0.01,
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
