"""torchvision's layouts (as of 0.29). Its ResNet has timm's names."""

from weightfiles.layouts.layout import UNUSED, Layout

BLOCK = r"encoder\.layers\.encoder_layer_(\d+)\."
VIT = {
    "class_token": "cls_token",
    r"encoder\.pos_embedding": "pos_embed",
    "conv_proj": "patch_embed.proj",
    rf"{BLOCK}ln_([12])": r"blocks.\1.norm\2",
    rf"{BLOCK}self_attention\.in_proj_(weight|bias)": r"blocks.\1.attn.qkv.\2",
    rf"{BLOCK}self_attention\.out_proj": r"blocks.\1.attn.proj",
    rf"{BLOCK}mlp\.(?:0|linear_1)": r"blocks.\1.mlp.fc1",  # linear_1 and linear_2 before 0.13
    rf"{BLOCK}mlp\.(?:3|linear_2)": r"blocks.\1.mlp.fc2",
    r"encoder\.ln": "norm",
    r"heads\.head": "head",
}

CONVNEXT = {r"features\.0\.([01])": r"stem.\1", r"classifier\.0": "head.norm", r"classifier\.2": "head.fc"}
SWIN = {
    r"features\.0\.0": "patch_embed.proj",
    r"features\.0\.2": "patch_embed.norm",
    "norm": "norm",
    "head": "head.fc",
    r".*\.relative_position_index": UNUSED,
}
for stage in range(4):
    BLOCK = rf"features\.{2 * stage + 1}\.(\d+)\."
    CONVNEXT |= {
        rf"{BLOCK}layer_scale": rf"stages.{stage}.blocks.\1.gamma",
        rf"{BLOCK}block\.0": rf"stages.{stage}.blocks.\1.conv_dw",
        rf"{BLOCK}block\.2": rf"stages.{stage}.blocks.\1.norm",
        rf"{BLOCK}block\.3": rf"stages.{stage}.blocks.\1.mlp.fc1",
        rf"{BLOCK}block\.5": rf"stages.{stage}.blocks.\1.mlp.fc2",
        rf"features\.{2 * stage + 2}\.([01])": rf"stages.{stage + 1}.downsample.\1",
    }
    SWIN |= {
        rf"{BLOCK}(norm[12]|attn\.qkv|attn\.proj|attn\.relative_position_bias_table)": rf"layers.{stage}.blocks.\1.\2",
        rf"{BLOCK}mlp\.0": rf"layers.{stage}.blocks.\1.mlp.fc1",
        rf"{BLOCK}mlp\.3": rf"layers.{stage}.blocks.\1.mlp.fc2",
        rf"features\.{2 * stage + 2}\.(norm|reduction)": rf"layers.{stage + 1}.downsample.\1",
    }

LAYOUTS = (
    Layout("torchvision", "ViT", "vit", VIT, epsilons={".*": 1e-6}),
    Layout("torchvision", "ConvNeXt", "convnext", CONVNEXT, epsilons={".*": 1e-6}),
    Layout("torchvision", "Swin", "swin", SWIN, epsilons={".*": 1e-5}),
)
