"""Saliency maps that the user brings: grey PNGs of the images' names and sizes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from weakseg.datasets import Dataset, Sample
from weakseg.errors import ConfigError, DatasetError
from weakseg.image import probe
from weakseg.progress import Progress

SHOWN = 5  # names in a message
GREY = {"1": 1, "L": 255, "I;16": 65535}  # white, by Pillow's mode


def saliency_path(folder: Path, sample: Sample) -> Path:
    return folder / f"{sample.id}.png"


def read_map(path: Path) -> NDArray[np.float32]:
    """(H, W) in [0, 1] of a grey PNG of 8 or 16 bits, black is 0 and white is 1.

    Raises:
        DatasetError: not a whole PNG, or not a grey one.
    """
    data = path.read_bytes()
    try:
        with PngImageFile(io.BytesIO(data)) as image:
            mode, pixels = image.mode, np.asarray(image)
    except Exception as error:  # decoders raise whatever they met
        raise DatasetError(f"{path}: expected a grey PNG, got a file that cannot be decoded: {error}") from error
    if mode not in GREY:
        raise DatasetError(
            f"{path}: expected a grey PNG of 8 or 16 bits, black where nothing is, got one of mode {mode}: convert it"
        )
    return pixels.astype(np.float32) / np.float32(GREY[mode])


def check_files(folder: Path, dataset: Dataset, missing: str, progress: Progress) -> None:
    """Look at the map of every image that has tags, before anything is trained.

    Raises:
        ConfigError: no such folder.
        DatasetError: a file that cannot be read, maps of another size than their images, maps that are missing (with
            `missing` "refuse", or all of them).
    """
    if not folder.is_dir():
        raise ConfigError(f"expected grey PNGs of the training images in {folder}, got no such folder")
    asked = [sample for sample in dataset if sample.tags]
    absent, other = [], []
    for sample in progress.each(asked, "saliency files", total=len(asked)):
        path = saliency_path(folder, sample)
        if not path.is_file():
            absent.append(sample.id)
            continue
        got, size = read_map(path).shape, probe(sample.image.read_bytes()).oriented_size
        if got != size:
            other.append(f"{path.name} {got[1]}x{got[0]} for {size[1]}x{size[0]}")
    if other:
        raise DatasetError(
            f"{folder}: expected maps of the sizes of their images, got {_some(other)}: {len(other)} of {len(asked)} "
            "are of another size (width x height); make them again from these images"
        )
    if absent and (missing == "refuse" or len(absent) == len(asked)):
        raise DatasetError(
            f"{folder}: expected <id>.png of every image of split {dataset.split!r} that has tags, {len(absent)} of "
            f"{len(asked)} are missing ({_some(absent)}): add them, or let images go without by saliency.missing skip"
        )
    if absent:
        progress.say(f"warning: {len(absent)} of {len(asked)} images have no saliency map ({_some(absent)})")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
