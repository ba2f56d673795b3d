"""Whether torch.compile works here."""

import torch
from torch import Tensor, nn

from utils import UserError, first_line


class Probe(nn.Module):
    """The least that torch compiles; of its own modules it leaves some as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() + 1


def check_compiler(device: torch.device, mode: str) -> None:
    """UserError unless torch can compile for the device; on a CPU that takes a compiler of C++, on a GPU one of C.

    Only a try shows it, which also finds a missing header, Triton, or a folder that cannot be written to.
    """
    probe = Probe()
    probe.compile(mode=mode)
    try:
        with torch.no_grad():
            probe(torch.ones(16, device=device))
    except Exception as error:  # torch wraps whatever stands in its way into errors of its own
        raise UserError(
            f"--compile: torch cannot compile here ({first_line(error)}); leave it out, or install a compiler such as g++"
        ) from error
