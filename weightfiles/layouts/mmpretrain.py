"""MMPretrain's layouts (as of 1.2.0; MMClassification's are the same), with and without its prefix `backbone.`."""

from torch import Tensor

from weightfiles.layouts.layout import UNUSED, Layout


def from_unfold(tensor: Tensor) -> Tensor:
    """Reorder what reads 2 x 2 merged patches, [..., 4 C]: from (channel, row, column), as unfold has it, to timm's
    (column, row, channel)."""
    *others, width = tensor.shape
    return tensor.reshape(*others, width // 4, 2, 2).transpose(-1, -3).reshape(tensor.shape)


BLOCK = r"layers\.(\d+)\."
VIT = {
    "(cls_token|dist_token|pos_embed)": r"\1",
    r"patch_embed\.projection": "patch_embed.proj",
    "pre_norm": "norm_pre",
    rf"{BLOCK}ln([12])": r"blocks.\1.norm\2",
    rf"{BLOCK}attn\.(qkv|proj)": r"blocks.\1.attn.\2",
    rf"{BLOCK}(?:attn|ffn)\.gamma([12])\.weight": r"blocks.\1.ls\2.gamma",
    rf"{BLOCK}ffn\.(?:layers\.0\.0|w12)": r"blocks.\1.mlp.fc1",
    rf"{BLOCK}ffn\.(?:layers\.1|w3)": r"blocks.\1.mlp.fc2",
    "ln1": "norm",
    "ln2": "fc_norm",
    r"head\.layers\.(head|head_dist)": r"\1",
    r"head\.fc": "head",
    r"mask_token|data_preprocessor\..*": UNUSED,
}

BLOCK = r"stages\.(\d)\.(\d+)\."
CONVNEXT = {
    r"downsample_layers\.0\.([01])": r"stem.\1",
    r"downsample_layers\.(\d)\.([01])": r"stages.\1.downsample.\2",
    rf"{BLOCK}gamma": r"stages.\1.blocks.\2.gamma",
    rf"{BLOCK}depthwise_conv": r"stages.\1.blocks.\2.conv_dw",
    rf"{BLOCK}norm": r"stages.\1.blocks.\2.norm",
    rf"{BLOCK}pointwise_conv([12])": r"stages.\1.blocks.\2.mlp.fc\3",
    rf"{BLOCK}grn\.gamma": r"stages.\1.blocks.\2.mlp.grn.weight",
    rf"{BLOCK}grn\.beta": r"stages.\1.blocks.\2.mlp.grn.bias",
    "norm3": "head.norm",
    r"head\.fc": "head.fc",
    r"data_preprocessor\..*": UNUSED,
}

BLOCK = r"stages\.(\d)\.blocks\.(\d+)\."
SWIN = {
    r"patch_embed\.projection": "patch_embed.proj",
    r"patch_embed\.norm": "patch_embed.norm",
    rf"{BLOCK}norm([12])": r"layers.\1.blocks.\2.norm\3",
    rf"{BLOCK}attn\.w_msa\.(qkv|proj|relative_position_bias_table)": r"layers.\1.blocks.\2.attn.\3",
    rf"{BLOCK}ffn\.layers\.0\.0": r"layers.\1.blocks.\2.mlp.fc1",
    rf"{BLOCK}ffn\.layers\.1": r"layers.\1.blocks.\2.mlp.fc2",
    **{rf"stages\.{stage}\.downsample\.(\w+)": rf"layers.{stage + 1}.downsample.\1" for stage in range(9)},
    r"norm\d?": "norm",
    r"head\.fc": "head.fc",
    r".*\.(?:relative_position_index|attn_mask)|mask_token|data_preprocessor\..*": UNUSED,
}

# without its prefix the ResNet has timm's names, apart from the deep stem of V1c and V1d
RESNET = {
    "(conv1|bn1)": r"\1",
    r"stem\.0\.conv": "conv1.0",
    r"stem\.0\.bn": "conv1.1",
    r"stem\.1\.conv": "conv1.3",
    r"stem\.1\.bn": "conv1.4",
    r"stem\.2\.conv": "conv1.6",
    r"stem\.2\.bn": "bn1",
    r"(layer\d\.\d+\.(?:conv\d|bn\d))": r"\1",
    r"(layer\d\.0\.downsample\.[01])": r"\1",
    r"head\.fc": "fc",
    r"data_preprocessor\..*": UNUSED,
}
# V1d pools before the convolution of a shortcut, but not in the first stage, where timm has an identity instead
RESNET_V1D = {
    r"layer1\.0\.downsample\.0": "layer1.0.downsample.1",
    r"layer1\.0\.downsample\.1": "layer1.0.downsample.2",
    r"(layer[234]\.0\.downsample\.[12])": r"\1",
} | {pattern: name for pattern, name in RESNET.items() if "downsample" not in pattern}

PREFIX = r"(?:backbone\.)?"
NEEDED_PREFIX = r"(?:backbone\.|(?=head\.|data_preprocessor\.))"
LAYOUTS = (
    Layout("MMPretrain", "ViT", "vit", VIT, PREFIX, epsilons={".*": 1e-6}),
    Layout("MMPretrain", "ConvNeXt", "convnext", CONVNEXT, PREFIX, epsilons={".*": 1e-6}),
    Layout(
        "MMPretrain",
        "Swin",
        "swin",
        SWIN,
        PREFIX,
        joins={r"layers\.\d\.downsample\..*": from_unfold},
        epsilons={".*": 1e-5},
    ),
    Layout("MMPretrain", "ResNet", "resnet", RESNET, NEEDED_PREFIX),
    Layout("MMPretrain", "ResNetV1d", "resnet", RESNET_V1D, NEEDED_PREFIX),
)
