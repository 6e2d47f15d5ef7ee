"""Run by tests in labelme's own environment: a labelme file as labelme reads it, as a label map of class numbers.

    python labelme_reads.py FILE.json CLASS ...

Prints JSON rows. 0 is background, the n-th class n.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

import numpy as np
from labelme._label_file import LabelFile
from labelme.utils import shape as shapes

if __name__ == "__main__":
    path, *names = sys.argv[1:]
    content = json.loads(Path(path).read_bytes())
    found = LabelFile(path)
    size = (content["imageHeight"], content["imageWidth"], 3)
    labels, _ = shapes.shapes_to_label(size, found.shapes, {name: i for i, name in enumerate(names, start=1)})
    print(json.dumps(np.asarray(labels).tolist()))
