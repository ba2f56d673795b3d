"""What the tests of selection share: small models of each kind in each family, values for them, and their plans."""

import torch
from timm.layers import GluMlp
from timm.models import MlpMixer, register_model
from torch import Tensor, nn

import models
from models import ModelSpec
from selection.families import FAMILIES
from selection.family import Family, Layout
from selection.match import match
from selection.plan import Plan, choose
from selection.rules import Choices
from weight_selection import select_weights

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 4, "num_classes": 5}
SMALL_VIT = {**VIT, "embed_dim": 12, "depth": 2, "num_heads": 3}
EVA = {**VIT, "embed_dim": 32}
SMALL_EVA = {**EVA, "embed_dim": 24, "depth": 2, "num_heads": 3}  # a head keeps its 8 channels
CONVNEXT = {"dims": (8, 10, 12, 16), "depths": (1, 2, 3, 1), "num_classes": 5}
SMALL_CONVNEXT = {**CONVNEXT, "dims": (5, 7, 8, 9), "depths": (1, 1, 2, 1)}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 1, 4, 1), "num_classes": 5}
SWIN |= {"num_heads": (2, 4, 4, 8)}
SMALL_SWIN = {**SWIN, "embed_dim": 6, "depths": (2, 1, 3, 1), "num_heads": (2, 3, 4, 6)}
MIXER = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_blocks": 3, "num_classes": 5}
SMALL_MIXER = {**MIXER, "embed_dim": 12, "num_blocks": 2}
RESNET = {"channels": (8, 12, 16, 20), "layers": (2, 3, 1, 2), "num_classes": 5}
SMALL_RESNET = {**RESNET, "channels": (5, 8, 9, 16), "layers": (1, 2, 1, 2)}

# a pair of ViTs for the script
SCRIPT_TEACHER = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 5}
SCRIPT_STUDENT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


# names of timm's models, and arguments that several tests give
VIT_T, VIT_B, VIT_L = "vit_tiny_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224"
DEIT, SIGLIP, PARALLEL = "deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224", "vit_small_patch16_18x2_224"
DINOV2_G, EVA02, SWIN_T = "vit_giant_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"
TWO_REGISTERS, POOL, GROUPS = {**SMALL_VIT, "reg_tokens": 2}, "attn_pool_num_heads", "cardinality"
TIED = {**RESNET, "channels": (64, 10, 8, 8)}, {**SMALL_RESNET, "channels": (64, 8, 7, 7)}


def _pair(name: str, teacher: dict, student: dict, **both) -> tuple[str, dict, str, dict]:
    return name, {**teacher, **both}, name, {**student, **both}


