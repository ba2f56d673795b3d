"""What a study consists of: the initializations it compares, the models, how they are trained, the runs in order."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

TEACHER_DATA, STUDENT_DATA = "tiny-imagenet-200", "cifar10-jpeg"


class Arm(NamedTuple):
    """One kind of initialization of a student: from a teacher, by options of weight_selection.py, or at random."""

    title: str
    selection: str | None = ""  # "{seed}" stands for the run's seed; None: random init, no teacher
    teacher: str = "teacher"
    shuffled: bool = False  # shuffle each tensor of the teacher first


ARMS = {
    "random": Arm("random init", None),
    "selected": Arm("weight selection"),  # the paper's rules: first layers, evenly spaced channels, blended heads
    "shuffled": Arm("shuffled teacher", shuffled=True),
    "keep": Arm("whole heads", "--heads keep"),
    "consecutive": Arm("consecutive channels", "--element_selection consecutive"),
    "random_slots": Arm("random channels", "--element_selection random --seed {seed}"),
    "random_inconsistent": Arm("random, inconsistent", "--element_selection random_inconsistent --seed {seed}"),
    "magnitude": Arm("largest channels", "--element_selection magnitude"),
    "last_layers": Arm("last layers", "--layer_selection last"),
    "middle_layers": Arm("middle layers", "--layer_selection middle"),
    "uniform_layers": Arm("layers spread", "--layer_selection uniform"),
    "twice_blend": Arm("2x wide, 6 deep", "--heads blend", teacher="twice_teacher"),
    "twice_keep": Arm("2x wide, 6 deep, whole heads", "--heads keep", teacher="twice_teacher"),
    "wide_blend": Arm("4x wide, 6 deep", "--heads blend", teacher="wide_teacher"),
    "wide_keep": Arm("4x wide, 6 deep, whole heads", "--heads keep", teacher="wide_teacher"),
}
# the share of the student's training images, and options that override its model's
SHARES = {"full": (1.0, ""), "tenth": (0.1, ""), "tenth_lr4e-3": (0.1, "--lr 4e-3")}


class Model(NamedTuple):
    """A model and how it is trained. `minutes`: the time of all epochs on all images, on a CPU with one thread."""

    name: str
    kwargs: str
    training: str
    epochs: int
    minutes: float


class Study(NamedTuple):
    recipe: str  # options of main.py for every run
    models: dict[str, Model]  # by family and role, such as "vit/teacher"
    rows: list[tuple[str, str, str, range]]  # family, share, arms and seeds, in the order in which they run


# The paper's augmentation is made for 300 epochs. Ten epochs need little more than flips and padded crops.
_CPU_RECIPE = """--input_size 32 --batch_size 128 --warmup_epochs 1 --aa none --color_jitter 0 --mixup 0 --cutmix 0
    --reprob 0 --augment device --cache ram --cache_size 32 --num_workers 0 --device cpu"""
_VIT = "img_size=32 patch_size=8 "
STUDIES = {
    "cpu": Study(
        _CPU_RECIPE,
        {
            "vit/student": Model("vit_tiny", _VIT + "embed_dim=64 depth=6 num_heads=2", "--lr 1e-3", 10, 8),
            "vit/teacher": Model(
                "vit_tiny", _VIT + "embed_dim=128 depth=12 num_heads=4", "--lr 1e-3 --data_fraction 0.3", 20, 45
            ),
            # These two are as deep as the student, so that they differ from each other only in width.
            "vit/twice_teacher": Model(
                "vit_tiny", _VIT + "embed_dim=128 depth=6 num_heads=4", "--lr 1e-3 --data_fraction 0.3", 20, 25
            ),
            "vit/wide_teacher": Model(
                "vit_tiny", _VIT + "embed_dim=256 depth=6 num_heads=8", "--lr 1e-3 --data_fraction 0.3", 20, 75
            ),
            "convnext/student": Model("convnext_femto", "dims=24,48,96,192 depths=2,2,6,2", "--lr 4e-3", 10, 16),
            "convnext/teacher": Model(
                "convnext_tiny",
                "dims=48,96,192,384 depths=3,3,9,3",
                "--lr 2e-3 --data_fraction 0.3",
                20,
                60,
            ),
        },
        [
            ("vit", "full", "random selected shuffled", range(3)),
            ("vit", "tenth", "random selected shuffled", range(3)),
            ("convnext", "full", "random selected shuffled", range(3)),
            ("convnext", "tenth", "random selected shuffled", range(3)),
            # The rules on a tenth of the data, where the initialization matters more and a run takes two minutes.
            ("vit", "tenth", "keep consecutive random_slots random_inconsistent magnitude", range(3)),
            ("vit", "tenth", "last_layers middle_layers uniform_layers", range(3)),
            ("vit", "tenth", "wide_blend wide_keep twice_blend twice_keep", range(3)),
            # Is the gain only due to a learning rate that is too low for random init?
            ("vit", "tenth_lr4e-3", "random selected", range(3)),
        ],
    ),
    # The paper's models and recipe, but at 64 px for 90 epochs. Choose one row with --only, and give it its own --work
    # and --results: it includes its teacher, and `selected`, because students can be compared only with those of the
    # same teacher. The minutes are guesses for one H100. None of this has been run.
    "gpu": Study(
        "--input_size 64 --augment device --cache device --use_amp true --amp_dtype bfloat16 --compile --device cuda "
        "--num_workers 8",
        {
            "vit/student": Model(
                "vit_tiny", "img_size=64 patch_size=8", "--batch_size 512 --lr 2e-3 --warmup_epochs 15", 90, 2.2
            ),
            "vit/teacher": Model(
                "vit_small", "img_size=64 patch_size=8", "--batch_size 1024 --lr 1e-3 --warmup_epochs 9", 90, 8
            ),
            # a stem with patches of 2, so that the last stage sees 4 x 4 positions
            "convnext/student": Model(
                "convnext_femto",
                "patch_size=2",
                "--batch_size 1024 --lr 4e-3 --warmup_epochs 15 --drop_path 0.1 --channels_last",
                90,
                2.2,
            ),
            "convnext/teacher": Model(
                "convnext_tiny",
                "patch_size=2",
                "--batch_size 1024 --lr 1e-3 --warmup_epochs 9 --drop_path 0.1 --channels_last",
                90,
                8,
            ),
        },
        [
            ("vit", "full", "random selected", range(3)),
            ("convnext", "full", "random selected", range(3)),
            ("vit", "full", "selected shuffled", range(3)),
            ("convnext", "full", "selected shuffled", range(3)),
            ("vit", "full", "selected keep", range(3)),
        ],
    ),
}


@dataclass(frozen=True)
class Run:
    """The training of a teacher or a student. `teacher` is None: it starts from random init."""

    name: str  # its folder
    command: tuple[str, ...]  # options of main.py except --initialize
    epochs: int
    minutes: float
    is_teacher: bool = False
    teacher: "Run | None" = None
    shuffled: bool = False
    selection: tuple[str, ...] = ()  # options of weight_selection.py except the file of weights

    @property
    def checkpoint(self) -> str:
        return f"{self.name}/checkpoint-{self.epochs - 1}.pth"


def runs_of(study: Study) -> list[Run]:
    """Return all runs of a study in order, each teacher before the first run that needs it."""
    return list(dict.fromkeys(_in_order(study)))


def _in_order(study: Study) -> Iterator[Run]:
    for family, share, arms, seeds in study.rows:
        for seed in seeds:
            for arm in arms.split():
                student = _student(study, family, share, arm, seed)
                yield from [student.teacher, student] if student.teacher else [student]


def _student(study: Study, family: str, share: str, arm: str, seed: int) -> Run:
    model, choices, (fraction, override) = study.models[f"{family}/student"], ARMS[arm], SHARES[share]
    name = f"{family}/{share}/{arm}-{seed}"
    options = f"{_training(study, model, STUDENT_DATA)} {override} --data_fraction {fraction} --seed {seed}"
    command = tuple(f"{options} --output_dir {name}".split())
    student = Run(name, command, model.epochs, model.minutes * fraction + 0.5)  # half a minute to start and select
    if choices.selection is None:
        return student
    role = f"{family}/{choices.teacher}"
    teacher = study.models[role]
    options = f"{_training(study, teacher, TEACHER_DATA)} --output_dir {role}"
    selection = (
        f"--student_model {model.name} {_option('--student_kwargs', model.kwargs)} "
        f"--pretrained_model {teacher.name} {_option('--pretrained_kwargs', teacher.kwargs)} "
        f"{choices.selection.format(seed=seed)}"
    )
    return replace(
        student,
        teacher=Run(role, tuple(options.split()), teacher.epochs, teacher.minutes, is_teacher=True),
        shuffled=choices.shuffled,
        selection=tuple(selection.split()),
    )


def _option(option: str, values: str) -> str:
    return f"{option} {values}" if values else ""


def _training(study: Study, model: Model, data: str) -> str:
    return (
        f"--model {model.name} {_option('--model_kwargs', model.kwargs)} "
        f"--data_set image_folder --data_path data/{data} --epochs {model.epochs} {study.recipe} {model.training} "
        f"--save_ckpt_num 1 --log_freq 100 --progress false"
    )
