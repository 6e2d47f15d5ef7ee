"""Datasets by datumaro, without weakseg: JSON from stdin to stdout. Runs in .venv-datumaro, see test_datumaro_slow.py.

in    {"folder", "format", "values": {label: mask value}, "exports": {format: [folder, options]}}
out   {"version", "maps": {id: rows of mask values}}; masks alone are exported, not the boxes that datumaro adds
"""

import importlib.metadata
import json
import sys

import datumaro
import numpy as np
from datumaro import AnnotationType


def main():
    asked = json.load(sys.stdin)
    dataset = datumaro.Dataset.import_from(asked["folder"], asked["format"])
    categories = dataset.categories()
    values = [asked["values"][label.name] for label in categories[AnnotationType.label]]
    maps, items = {}, []
    for item in dataset:
        masks = [one for one in item.annotations if one.type == AnnotationType.mask]
        labels = np.zeros(item.media.size, np.int64)
        for mask in masks:
            labels[np.asarray(mask.image) > 0] = values[mask.label]
        maps[item.id] = labels.tolist()
        items.append(item.wrap(annotations=masks))
    found = datumaro.Dataset.from_iterable(items, categories=categories)
    for name, (folder, options) in asked["exports"].items():
        found.export(folder, name, **options)
    json.dump({"version": importlib.metadata.version("datumaro"), "maps": maps}, sys.stdout)


if __name__ == "__main__":
    main()
