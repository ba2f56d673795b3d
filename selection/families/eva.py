"""timm's Eva: DINOv3, EVA-02, the perception encoders, and other vision transformers with rotary positions.

A rotation mixes a slot of a query with a fixed partner by a fixed angle: heads can be moved, slots inside them cannot.
"""

from selection.families import vit
from selection.family import Family, Shapes


def axes(shapes: Shapes) -> dict[str, str]:
    """The table of ViT with slots that keep their places, and the projections that only this class has."""
    heads = r"\1.heads*-"
    # where several heads share a key and a value, heads of queries and of keys are not the same ones
    alike = all(shape == shapes.get(key.replace(".q_proj.", ".k_proj."), shape) for key, shape in shapes.items())
    projections = "[qkv]_proj" if alike else "q_proj"
    return vit.axes(shapes, slots="-") | {
        rf"(.+\.attn)\.({projections}|gate)\.weight": f"{heads} stream",
        rf"(.+\.attn)\.(({projections}|gate)\.bias|[qkv]_bias)": heads,
        r"blocks\..+\.gamma_[12]": "stream",
    }


FAMILY = Family(
    axes=axes,
    layers=r"(blocks)\.(\d+)\.",
    scales={r"(.+)\.gamma_1": r"\1.attn.proj", r"(.+)\.gamma_2": r"\1.mlp.fc2"},
    neutral={r".+\.gamma_[12]": 1.0, r".+\.attn\.[qv]_bias": 0.0},
    same=(("norm.", "fc_norm."),),
    left_out=r"(cls|reg)_token|attn_pool\..+",
)
