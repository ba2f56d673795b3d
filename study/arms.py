"""The starts that a study compares, and on which images their students are trained."""

from typing import NamedTuple

TEACHER_DATA, STUDENT_DATA = "tiny-imagenet-200", "cifar10-jpeg"


class Arm(NamedTuple):
    """One kind of start, and of training, of a student.

    It starts from a teacher, by options of weight_selection.py, or at random. A teacher whose name begins with "tuned" was
    trained on the student's images after its own. `control`: what study.controls leaves of the selected weights.
    `distilled`: the teacher whose logits the student also learns from. `training`: options of main.py.
    """

    title: str
    selection: str | None = ""  # "{seed}" stands for the run's seed, "{data}" for its images; None: no teacher
    teacher: str = "teacher"
    control: str = ""
    distilled: str = ""
    training: str = ""
    rate_of: str = ""  # the arm whose learning rate it takes, where each has its own; "": it looks for its own


_ON_IMAGES = "--data_path {data}"
_REFIT = f"--refit true {_ON_IMAGES}"
_BY_ENERGY = f"--element_selection energy {_REFIT}"


def _ablation(title: str, options: str) -> Arm:
    return Arm(title, f"{_BY_ENERGY} {options}", rate_of="refit_energy")


ARMS = {
    "random": Arm("random init", None),
    "selected": Arm("weight selection"),  # the paper's rules: first layers, evenly spaced channels, blended heads
    # What is left of selected weights without their places, and other statistics than timm's.
    "shuffled": Arm("shuffled weights", control="shuffled"),
    "matrices": Arm("matrices shuffled, norms and biases kept", control="matrices"),
    "rows": Arm("the same, within rows", control="rows"),
    "columns": Arm("the same, within columns", control="columns"),
    "moments": Arm("normal values of equal means and deviations", control="moments"),
    "vectors": Arm("norms and biases alone", control="vectors"),
    "xavier": Arm("Xavier init", None, training="--init xavier"),
    "kaiming": Arm("Kaiming init", None, training="--init kaiming"),
    "mimetic": Arm("mimetic init", None, training="--init mimetic"),
    # Parts that are left out, and matrices that are scaled.
    "no_patch_embed": Arm("without patch embedding", "--take tokens pos_embed attention mlp norm"),
    "no_pos_embed": Arm("without position embedding", "--take patch_embed tokens attention mlp norm"),
    "no_attention": Arm("without attention", "--take patch_embed tokens pos_embed mlp norm"),
    "no_mlp": Arm("without MLPs", "--take patch_embed tokens pos_embed attention norm"),
    "no_norm": Arm("without norms", "--take patch_embed tokens pos_embed attention mlp"),
    "gain_width": Arm("matrices times 1.41", "--gain width"),
    "gain_1": Arm("matrices times 2", "--gain 1"),
    # Rules for the indices.
    "keep": Arm("whole heads", "--heads keep"),
    "consecutive": Arm("consecutive channels", "--element_selection consecutive"),
    "random_slots": Arm("random channels", "--element_selection random --seed {seed}"),
    "random_inconsistent": Arm("random, inconsistent", "--element_selection random_inconsistent --seed {seed}"),
    "magnitude": Arm("largest channels", "--element_selection magnitude"),
    "magnitude_inconsistent": Arm("largest L2, inconsistent", "--element_selection magnitude_inconsistent"),
    "l1_inconsistent": Arm("largest L1, inconsistent", "--element_selection l1_inconsistent"),
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
    "refit_energy": Arm("energy, refit", _BY_ENERGY),
    "refit_coverage": Arm("coverage, refit", f"--element_selection coverage {_REFIT}"),
    "refit_magnitude_energy": Arm("norm and energy, refit", f"--element_selection magnitude_energy {_REFIT}"),
    "tuned_selected": Arm("tuned teacher, weight selection", teacher="tuned"),
    "tuned_refit": Arm("tuned teacher, refit", _BY_ENERGY, teacher="tuned"),
    "distilled_random": Arm("random init, distilled", None, distilled="tuned"),
    "distilled_selected": Arm("weight selection, distilled", distilled="tuned"),
    "distilled_refit": Arm("refit, distilled", _BY_ENERGY, distilled="tuned"),
    "chain": Arm("tuned teacher, refit, distilled", _BY_ENERGY, teacher="tuned", distilled="tuned"),
    "refit_distilled": Arm("refit, distilled from the teacher as it is", _BY_ENERGY, distilled="teacher"),
    # Other teachers: as wide as the refit's, but deeper.
    "deep_selected": Arm("12 deep, weight selection", teacher="deep_teacher"),
    "deep_spread": Arm("12 deep, layers spread", "--layer_selection uniform", teacher="deep_teacher"),
    "deep_refit": Arm("12 deep, refit", _BY_ENERGY, teacher="deep_teacher"),
    "deep_spread_refit": Arm(
        "12 deep, layers spread, refit", f"--layer_selection uniform {_BY_ENERGY}", teacher="deep_teacher"
    ),
    "deepest_selected": Arm("24 deep, weight selection", teacher="deepest_teacher"),
    "deepest_spread": Arm("24 deep, layers spread", "--layer_selection uniform", teacher="deepest_teacher"),
    "deepest_last": Arm("24 deep, last layers", "--layer_selection last", teacher="deepest_teacher"),
    "deep_chain": Arm(
        "12 deep, tuned, refit, distilled", _BY_ENERGY, teacher="tuned_deep_teacher", distilled="tuned_deep_teacher"
    ),
    # What the refit depends on: one change each of "refit_energy", at its learning rate.
    "images_64": _ablation("64 images", "--calibration_images 64"),
    "images_256": _ablation("256 images", "--calibration_images 256"),
    "images_4096": _ablation("4,096 images", "--calibration_images 4096"),
    "ridge_0.001": _ablation("ridge 0.001", "--ridge 0.001"),
    "ridge_0.1": _ablation("ridge 0.1", "--ridge 0.1"),
    "ridge_1": _ablation("ridge 1", "--ridge 1"),
    "teachers_images": _ablation("images of the teacher's data", f"--data_path data/{TEACHER_DATA}"),
    "own_outputs": _ablation("the layers' own outputs as targets", "--refit_target outputs"),
    "only_attention": _ablation("attention layers only", "--refit_layers [.]attn[.]"),
    "only_mlp": _ablation("MLP layers only", "--refit_layers [.]mlp[.]"),
    "only_writers": _ablation("only layers that write to the stream", "--refit_layers [.](proj|fc2)[.]"),
    "no_writers": _ablation("only the other layers", "--refit_layers [.](qkv|fc1)[.]"),
}


