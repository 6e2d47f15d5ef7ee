"""Run by tests in label-studio-converter's own environment: its decoder and its encoder of brush masks.

Reads {"rle": [...], "height": h, "width": w, "mask": rows of 0 and 1} from stdin; prints {"mask": what it decodes,
"rle": what it encodes}.
"""

import json
import sys

import numpy as np
from label_studio_converter.brush import decode_rle, mask2rle

if __name__ == "__main__":
    asked = json.load(sys.stdin)
    decoded = decode_rle(asked["rle"]).reshape(asked["height"], asked["width"], 4)[..., 3]
    encoded = mask2rle(np.array(asked["mask"], dtype=np.uint8) * 255)
    print(json.dumps({"mask": (decoded > 0).astype(int).tolist(), "rle": [int(v) for v in encoded]}))
