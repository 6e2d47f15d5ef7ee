"""Masks of the training images from a segmentation network that was trained on earlier ones, for a further round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training import distributed
from training.predict_segmentation import network
from weakseg.cam import mask_values, upsample
from weakseg.classes import BACKGROUND, ignore_value, mask_dtype, voc_palette
from weakseg.datasets import Dataset, Sample
from weakseg.errors import ConfigError
from weakseg.files import write_bytes_atomic
from weakseg.image import read_image
from weakseg.masks.png import png_from_labels, provenance_text
from weakseg.progress import Progress
from weakseg.recipe import Recipe, SegConfig
from weakseg.run_folder import mask_path

FOLDER = "labels"  # beside the network's file


def check(config: SegConfig) -> None:
    """Raises ConfigError when rounds cannot be run so."""
    if config.rounds < 1 or not 0 <= config.sure < 1:
        raise ConfigError(
            f"train_seg.rounds must be at least 1 and train_seg.sure lie in [0, 1), got {config.rounds} and "
            f"{config.sure}: 0.8 is usual, 0 = no IGNORE"
        )


def relabel(recipe: Recipe, model_path: Path, dataset: Dataset, sure: float, progress: Progress) -> int:
    """Writes labels/<split>/<id>.png beside the model; of several processes each a share. Goes on where it stopped.

    Returns: how many this process has written.
    """
    config, folder = recipe.evaluate, model_path.parent
    logits_of = network(config, model_path)
    fields = {"mask": "self_training", "recipe": recipe.name, "seed": recipe.seed, "sure": sure}
    text = provenance_text(fields | {"scales": config.seg_scales, "flip": config.seg_flip})

    def path(sample: Sample) -> Path:
        return mask_path(folder, dataset.split, sample.id, FOLDER)

    share = dataset.samples[distributed.rank() :: distributed.size()]
    todo = [sample for sample in share if not path(sample).is_file()]
    for sample in progress.each(todo, f"{folder.name}: relabel", total=len(todo)):
        image = read_image(sample.image)
        labels = sure_labels(logits_of(image), np.array(sample.tags), *image.shape[:2], sure)
        write_bytes_atomic(path(sample), png_from_labels(labels, voc_palette(), text))
    distributed.wait()
    return len(todo)


def sure_labels(
    logits: NDArray[np.float32], tags: NDArray[np.intp], height: int, width: int, sure: float
) -> NDArray[Any]:
    """(height, width) label map of background and the image's tags, IGNORE where none of them is as likely as `sure`.

    Args:
        logits: (C + 1, ceil(height / 4), ceil(width / 4)). tags: (K,) class indices; other classes are known to be
            absent, so probabilities are among background and tags alone.
    """
    values = np.concatenate([[BACKGROUND], mask_values(tags, len(logits) - 1)])
    among = logits[values]
    likely = np.exp(among - among.max(axis=0))
    likely = upsample(likely / likely.sum(axis=0), height, width)
    labels: NDArray[Any] = values.astype(mask_dtype(len(logits) - 1))[likely.argmax(axis=0)]
    labels[likely.max(axis=0) < sure] = ignore_value(labels)
    return labels
