"""Files of MMPretrain give timm's models the outputs that its own forward pass gives.

The tables of names and the forward passes are written down from MMPretrain 1.2.0: mmpretrain/models/backbones/
vision_transformer.py, convnext.py, swin_transformer.py, resnet.py, deit.py; models/utils/attention.py, norm.py,
layer_scale.py, swiglu_ffn.py; models/heads/linear_head.py, vision_transformer_head.py, deit_head.py; and, for PatchEmbed,
PatchMerging and FFN, from mmcv 2: mmcv/cnn/bricks/transformer.py.
"""

import pytest
import torch
import torch.nn.functional as F
from small_models import assert_same
from torch import Tensor

import models
from models import ModelSpec
from weightfiles import layouts
from weightfiles.lazy import Weights
from weightfiles.teacher import read_teacher

CLASSES = 5


class File(dict):
    """Random tensors by key, and the layers of the forward pass by their keys."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        generator = torch.Generator().manual_seed(0)
        for key, shape in shapes.items():
            self[key] = torch.randn(shape, generator=generator, dtype=torch.float64) / 5
            if key.endswith("running_var"):
                self[key] = self[key].abs() + 0.5
            if key.endswith("num_batches_tracked"):
                self[key] = torch.tensor(7)

    def linear(self, x: Tensor, key: str) -> Tensor:
        return F.linear(x, self[f"{key}.weight"], self.get(f"{key}.bias"))

    def conv(self, x: Tensor, key: str, **more) -> Tensor:
        return F.conv2d(x, self[f"{key}.weight"], self.get(f"{key}.bias"), **more)

    def norm(self, x: Tensor, key: str, eps: float) -> Tensor:
        """A layer norm of the last axis."""
        return F.layer_norm(x, x.shape[-1:], self[f"{key}.weight"], self[f"{key}.bias"], eps)

    def batch_norm(self, x: Tensor, key: str) -> Tensor:
        means, weights = ("running_mean", "running_var"), ("weight", "bias")
        return F.batch_norm(x, *(self[f"{key}.{name}"] for name in (*means, *weights)))


def layer(key: str, *shape: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    """The shapes of a linear layer, a convolution or a norm."""
    return {f"{key}.weight": shape} | ({f"{key}.bias": shape[:1]} if bias else {})


# ---- ViT: 32 px, patches of 8, 2 layers of 32 channels, 4 heads ----


def vit_shapes(tokens: int, *, scaled: bool = False, swiglu: bool = False) -> dict:
    shapes = {"backbone.cls_token": (1, 1, 32), "backbone.pos_embed": (1, 16 + tokens, 32)}
    shapes |= layer("backbone.patch_embed.projection", 32, 3, 8, 8) | layer("backbone.ln1", 32)
    for number in range(2):
        at = f"backbone.layers.{number}."
        shapes |= layer(f"{at}ln1", 32) | layer(f"{at}ln2", 32)
        shapes |= layer(f"{at}attn.qkv", 96, 32) | layer(f"{at}attn.proj", 32, 32)
        if scaled:
            shapes |= {f"{at}attn.gamma1.weight": (32,), f"{at}ffn.gamma2.weight": (32,)}
        if swiglu:
            shapes |= layer(f"{at}ffn.w12", 88, 32) | layer(f"{at}ffn.w3", 32, 44)
        else:
            shapes |= layer(f"{at}ffn.layers.0.0", 64, 32) | layer(f"{at}ffn.layers.1", 32, 64)
    return shapes | layer("head.layers.head", CLASSES, 32)


def attention(file: File, x: Tensor, key: str, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """Attention among the tokens of x [batch, tokens, channels]."""
    batch, tokens, width = x.shape
    q, k, v = file.linear(x, f"{key}.qkv").reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = ((q @ k.transpose(-2, -1)) * (width // heads) ** -0.5 + bias).softmax(dim=-1)
    return file.linear((weights @ v).transpose(1, 2).reshape(batch, tokens, width), f"{key}.proj")


def ffn(file: File, x: Tensor, key: str) -> Tensor:
    if f"{key}.w12.weight" in file:
        gate, value = file.linear(x, f"{key}.w12").chunk(2, dim=-1)
        return file.linear(F.silu(gate) * value, f"{key}.w3")
    return file.linear(F.gelu(file.linear(x, f"{key}.layers.0.0")), f"{key}.layers.1")


def vit_forward(file: File, images: Tensor) -> Tensor:
    x = file.conv(images, "backbone.patch_embed.projection", stride=8).flatten(2).transpose(1, 2)
    tokens = [file[f"backbone.{name}"] for name in ("cls_token", "dist_token") if f"backbone.{name}" in file]
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], dim=1) + file["backbone.pos_embed"]
    for number in range(2):
        at = f"backbone.layers.{number}"
        scales = [file.get(f"{at}.{name}.weight", 1.0) for name in ("attn.gamma1", "ffn.gamma2")]
        x = x + attention(file, file.norm(x, f"{at}.ln1", 1e-6), f"{at}.attn", 4) * scales[0]
        x = x + ffn(file, file.norm(x, f"{at}.ln2", 1e-6), f"{at}.ffn") * scales[1]
    x = file.norm(x, "backbone.ln1", 1e-6)
    if len(tokens) == 2:
        return (file.linear(x[:, 0], "head.layers.head") + file.linear(x[:, 1], "head.layers.head_dist")) / 2
    return file.linear(x[:, 0], "head.layers.head")


# ---- ConvNeXt: stages of 8, 12, 16, 20 channels and 1, 2, 1, 1 blocks ----

DIMS, DEPTHS = (8, 12, 16, 20), (1, 2, 1, 1)


def convnext_shapes(*, v2: bool) -> dict:
    shapes = layer("backbone.downsample_layers.0.0", 8, 3, 4, 4) | layer("backbone.downsample_layers.0.1", 8)
    for stage, (width, depth) in enumerate(zip(DIMS, DEPTHS, strict=True)):
        if stage:
            at = f"backbone.downsample_layers.{stage}."
            shapes |= layer(f"{at}0", DIMS[stage - 1]) | layer(f"{at}1", width, DIMS[stage - 1], 2, 2)
        for number in range(depth):
            at = f"backbone.stages.{stage}.{number}."
            shapes |= layer(f"{at}depthwise_conv", width, 1, 7, 7) | layer(f"{at}norm", width)
            shapes |= layer(f"{at}pointwise_conv1", 4 * width, width) | layer(f"{at}pointwise_conv2", width, 4 * width)
            names = ("grn.gamma", "grn.beta") if v2 else ("gamma",)
            shapes |= {f"{at}{name}": (4 * width,) if v2 else (width,) for name in names}
    return shapes | layer("backbone.norm3", 20) | layer("head.fc", CLASSES, 20)


def norm_2d(file: File, x: Tensor, key: str) -> Tensor:
    return file.norm(x.permute(0, 2, 3, 1), key, 1e-6).permute(0, 3, 1, 2)


def convnext_forward(file: File, images: Tensor) -> Tensor:
    x = norm_2d(file, file.conv(images, "backbone.downsample_layers.0.0", stride=4), "backbone.downsample_layers.0.1")
    for stage, depth in enumerate(DEPTHS):
        if stage:
            at = f"backbone.downsample_layers.{stage}."
            x = file.conv(norm_2d(file, x, f"{at}0"), f"{at}1", stride=2)
        for number in range(depth):
            at = f"backbone.stages.{stage}.{number}."
            y = file.conv(x, f"{at}depthwise_conv", padding=3, groups=x.shape[1]).permute(0, 2, 3, 1)
            y = F.gelu(file.linear(file.norm(y, f"{at}norm", 1e-6), f"{at}pointwise_conv1"))
            if f"{at}grn.gamma" in file:
                lengths = y.norm(dim=(1, 2), keepdim=True)
                lengths = lengths / (lengths.mean(dim=-1, keepdim=True) + 1e-6)
                y = file[f"{at}grn.gamma"] * (y * lengths) + file[f"{at}grn.beta"] + y
            y = file.linear(y, f"{at}pointwise_conv2") * file.get(f"{at}gamma", 1.0)
            x = x + y.permute(0, 3, 1, 2)
    return file.linear(file.norm(x.mean(dim=(2, 3)), "backbone.norm3", 1e-6), "head.fc")


# ---- Swin: 32 px, patches of 2, windows of 4, three stages of 8, 16, 32 channels and two blocks ----

WINDOW, HEADS = 4, (2, 4, 4)


def swin_shapes() -> dict:
    shapes = layer("backbone.patch_embed.projection", 8, 3, 2, 2) | layer("backbone.patch_embed.norm", 8)
    for stage, heads in enumerate(HEADS):
        width = 8 * 2**stage
        for number in range(2):
            at = f"backbone.stages.{stage}.blocks.{number}."
            shapes |= layer(f"{at}norm1", width) | layer(f"{at}norm2", width)
            shapes |= {f"{at}attn.w_msa.relative_position_bias_table": ((2 * WINDOW - 1) ** 2, heads)}
            shapes |= layer(f"{at}attn.w_msa.qkv", 3 * width, width) | layer(f"{at}attn.w_msa.proj", width, width)
            shapes |= layer(f"{at}ffn.layers.0.0", 4 * width, width) | layer(f"{at}ffn.layers.1", width, 4 * width)
        if stage < 2:
            at = f"backbone.stages.{stage}.downsample."
            shapes |= layer(f"{at}norm", 4 * width) | layer(f"{at}reduction", 2 * width, 4 * width, bias=False)
    return shapes | layer("backbone.norm2", 32) | layer("head.fc", CLASSES, 32)


def relative_position_index() -> Tensor:
    """The row of the table for each pair of positions in a window, [positions, positions]."""
    steps = (torch.arange(WINDOW)[:, None] * (2 * WINDOW - 1) + torch.arange(WINDOW)).flatten()
    return (steps[:, None] + steps[None, :]).flip(1)


def windows_of(x: Tensor) -> Tensor:
    """Cut [batch, height, width, channels] into windows, [windows, positions, channels]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // WINDOW, WINDOW, width // WINDOW, WINDOW, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, WINDOW**2, channels)


