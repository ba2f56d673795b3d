"""What a study consists of: the initializations it compares, the models, how they are trained, the runs in order."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

TEACHER_DATA, STUDENT_DATA = "tiny-imagenet-200", "cifar10-jpeg"

_ON_IMAGES = f"--data_path data/{STUDENT_DATA}"
_REFIT = f"--refit true {_ON_IMAGES}"


class Arm(NamedTuple):
    """One kind of start, and of training, of a student.

    It starts from a teacher, by options of weight_selection.py, or at random. The teacher "tuned" is the family's
    teacher after it was trained on the student's images. `distilled`: the teacher whose logits it also learns from.
    """

    title: str
    selection: str | None = ""  # "{seed}" stands for the run's seed; None: random init, no teacher
    teacher: str = "teacher"
    shuffled: bool = False  # shuffle each tensor of the teacher first
    distilled: str = ""


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
    # Rules by activation, and the refit, which the paper does not have.
    "energy": Arm("channels by energy", f"--element_selection energy --heads keep {_ON_IMAGES}"),
    "coverage": Arm("channels by coverage", f"--element_selection coverage --heads keep {_ON_IMAGES}"),
    "magnitude_energy": Arm(
        "channels by norm, heads and units by energy", f"--element_selection magnitude_energy --heads keep {_ON_IMAGES}"
    ),
    "refit_selected": Arm("weight selection, refit", f"--element_selection uniform --heads blend {_REFIT}"),
    "refit_keep": Arm("whole heads, refit", f"--element_selection uniform {_REFIT}"),
    "refit_magnitude": Arm("largest channels, refit", f"--element_selection magnitude --heads blend {_REFIT}"),
    "refit_energy": Arm("energy, refit", f"--element_selection energy {_REFIT}"),
    "refit_coverage": Arm("coverage, refit", f"--element_selection coverage {_REFIT}"),
    "refit_magnitude_energy": Arm("norm and energy, refit", f"--element_selection magnitude_energy {_REFIT}"),
    "tuned_selected": Arm("tuned teacher, weight selection", teacher="tuned"),
    "tuned_refit": Arm("tuned teacher, refit", f"--element_selection energy {_REFIT}", teacher="tuned"),
    "distilled_random": Arm("random init, distilled", None, distilled="tuned"),
    "distilled_selected": Arm("weight selection, distilled", distilled="tuned"),
    "distilled_refit": Arm("refit, distilled", f"--element_selection energy {_REFIT}", distilled="tuned"),
    "chain": Arm(
        "tuned teacher, refit, distilled", f"--element_selection energy {_REFIT}", teacher="tuned", distilled="tuned"
    ),
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
    rates: tuple[str, ...] = ()  # learning rates that each arm tries on RATE_SEED; the best is that of its other seeds
    tuning: str = ""  # options by which a teacher is trained on the student's images


RATE_SEED = 3
CALIBRATION_IMAGES = 1024  # the default of weight_selection.py
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
    # Does a student that starts by computing the teacher's function end better, and with distillation? Each arm at the
    # best of three learning rates.
    "refit": Study(
        _CPU_RECIPE,
        {
            "vit/student": Model("vit_tiny", _VIT + "embed_dim=64 depth=6 num_heads=2", "", 10, 8),
            "vit/teacher": Model(
                "vit_tiny", _VIT + "embed_dim=128 depth=6 num_heads=4", "--lr 1e-3 --data_fraction 0.3", 12, 15
            ),
        },
        [
            ("vit", "tenth", "random selected magnitude keep", range(3)),
            ("vit", "tenth", "refit_energy refit_magnitude_energy refit_coverage", range(3)),
            ("vit", "tenth", "energy coverage magnitude_energy refit_selected refit_magnitude refit_keep", range(3)),
            ("vit", "tenth", "chain tuned_selected tuned_refit", range(3)),
            ("vit", "tenth", "distilled_random distilled_selected distilled_refit", range(3)),
        ],
        rates=("5e-4", "1e-3", "2e-3"),
        tuning="--lr 1e-3",
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
    selection: tuple[str, ...] | None = None  # options of weight_selection.py except the file; None: all weights
    distilled_from: "Run | None" = None

    @property
    def checkpoint(self) -> str:
        return f"{self.name}/checkpoint-{self.epochs - 1}.pth"

    @property
    def needs(self) -> list["Run"]:
        """List the runs that must be finished before this one, in order."""
        teachers = [teacher for teacher in (self.teacher, self.distilled_from) if teacher]
        return list(dict.fromkeys(run for teacher in teachers for run in (*teacher.needs, teacher)))


def runs_of(study: Study, best_rate: Callable[[str, str], str | None] = lambda section, arm: None) -> list[Run]:
    """Return all runs of a study in order, each after those that it needs.

    In a study with rates, `best_rate` names that of a section's arm, such as "vit/tenth", "random". As long as it
    returns None, the arm's runs are those that find it.
    """
    return list(dict.fromkeys(_in_order(study, best_rate)))


def _in_order(study: Study, best_rate: Callable[[str, str], str | None]) -> Iterator[Run]:
    for family, share, arms, seeds in study.rows:
        for arm in arms.split() if study.rates else ():
            for rate in study.rates:
                yield from _with_needs(_student(study, family, share, arm, RATE_SEED, rate))
        for seed in seeds:
            for arm in arms.split():
                rate = best_rate(f"{family}/{share}", arm) if study.rates else ""
                if rate is not None:
                    yield from _with_needs(_student(study, family, share, arm, seed, rate))


def _with_needs(run: Run) -> list[Run]:
    return [*run.needs, run]


def _student(study: Study, family: str, share: str, arm: str, seed: int, rate: str) -> Run:
    model, choices, (fraction, override) = study.models[f"{family}/student"], ARMS[arm], SHARES[share]
    name = f"{family}/{share}/{arm}{rate and f'@{rate}'}-{seed}"
    override += f" --lr {rate}" if rate else ""
    options = f"{_training(study, model, STUDENT_DATA)} {override} --data_fraction {fraction} --seed {seed}"
    student = Run(name, (), model.epochs, model.minutes * fraction + 0.5)  # half a minute to start and select
    if choices.distilled:
        distilled_from = _teacher(study, family, share, choices.distilled)
        options += f" --distillation logits --teacher_path {distilled_from.checkpoint}"
        student = replace(student, distilled_from=distilled_from, minutes=1.5 * student.minutes)
    student = replace(student, command=tuple(f"{options} --output_dir {name}".split()))
    if choices.selection is None:
        return student
    teacher = study.models[f"{family}/{'teacher' if choices.teacher == 'tuned' else choices.teacher}"]
    selection = (
        f"--student_model {model.name} {_option('--student_kwargs', model.kwargs)} "
        f"--pretrained_model {teacher.name} {_option('--pretrained_kwargs', teacher.kwargs)} "
        f"{choices.selection.format(seed=seed)}"
    )
    return replace(
        student,
        teacher=_teacher(study, family, share, choices.teacher),
        shuffled=choices.shuffled,
        selection=tuple(selection.split()),
    )


def _teacher(study: Study, family: str, share: str, role: str) -> Run:
    """Return the training of a teacher; the role "tuned" is the family's teacher, trained on the student's images."""
    if role != "tuned":
        model, name = study.models[f"{family}/{role}"], f"{family}/{role}"
        options = f"{_training(study, model, TEACHER_DATA)} --output_dir {name}"
        return Run(name, tuple(options.split()), model.epochs, model.minutes, is_teacher=True)
    model, name = study.models[f"{family}/teacher"], f"{family}/{share}/tuned"
    student, fraction = study.models[f"{family}/student"], SHARES[share][0]
    model = model._replace(training=study.tuning, epochs=student.epochs, minutes=4 * student.minutes * fraction)
    options = f"{_training(study, model, STUDENT_DATA)} --data_fraction {fraction} --output_dir {name}"
    teacher = _teacher(study, family, share, "teacher")
    return Run(name, tuple(options.split()), model.epochs, model.minutes, is_teacher=True, teacher=teacher)


def _option(option: str, values: str) -> str:
    return f"{option} {values}" if values else ""


def _training(study: Study, model: Model, data: str) -> str:
    return (
        f"--model {model.name} {_option('--model_kwargs', model.kwargs)} "
        f"--data_set image_folder --data_path data/{data} --epochs {model.epochs} {study.recipe} {model.training} "
        f"--save_ckpt_num 1 --log_freq 100 --progress false"
    )
