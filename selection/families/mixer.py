"""timm's MlpMixer with mixing blocks (mixer_* and gmixer_*). Tokens are positions: all are kept, in order."""

from selection.family import Family, Shapes, packed


def axes(shapes: Shapes) -> dict[str, str]:
    """Make the table. gmixer_* packs the two halves of a gated MLP into one projection."""
    tokens = packed(shapes, r"(.+\.mlp_tokens)\.fc1\.weight", r"\1.fc2.weight")
    channels = packed(shapes, r"(.+\.mlp_channels)\.fc1\.weight", r"\1.fc2.weight")
    return {
        r"stem\.proj\.weight": "stream rgb ~ ~",
        r"stem\.proj\.bias": "stream",
        r"(.+\.mlp_tokens)\.fc1\.weight": rf"{tokens}\1 -",
        r"(.+\.mlp_tokens)\.fc1\.bias": rf"{tokens}\1",
        r"(.+\.mlp_tokens)\.fc2\.weight": r"- \1",
        r".+\.mlp_tokens\.fc2\.bias": "-",
        r"(.+\.mlp_channels)\.fc1\.weight": rf"{channels}\1 stream",
        r"(.+\.mlp_channels)\.fc1\.bias": rf"{channels}\1",
        r"(.+\.mlp_channels)\.fc2\.weight": r"stream \1",
        r".+\.mlp_channels\.fc2\.bias": "stream",
        r"blocks\.\d+\.norm[12]\.(weight|bias)": "stream",
        r"norm\.(weight|bias)": "stream",
        r"head\.weight": "- stream",
        r"head\.bias": "-",
    }


PARTS = {
    r"stem\..+": "patch_embed",
    r"blocks\.\d+\.mlp_(tokens|channels)\..+": "mlp",
    r"(blocks\.\d+\.norm[12]|norm)\..+": "norm",
    r"head\..+": "head",
}

FAMILY = Family(axes=axes, parts=PARTS, layers=r"(blocks)\.(\d+)\.")
