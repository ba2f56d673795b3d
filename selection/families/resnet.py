"""timm's ResNet of basic or bottleneck blocks: ResNet, ResNeXt, Wide ResNet, SE-ResNet, any of its stems."""

from selection.family import Family, Shapes


def axes(shapes: Shapes) -> dict[str, str]:
    """Make the table. The stem's channels are those of the first stage if no projection stands between them."""
    # only batch norms: the groups of a group norm would have to stay together
    norm = "(weight|bias|running_mean|running_var)" if "bn1.running_mean" in shapes else "(?!)"
    pools = "maxpool.0.weight" in shapes
    projected = any(key.startswith("layer1.0.downsample.") for key in shapes)
    pooled = "layer1" if not projected else "pool" if pools else "stem"
    stem = "stem" if pools else pooled
    # all groups of a convolution are cut alike
    inner, outer = r"\1.conv2.groups*\1.in", r"\1.conv2.groups*\1.out"
    bottleneck = {
        rf"((layer\d)\.\d+)\.bn1\.{norm}": inner,
        r"((layer\d)\.\d+)\.conv2\.weight": rf"{outer} \1.in",
        rf"((layer\d)\.\d+)\.bn2\.{norm}": outer,
        r"((layer\d)\.\d+)\.conv3\.weight": rf"\2 {outer}",
        rf"((layer\d)\.\d+)\.bn3\.{norm}": r"\2",
    }
    basic = {
        rf"((layer\d)\.\d+)\.bn1\.{norm}": inner,
        r"((layer\d)\.\d+)\.conv2\.weight": rf"\2 {inner}",
        rf"((layer\d)\.\d+)\.bn2\.{norm}": r"\2",
    }
    stages = {}
    for stage, before in ((1, pooled), (2, "layer1"), (3, "layer2"), (4, "layer3")):
        stages |= {
            rf"(layer{stage}\.0)\.conv1\.weight": f"{inner} {before}",
            rf"(layer{stage}\.\d+)\.conv1\.weight": f"{inner} layer{stage}",
            rf"layer{stage}\.0\.downsample\.\d\.weight": f"layer{stage} {before}",  # the convolution, or the norm after it
            rf"layer{stage}\.0\.downsample\.\d\.{norm}": f"layer{stage}",
        }
    return {
        r"conv1\.weight": f"{stem} rgb",
        rf"bn1\.{norm}": stem,
        r"conv1\.0\.weight": "stem.0 rgb",
        rf"conv1\.1\.{norm}": "stem.0",
        r"conv1\.3\.weight": "stem.3 stem.0",
        rf"conv1\.4\.{norm}": "stem.3",
        r"conv1\.6\.weight": f"{stem} stem.3",
        r"maxpool\.0\.weight": f"{pooled} {stem}",
        rf"maxpool\.1\.{norm}": pooled,
        **stages,
        **(bottleneck if "layer1.0.conv3.weight" in shapes else basic),
        r"((layer\d)\.\d+\.se)\.fc1\.weight": r"\1 \2",
        r"((layer\d)\.\d+\.se)\.fc1\.bias": r"\1",
        r"((layer\d)\.\d+\.se)\.fc2\.weight": r"\2 \1",
        r"((layer\d)\.\d+\.se)\.fc2\.bias": r"\2",
        r".+\.num_batches_tracked": "",
        r"fc\.weight": "- layer4",
        r"fc\.bias": "-",
    }


PARTS = {
    r"(conv1|bn1|maxpool)\..+": "patch_embed",
    r"layer\d\.\d+\.(conv\d|se)\..+": "conv",
    r"layer\d\.\d+\.bn\d\..+": "norm",
    r"layer\d\.0\.downsample\..+": "downsample",
    r"fc\..+": "head",
}

FAMILY = Family(axes=axes, parts=PARTS, layers=r"(layer\d)\.(\d+)\.", first_stays=True)
