"""Files of transformers and torchvision give timm's models the same outputs."""

import re

import pytest
import torch
import torchvision
from small_models import assert_same, random_tensors, small_pair
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock, Bottleneck

import models
import weight_selection
from models import ModelSpec
from utils import UserError
from weightfiles import layouts
from weightfiles.lazy import Weights
from weightfiles.teacher import read_teacher

ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
VIT = {**ENCODER, "intermediate_size": 64}
REGISTERS = {**VIT, "num_register_tokens": 4}
STAGES = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1]}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 8,
    "depths": [2, 2, 2],
    "num_heads": [2, 4, 4],
}
RESNET = {"embedding_size": 64, "hidden_sizes": [8, 16, 24, 32], "depths": [2, 1, 1, 2]}

TIMM_DINOV2 = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
TIMM_VIT = {**TIMM_DINOV2, "mlp_ratio": 2}
TIMM_STAGES = {"dims": (8, 12, 16, 20), "depths": (1, 2, 1, 1)}
TIMM_SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2, 2)}
TIMM_SWIN["num_heads"] = (2, 4, 4)
TIMM_RESNET = {"layers": (2, 1, 1, 2), "channels": (8, 16, 24, 32)}

# transformers' class, what its config holds, timm's name, its arguments
TRANSFORMERS = {
    "ViT": ("ViTForImageClassification", VIT, "vit_tiny", TIMM_VIT),
    "ViT SimMIM": ("ViTForMaskedImageModeling", {**VIT, "encoder_stride": 8}, "vit_tiny", TIMM_VIT),
    "DeiT": ("DeiTForImageClassificationWithTeacher", VIT, "deit_tiny_distilled_patch16_224", TIMM_VIT),
    "Dinov2": ("Dinov2ForImageClassification", ENCODER, "vit_small_patch14_dinov2", TIMM_DINOV2),
    "Dinov2 SwiGLU": (
        "Dinov2ForImageClassification",
        {**ENCODER, "use_swiglu_ffn": True},
        "vit_giant_patch14_dinov2",
        {**TIMM_DINOV2, "mlp_ratio": 5.5},
    ),
    "Dinov2 with registers": (
        "Dinov2WithRegistersForImageClassification",
        ENCODER,
        "vit_small_patch14_reg4_dinov2",
        TIMM_DINOV2,
    ),
    "DINOv3": ("DINOv3ViTModel", REGISTERS, "vit_small_patch16_dinov3_qkvb", TIMM_VIT),
    "DINOv3 gated": (
        "DINOv3ViTModel",
        {**REGISTERS, "use_gated_mlp": True, "hidden_act": "silu"},
        "vit_small_plus_patch16_dinov3_qkvb",
        TIMM_VIT,
    ),
    "ConvNeXt": ("ConvNextForImageClassification", STAGES, "convnext_tiny", TIMM_STAGES),
    "ConvNeXt 1x1": ("ConvNextForImageClassification", STAGES, "convnext_tiny", {**TIMM_STAGES, "conv_mlp": True}),
    "ConvNeXt V2": ("ConvNextV2ForImageClassification", STAGES, "convnextv2_tiny", TIMM_STAGES),
    "DINOv3 ConvNeXt": ("DINOv3ConvNextModel", STAGES, "convnext_tiny", TIMM_STAGES),
    "Swin": ("SwinForImageClassification", SWIN, "swin_tiny_patch4_window7_224", TIMM_SWIN),
    "ResNet": ("ResNetForImageClassification", {**RESNET, "layer_type": "basic"}, "resnet18", TIMM_RESNET),
    "ResNet bottleneck": (
        "ResNetForImageClassification",
        {**RESNET, "layer_type": "bottleneck"},
        "resnet50",
        {**TIMM_RESNET, "channels": (2, 4, 6, 8)},
    ),
}

