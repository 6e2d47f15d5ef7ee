"""A folder of masks by FiftyOne, without weakseg and without a database: JSON from stdin to stdout. Runs in
.venv-fiftyone, see test_fiftyone_slow.py.

in    {"folder": of data/ and labels/, "targets": mask targets, "mask": rows of integers}
out   {"version", "kinds": whether the targets are for colours, for integers,
       "names": {stem: rows of names}, "mask": rows of a Segmentation made of the array}
"""

import json
import sys
from pathlib import Path

import fiftyone
import fiftyone.core.fields as fields
import numpy as np
from fiftyone.utils.data import ImageSegmentationDirectoryImporter


def main():
    asked = json.load(sys.stdin)
    targets = asked["targets"]
    is_rgb = fields.is_rgb_mask_targets(targets)
    by_value = {fields.hex_to_int(key) if is_rgb else int(key): name for key, name in targets.items()}
    names = {}
    with ImageSegmentationDirectoryImporter(dataset_dir=asked["folder"], load_masks=True) as importer:
        for path, _, label in importer:
            mask = fields.rgb_array_to_int(label.mask) if label.mask.ndim == 3 else label.mask
            names[Path(path).stem] = [[by_value[value] for value in row] for row in mask.tolist()]
    answer = {
        "version": fiftyone.__version__,
        "kinds": [is_rgb, fields.is_integer_mask_targets({value: by_value[value] for value in by_value})],
        "names": names,
        "mask": fiftyone.Segmentation(mask=np.array(asked["mask"])).mask.tolist(),
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
