"""The families of models to select from, by name: a file each."""

from selection.families import convnext, eva, mixer, resnet, swin, vit
from selection.family import Family

FAMILIES: dict[str, Family] = {
    "vit": vit.FAMILY,
    "convnext": convnext.FAMILY,
    "eva": eva.FAMILY,
    "swin": swin.FAMILY,
    "mixer": mixer.FAMILY,
    "resnet": resnet.FAMILY,
}
