"""The studies: which arms, of which models, trained how."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Model(NamedTuple):
    """A model and how it is trained. `minutes`: the time of all epochs on all images, on a CPU with one thread.

    `weights`: a teacher's file in the folder of --data, which is taken as it is.
    """

    name: str
    kwargs: str
    training: str
    epochs: int
    minutes: float
    weights: str = ""


class Study(NamedTuple):
    recipe: str  # options of main.py for every run
    models: dict[str, Model]  # by family and role, such as "vit/teacher"
    rows: list[tuple[str, str, str, range]]  # family, setting, arms and seeds, in the order in which they run
    # The learning rates that each arm tries on RATE_SEED, by family or by section, such as "vit/tenth": three from the
    # middle, and further ones while the best is at an end. The best is that of its other seeds. A section may name
    # another one instead, whose best rates it takes.
    rates: Mapping[str, tuple[str, ...] | str] = MappingProxyType({})
    # by family, options by which a teacher is trained on the student's images
    tuning: Mapping[str, str] = MappingProxyType({})

    def chooses_rates(self, section: str) -> str:
        """Name the section whose arms try the rates that a section's arms take: mostly its own."""
        rates = self.rates.get(section)
        return rates if isinstance(rates, str) else section

    def rates_of(self, section: str) -> tuple[str, ...]:
        """Return the rates that each arm of a section tries, where the section chooses its own."""
        return self.rates.get(section) or self.rates.get(section.partition("/")[0], ())


RATE_SEED = 3
CALIBRATION_IMAGES = 1024  # the default of weight_selection.py
# The paper's augmentation is made for 300 epochs. Ten epochs need little more than flips and padded crops.
_CPU_RECIPE = """--input_size 32 --batch_size 128 --warmup_epochs 1 --aa none --color_jitter 0 --mixup 0 --cutmix 0
    --reprob 0 --augment device --cache ram --cache_size 32 --num_workers 0 --device cpu"""
_TEACHER = "--lr 1e-3 --data_fraction 0.3"


def _vit(width: int, depth: int, training: str, epochs: int, minutes: float) -> Model:
    """A small ViT for images of 32 px, with heads 32 wide."""
    shape = f"img_size=32 patch_size=8 embed_dim={width} depth={depth} num_heads={width // 32}"
    return Model("vit_tiny", shape, training, epochs, minutes)


