"""Our masks for CVAT and those of its SDK, in an environment of its own; `make test-cvat` installs it."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.weakseg.masks.label_maps import CLASSES, SEEDS, random_map
from weakseg.masks.cvat import mask_from_points, points_from_mask

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-cvat" / "bin" / "python"
LONG_S = 120.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-cvat: make test-cvat"),
]


def test_500_masks_are_those_of_the_sdk(tmp_path):
    masks = [random_map(seed, len(CLASSES)) % 2 == 1 for seed in SEEDS]
    points = [points_from_mask(mask) for mask in masks]
    asked = {"masks": [mask.astype(int).tolist() for mask in masks], "points": points}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = json.loads(
        subprocess.run(
            [PYTHON, Path(__file__).with_name("cvat_sdk_masks.py")],
            check=True,
            cwd=tmp_path,
            env=environment,
            input=json.dumps(asked),
            stdout=subprocess.PIPE,
            text=True,
            timeout=LONG_S,
        ).stdout
    )
    assert told["points"] == points
    for mask, again, theirs in zip(masks, told["masks"], told["points"], strict=True):
        np.testing.assert_array_equal(np.array(again, dtype=bool), mask)
        np.testing.assert_array_equal(mask_from_points(theirs, *mask.shape), mask)
