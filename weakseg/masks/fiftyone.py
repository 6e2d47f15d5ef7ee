"""What FiftyOne wants besides index PNGs of the images' names: the class of every pixel value.

`fo.Dataset.from_dir(dataset_type=fo.types.ImageSegmentationDirectory, ...)` reads a folder of masks;
`dataset.default_mask_targets = {int(k): v for k, v in json.load(file).items()}` names their values.
"""

from __future__ import annotations

from weakseg.classes import BACKGROUND, IGNORE, IGNORE_U16, ClassTable, mask_dtype


def mask_targets(classes: ClassTable) -> dict[str, str]:
    """{pixel value as JSON's text: name}, background and IGNORE among them; FiftyOne does not draw the value 0."""
    ignore = IGNORE if mask_dtype(len(classes)).__name__ == "uint8" else IGNORE_U16
    names = {str(i + 1): name for i, name in enumerate(classes.names)}
    return {str(BACKGROUND): "background", **names, str(ignore): "ignore"}
