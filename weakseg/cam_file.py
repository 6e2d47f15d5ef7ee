"""The maps of one image on disk: a compressed .npz without pickles."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.cam import normalise, upsample
from weakseg.errors import DataError
from weakseg.files import write_bytes_atomic


@dataclass(frozen=True)
class CamFile:
    """classes (K,) int32 indices of the image's tags · cam (K, ceil(H/4), ceil(W/4)) float16 raw, mean over views ·
    height, width of the image · scores (C,) float32 in [0, 1] of all classes."""

    classes: NDArray[np.int32]
    cam: NDArray[np.float16]
    height: int
    width: int
    scores: NDArray[np.float32]

    def cam01(self, normalisation: Any = "max") -> NDArray[np.float32]:
        """(K, H, W) in [0, 1] at the image's size."""
        return upsample(normalise(self.cam, normalisation), self.height, self.width)

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        size = np.array([self.height, self.width], dtype=np.int32)
        np.savez(buffer, classes=self.classes, cam=self.cam, size=size, scores=self.scores)
        write_bytes_atomic(path, buffer.getvalue())


def read_cam(path: Path) -> CamFile:
    """Raises DataError when the file is missing, damaged or not a CAM file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            height, width = (int(value) for value in data["size"])
            return CamFile(data["classes"], data["cam"], height, width, data["scores"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read the maps in {path} ({error}): run the cam stage again") from error
