"""What a library's layout is: its names for the tensors of a model, and timm's for the same tensors."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

LEAF = r"(?P<leaf>(?:\.(?:weight|bias|running_mean|running_var|num_batches_tracked))?)"
UNUSED = ""  # instead of timm's name: the tensor has no counterpart there


@dataclass(frozen=True, eq=False)
class Layout:
    """How `library` names the tensors of `model`, which timm builds as a model of `family` (see models.FAMILIES).

    `names`: patterns of the library's names -> timm's names for modules, or for tensors that belong to no module. The
        first pattern that matches counts. One name may stand for several of timm's, separated by spaces. Where timm
        joins tensors along axis 0, ":0", ":1", ... behind its name give their order.
    `prefix`: a pattern of what may precede the library's names.
    `joins`: patterns of timm's full names -> functions of the tensors for that name, in their order, that replace the
        concatenation. They also run on tensors without values, for the shape.
    `epsilons`: patterns of timm's names for layer norms -> the library's default epsilon, where timm's may differ. The
        first pattern that matches counts; that of the first row may be another by transformers' config.json.
    """

    library: str
    model: str
    family: str
    names: Mapping[str, str]
    prefix: str = ""
    joins: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    epsilons: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def _rows(self) -> list[tuple[re.Pattern, str]]:
        return [(re.compile(f"{self.prefix}(?:{pattern}){LEAF}"), name) for pattern, name in self.names.items()]

    @cached_property
    def _any_row(self) -> re.Pattern:
        return re.compile(f"{self.prefix}(?:{'|'.join(self.names)}){LEAF}")

    def count(self, keys: Iterable[str]) -> int:
        """Count the keys that the layout has."""
        return sum(self._any_row.fullmatch(key) is not None for key in keys)

    def places(self, key: str) -> list[tuple[str, int]] | None:
        """Find timm's names for a key, each with the key's position among the tensors joined there.

        The list is empty for a tensor without a counterpart in timm. None: the layout has no such key.
        """
        for pattern, name in self._rows:
            if match := pattern.fullmatch(key):
                targets = [target.partition(":") for target in match.expand(name).split()]
                return [(target + match["leaf"], int(position or 0)) for target, _, position in targets]
        return None

    def join(self, name: str, tensors: list[Tensor]) -> Tensor:
        """Make timm's tensor `name` of the library's tensors."""
        for pattern, function in self.joins.items():
            if re.fullmatch(pattern, name):
                return function(*tensors)
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def epsilon_note(self, model: nn.Module, settings: Mapping) -> str:
        """Say which norms of `model` have another epsilon than the library's, by `settings` or default; "" if none has."""
        known = settings.get("layer_norm_eps")
        known = known if isinstance(known, int | float) else None
        norms = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
        for row, (pattern, epsilon) in enumerate(self.epsilons.items()):
            matching = {name: norms.pop(name) for name in list(norms) if re.fullmatch(pattern, name)}
            by_settings = known is not None and row == 0
            wanted = known if by_settings else epsilon
            differing = [name for name, own in matching.items() if own != wanted]
            if differing:
                which = f"{differing[0]} and {len(differing) - 1} other norms" if len(differing) > 1 else differing[0]
                source = "by its config.json" if by_settings else "by default"
                return (
                    f"{self.library} computes {which} with epsilon {wanted:g} {source}, timm with "
                    f"{matching[differing[0]]:g}; no argument of timm's constructor sets it"
                )
        return ""
