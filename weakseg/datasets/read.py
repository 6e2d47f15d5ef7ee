"""The one way in: a split of a dataset in any supported format."""

from __future__ import annotations

from weakseg.datasets import truth
from weakseg.datasets.formats import load
from weakseg.datasets.sample import Dataset
from weakseg.errors import DatasetError
from weakseg.recipe import DataConfig


def read(config: DataConfig, split: str) -> Dataset:
    """The samples of one split; from then on the true masks of this dataset are sealed in this process.

    Images are found, not decoded. Every split of one config has the same class table.

    Args:
        split: a name as in `config.train`, `config.val` or `config.tune`.
    Raises:
        DatasetError: a missing folder, list, label or image (with file and line), or no sample at all.
        UnknownClassError: a tag that is not in the class table.
    """
    truth.seal(config)
    dataset = load(config, split)
    if not dataset.samples:
        raise DatasetError(
            f"{config.root}: expected images in split {split!r}, got an empty split: add some to its list"
        )
    return dataset