BLOCKS = [CNBlockConfig(8, 12, 1), CNBlockConfig(12, 16, 2), CNBlockConfig(16, 20, 1), CNBlockConfig(20, None, 1)]
# torchvision's model, timm's name, its arguments
TORCHVISION = {
    "ViT": (lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5), "vit_tiny", TIMM_VIT),
    "ConvNeXt": (lambda: torchvision.models.ConvNeXt(BLOCKS, num_classes=5), "convnext_tiny", TIMM_STAGES),
    "Swin": (
        lambda: torchvision.models.SwinTransformer([2, 2], 8, [2, 2, 2], [2, 4, 4], [4, 4], num_classes=5),
        "swin_tiny_patch4_window7_224",
        TIMM_SWIN,
    ),
    "ResNet": (lambda: torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], 5), "resnet18", {"layers": (1, 1, 1, 1)}),
    "ResNet bottleneck": (
        lambda: torchvision.models.ResNet(Bottleneck, [1, 1, 1, 1], 5),
        "resnet50",
        {"layers": (1, 1, 1, 1)},
    ),
}


@pytest.fixture(autouse=True)
def _lines(caplog):
    caplog.set_level("INFO")


def filled(model: nn.Module) -> nn.Module:
    """The model in evaluation mode and float64, with random values in all that its state dict holds."""
    generator = torch.Generator().manual_seed(0)
    for key, tensor in model.double().eval().state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.2, generator=generator)
    return model


def of_transformers(class_name: str, config: dict) -> nn.Module:
    import transformers

    kind = getattr(transformers, class_name)
    return filled(kind(kind.config_class(**config, **({"num_labels": 5} if "Classification" in class_name else {}))))


def read(path, name, kwargs) -> Weights:
    return read_teacher(ModelSpec(name, kwargs), models.create(name, kwargs, device="meta"), path)


def loaded(weights, name, kwargs, epsilons: str = "(?!)") -> nn.Module:
    """timm's model with these weights, and transformers' epsilon of 1e-12 in the norms of these names."""
    model = models.create(name, kwargs).double().eval()
    missing, extra = model.load_state_dict(dict(weights), strict=False)
    assert not extra and all(key.startswith(models.head_prefixes(model)) for key in missing)
    for module_name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and re.fullmatch(epsilons, module_name):
            module.eps = 1e-12
    return model


def images():
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_close(output, expected):
    assert output.shape == expected.shape
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()


def saved(model: nn.Module, folder) -> list:
    """The model's weights as transformers saves them, and as they are in memory."""
    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "memory.pth")
    return [folder / "model.safetensors", folder / "memory.pth"]


@pytest.mark.parametrize("case", TRANSFORMERS)
@torch.no_grad()
def test_transformers_files_give_the_same_outputs(case, tmp_path, caplog):
    class_name, config, name, kwargs = TRANSFORMERS[case]
    library = of_transformers(class_name, config)
    base = library if class_name.startswith("DINOv3") else library.base_model
    classifies = "Classification" in class_name and not class_name.startswith("Dinov2")
    kwargs = {**kwargs, "num_classes": 5 if classifies else 0}
    on_disk, in_memory = (read(path, name, kwargs) for path in saved(library, tmp_path))
    assert_same(on_disk, in_memory)
    headless = {key: value for key, value in on_disk.items() if key not in ("head.weight", "head.fc.weight")}
    for path in saved(base, tmp_path):
        weights = read(path, name, kwargs)
        assert all(torch.equal(weights[key], headless[key]) for key in weights)
    assert not on_disk.whole

    differs = getattr(library.config, "layer_norm_eps", 0) == 1e-12
    epsilons = r"head\.norm" if "convnext" in name else ".*"
    assert ("with epsilon 1e-12 by default, timm with 1e-06" in caplog.text) == differs
    model = loaded(on_disk, name, kwargs, epsilons if differs else "(?!)")
    if classifies:
        assert_close(model(images()), library(images()).logits)
    elif "convnext" in name:
        assert_close(model(images()), base(images()).pooler_output)
    else:
        assert_close(model.forward_features(images()), base(images()).last_hidden_state)


@pytest.mark.parametrize("case", TORCHVISION)
@torch.no_grad()
def test_torchvision_files_give_the_same_outputs(case, tmp_path, caplog):
    build, name, kwargs = TORCHVISION[case]
    library, kwargs = filled(build()), {**kwargs, "num_classes": 5}
    torch.save(library.state_dict(), tmp_path / "weights.pth")
    weights = read(tmp_path / "weights.pth", name, kwargs)
    assert_close(loaded(weights, name, kwargs)(images()), library(images()))
    assert "epsilon" not in caplog.text and not weights.whole


