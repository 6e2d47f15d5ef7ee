"""The arithmetic of a training step: float32, bf16, or fp16 with loss scaling. Weights and optimiser stay float32."""

from __future__ import annotations

import torch

from weakseg.errors import ConfigError

DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_SCALE = 1.0  # a gradient that is not finite at this scale is not the scale's fault


class Precision:
    """`autocast()` goes around the losses; `scaler` around their backward pass, and does nothing but for fp16.

    fp16 has no exponents for small gradients, so the loss is multiplied up; a step whose gradient overflows is left out
    and the scale halved. Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018.

    Raises:
        ConfigError: an unknown name, or fp16 without a CUDA device.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name not in DTYPES:
            raise ConfigError(f"optim.precision: expected one of {', '.join(DTYPES)}, got {name!r}")
        if name == "fp16" and device.type != "cuda":
            raise ConfigError(f"optim.precision fp16 needs a CUDA device, this runs on {device}: use float32 or bf16")
        self.dtype, self.device_type = DTYPES[name], device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None)

    def forgives_overflow(self) -> bool:
        """Whether a gradient that is not finite is the scaler's business, not the end of the training."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > MIN_SCALE
