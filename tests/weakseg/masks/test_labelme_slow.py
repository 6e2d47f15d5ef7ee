"""labelme's own reader finds the masks that we wrote. `make test-formats` makes its environment."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.weakseg.masks.label_maps import CLASSES, random_map, without_ignore
from weakseg.masks.labelled import LabelledImage
from weakseg.masks.labelme import json_from_labels

PYTHON = Path(__file__).parents[3] / ".venv-labelme" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="labelme is in an environment of its own: make test-formats"),
]


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 7, 8, 9])
def test_labelme_reads_our_masks(tmp_path, seed):
    labels = random_map(seed, len(CLASSES))
    (tmp_path / "a.json").write_bytes(json_from_labels(LabelledImage("a.png", labels), CLASSES))
    Image.new("RGB", labels.shape[::-1]).save(tmp_path / "a.png")
    reader = Path(__file__).with_name("labelme_reads.py")
    done = subprocess.run(
        [PYTHON, reader, tmp_path / "a.json", *CLASSES.names],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"QT_QPA_PLATFORM": "offscreen"},
    )
    np.testing.assert_array_equal(json.loads(done.stdout.splitlines()[-1]), without_ignore(labels))
