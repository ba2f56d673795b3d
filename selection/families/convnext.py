"""timm's ConvNeXt, V1 and V2: linear layers or 1x1 convolutions in its MLPs, any of its stems."""

from selection.family import Family, Shapes


def axes(shapes: Shapes) -> dict[str, str]:
    """Make the table. A stem of two convolutions has channels of its own between them."""
    second = next((number for number in (1, 2) if len(shapes.get(f"stem.{number}.weight", ())) == 4), None)
    stem = (
        {
            r"stem\.0\.(weight|bias)": "stem rgb",
            rf"stem\.{second}\.weight": "stages.0 stem",
            rf"stem\.({second}\.bias|{second + 1}\.weight|{second + 1}\.bias)": "stages.0",
        }
        if second
        else {r"stem\.[01]\.(weight|bias)": "stages.0 rgb"}
    )
    return stem | {
        r"(stages\.\d+)\.blocks\.\d+\.(gamma|conv_dw\.weight|conv_dw\.bias|norm\.weight|norm\.bias)": r"\1",
        r"((stages\.\d+)\.blocks\.\d+\.mlp)\.fc1\.weight": r"\1 \2",
        r"(stages\.\d+\.blocks\.\d+\.mlp)\.(fc1\.bias|grn\.weight|grn\.bias)": r"\1",
        r"((stages\.\d+)\.blocks\.\d+\.mlp)\.fc2\.weight": r"\2 \1",
        r"(stages\.\d+)\.blocks\.\d+\.mlp\.fc2\.bias": r"\1",
        # after a stem of stride 2 the first stage halves the image too, at the stem's width
        **{rf"stages\.{s}\.downsample\.0\.(weight|bias)": f"stages.{max(s - 1, 0)}" for s in range(4)},
        **{rf"stages\.{s}\.downsample\.1\.weight": f"stages.{s} stages.{max(s - 1, 0)}" for s in range(4)},
        r"(stages\.\d+)\.downsample\.1\.bias": r"\1",
        r"(norm_pre|head\.norm)\.(weight|bias)": "stages.3",
        r"(head\.pre_logits)\.fc\.weight": r"\1 stages.3",
        r"(head\.pre_logits)\.fc\.bias": r"\1",
        r"head\.fc\.weight": "- head.pre_logits" if "head.pre_logits.fc.weight" in shapes else "- stages.3",
        r"head\.fc\.bias": "-",
    }


PARTS = {
    r"stem\..+": "patch_embed",
    r"stages\.\d+\.downsample\..+": "downsample",
    r"stages\.\d+\.blocks\.\d+\.conv_dw\..+": "conv",
    r"stages\.\d+\.blocks\.\d+\.(gamma|mlp\..+)": "mlp",
    r"(stages\.\d+\.blocks\.\d+\.norm|norm_pre)\..+": "norm",
    r"head\..+": "head",
}

FAMILY = Family(
    axes=axes,
    parts=PARTS,
    layers=r"(stages\.\d+\.blocks)\.(\d+)\.",
    scales={r"(.+)\.gamma": r"\1.mlp.fc2"},
    neutral={r".+\.gamma": 1.0, r".+\.mlp\.grn\.(weight|bias)": 0.0},
)
