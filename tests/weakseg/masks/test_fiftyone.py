"""Names of pixel values as FiftyOne takes them; that it does is in test_fiftyone_slow.py."""

import json

import numpy as np
import pytest

from tests.weakseg.masks.label_maps import MANY
from weakseg.classes import ClassTable, voc_palette
from weakseg.errors import UsageError
from weakseg.masks.fiftyone import mask_targets

CLASSES = ClassTable(("cat", "dog"))


def test_colours_of_palette_pngs():
    expected = {"#000000": "background", "#800000": "cat", "#008000": "dog", "#e0e0c0": "ignore"}
    assert json.loads(json.dumps(mask_targets(CLASSES))) == expected
    palette = voc_palette()
    palette[1:3] = [[1, 2, 3], [255, 254, 253]]
    assert [*mask_targets(CLASSES, palette)] == ["#000000", "#010203", "#fffefd", "#e0e0c0"]


def test_integers_of_arrays_and_of_pngs_with_16_bits():
    assert mask_targets(CLASSES, integers=True) == {"0": "background", "1": "cat", "2": "dog", "255": "ignore"}
    targets = mask_targets(MANY)
    assert (len(targets), targets["0"], targets["400"], targets["65535"]) == (402, "background", "class 400", "ignore")


def test_254_classes_have_a_colour_each():
    assert len(mask_targets(ClassTable(tuple(map(str, range(254)))))) == 256


def test_palettes_that_cannot_be():
    same = voc_palette()
    same[2] = same[1]
    for palette in (same, voc_palette()[:3], np.zeros((256, 3), np.uint8)):
        with pytest.raises(UsageError, match="4 colours that differ"):
            mask_targets(CLASSES, palette)
