"""Our masks for CVAT and those of its SDK, in an environment of its own."""

import numpy as np

from tests.weakseg.masks import peers
from tests.weakseg.masks.label_maps import CLASSES, SEEDS, random_map
from weakseg.masks.cvat import mask_from_points, points_from_mask

pytestmark = peers.needs("cvat")


def test_500_masks_are_those_of_the_sdk(tmp_path):
    masks = [random_map(seed, len(CLASSES)) % 2 == 1 for seed in SEEDS]
    points = [points_from_mask(mask) for mask in masks]
    asked = {"masks": [mask.astype(int).tolist() for mask in masks], "points": points}
    told = peers.ask("cvat", "cvat_sdk_masks.py", tmp_path, **asked)
    assert told["points"] == points
    for mask, again, theirs in zip(masks, told["masks"], told["points"], strict=True):
        np.testing.assert_array_equal(np.array(again, dtype=bool), mask)
        np.testing.assert_array_equal(mask_from_points(theirs, *mask.shape), mask)
