"""ConvNeXts by the paper's short names: timm's name and the arguments that differ from timm's own.

timm builds its smaller variants with 1x1 convolutions; the paper's have linear layers throughout (`conv_mlp=False`),
which is what the weights of the larger ones fit.
"""

VARIANTS = {
    f"convnext_{size}": (f"convnext_{size}", {"conv_mlp": False})
    for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "xlarge")
}
