"""timm's SwinTransformer (V1): plain and shifted windows take turns, and stages are joined by merging 2 x 2 patches."""

from selection.family import Family, Shapes


def axes(shapes: Shapes) -> dict[str, str]:
    """Make the table. Merging concatenates the channels of four neighbours."""
    heads = r"\1.heads*\1.slots"
    return {
        r"patch_embed\.proj\.weight": "layers.0 rgb ~ ~",
        r"patch_embed\.(proj\.bias|norm\.weight|norm\.bias)": "layers.0",
        r"(layers\.\d+)\.blocks\.\d+\.norm[12]\.(weight|bias)": r"\1",
        r"((layers\.\d+)\.blocks\.\d+\.attn)\.qkv\.weight": rf"3*{heads} \2",
        r"(layers\.\d+\.blocks\.\d+\.attn)\.qkv\.bias": f"3*{heads}",
        r"(layers\.\d+\.blocks\.\d+\.attn)\.relative_position_bias_table": r"~ \1.heads",
        r"((layers\.\d+)\.blocks\.\d+\.attn)\.proj\.weight": rf"\2 {heads}",
        r"((layers\.\d+)\.blocks\.\d+\.mlp)\.fc1\.weight": r"\1 \2",
        r"(layers\.\d+\.blocks\.\d+\.mlp)\.fc1\.bias": r"\1",
        r"((layers\.\d+)\.blocks\.\d+\.mlp)\.fc2\.weight": r"\2 \1",
        r"(layers\.\d+)\.blocks\.\d+\.(attn\.proj|mlp\.fc2)\.bias": r"\1",
        **{rf"layers\.{s}\.downsample\.norm\.(weight|bias)": f"4*layers.{s - 1}" for s in (1, 2, 3)},
        **{rf"layers\.{s}\.downsample\.reduction\.weight": f"layers.{s} 4*layers.{s - 1}" for s in (1, 2, 3)},
        r"norm\.(weight|bias)": "layers.3",
        r"head\.fc\.weight": "- layers.3",
        r"head\.fc\.bias": "-",
    }


PARTS = {
    r"patch_embed\..+": "patch_embed",
    r".+\.relative_position_bias_table": "pos_embed",
    r"layers\.\d+\.blocks\.\d+\.attn\.(qkv|proj)\..+": "attention",
    r"layers\.\d+\.blocks\.\d+\.mlp\..+": "mlp",
    r"(layers\.\d+\.blocks\.\d+\.norm[12]|norm)\..+": "norm",
    r"layers\.\d+\.downsample\..+": "downsample",
    r"head\..+": "head",
}

FAMILY = Family(axes=axes, parts=PARTS, layers=r"(layers\.\d+\.blocks)\.(\d+)\.", turns=2)
