"""Class activation maps as an .npz without pickles.

format_version  ()        int64, FORMAT_VERSION
values          (K,)      uint16 mask values of the classes
names           (K,)      their names
cam01           (K, h, w) float16 in [0, 1], covering the whole image
size            (2,)      int64 height, width of the image
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weakseg.errors import DataError

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Cams:
    """values, names: of the K classes. cam01: (K, h, w) float16 in [0, 1]. size: (height, width) of the image."""

    values: tuple[int, ...]
    names: tuple[str, ...]
    cam01: NDArray[np.float16]
    size: tuple[int, int]


def npz_from_cams(
    cam01: Sequence[NDArray[np.float32]], values: Sequence[int], names: Sequence[str], size: tuple[int, int]
) -> bytes:
    """K maps (h, w) in [0, 1], K >= 0, all of one size. The same maps give the same bytes wherever zlib is the same.

    float16 keeps 3 digits, more than maps are worth, at half the size.
    """
    maps = np.stack(cam01).astype(np.float16) if len(cam01) else np.zeros((0, 1, 1), np.float16)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        format_version=np.int64(FORMAT_VERSION),
        values=np.array(values, dtype=np.uint16),
        names=np.array(names, dtype=np.str_),
        cam01=maps,
        size=np.array(size, dtype=np.int64),
    )
    return buffer.getvalue()


def cams_from_npz(data: bytes) -> Cams:
    """Raises DataError: damaged, or of another version."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            version = int(arrays["format_version"])
            if version != FORMAT_VERSION:
                raise DataError(f"expected CAMs of format version {FORMAT_VERSION}, got {version}: update weakseg")
            height, width = (int(side) for side in arrays["size"])
            values, names = arrays["values"].tolist(), arrays["names"].tolist()
            return Cams(tuple(values), tuple(names), arrays["cam01"], (height, width))
    except (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"expected CAMs as weakseg writes them, got damaged or other data: {error}") from error
