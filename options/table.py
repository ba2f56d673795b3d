"""The table of main.py's options: names, types, defaults, recipes, and which of them may change between runs and processes."""

import argparse

from options.parser import BOOLEAN, MODEL_KEY, Formatter, Parser, add_keywords, below_one, epochs, number

DATA_SETS = (
    "CIFAR10 CIFAR100 IMNET image_folder flowers pets stl10 food101 dtd svhn eurosat fashion_mnist digits".split()
)

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


# What follows is laid out by hand, an option or a check per line where it fits.
# fmt: off


def training_parser() -> argparse.ArgumentParser:
    description = "Train a small model, from selected weights (--initialize) or from random init."
    parser = Parser(prog="main.py", description=description, formatter_class=Formatter)
    positive, count, share = number(int, 1), number(int, 0), number(float, 0, 1)

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", default="convnext_tiny", metavar="NAME", help="vit_tiny, convnext_femto, … or any name of timm")
    add_keywords(group, "--model_kwargs", "arguments of the model's constructor")
    add("--input_size", default=224, type=positive, metavar="PIXELS", help="side of the images the model sees")
    add("--drop_path", default=0.0, type=share, help="stochastic depth rate of the last block")
    add("--layer_scale_init_value", default=1e-6, type=number(float), help="ConvNeXt: initial value of its layer scales")
    add("--head_init_scale", default=1.0, type=number(float), help="ConvNeXt: factor on the classifier's initial weights")

    add = parser.add_argument_group("initialization").add_argument
    add("--initialize", default="", metavar="FILE", help="a file of weight_selection.py, the folder it wrote to, or "
        "https://…#sha256=…; leave it out for the random-init baseline")
    add("--init", choices=("timm", "xavier", "kaiming", "mimetic"), default="timm", help="random init: timm's own, or "
        "a baseline of the paper's comparison; mimetic is for ViTs")
    add("--model_key", default="model|module", help="where in the file to look first, before state_dict; a single name, "
        "e.g. model_ema, must be there")
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
    add("--color_jitter", type=number(float, 0), default=0.4, help="strength, if --aa is off")
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
    add("--cutmix_minmax", type=share, nargs="+", metavar="SHARE",
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
    add("--opt_eps", default=1e-8, type=number(float, 0), help="optimizer epsilon")
    add("--opt_betas", type=below_one, nargs="+", metavar="BETA", help="optimizer betas (default: the optimizer's)")
    add("--momentum", type=below_one, default=0.9, help="for optimizers with momentum")
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
    add_keywords(group, "--teacher_kwargs", "arguments of its constructor")
    add("--teacher_path", metavar="FILE", help="a file of its weights; or a run of main.py (its folder or a "
        "checkpoint) or a folder of export.py, which say what model it is")
    add("--teacher_key", default=MODEL_KEY, help="where in the file its weights are, e.g. model_ema")
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

    add("--dist_timeout", default=600.0, type=number(float, 1, 10**7), metavar="SECONDS",
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
