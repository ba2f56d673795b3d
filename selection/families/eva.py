"""timm's Eva: DINOv3, EVA-02, the perception encoders, and other vision transformers with rotary positions.

A rotation mixes a channel of a query with a fixed partner by a fixed angle. So heads may be reordered, but channels within
a head may not.
"""

from selection.families import vit
from selection.family import Family, Shapes


def axes(shapes: Shapes) -> dict[str, str]:
    """Make ViT's table, with heads whose channels keep their order, and the projections that only this class has."""
    heads = r"\1.heads*-"
    # if several heads share a key and a value, there are fewer heads of keys than of queries: only queries are known
    alike = all(shape == shapes.get(key.replace(".q_proj.", ".k_proj."), shape) for key, shape in shapes.items())
    projections = "[qkv]_proj" if alike else "q_proj"
    return vit.axes(shapes, within_head="-") | {
        rf"(.+\.attn)\.({projections}|gate)\.weight": f"{heads} stream",
        rf"(.+\.attn)\.(({projections}|gate)\.bias|[qkv]_bias)": heads,
        r"blocks\..+\.gamma_[12]": "stream",
    }


PARTS = vit.PARTS | {r"blocks\.\d+\.gamma_1": "attention", r"blocks\.\d+\.gamma_2": "mlp"}

FAMILY = Family(
    axes=axes,
    parts=PARTS,
    layers=r"(blocks)\.(\d+)\.",
    scales={r"(.+)\.gamma_1": r"\1.attn.proj", r"(.+)\.gamma_2": r"\1.mlp.fc2"},
    neutral={r".+\.gamma_[12]": 1.0, r".+\.attn\.[qv]_bias": 0.0},
    same=(("norm.", "fc_norm."),),
    left_out=r"(cls|reg)_token|attn_pool\..+",
)
