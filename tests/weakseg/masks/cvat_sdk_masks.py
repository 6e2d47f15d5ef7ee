"""Masks by CVAT's SDK, without weakseg: JSON from stdin to stdout. Runs in .venv-cvat, see test_cvat_slow.py.

in    {"masks": [[[0 or 1, by column], by row]], "points": [points of each]}
out   {"version", "points": [of each mask, by encode_mask], "masks": [of each of the points, by decode_mask]}
"""

import importlib.metadata
import json
import sys

import numpy as np
from cvat_sdk.masks import decode_mask, encode_mask


def main():
    asked = json.load(sys.stdin)
    masks = [np.array(mask, dtype=bool) for mask in asked["masks"]]
    decoded = [
        decode_mask(points, image_width=mask.shape[1], image_height=mask.shape[0])
        for mask, points in zip(masks, asked["points"], strict=True)
    ]
    answer = {
        "version": importlib.metadata.version("cvat-sdk"),
        "points": [encode_mask(mask) for mask in masks],
        "masks": [mask.astype(int).tolist() for mask in decoded],
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
