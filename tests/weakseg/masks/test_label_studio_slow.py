"""label-studio-converter decodes what we encode, and we what it encodes. `make test-formats` makes its environment."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.weakseg.masks.label_maps import random_map
from weakseg.masks.label_studio_rle import mask_from_rle, rle_from_mask

PYTHON = Path(__file__).parents[3] / ".venv-label-studio" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(), reason="label-studio-converter has an environment of its own: make test-formats"
    ),
]


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 7, 8, 9])
def test_both_ways(seed):
    mask = random_map(seed, 4) > 0
    asked = {"rle": rle_from_mask(mask), "height": mask.shape[0], "width": mask.shape[1]}
    asked["mask"] = mask.astype(int).tolist()
    script = Path(__file__).with_name("label_studio_converts.py")
    done = subprocess.run([PYTHON, script], input=json.dumps(asked), capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_array_equal(np.array(said["mask"], bool), mask)
    np.testing.assert_array_equal(mask_from_rle(said["rle"], *mask.shape), mask)
