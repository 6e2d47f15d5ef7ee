"""What FiftyOne needs besides PNGs with the images' names, as `ImageSegmentationDirectory` has them: the class of every
pixel value. FiftyOne takes a palette PNG for a picture, so that its values are colours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import MAX_CLASSES_U8, ClassTable
from weakseg.errors import UsageError
from weakseg.masks.shapes import BACKGROUND_NAME, value_of_ignore

IGNORE_NAME = "ignore"


def mask_targets(
    classes: ClassTable, palette: NDArray[np.uint8] | None = None, *, integers: bool = False
) -> dict[str, str]:
    """`mask_targets` of the label maps of these classes, IGNORE and background among them. FiftyOne does not draw 0.

    Args:
        palette: (n, 3) uint8 RGB, of the PNGs; None = the VOC colours, as for `png_from_labels`.
        integers: for masks as arrays. What JSON makes of the keys is text: `{int(k): v for k, v in targets.items()}`.
    Returns:
        {"#000000": "background", "#800000": <first class>, …}; above 254 classes, of which PNGs are grey, as with
        `integers`, {"0": "background", "1": <first class>, …}.
    Raises:
        UsageError: a palette with too few colours, or with one for two classes.
    """
    names = dict(enumerate((BACKGROUND_NAME, *classes.names)))
    names[value_of_ignore(classes, None)] = IGNORE_NAME
    if integers or len(classes) > MAX_CLASSES_U8:
        return {str(value): name for value, name in names.items()}
    colours = classes.palette() if palette is None else palette
    targets = {f"#{bytes(colours[value]).hex()}": name for value, name in names.items() if value < len(colours)}
    if len(targets) < len(names):
        raise UsageError(f"expected {len(names)} colours that differ, for classes, background and IGNORE, got fewer")
    return targets
