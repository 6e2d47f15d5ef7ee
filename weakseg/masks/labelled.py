"""What every format of a label map takes and gives back: an image's name and its mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """The mask of one image.

    name: of the image file, as its consumer finds it: a relative path with "/", or a URI.
    labels: (H, W) uint8 or uint16 mask values, at the size of the image, upright.
    confidence: {mask value: in [0, 1]} of the classes in it, as far as it is known.
    """

    name: str
    labels: NDArray[Any]
    confidence: Mapping[int, float] = field(default_factory=dict)
