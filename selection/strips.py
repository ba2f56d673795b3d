"""What a picture of a plan shows, in words and numbers: panels of strips, which selection.picture draws."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

# the last part of a group's name -> the title of its panel, in the order of the panels
TITLES = {
    "stream": "Residual stream: channels",
    "registers": "Register tokens",
    "heads": "Attention: heads",
    "slots": "Attention: channels in each head",
    "attn": "Attention: channels of all heads",
    "mlp": "MLP: hidden units",
    "mlp_tokens": "MLP over tokens: hidden units",
    "mlp_channels": "MLP over channels: hidden units",
    "groups": "Convolutions: groups",
    "in": "Convolutions: channels per group between the first and the second",
    "out": "Convolutions: channels per group between the second and the third",
    "se": "Squeeze and excitation: hidden units",
}
MOST_STRIPS = 24  # of a panel: the deepest of the stock ViTs of ImageNet has 24 layers


@dataclass(frozen=True)
class Strip:
    """The indices that are kept of an axis of `size`."""

    label: str
    size: int
    kept: tuple[int, ...]

    def count(self) -> str:
        """Count in words: "all 64", "12 of 64", "192 of 384, stride 2"."""
        if len(self.kept) == self.size:
            return f"all {self.size}"
        strides = set(np.diff(self.kept).tolist())
        even = len(strides) == 1 and strides != {1} and len(self.kept) >= 8  # of fewer it may be an accident
        return f"{len(self.kept)} of {self.size}" + f", stride {max(strides)}" * even


def panels(plan: Mapping) -> dict[str, list[Strip]]:
    """Make a panel of strips for each kind of group, by its title. Layers that keep the same indices share a strip."""
    layers: dict[tuple, list] = {}
    for name, group in plan["groups"].items():
        base, _, tensor = name.partition(" of ")  # the tensor is named if it chooses for itself
        kind, owner, layer = _place(base, plan["layers"])
        if group["teacher_size"] > 1:  # of one there is nothing to choose
            key = kind, tensor or owner, group["teacher_size"], tuple(group["indices"])
            layers.setdefault(key, []).append(None if tensor else layer)
    strips: dict[str, list[Strip]] = {}
    for (kind, owner, size, kept), numbers in layers.items():
        strips.setdefault(kind, []).append(Strip(_label(owner, numbers), size, kept))
    titled = {}
    for kind in [kind for kind in dict.fromkeys([*TITLES, *strips]) if kind in strips]:
        title, members = TITLES.get(kind, kind), strips[kind]
        if kind == "heads" and "attn" in strips:  # elsewhere heads are blended
            title += ", in the tables of relative positions"
        if len(members) > MOST_STRIPS:
            title += f" (the first {MOST_STRIPS} of {len(members)})"
        titled[title] = members[:MOST_STRIPS]
    return titled


def _place(group: str, stages: Iterable[str]) -> tuple[str, str, int | None]:
    """Split a group's name into its kind, its owner for the label, and the number of its layer if it is in one."""
    owner, _, last = group.rpartition(".")
    in_layer = re.match(rf"({'|'.join(map(re.escape, stages))})\.(\d+)\.(?:(.+\.\d+)\.)?", group)
    if in_layer:
        stage, number, part = in_layer.groups()  # the part is attns.1 if a layer has several attentions
        return last, f"{stage} ({part})" if part else stage, int(number)
    if group == "attn_pool":
        return "attn", group, None
    return (last, owner or group, None) if last in TITLES else ("stream", group, None)


def _label(owner: str, layers: list[int | None]) -> str:
    if None in layers:
        return owner
    layers = sorted(set(layers))
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{owner} {layers[0]}\N{EN DASH}{layers[-1]}"
    return f"{owner} {', '.join(map(str, layers))}"


def headline(description: Mapping) -> tuple[str, str]:
    """Name the two models, and the choices."""
    names = []
    for side in (description["student"], description["teacher"]):
        kwargs = ", ".join(f"{key}={value}" for key, value in side["kwargs"].items())
        names.append(side["model"] + f" ({kwargs})" * bool(kwargs))
    choices = description["choices"]
    rule = choices["element_selection"]
    seed = f" (seed {choices['seed']})" if rule.startswith("random") else ""
    parts = [f"layers: {choices['layer_selection']}", f"elements: {rule}{seed}"]
    parts += [f"heads: {choices['heads']}"] * (choices["heads"] is not None)
    parts += [f"classifier: {'taken' if choices['include_head'] else 'left out'}"]
    return " from ".join(names), " · ".join(parts)