def shift_mask(side: int, shift: int) -> Tensor:
    """-100 between positions of a shifted window that were apart, [windows, 1, positions, positions]."""
    regions = torch.zeros(1, side, side, 1)
    parts = (slice(0, -WINDOW), slice(-WINDOW, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((rows, columns) for rows in parts for columns in parts):
        regions[:, rows, columns] = number
    regions = windows_of(regions).squeeze(-1)
    return (regions[:, None, :] != regions[:, :, None]).unsqueeze(1) * -100.0


def swin_forward(file: File, images: Tensor) -> Tensor:
    x = file.conv(images, "backbone.patch_embed.projection", stride=2).permute(0, 2, 3, 1)
    x = file.norm(x, "backbone.patch_embed.norm", 1e-5)
    for stage, heads in enumerate(HEADS):
        batch, side, _, width = x.shape
        for number in range(2):
            at = f"backbone.stages.{stage}.blocks.{number}."
            shift = WINDOW // 2 if number % 2 and side > WINDOW else 0
            table = file[f"{at}attn.w_msa.relative_position_bias_table"]
            bias = table[relative_position_index()].permute(2, 0, 1)
            if shift:
                bias = bias + shift_mask(side, shift).repeat(batch, 1, 1, 1)
            y = torch.roll(file.norm(x, f"{at}norm1", 1e-5), (-shift, -shift), dims=(1, 2))
            y = attention(file, windows_of(y), f"{at}attn.w_msa", heads, bias)
            y = y.reshape(batch, side // WINDOW, side // WINDOW, WINDOW, WINDOW, width).permute(0, 1, 3, 2, 4, 5)
            x = x + torch.roll(y.reshape(x.shape), (shift, shift), dims=(1, 2))
            x = x + ffn(file, file.norm(x, f"{at}norm2", 1e-5), f"{at}ffn")
        if stage < 2:
            at = f"backbone.stages.{stage}.downsample."
            x = F.unfold(x.permute(0, 3, 1, 2), kernel_size=2, stride=2).transpose(1, 2)
            x = file.linear(file.norm(x, f"{at}norm", 1e-5), f"{at}reduction")
            x = x.reshape(batch, side // 2, side // 2, 2 * width)
    return file.linear(file.norm(x, "backbone.norm2", 1e-5).mean(dim=(1, 2)), "head.fc")


# ---- ResNet: four stages of 8, 16, 32, 64 channels (four times as many behind a bottleneck) with one block each ----


def bn(key: str, width: int) -> dict[str, tuple[int, ...]]:
    buffers = {f"{key}.running_mean": (width,), f"{key}.running_var": (width,), f"{key}.num_batches_tracked": ()}
    return layer(key, width) | buffers


def resnet_shapes(*, bottleneck: bool = False, deep_stem: bool = False, avg_down: bool = False) -> dict:
    if deep_stem:
        shapes = {}
        for number, (inputs, width) in enumerate(((3, 32), (32, 32), (32, 64))):
            at = f"backbone.stem.{number}."
            shapes |= layer(f"{at}conv", width, inputs, 3, 3, bias=False) | bn(f"{at}bn", width)
    else:
        shapes = layer("backbone.conv1", 64, 3, 7, 7, bias=False) | bn("backbone.bn1", 64)
    inputs = 64
    for stage in range(4):
        at, middle = f"backbone.layer{stage + 1}.0.", 8 * 2**stage
        width = 4 * middle if bottleneck else middle
        kernels = ((middle, inputs, 1), (middle, middle, 3), (width, middle, 1))
        for number, (out, into, side) in enumerate(kernels if bottleneck else ((width, inputs, 3), (width, width, 3))):
            shapes |= layer(f"{at}conv{number + 1}", out, into, side, side, bias=False) | bn(f"{at}bn{number + 1}", out)
        if stage or inputs != width:
            first = 1 if avg_down and stage else 0  # behind the pooling, which a stride of 1 does without
            shapes |= layer(f"{at}downsample.{first}", width, inputs, 1, 1, bias=False)
            shapes |= bn(f"{at}downsample.{first + 1}", width)
        inputs = width
    return shapes | layer("head.fc", CLASSES, inputs)


def resnet_forward(file: File, images: Tensor) -> Tensor:
    if "backbone.conv1.weight" in file:
        x = file.batch_norm(file.conv(images, "backbone.conv1", stride=2, padding=3), "backbone.bn1").relu()
    else:
        x = images
        for number in range(3):
            x = file.conv(x, f"backbone.stem.{number}.conv", stride=1 if number else 2, padding=1)
            x = file.batch_norm(x, f"backbone.stem.{number}.bn").relu()
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    for stage in range(4):
        at, stride = f"backbone.layer{stage + 1}.0.", 2 if stage else 1
        bottleneck = f"{at}conv3.weight" in file
        y = x
        for number in range(3 if bottleneck else 2):
            strided = number == (1 if bottleneck else 0)  # the style "pytorch"
            padding = file[f"{at}conv{number + 1}.weight"].shape[-1] // 2
            y = file.conv(y, f"{at}conv{number + 1}", stride=stride if strided else 1, padding=padding)
            y = file.batch_norm(y, f"{at}bn{number + 1}")
            y = y if number == (2 if bottleneck else 1) else y.relu()
        if f"{at}downsample.2.weight" in file:
            x = F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
            x = file.batch_norm(file.conv(x, f"{at}downsample.1"), f"{at}downsample.2")
        elif f"{at}downsample.0.weight" in file:
            x = file.batch_norm(file.conv(x, f"{at}downsample.0", stride=stride), f"{at}downsample.1")
        x = (x + y).relu()
    return file.linear(x.mean(dim=(2, 3)), "head.fc")


# ---- the same in timm ----

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
TIMM_SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2, 2), "num_heads": HEADS}
CONVNEXT, RESNET = {"dims": DIMS, "depths": DEPTHS}, {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64)}
DISTILLED = layer("head.layers.head_dist", CLASSES, 32) | {"backbone.dist_token": (1, 1, 32)}
DEIT, DINOV2 = "deit_tiny_distilled_patch16_224", "vit_giant_patch14_dinov2"
# the file's shapes, MMPretrain's forward pass, timm's name, its arguments
CASES = {
    "ViT": (vit_shapes(1), vit_forward, "vit_tiny_patch16_224", VIT),
    "DeiT": (vit_shapes(2) | DISTILLED, vit_forward, DEIT, VIT),
    "DINOv2": (vit_shapes(1, scaled=True, swiglu=True), vit_forward, DINOV2, {**VIT, "mlp_ratio": 2.75}),
    "ConvNeXt": (convnext_shapes(v2=False), convnext_forward, "convnext_tiny", CONVNEXT),
    "ConvNeXt V2": (convnext_shapes(v2=True), convnext_forward, "convnextv2_tiny", CONVNEXT),
    "Swin": (swin_shapes(), swin_forward, "swin_tiny_patch4_window7_224", TIMM_SWIN),
    "ResNet": (resnet_shapes(), resnet_forward, "resnet18", RESNET),
    "ResNet bottleneck": (resnet_shapes(bottleneck=True), resnet_forward, "resnet50", RESNET),
    "ResNetV1c": (resnet_shapes(bottleneck=True, deep_stem=True), resnet_forward, "resnet50c", RESNET),
    "ResNetV1d": (resnet_shapes(deep_stem=True, avg_down=True), resnet_forward, "resnet18d", RESNET),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_mmpretrain_files_give_the_same_outputs(case, tmp_path):
    shapes, forward, name, kwargs = CASES[case]
    kwargs = {**kwargs, "num_classes": CLASSES}
    file = File(shapes)
    torch.save({"meta": {}, "state_dict": dict(file)}, tmp_path / "weights.pth")
    meta = models.create(name, kwargs, device="meta")
    weights = read_teacher(ModelSpec(name, kwargs), meta, tmp_path / "weights.pth")
    assert not weights.whole
    model = models.create(name, kwargs).double().eval()
    model.load_state_dict(dict(weights))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output, expected = model(images), forward(file, images)
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", ["ViT", "ConvNeXt V2", "Swin"])
def test_backbones_without_their_prefix_are_read(case):
    shapes, _, name, kwargs = CASES[case]
    model, file = models.create(name, kwargs, device="meta"), File(shapes)
    bare = {key.removeprefix("backbone."): tensor for key, tensor in file.items() if not key.startswith("head.")}
    whole, backbone = (layouts.to_timm(Weights.in_memory(weights, ""), model).weights for weights in (dict(file), bare))
    assert_same(dict(backbone), {key: tensor for key, tensor in whole.items() if key in backbone})
    assert all(key.startswith(models.head_prefixes(model)) for key in whole.keys() - backbone.keys())
