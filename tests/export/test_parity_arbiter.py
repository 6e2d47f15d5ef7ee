"""When torch and the runtime differ by more than the tolerance, float64 decides which of them is off."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from export.parity import _exact


class Cancelling(nn.Module):
    """A small difference of large sums: float32 loses it, float64 does not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1e8, 1.0, -1e8]))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        ones = torch.ones(3, dtype=self.weight.dtype)
        return {"cam": torch.stack([(self.weight * ones).cumsum(0)[-1]]).reshape(1, 1, 1, 1)}


def test_float64_is_the_arbiter_and_the_weights_come_back() -> None:
    module = Cancelling()
    before = module.weight.detach().clone()
    images = np.zeros((1, 1, 1, 3), np.uint8)
    rounded = {"cam": np.zeros((1, 1, 1, 1), np.float32)}
    assert _exact(module, images, rounded)["cam"].item() == 1.0
    assert module.weight.dtype == torch.float32 and torch.equal(module.weight, before)


def test_a_module_without_a_float64_form_keeps_what_it_said() -> None:
    class Stuck(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            raise RuntimeError("expected Float, got Double")

    rounded = {"cam": np.ones((1, 1, 1, 1), np.float32)}
    assert _exact(Stuck(), np.zeros((1, 1, 1, 3), np.uint8), rounded) is rounded
