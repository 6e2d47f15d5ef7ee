"""Beside what jacobgil/pytorch-grad-cam 1.5.7 computes (make_golden.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.cams.networks import of_waves, waves
from training import cams

LINES = [json.loads(line) for line in Path(__file__).with_name("grad_cam.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("golden", LINES, ids=[f"{line['method']} {line['layer']}" for line in LINES])
def test_the_same_maps(golden: dict[str, Any]) -> None:
    _, maps = cams.get(golden["method"]).maps(of_waves(), waves(2, 2, 5, 6, phase=1.0), layer=golden["layer"])
    expected = torch.tensor(golden["maps"]).reshape(2, 3, 5, 6)
    assert (expected.amax(dim=(2, 3)) > 0.1).sum() >= 4, "of six maps; some are empty, as Grad-CAM's may be"
    # 1e-4: the epsilon that theirs has beside the gradients' squares
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
