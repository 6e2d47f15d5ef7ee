"""Names of pixel values as FiftyOne takes them."""

import json

from weakseg.classes import ClassTable
from weakseg.masks.fiftyone import mask_targets


def test_every_value_has_its_name():
    targets = mask_targets(ClassTable(("cat", "dog")))
    assert json.loads(json.dumps(targets)) == {"0": "background", "1": "cat", "2": "dog", "255": "ignore"}
    assert mask_targets(ClassTable(tuple(f"c{i}" for i in range(300))))["65535"] == "ignore"
