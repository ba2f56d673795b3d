"""Vision transformers by the paper's short names: timm's name and the arguments that differ from timm's own."""

VARIANTS = {
    "vit_tiny": ("vit_tiny_patch16_224", {}),
    "vit_small": ("vit_small_patch16_224", {}),
    "vit_base": ("vit_base_patch16_224", {}),
    "vit_large": ("vit_large_patch16_224", {}),
}