# kind of model -> a teacher's name and arguments, a smaller student's
PAIRS = {
    "vit": _pair(VIT_T, VIT, SMALL_VIT),
    "vit norms in each head": _pair(VIT_T, EVA, SMALL_EVA, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    "vit parallel": _pair(PARALLEL, VIT, SMALL_VIT, init_values=1.0),
    "clip": _pair("vit_base_patch16_clip_224", VIT, SMALL_VIT),
    "deit distilled": _pair(DEIT, VIT, SMALL_VIT),
    "siglip": _pair(SIGLIP, VIT, SMALL_VIT),
    "dinov2": _pair(DINOV2_G, VIT, TWO_REGISTERS, mlp_ratio=3),
    "dinov2 pooled by attention": _pair(DINOV2_G, VIT, TWO_REGISTERS, mlp_ratio=3, global_pool="map"),
    "dinov3": _pair("vit_small_patch16_dinov3_qkvb", EVA, {**SMALL_EVA, "num_reg_tokens": 2}),
    "eva02": _pair(EVA02, EVA, SMALL_EVA),
    "eva02 separate q k v": _pair("eva02_base_patch14_448", EVA, SMALL_EVA),
    "perception encoder": _pair("vit_pe_core_tiny_patch16_384", {**EVA, POOL: 4}, {**SMALL_EVA, POOL: 3}),
    "convnext": _pair("convnext_atto", CONVNEXT, SMALL_CONVNEXT, conv_mlp=False),
    "convnext stem of stride 2": _pair("convnext_atto", CONVNEXT, SMALL_CONVNEXT, patch_size=2),
    "convnext v2": _pair("convnextv2_atto", CONVNEXT, SMALL_CONVNEXT),
    "convnext overlapping stem": _pair("convnext_atto_ols", CONVNEXT, SMALL_CONVNEXT),
    "convnext stem with activation": _pair("convnext_atto", CONVNEXT, SMALL_CONVNEXT, stem_type="overlap_act"),
    "swin": _pair(SWIN_T, SWIN, SMALL_SWIN),
    "mixer": _pair("small_mixer", MIXER, SMALL_MIXER),
    "gmixer": _pair("small_mixer", MIXER, SMALL_MIXER, gated=True),
    "resnet basic": _pair("resnet18", RESNET, SMALL_RESNET),
    "resnet stem tied to stage": _pair("resnet18", *TIED),
    "resnet bottleneck": _pair("resnet50", RESNET, SMALL_RESNET),
    "resnet deep stem": _pair("resnet26d", {**RESNET, "stem_width": 8}, {**SMALL_RESNET, "stem_width": 6}),
    "resnext": _pair("resnext50_32x4d", {**RESNET, GROUPS: 4}, {**SMALL_RESNET, GROUPS: 2}, base_width=32),
    "seresnet": _pair("seresnet50", RESNET, SMALL_RESNET),
    "resnetrs": _pair("resnetrs50", {**RESNET, "stem_width": 8}, {**SMALL_RESNET, "stem_width": 6}),
}


@register_model
def small_mixer(gated: bool = False, **kwargs) -> nn.Module:
    """timm's mixer_* (`gated`: gmixer_*), whose functions take no sizes."""
    sizes = {key: value for key, value in kwargs.items() if key in (*MIXER, "in_chans")}
    return MlpMixer(**sizes, **({"mlp_layer": GluMlp} if gated else {}))


def random_tensors(model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A state dict for `model` with values that no constructor gives: norms are not 1, biases not 0."""
    generator = torch.Generator().manual_seed(0)

    def values(key: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.tensor(7)  # batches that a norm has seen
        if key.endswith("running_var"):
            return torch.rand(tensor.shape, generator=generator, dtype=dtype) + 0.5
        return torch.randn(tensor.shape, generator=generator, dtype=dtype) / 2

    return {key: values(key, tensor) for key, tensor in model.state_dict().items()}


def layout(name: str, device: str = "meta", *, include_head: bool = False, **kwargs) -> tuple[Layout, Family]:
    """The layout of a model and its family. A small model is built faster on the CPU."""
    model = models.create(name, kwargs, device=device)
    family = FAMILIES[models.family_of(model)]
    return Layout.of(model, family, () if include_head else models.head_prefixes(model)), family


def vit_layout(shapes: dict, grid: tuple[int, int] | None = None) -> tuple[Layout, Family]:
    """The layout of a ViT that consists of tensors of these shapes."""
    return Layout(shapes, {}, {}, grid, {}), FAMILIES["vit"]


def plan_of(teacher: tuple[Layout, Family], student: tuple[Layout, Family], choices: Choices | None = None) -> Plan:
    """The plan of two such models."""
    choices = choices or Choices()
    return choose(match(teacher[1], teacher[0], student[0], choices), choices)


def small_pair(path, *more):
    """Options that select the small student from the small teacher's file."""
    words = [" ".join(f"{key}={value}" for key, value in sizes.items()) for sizes in (SCRIPT_TEACHER, SCRIPT_STUDENT)]
    teacher = f"--pretrained_model vit_tiny --pretrained_path {path} --pretrained_kwargs {words[0]}"
    return [*f"{teacher} --student_model vit_tiny --student_kwargs {words[1]}".split(), *more]


def selected(path, student=SCRIPT_STUDENT, **more):
    """The small student's tensors."""
    specs = ModelSpec("vit_tiny", SCRIPT_TEACHER), ModelSpec("vit_tiny", student)
    return select_weights(*specs, pretrained_path=str(path), **more)[0]


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def indices_of(plan: Plan, key: str) -> list[list[int] | None]:
    """The teacher's indices along each axis of a student's tensor; None for an axis that is kept whole."""
    return [axis and plan.axis_indices(axis).tolist() for axis in plan.sources[key].axes]