# ---- what the readers say and leave out ----


def renamed(weights: dict, name: str = "vit_tiny", kwargs: dict = TIMM_VIT) -> layouts.Converted:
    return layouts.to_timm(Weights.in_memory(weights, ""), models.create(name, kwargs, device="meta"))


@pytest.fixture(scope="module")
def vit() -> dict[str, torch.Tensor]:
    """The weights of a ViT of transformers with pooler and mask token, under its names on disk."""
    import transformers

    model = filled(transformers.ViTModel(transformers.ViTConfig(**VIT), use_mask_token=True))
    names = {r"^layers\.": "encoder.layer.", "q_proj": "attention.query", "k_proj": "attention.key"}
    names |= {"v_proj": "attention.value", "o_proj": "output.dense", r"mlp\.fc1": "intermediate.dense"}
    names |= {r"mlp\.fc2": "output.dense"}
    weights = {}
    for key, tensor in model.state_dict().items():
        for old, new in names.items():
            key = re.sub(old, new, key)
        weights[key] = tensor
    return weights


def test_tensors_without_counterpart_are_left_out_and_said(vit, tmp_path, caplog):
    unused = ("embeddings.mask_token", "pooler.dense.weight", "pooler.dense.bias")
    assert renamed(vit).unused == list(unused)
    assert renamed({**vit, "lm_head.weight": torch.zeros(9, 32)}).unused == [*unused, "lm_head.weight"]
    torch.save(vit, tmp_path / "vit.pth")
    read(tmp_path / "vit.pth", "vit_tiny", TIMM_VIT)
    line = "(transformers layout); head: none; left out: embeddings.mask_token, pooler.*"
    assert f"30 of 30 tensors of vit_tiny taken from {tmp_path}/vit.pth {line}" in caplog.text


def test_only_tensors_asked_for_are_read(vit):
    asked = []
    file = Weights({key: tuple(tensor.shape) for key, tensor in vit.items()}, lambda key: asked.append(key) or vit[key])
    weights = layouts.to_timm(file, models.create("vit_tiny", TIMM_VIT, device="meta")).weights
    assert not asked and weights.shapes["blocks.1.attn.qkv.weight"] == (96, 32)
    parts = [f"encoder.layer.1.attention.attention.{name}.weight" for name in ("query", "key", "value")]
    assert torch.equal(weights["blocks.1.attn.qkv.weight"], torch.cat([vit[part] for part in parts]))
    assert asked == parts


def test_half_precision_tokens_are_added_in_single_precision():
    keys = {"cls_token": (1, 1, 8), "position_embeddings": (1, 17, 8), "register_tokens": (1, 4, 8)}
    weights = {f"embeddings.{key}": torch.full(shape, 0.1, dtype=torch.half) for key, shape in keys.items()}
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
    tensors = renamed(weights, "vit_small_patch14_reg4_dinov2", kwargs).weights
    assert tensors["cls_token"].dtype == torch.float32 and tensors["pos_embed"].dtype == torch.half
    assert tensors["cls_token"][0, 0, 0] == 2 * float(torch.tensor(0.1).half())


def test_biases_of_dinov3_that_are_zero_are_left_out():
    weights = of_transformers("DINOv3ViTModel", REGISTERS).state_dict()
    zero = "model.layer.0.attention.q_proj.bias"
    weights[zero] = torch.zeros(32)
    found = renamed(weights, "vit_small_patch16_dinov3")
    assert zero in found.unused and "blocks.0.attn.q_bias" not in found.weights
    assert "blocks.0.attn.v_bias" in found.weights  # which this model does not have: the file is refused


def test_biases_that_timms_dinov3_lacks_are_the_reason(tmp_path):
    for path in saved(of_transformers("DINOv3ViTModel", REGISTERS), tmp_path):
        with pytest.raises(
            UserError, match=r"has blocks\.0\.attn\.._bias, which is no tensor of .*; see --pretrained_kw"
        ):
            read(path, "vit_small_patch16_dinov3", TIMM_VIT)
        assert read(path, "vit_small_patch16_dinov3", {**TIMM_VIT, "qkv_bias": True})