class Setting(NamedTuple):
    """Which images the students are trained on, and for how long."""

    fraction: float = 1.0
    training: str = ""  # options that override the model's
    data: str = STUDENT_DATA
    epochs: int | None = None  # None: the model's
    selection: str = ""  # options of weight_selection.py for every arm with a teacher
    untrained: bool = False  # also measure a student from a teacher before its training


# by the name of the folder of their runs, in that of their family
SETTINGS = {
    "full": Setting(),
    "tenth": Setting(0.1),
    "tenth_lr4e-3": Setting(0.1, "--lr 4e-3"),
    # other lengths; the warm-up keeps its share
    **{f"tenth_{n}": Setting(0.1, f"--warmup_epochs {n / 10}", epochs=n) for n in (3, 30, 100)},
    **{f"epochs_{n}": Setting(training=f"--warmup_epochs {n / 10}", epochs=n) for n in (1, 3, 7)},
    "probe": Setting(0.1, "--linear_probe true --hflip 0.5", epochs=20),  # augmented as the other runs are
    **{
        f"{recipe}_{epochs}": Setting(0.1, f"--recipe {recipe} {proportions.format(epochs / 6)}", epochs=epochs)
        for recipe, proportions in (("paper", "--lr 5e-4 --warmup_epochs {}"), ("short", ""))
        for epochs in (3, 10, 30)
    },
    "short_10_lr2x": Setting(0.1, "--recipe short --lr 5e-4", epochs=10),
    "short_10_lr4x": Setting(0.1, "--recipe short --lr 1e-3", epochs=10),
    # 10,000 images of the classes that the teacher knows, for as many updates as a tenth of the student's own
    "near": Setting(0.1, data=TEACHER_DATA, epochs=5, selection="--include_head true", untrained=True),
}