_REAL = Model("vit_small_patch14_dinov2", "", "", 0, 0, weights="dinov2_vits14_saliency_fp16.safetensors")
_TRIED = ("paper", "short")  # recipes
_STATISTICS = "shuffled matrices rows columns moments vectors xavier kaiming"  # arms
_SHORT = ("2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3")  # learning rates of 390 updates, and of more
_LONG = ("5e-4", "1e-3", "2e-3", "4e-3", "8e-3")
STUDIES = {
    "cpu": Study(
        _CPU_RECIPE,
        {
            "vit/student": _vit(64, 6, "--lr 1e-3", 10, 8),
            "vit/teacher": _vit(128, 12, _TEACHER, 20, 45),
            # These two are as deep as the student, so that they differ from each other only in width.
            "vit/twice_teacher": _vit(128, 6, _TEACHER, 20, 25),
            "vit/wide_teacher": _vit(256, 6, _TEACHER, 20, 75),
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
            "vit/student": _vit(64, 6, "", 10, 8),
            "vit/teacher": _vit(128, 6, _TEACHER, 12, 15),
            "vit/deep_teacher": _vit(128, 12, _TEACHER, 12, 27),
            "convnext/student": Model("convnext_femto", "dims=24,48,96,192 depths=2,2,6,2", "--channels_last", 10, 16),
            "convnext/teacher": Model(
                "convnext_tiny",
                "dims=48,96,192,384 depths=3,3,9,3",
                "--channels_last --lr 2e-3 --data_fraction 0.3",
                12,
                36,
            ),
        },
        [
            ("vit", "tenth", "random selected magnitude keep", range(3)),
            ("vit", "tenth", "refit_energy refit_magnitude_energy refit_coverage", range(3)),
            ("vit", "tenth", "energy coverage magnitude_energy refit_selected refit_magnitude refit_keep", range(3)),
            ("vit", "tenth", "chain tuned_selected tuned_refit", range(3)),
            ("vit", "tenth", "distilled_random distilled_selected distilled_refit", range(3)),
            ("vit", "tenth", "images_64 images_256 images_4096 ridge_0.001 ridge_0.1 ridge_1", range(3)),
            ("vit", "tenth", "teachers_images own_outputs only_attention only_mlp only_writers no_writers", range(3)),
            ("vit", "near", "random selected magnitude refit_energy refit_magnitude refit_distilled", range(3)),
            ("convnext", "tenth", "random selected magnitude refit_energy refit_magnitude chain", range(3)),
            ("convnext", "near", "random selected magnitude refit_energy refit_magnitude refit_distilled", range(3)),
            ("vit", "tenth", "deep_selected deep_spread deep_refit deep_spread_refit deep_chain", range(3)),
            ("vit", "full", "random selected magnitude refit_energy refit_magnitude chain", range(3)),
            ("convnext", "full", "random selected refit_energy", range(3)),
            # Does a refit still help a student that is distilled, in shorter and in longer runs?
            ("vit", "tenth_3", "random selected refit_energy distilled_selected distilled_refit", range(3)),
            ("vit", "tenth_30", "random selected refit_energy distilled_selected distilled_refit", range(3)),
        ],
        rates={"vit": ("5e-4", "1e-3", "2e-3"), "convnext": ("1e-3", "2e-3", "4e-3")},
        tuning={"vit": "--lr 1e-3", "convnext": "--lr 1e-3 --channels_last"},
    ),
    # Which recipe suits a short run on few images, in the paper's ViT-T and from a real ViT-S? The teacher is DINOv2's
    # ViT-S/14 or a model of its shape, in a file. "paper" keeps the proportions of the paper's CIFAR-100 recipe.
    "short": Study(
        "--input_size 32 --batch_size 128 --augment device --cache ram --cache_size 32 --num_workers 0 --device cpu "
        "--use_amp true --amp_dtype bfloat16",
        {
            "vit/student": Model("vit_tiny", "img_size=32 patch_size=8", "", 10, 35),
            "vit/teacher": _REAL,
        },
        [
            *(("vit", f"{recipe}_{epochs}", "random selected", range(3)) for epochs in (3, 10) for recipe in _TRIED),
            ("vit", "short_10_lr2x", "random selected", range(3, 4)),
            ("vit", "short_10_lr4x", "random selected", range(3, 4)),
            ("vit", "short_10", "random selected", range(3, 4)),
            *(("vit", f"{recipe}_30", "random selected", range(3)) for recipe in _TRIED),
        ],
    ),
    # What is the gain made of, when is it there, and which of the paper's other findings show again? One ViT pair.
    "claims": Study(
        _CPU_RECIPE,
        {
            "vit/student": _vit(64, 6, "", 10, 4),
            "vit/teacher": _vit(128, 12, _TEACHER, 12, 14),
            "vit/twice_teacher": _vit(128, 6, _TEACHER, 12, 7),
            "vit/deepest_teacher": _vit(128, 24, _TEACHER, 12, 28),
        },
        [
            ("vit", "tenth", "random selected shuffled refit_energy", range(3)),
            ("vit", "probe", "random selected shuffled refit_energy", range(3)),
            ("vit", "full", f"random selected {_STATISTICS} refit_energy", range(3)),
            ("vit", "tenth_100", "random selected shuffled", range(3)),
            *(("vit", f"epochs_{n}", "random selected refit_energy", range(3)) for n in (1, 3, 7)),
            ("vit", "tenth", "no_patch_embed no_pos_embed no_attention no_mlp no_norm", range(3)),
            ("vit", "tenth", "gain_width gain_1 xavier kaiming mimetic", range(3)),
            ("vit", "tenth", "magnitude magnitude_inconsistent l1_inconsistent", range(3)),
            (
                "vit",
                "tenth",
                "last_layers uniform_layers twice_blend deepest_selected deepest_spread deepest_last",
                range(3),
            ),
        ],
        rates={
            "vit": _SHORT,
            "vit/probe": ("1e-3", "3e-3", "1e-2", "3e-2", "1e-1"),
            **dict.fromkeys(("vit/epochs_3", "vit/full"), _LONG),
            **dict.fromkeys(("vit/epochs_7", "vit/tenth_100"), "vit/full"),
        },
    ),
    # The paper's ViT-T in its full shape, from a real ViT-S.
    "real": Study(
        f"{_CPU_RECIPE} --use_amp true --amp_dtype bfloat16",
        {"vit/student": Model("vit_tiny", "img_size=32 patch_size=8", "", 10, 20), "vit/teacher": _REAL},
        [
            ("vit", "tenth", "random selected shuffled xavier refit_energy", range(3)),
            ("vit", "tenth_30", "random selected shuffled xavier refit_energy", range(3)),
            ("vit", "full", "random selected refit_energy", range(3)),
            ("vit", "tenth", "magnitude refit_magnitude_energy refit_coverage", range(3)),
        ],
        rates={"vit": ("3e-5", "1e-4", "3e-4", "1e-3", "3e-3"), "vit/tenth_30": "vit/tenth", "vit/full": "vit/tenth"},
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
