"""The floating-point type that a run computes in, and the scaler that guards its updates."""

import logging
from dataclasses import dataclass, field

import torch
from torch import nn

from training.agreement import check_same

log = logging.getLogger(__name__)


@dataclass
class Precision:
    """Autocast to `dtype` (None: float32 throughout) on `device`, and the scaler that guards every update.

    One scaler serves all precisions. At scale 1 it multiplies by exactly 1 and still skips an update with non-finite
    gradients, on the device, without a wait. In float16 it scales the loss as well.
    """

    device: torch.device
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self):
        settings = {} if self.scales_loss else {"init_scale": 1.0, "growth_interval": 2**31 - 1}
        self.scaler = torch.amp.GradScaler(self.device.type, **settings)

    @property
    def scales_loss(self) -> bool:
        return self.dtype == torch.float16

    @property
    def name(self) -> str:
        return str(self.dtype or torch.float32).removeprefix("torch.")

    @classmethod
    def choose(cls, device: torch.device, use_amp: bool, name: str | None = None) -> "Precision":
        """Choose float32 or, with `use_amp`, the type of that name: by default float16 on cuda and bfloat16 elsewhere.

        A CPU without bfloat16 units would train many times slower. It stays in float32, with a warning, unless the
        type is named. UserError on all ranks if they choose differently.
        """
        units = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
        if use_amp and name is None and device.type == "cpu" and not any(map(torch.cpu.get_capabilities().get, units)):
            use_amp = False
            log.warning(
                "--use_amp true: this CPU has no bfloat16 units and would be many times slower; training in float32"
            )
        default = "float16" if device.type == "cuda" else "bfloat16"
        precision = cls(device, getattr(torch, name or default) if use_amp else None)
        check_same({"the precision": precision.name}, "give --amp_dtype, or --use_amp false")
        return precision

    def place(self, model: nn.Module, memory_format: torch.memory_format = torch.preserve_format) -> nn.Module:
        """Move a model to the device, and let it compute attention as is fastest there.

        In bfloat16 on a CPU that is by plain products: a training step of ViT-T takes 2.4 ms an image of 17 tokens and 28
        of 197, with torch's fused kernel 4.4 and 39 (torch 2.14, one core with AMX, medians of 12 and 6 steps).
        """
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False
        return model.to(self.device, memory_format=memory_format)

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)
