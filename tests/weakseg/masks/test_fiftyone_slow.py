"""Folders of masks as FiftyOne reads them, in an environment of its own; `make test-fiftyone` installs it."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.weakseg.masks.label_maps import CLASSES, MANY, random_map
from weakseg.masks.fiftyone import mask_targets
from weakseg.masks.png import png_from_labels

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-fiftyone" / "bin" / "python"
LONG_S = 300.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-fiftyone: make test-fiftyone"),
]


@pytest.mark.parametrize("classes", [CLASSES, MANY], ids=["palette", "grey"])
def test_every_pixel_has_its_class(classes, tmp_path):
    maps = {f"image-{seed}": random_map(seed, len(classes)) for seed in range(40)}
    for name, labels in maps.items():
        for folder in ("data", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", labels.shape[::-1]).save(tmp_path / "data" / f"{name}.jpg")
        (tmp_path / "labels" / f"{name}.png").write_bytes(png_from_labels(labels))
    told = run(folder=str(tmp_path), targets=mask_targets(classes), mask=[[0, 1], [2, 255]])
    assert told["kinds"] == [classes is CLASSES, True]
    assert told["mask"] == [[0, 1], [2, 255]]
    assert told["names"].keys() == maps.keys()
    of_value = np.array([mask_targets(classes, integers=True).get(str(value)) for value in range(2**16)], dtype=object)
    for name, labels in maps.items():
        assert told["names"][name] == of_value[labels].tolist()


def run(**asked):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("fiftyone_masks.py")],
        check=True,
        cwd=asked["folder"],
        env=environment | {"FIFTYONE_DO_NOT_TRACK": "true"},
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        timeout=LONG_S,
    )
    return json.loads(done.stdout)
