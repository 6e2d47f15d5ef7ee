"""Where things are, whatever they are: saliency maps of the training images, brought by the user or estimated.

An estimator is a file of this folder. None of them sees a mask of the data, and none is told the tags.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training import distributed
from training.saliency import contrast, objectness
from training.saliency.files import check_files, read_map, saliency_path
from weakseg.datasets import Dataset, Sample
from weakseg.files import write_bytes_atomic
from weakseg.image import read_image
from weakseg.progress import Progress
from weakseg.recipe import SaliencyConfig

FOLDER = "saliency"  # in the folder of the stage


@dataclass(frozen=True)
class SaliencyMaps:
    """(H, W) in [0, 1] of an image, from <folder>/<id>.png; None where it has no tags, or there is no file.

    A file of an image without tags is not looked at: the user's may show what is no class of this data.
    """

    folder: Path

    def __call__(self, sample: Sample) -> NDArray[np.float32] | None:
        path = saliency_path(self.folder, sample)
        return read_map(path) if sample.tags and path.is_file() else None


def saliency_of(config: SaliencyConfig, dataset: Dataset, folder: Path, progress: Progress) -> SaliencyMaps:
    """The maps of the images that have tags: in the others there is nothing to look for.

    Maps of `config.folder` are all looked at now. Without it they are estimated, as saliency/<split>/<id>.png in
    `folder`, those alone that are not there; of several processes each makes a share.

    Raises:
        ConfigError, DatasetError: maps that cannot be used, see `check_files`; an estimator that this data is not for.
    """
    if config.folder is not None:
        check_files(Path(config.folder), dataset, config.missing, progress)
        return SaliencyMaps(Path(config.folder))
    estimate = _estimator(config, dataset, folder / FOLDER, progress)
    maps = SaliencyMaps(folder / FOLDER / dataset.split)
    share = [sample for sample in dataset if sample.tags][distributed.rank() :: distributed.size()]
    todo = [sample for sample in share if not saliency_path(maps.folder, sample).is_file()]
    for sample in progress.each(todo, f"saliency by {config.estimator}", total=len(todo)):
        write_map(saliency_path(maps.folder, sample), estimate(read_image(sample.image)))
    distributed.wait()
    return maps


def write_map(path: Path, values: NDArray[np.float32]) -> None:
    """(H, W) in [0, 1] as a grey PNG, rounded to 255ths."""
    buffer = io.BytesIO()
    Image.fromarray(np.round(values * 255).astype(np.uint8)).save(buffer, "PNG")
    write_bytes_atomic(path, buffer.getvalue())


def _estimator(
    config: SaliencyConfig, dataset: Dataset, folder: Path, progress: Progress
) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    if config.estimator == "objectness":
        return objectness.estimator(dataset, folder, progress)
    return contrast.saliency
