"""The runs of a study, in order, and their commands."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from study.arms import ARMS, SETTINGS, TEACHER_DATA
from study.search import known_best, rates_to_try
from study.studies import RATE_SEED, Model, Study


@dataclass(frozen=True)
class Run:
    """The training of a teacher or a student. Without `teacher` and `weights` it starts from random init."""

    name: str  # its folder
    command: tuple[str, ...]  # options of main.py except --initialize
    epochs: int
    minutes: float
    is_teacher: bool = False
    teacher: "Run | None" = None
    weights: str = ""  # the file of its teacher, if no run makes one
    control: tuple[str, ...] = ()  # options of study.controls except the files, for what was selected
    selection: tuple[str, ...] | None = None  # options of weight_selection.py except the file; None: all weights
    untrained: bool = False  # measure it before the training too
    distilled_from: "Run | None" = None

    @property
    def checkpoint(self) -> str:
        return f"{self.name}/checkpoint-{self.epochs - 1}.pth"

    @property
    def needs(self) -> list["Run"]:
        """List the runs that must be finished before this one, in order."""
        teachers = [teacher for teacher in (self.teacher, self.distilled_from) if teacher]
        return list(dict.fromkeys(run for teacher in teachers for run in (*teacher.needs, teacher)))


def runs_of(study: Study, ends: Callable[[str, str], dict[str, float]] = lambda section, arm: {}) -> list[Run]:
    """Return all runs of a study in order, each after those that it needs.

    In a study with rates, `ends` says where a section's arm, such as "vit/tenth", "random", ended with each rate that was
    tried. As long as the best is not known, the arm's runs are those that find it.
    """
    return list(dict.fromkeys(_in_order(study, functools.cache(ends))))


def _in_order(study: Study, ends: Callable[[str, str], dict[str, float]]) -> Iterator[Run]:
    for family, setting, arms, seeds in study.rows:
        section = study.chooses_rates(f"{family}/{setting}")
        ladder = study.rates_of(section)
        for arm in arms.split():
            for rate in () if ARMS[arm].rate_of else rates_to_try(ladder, ends(section, arm)):
                yield from _with_needs(_student(study, family, section.partition("/")[2], arm, RATE_SEED, rate))
        for seed in seeds:
            for arm in arms.split():
                rate = known_best(ladder, ends(section, ARMS[arm].rate_of or arm)) if ladder else ""
                if rate is not None:
                    yield from _with_needs(_student(study, family, setting, arm, seed, rate))


def arm_and_rate(folder: str) -> tuple[str, str]:
    """Return the arm and the learning rate in the name of a student's folder, such as "random@5e-4-3"; "" without a rate."""
    arm, _, rate = folder.rpartition("-")[0].partition("@")
    return arm, rate


def _with_needs(run: Run) -> list[Run]:
    return [*run.needs, run]


def _student(study: Study, family: str, setting: str, arm: str, seed: int, rate: str) -> Run:
    model, choices, where = study.models[f"{family}/student"], ARMS[arm], SETTINGS[setting]
    epochs = where.epochs or model.epochs
    model = model._replace(epochs=epochs, minutes=model.minutes * where.fraction * epochs / model.epochs)
    name = f"{family}/{setting}/{arm}{rate and f'@{rate}'}-{seed}"
    override = f"{where.training} --lr {rate}" if rate else where.training
    override = f"{override} {choices.training}"
    options = f"{_training(study, model, where.data)} {override} --data_fraction {where.fraction} --seed {seed}"
    student = Run(name, (), model.epochs, model.minutes + 0.5)  # half a minute to start and select
    if choices.distilled:
        distilled_from = _teacher(study, family, setting, choices.distilled)
        options += f" --distillation logits --teacher_path {distilled_from.checkpoint}"
        student = replace(student, distilled_from=distilled_from, minutes=1.5 * student.minutes)
    student = replace(student, command=tuple(f"{options} --output_dir {name}".split()))
    if choices.selection is None:
        return student
    teacher = study.models[f"{family}/{_base(choices.teacher)}"]
    selection = (
        f"--student_model {model.name} {_option('--student_kwargs', model.kwargs)} "
        f"--pretrained_model {teacher.name} {_option('--pretrained_kwargs', teacher.kwargs)} "
        f"{choices.selection.format(seed=seed, data=f'data/{where.data}')} {where.selection}"
    )
    return replace(
        student,
        teacher=None if teacher.weights else _teacher(study, family, setting, choices.teacher),
        weights=teacher.weights and f"data/{teacher.weights}",
        control=(choices.control, "--seed", str(seed)) if choices.control else (),
        selection=tuple(selection.split()),
        untrained=where.untrained,
    )


def _base(role: str) -> str:
    """Name the teacher that a tuned one, "tuned" or "tuned_<role>", was before."""
    return role.removeprefix("tuned").removeprefix("_") or "teacher"


def _teacher(study: Study, family: str, setting: str, role: str) -> Run:
    """Return the training of a teacher; one that is tuned goes on from its base, on the student's images."""
    base = _base(role)
    model, name = study.models[f"{family}/{base}"], f"{family}/{base}"
    if role == base:
        options = f"{_training(study, model, TEACHER_DATA)} --output_dir {name}"
        return Run(name, tuple(options.split()), model.epochs, model.minutes, is_teacher=True)
    student, where, name = study.models[f"{family}/student"], SETTINGS[setting], f"{family}/{setting}/{role}"
    minutes = 4 * student.minutes * where.fraction
    model = model._replace(training=study.tuning[family], epochs=where.epochs or student.epochs, minutes=minutes)
    options = f"{_training(study, model, where.data)} --data_fraction {where.fraction} --output_dir {name}"
    teacher = _teacher(study, family, setting, base)
    return Run(name, tuple(options.split()), model.epochs, model.minutes, is_teacher=True, teacher=teacher)


def _option(option: str, values: str) -> str:
    return f"{option} {values}" if values else ""


def _training(study: Study, model: Model, data: str) -> str:
    return (
        f"--model {model.name} {_option('--model_kwargs', model.kwargs)} "
        f"--data_set image_folder --data_path data/{data} --epochs {model.epochs} {study.recipe} {model.training} "
        f"--save_ckpt_num 1 --log_freq 100 --progress false"
    )