def test_file_of_another_image_size_is_resampled_by_timm(vit, tmp_path, caplog):
    kwargs = {**TIMM_VIT, "img_size": 64, "patch_size": 4}
    torch.save(vit, tmp_path / "vit.pth")
    torch.save(dict(renamed(vit).weights), tmp_path / "timm.pth")
    ours, by_timm = (read(tmp_path / name, "vit_tiny", kwargs) for name in ("vit.pth", "timm.pth"))
    assert_same(ours, by_timm)
    assert not ours.whole and by_timm.whole
    assert "vit.pth: timm made [1, 257, 32] of pos_embed [1, 17, 32]" in caplog.text


def test_windows_of_another_size_are_resampled_and_said_once(tmp_path, caplog):
    library = filled(torchvision.models.SwinTransformer([2, 2], 8, [2, 2, 2], [2, 4, 4], [4, 4], num_classes=5))
    torch.save(library.state_dict(), tmp_path / "swin.pth")
    weights = read(
        tmp_path / "swin.pth", "swin_tiny_patch4_window7_224", {**TIMM_SWIN, "img_size": 64, "window_size": 8}
    )
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert weights[table].shape == weights.shapes[table] == (225, 2)
    assert caplog.text.count("timm made") == 1
    assert f"timm made [225, 2] of {table} [49, 2] and of 5 more" in caplog.text


def test_selection_takes_the_classifier_too(vit, tmp_path):
    teacher = models.create("vit_tiny", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4})
    library = torchvision.models.VisionTransformer(32, 8, 3, 4, 48, 192, num_classes=7)
    weights = random_tensors(library, torch.float32)
    torch.save(weights, tmp_path / "vit.pth")
    torch.save(dict(layouts.to_timm(Weights.in_memory(weights, ""), teacher).weights), tmp_path / "timm.pth")
    outputs = []
    for name in ("vit", "timm"):
        more = ["--output_dir", str(tmp_path / f"{name}-small.pth"), "--include_head", "true"]
        weight_selection.main(small_pair(tmp_path / f"{name}.pth", *more))
        outputs.append(torch.load(tmp_path / f"{name}-small.pth"))
    assert_same(*outputs)
    assert outputs[0]["head.weight"].shape == (7, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layernorm.bias": torch.zeros(31)},
            r"\(transformers layout\) has norm.bias \[31\], unlike the \[32\] of vit_",
        ),
        (
            {"encoder.layer.7.layernorm_before.bias": torch.zeros(32)},
            r"has blocks.7.norm1.bias, which is no tensor of v",
        ),
        (
            {"encoder.layer.0.lambda_1": torch.zeros(32)},
            r"encoder.layer.0.lambda_1 has no counterpart in timm's model",
        ),
        ({"vit.layernorm.bias": torch.zeros(32)}, r"layernorm.bias and vit.layernorm.bias are the same tensor"),
        (
            {"encoder.layer.0.attention.attention.key.bias": torch.zeros(3, 1)},
            r"query.bias \[32\], encoder.*key.bias \[3, 1\], encoder.*value.bias \[32\] do not fit together",
        ),
    ],
)
def test_known_layout_of_other_tensors_is_refused(change, message, vit, tmp_path):
    torch.save({**vit, **change}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=rf"bad\.pth.*{message}"):
        read(tmp_path / "bad.pth", "vit_tiny", TIMM_VIT)


def test_unknown_layout_and_other_family_are_named(vit, tmp_path):
    def refused(weights, message, name="vit_tiny", kwargs=TIMM_VIT):
        torch.save(weights, tmp_path / "bad.pth")
        with pytest.raises(UserError, match=rf"bad\.pth {message}$"):
            read(tmp_path / "bad.pth", name, kwargs)

    unknown = {f"trunk.{layer}.mix.{leaf}": torch.zeros(3) for layer in range(12) for leaf in ("a", "b")}
    known = (
        r"has no layout that vit_tiny is known in \(timm, its original release, transformers, torchvision, MMPretrain\)"
    )
    refused(unknown, rf"{known}: its keys look like trunk\.N\.mix\.a, trunk\.N\.mix\.b")
    other = r"has no layout that convnext_tiny is known in: it is a ViT or DeiT in transformers layout"
    refused(vit, other, "convnext_tiny", TIMM_STAGES)
