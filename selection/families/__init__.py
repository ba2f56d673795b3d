"""The families to select from, by the names of models.FAMILIES: a file per family says what its tensors' axes are."""

from importlib import import_module

import models
from selection.family import Family

FAMILIES: dict[str, Family] = {name: import_module(f"selection.families.{name}").FAMILY for name in models.FAMILIES}
