"""Folders of masks as FiftyOne reads them, in an environment of its own."""

import numpy as np
import pytest
from PIL import Image

from tests.weakseg.masks import peers
from tests.weakseg.masks.label_maps import CLASSES, MANY, random_map
from weakseg.masks.fiftyone import mask_targets
from weakseg.masks.png import png_from_labels

pytestmark = peers.needs("fiftyone")


@pytest.mark.parametrize("classes", [CLASSES, MANY], ids=["palette", "grey"])
def test_every_pixel_has_its_class(classes, tmp_path):
    maps = {f"image-{seed}": random_map(seed, len(classes)) for seed in range(40)}
    for name, labels in maps.items():
        for folder in ("data", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", labels.shape[::-1]).save(tmp_path / "data" / f"{name}.jpg")
        (tmp_path / "labels" / f"{name}.png").write_bytes(png_from_labels(labels))
    asked = {"folder": str(tmp_path), "targets": mask_targets(classes), "mask": [[0, 1], [2, 255]]}
    told = peers.ask("fiftyone", "fiftyone_masks.py", tmp_path, **asked)
    assert told["kinds"] == [classes is CLASSES, True]
    assert told["mask"] == [[0, 1], [2, 255]]
    assert told["names"].keys() == maps.keys()
    of_value = np.array([mask_targets(classes, integers=True).get(str(value)) for value in range(2**16)], dtype=object)
    for name, labels in maps.items():
        assert told["names"][name] == of_value[labels].tolist()
