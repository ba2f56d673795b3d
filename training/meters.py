"""What a run measures: sums on the device, whether they are finite, top-k counts, speed."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from training.distributed import all_sum
from utils import UserError

SKIPS_IN_A_ROW = 50  # float16's scale starts at 2^16 and halves at each skip: after so many, no scale will work


class NotFinite(UserError):
    """An update since the last log step was not finite; all ranks raise it."""


class DeviceSums:
    """Named sums on the device. Adding never waits; `read` costs one reduction over the ranks and one wait."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = list(names)
        # float64 keeps the last digits of an epoch's sum of losses; mps has none
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.values = torch.zeros(len(self.names), dtype=dtype, device=device)

    def add(self, *terms: Tensor) -> None:
        """Add one 0-d tensor to each of the first sums, in the order of the names."""
        self.values[: len(terms)] += torch.stack([term.detach().to(self.values.dtype) for term in terms])

    def read(self, *, over_ranks: bool = True) -> dict[str, float]:
        """Return the sums, over all ranks by default, and reset them to 0."""
        values = all_sum(self.values) if over_ranks else self.values
        result = dict(zip(self.names, values.tolist(), strict=True))
        self.values.zero_()
        return result


def count_in_top(logits: Tensor, targets: Tensor, ks: Sequence[int]) -> list[Tensor]:
    """For each k, count the rows of `logits` [batch, classes] whose k highest include the class in `targets` [batch].

    With fewer than k classes, every row counts.
    """
    ranked = logits.topk(min(max(ks), logits.shape[1])).indices
    hits = ranked.eq(targets[:, None])  # [batch, highest k]
    return [hits[:, :k].sum() for k in ks]


def stop_if_not_finite(sums: dict[str, float], longest: Tensor, skips_allowed: bool, where: str) -> None:
    """NotFinite if an update since the last reading was not finite. `sums` is the same on all ranks, so all raise."""
    if sums["bad_loss"]:
        raise NotFinite(f"the loss was not finite {where}")
    if sums["bad_grad"] and not skips_allowed:
        raise NotFinite(f"a gradient was not finite {where}")
    if skips_allowed and longest.item() > SKIPS_IN_A_ROW:
        count = int(longest.item())
        raise NotFinite(f"float16 gradients overflowed {count} times in a row {where}: try --amp_dtype bfloat16")
    if sums["bad_weights"]:
        raise NotFinite(f"weights or the optimizer's state were not finite {where.replace('in', 'after', 1)}")


class Speed:
    """Images per second over all ranks, since the last reading and overall. Each rank adds the same numbers."""

    def __init__(self, ranks: int):
        self.ranks, self.since = ranks, time.monotonic()
        self.restart()

    def add(self, images: int) -> None:
        self.images, self.recent = self.images + images, self.recent + images

    def restart(self) -> float:
        """Start again from 0; return the seconds since the last reading."""
        now, last = time.monotonic(), self.since
        self.start, self.since, self.images, self.recent = now, now, 0, 0
        return now - last

    def read(self) -> float:
        """Return the rate since the last reading."""
        now = time.monotonic()
        rate = self.recent * self.ranks / max(now - self.since, 1e-9)
        self.since, self.recent = now, 0
        return rate

    def overall(self) -> float:
        """Return the rate since the start."""
        return self.images * self.ranks / max(time.monotonic() - self.start, 1e-9)
