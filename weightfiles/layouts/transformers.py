"""transformers' layouts: the names in its files, which are those of 4.x, and in memory since 5.0 (as of 5.24)."""

from torch import Tensor

from weightfiles.layouts.layout import UNUSED, Layout
from weightfiles.read import widened


def add_position(token: Tensor, positions: Tensor) -> Tensor:
    """Add the class token's row of the position embedding to the token."""
    return widened(token) + widened(positions[:, :1])


def without_first(positions: Tensor) -> Tensor:
    """Leave out the class token's row of the position embedding."""
    return positions[:, 1:]


BLOCK = r"(?:encoder\.layer|layers)\.(\d+)\."
ENCODER = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    rf"{BLOCK}attention\.(?:attention\.query|q_proj)": r"blocks.\1.attn.qkv:0",
    rf"{BLOCK}attention\.(?:attention\.key|k_proj)": r"blocks.\1.attn.qkv:1",
    rf"{BLOCK}attention\.(?:attention\.value|v_proj)": r"blocks.\1.attn.qkv:2",
    rf"{BLOCK}attention\.(?:output\.dense|o_proj)": r"blocks.\1.attn.proj",
    "layernorm": "norm",
    r"embeddings\.mask_token|pooler\.dense|decoder\..*": UNUSED,
}
VIT = ENCODER | {
    r"embeddings\.distillation_token": "dist_token",
    rf"{BLOCK}layernorm_before": r"blocks.\1.norm1",
    rf"{BLOCK}layernorm_after": r"blocks.\1.norm2",
    rf"{BLOCK}(?:intermediate\.dense|mlp\.fc1)": r"blocks.\1.mlp.fc1",
    rf"{BLOCK}(?:output\.dense|mlp\.fc2)": r"blocks.\1.mlp.fc2",
    "classifier|cls_classifier": "head",
    "distillation_classifier": "head_dist",
}
DINOV2 = ENCODER | {
    rf"{BLOCK}norm([12])": r"blocks.\1.norm\2",
    rf"{BLOCK}layer_scale([12])\.lambda1": r"blocks.\1.ls\2.gamma",
    rf"{BLOCK}mlp\.fc([12])": r"blocks.\1.mlp.fc\2",
    rf"{BLOCK}mlp\.weights_in": r"blocks.\1.mlp.fc1",
    rf"{BLOCK}mlp\.gate_proj": r"blocks.\1.mlp.fc1:0",
    rf"{BLOCK}mlp\.up_proj": r"blocks.\1.mlp.fc1:1",
    rf"{BLOCK}mlp\.(?:weights_out|down_proj)": r"blocks.\1.mlp.fc2",
    "classifier": UNUSED,  # it reads the mean of the patches too, timm's reads the class token alone
}
DINOV2_WITH_REGISTERS = DINOV2 | {
    r"embeddings\.register_tokens": "reg_token",
    r"embeddings\.position_embeddings": "cls_token:1 pos_embed",  # timm's has no row for the class token
}

BLOCK = r"(?:model\.)?layer\.(\d+)\."
DINOV3 = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.register_tokens": "reg_token",
    r"embeddings\.patch_embeddings": "patch_embed.proj",
    rf"{BLOCK}norm([12])": r"blocks.\1.norm\2",
    rf"{BLOCK}attention\.([qkv])_proj\.bias": r"blocks.\1.attn.\2_bias",
    rf"{BLOCK}attention\.q_proj": r"blocks.\1.attn.qkv:0",
    rf"{BLOCK}attention\.k_proj": r"blocks.\1.attn.qkv:1",
    rf"{BLOCK}attention\.v_proj": r"blocks.\1.attn.qkv:2",
    rf"{BLOCK}attention\.o_proj": r"blocks.\1.attn.proj",
    rf"{BLOCK}layer_scale([12])\.lambda1": r"blocks.\1.gamma_\2",
    rf"{BLOCK}mlp\.up_proj": r"blocks.\1.mlp.fc1",
    rf"{BLOCK}mlp\.down_proj": r"blocks.\1.mlp.fc2",
    "norm": "norm",
    r"embeddings\.mask_token|rope_embeddings\..*": UNUSED,
}
GATED_DINOV3 = DINOV3 | {
    rf"{BLOCK}mlp\.gate_proj": r"blocks.\1.mlp.fc1_g",
    rf"{BLOCK}mlp\.up_proj": r"blocks.\1.mlp.fc1_x",
}

BLOCK = r"encoder\.stages\.(\d)\.layers\.(\d+)\."
CONVNEXT = {
    r"embeddings\.patch_embeddings": "stem.0",
    r"embeddings\.layernorm": "stem.1",
    r"encoder\.stages\.(\d)\.downsampling_layer\.([01])": r"stages.\1.downsample.\2",
    rf"{BLOCK}layer_scale_parameter": r"stages.\1.blocks.\2.gamma",
    rf"{BLOCK}dwconv": r"stages.\1.blocks.\2.conv_dw",
    rf"{BLOCK}layernorm": r"stages.\1.blocks.\2.norm",
    rf"{BLOCK}pwconv([12])": r"stages.\1.blocks.\2.mlp.fc\3",
    rf"{BLOCK}grn": r"stages.\1.blocks.\2.mlp.grn",
    "layernorm": "head.norm",
    "classifier": "head.fc",
}

