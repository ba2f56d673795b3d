"""timm's VisionTransformer: ViT, DeiT with its distillation token, AugReg, CLIP's image towers, MAE, DINO, DINOv2, SigLIP."""

from selection.family import Family, Shapes, packed

LAYER_SCALES = {
    r"(.+)\.ls1\.gamma": r"\1.attn.proj",
    r"(.+)\.ls2\.gamma": r"\1.mlp.fc2",
    r"(.+\.attns\.\d+)\.ls\.gamma": r"\1.attn.proj",
    r"(.+\.ffns\.\d+)\.ls\.gamma": r"\1.mlp.fc2",
}


def axes(shapes: Shapes, within_head: str = r"\1.slots") -> dict[str, str]:
    """Make the table. If queries and keys are normalized in each head, channels of different heads cannot be mixed."""
    if any(".q_norm." in key for key in shapes):
        within_head = "-"
    heads, pool = rf"\1.heads*{within_head}", "attn_pool.heads*attn_pool.slots"
    latent = "stream" if "attn_pool.q.weight" in shapes else pool  # without a projection the latent is the query
    gate = packed(shapes, r"(blocks\..+\.mlp)\.fc1\.weight", r"\1.fc2.weight")  # timm's attention pooling has no gate
    return {
        r"(cls|dist)_token": "- - stream",
        r"reg_token": "- registers stream",
        r"pos_embed": "- ~ stream",
        r"patch_embed\.proj\.weight": "stream rgb ~ ~",
        r"patch_embed\.(proj\.bias|norm\.weight|norm\.bias)": "stream",
        r"(norm|norm_pre|fc_norm)\.(weight|bias)": "stream",
        r"(.+\.attn)\.qkv\.weight": f"3*{heads} stream",
        r"(.+\.attn)\.qkv\.bias": f"3*{heads}",
        r"(.+\.attn)\.[qk]_norm\.(weight|bias)": "-",
        r"(.+\.attn)\.norm\.(weight|bias)": heads,
        r"(.+\.attn)\.proj\.weight": f"stream {heads}",
        r"(blocks\..+\.mlp)\.fc1\.weight": rf"{gate}\1 stream",
        r"(blocks\..+\.mlp)\.fc1\.bias": rf"{gate}\1",
        r"(attn_pool\.mlp)\.fc1\.weight": r"\1 stream",
        r"(attn_pool\.mlp)\.fc1\.bias": r"\1",
        r"(.+\.mlp)\.fc1_[gx]\.weight": r"\1 stream",
        r"(.+\.mlp)\.(fc1_[gx]\.bias|norm\.weight|norm\.bias)": r"\1",
        r"(.+\.mlp)\.fc2\.weight": r"stream \1",
        r".+\.(attn\.proj|mlp\.fc2)\.bias": "stream",
        r"blocks\..+\.(norm\d?|ls\d?)\.(weight|bias|gamma)": "stream",
        r"attn_pool\.latent": f"- - {latent}",
        r"attn_pool\.q\.weight": f"{pool} stream",
        r"attn_pool\.q\.bias": pool,
        r"attn_pool\.kv\.weight": f"2*{pool} stream",
        r"attn_pool\.kv\.bias": f"2*{pool}",
        r"attn_pool\.proj\.weight": f"stream {pool}",
        r"attn_pool\.(proj\.bias|norm\.weight|norm\.bias)": "stream",
        r"(head|head_dist)\.weight": "- stream",
        r"(head|head_dist)\.bias": "-",
    }


PARTS = {
    r"patch_embed\..+": "patch_embed",
    r"(cls|dist|reg)_token": "tokens",
    r"pos_embed": "pos_embed",
    r"blocks\.\d+\.(attns\.\d+\.)?attn\..+": "attention",
    r"blocks\.\d+\.(ls1|attns\.\d+\.ls)\.gamma": "attention",
    r"attn_pool\..+": "attention",
    r"blocks\.\d+\.(ffns\.\d+\.)?mlp\..+": "mlp",
    r"blocks\.\d+\.(ls2|ffns\.\d+\.ls)\.gamma": "mlp",
    r"blocks\.\d+\.((attns|ffns)\.\d+\.)?norm\d?\..+": "norm",
    r"(norm|norm_pre|fc_norm)\..+": "norm",
    r"(head|head_dist)\..+": "head",
}

FAMILY = Family(
    axes=axes,
    parts=PARTS,
    layers=r"(blocks)\.(\d+)\.",
    scales=LAYER_SCALES,
    neutral={r".+\.ls\d?\.gamma": 1.0},
    same=(("norm.", "fc_norm."),),
    left_out=r"(cls|dist|reg)_token|attn_pool\..+",
)
