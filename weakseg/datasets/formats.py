"""Dispatch from `config.format` to its reader."""

from __future__ import annotations

from weakseg.datasets import coco, csv, folder, voc
from weakseg.datasets.common import Complain, stop
from weakseg.datasets.sample import Dataset
from weakseg.recipe import DataConfig


def load(config: DataConfig, split: str, complain: Complain = stop) -> Dataset:
    """One split, possibly empty; problems go to `complain`. For use outside this package: weakseg.datasets.read."""
    readers = {"voc": voc.load, "csv": csv.load, "folder": folder.load, "coco": coco.load}
    return readers[config.format](config, split, complain)