BLOCK = r"(?:model\.)?stages\.(\d)\.layers\.(\d+)\."
DINOV3_CONVNEXT = {
    r"(?:model\.)?stages\.0\.downsample_layers\.([01])": r"stem.\1",
    r"(?:model\.)?stages\.(\d)\.downsample_layers\.([01])": r"stages.\1.downsample.\2",
    rf"{BLOCK}gamma": r"stages.\1.blocks.\2.gamma",
    rf"{BLOCK}depthwise_conv": r"stages.\1.blocks.\2.conv_dw",
    rf"{BLOCK}layer_norm": r"stages.\1.blocks.\2.norm",
    rf"{BLOCK}pointwise_conv([12])": r"stages.\1.blocks.\2.mlp.fc\3",
    "layer_norm": "head.norm",
}

BLOCK = r"encoder\.layers\.(\d)\.blocks\.(\d+)\."
SWIN = {
    r"embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"embeddings\.norm": "patch_embed.norm",
    rf"{BLOCK}attention\.(?:self\.query|q_proj)": r"layers.\1.blocks.\2.attn.qkv:0",
    rf"{BLOCK}attention\.(?:self\.key|k_proj)": r"layers.\1.blocks.\2.attn.qkv:1",
    rf"{BLOCK}attention\.(?:self\.value|v_proj)": r"layers.\1.blocks.\2.attn.qkv:2",
    rf"{BLOCK}attention\.(?:self|relative_position_bias)\.relative_position_bias_table": (
        r"layers.\1.blocks.\2.attn.relative_position_bias_table"
    ),
    rf"{BLOCK}attention\.(?:output\.dense|o_proj)": r"layers.\1.blocks.\2.attn.proj",
    rf"{BLOCK}layernorm_before": r"layers.\1.blocks.\2.norm1",
    rf"{BLOCK}layernorm_after": r"layers.\1.blocks.\2.norm2",
    rf"{BLOCK}(?:intermediate\.dense|mlp\.fc1)": r"layers.\1.blocks.\2.mlp.fc1",
    rf"{BLOCK}(?:output\.dense|mlp\.fc2)": r"layers.\1.blocks.\2.mlp.fc2",
    **{rf"encoder\.layers\.{stage}\.downsample\.(\w+)": rf"layers.{stage + 1}.downsample.\1" for stage in range(9)},
    "layernorm": "norm",
    "classifier": "head.fc",
    r"embeddings\.mask_token|.*\.relative_position_index|decoder\..*": UNUSED,
}

RESNET = {
    r"embedder\.embedder\.convolution": "conv1",
    r"embedder\.embedder\.normalization": "bn1",
    r"classifier\.1": "fc",
}
for stage in range(4):
    BLOCK = rf"encoder\.stages\.{stage}\.layers\.(\d+)\."
    for layer in range(3):
        RESNET[rf"{BLOCK}layer\.{layer}\.convolution"] = rf"layer{stage + 1}.\1.conv{layer + 1}"
        RESNET[rf"{BLOCK}layer\.{layer}\.normalization"] = rf"layer{stage + 1}.\1.bn{layer + 1}"
    RESNET[rf"{BLOCK}shortcut\.convolution"] = rf"layer{stage + 1}.\1.downsample.0"
    RESNET[rf"{BLOCK}shortcut\.normalization"] = rf"layer{stage + 1}.\1.downsample.1"


def _layout(model: str, family: str, names: dict[str, str], prefix: str = "", **more) -> Layout:
    return Layout("transformers", model, family, names, f"(?:(?:{prefix})\\.)?" if prefix else "", **more)


LAYOUTS = (
    _layout("ViT or DeiT", "vit", VIT, "vit|deit", epsilons={".*": 1e-12}),
    _layout("Dinov2", "vit", DINOV2, "dinov2", epsilons={".*": 1e-6}),
    _layout(
        "Dinov2 with registers",
        "vit",
        DINOV2_WITH_REGISTERS,
        "dinov2_with_registers",
        joins={"cls_token": add_position, "pos_embed": without_first},
        epsilons={".*": 1e-6},
    ),
    _layout("DINOv3 ViT", "eva", DINOV3, epsilons={".*": 1e-5}),
    _layout("DINOv3 ViT with gated MLPs", "eva", GATED_DINOV3, epsilons={".*": 1e-5}),
    _layout("ConvNeXt", "convnext", CONVNEXT, "convnext|convnextv2", epsilons={r"head\.norm": 1e-12, ".*": 1e-6}),
    _layout("DINOv3 ConvNeXt", "convnext", DINOV3_CONVNEXT, epsilons={".*": 1e-6}),
    _layout("Swin", "swin", SWIN, "swin", epsilons={r"norm|.*\.blocks\..*": 1e-5, ".*": 1e-5}),
    _layout("ResNet", "resnet", RESNET, "resnet"),
)
