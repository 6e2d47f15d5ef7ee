"""Samples to batches: decode, augment, stack. One map-style dataset for classifier and segmentation network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from training.augment import augment
from training.randomness import epoch_order, sample_rng
from weakseg.classes import ignore_value
from weakseg.datasets.sample import Dataset, Sample
from weakseg.errors import ConfigError, DatasetError, WeaksegError
from weakseg.image import read_image
from weakseg.recipe import OptimConfig

UNLABELLED = -1  # in batches, where 255 may be a class
LabelSource = Callable[
    [Sample], NDArray[np.integer]
]  # where label maps come from: pseudo-masks or, for the bound, truth


class Batch(NamedTuple):
    """images (B, 3, S, S) uint8; tags (B, C) float32 of 0 and 1; labels (B, S, S) int64 or None; ids of the samples.

    labels are mask values or UNLABELLED; soft ones are (B, S, S, 3) as `weakseg.pseudo_mask.soft_labels` has them.
    """

    images: Tensor
    tags: Tensor
    labels: Tensor | None
    ids: list[str]

    def to(self, device: torch.device) -> Batch:
        """On a device; the host does not wait."""
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        images, tags = self.images.to(device, non_blocking=True), self.tags.to(device, non_blocking=True)
        return Batch(images, tags, labels, self.ids)


class TrainingImages(TorchDataset[tuple[Tensor, Tensor, Tensor | None, str]]):
    """Items are asked for by (epoch, index), so that augmentation depends on both and on nothing else."""

    def __init__(
        self,
        dataset: Dataset,
        config: OptimConfig,
        fill: tuple[int, int, int],
        seed: int,
        label_source: LabelSource | None = None,
    ) -> None:
        self.dataset, self.config, self.fill, self.seed = dataset, config, fill, seed
        self.label_source = label_source

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None, str]:
        epoch, index = key
        sample = self.dataset.samples[index]
        image = read_image(sample.image)
        labels = None
        if self.label_source is not None:
            labels = self.label_source(sample)
            if labels.shape[:2] != image.shape[:2]:
                raise DatasetError(
                    f"label map of {sample.id} is {labels.shape[1]}x{labels.shape[0]}, its image is "
                    f"{image.shape[1]}x{image.shape[0]} (width x height): make the masks again from these images"
                )
        image, labels = augment(image, labels, self.config, self.fill, sample_rng(self.seed, epoch, sample.id))
        tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)  # channels-last in memory
        tags = torch.from_numpy(sample.tag_vector(len(self.dataset.classes)).astype(np.float32))
        return tensor, tags, None if labels is None else _target(labels), sample.id


def _target(labels: NDArray[np.integer]) -> Tensor:
    target = labels.astype(np.int64)
    values = target[..., :2] if labels.ndim == 3 else target  # the third of soft labels is a share
    values[values == ignore_value(labels)] = UNLABELLED
    return torch.from_numpy(target)


class Batches:
    """(epoch, index) keys of every batch from step `start`. An epoch drops its last, incomplete batch.

    Of several processes each gets its share of every batch, in order.

    Raises:
        ConfigError: the shares would not be equal.
    """

    def __init__(
        self, n: int, config: OptimConfig, seed: int, start: int = 0, process: int = 0, n_processes: int = 1
    ) -> None:
        self.n, self.config, self.seed, self.start = n, config, seed, start
        self.per_epoch = max(1, n // config.batch_size)
        size = min(config.batch_size, n)
        if size % n_processes:
            raise ConfigError(
                f"a batch is shared equally: expected optim.batch_size to be a multiple of the {n_processes} "
                f"processes, got {size}" + (" images in all" if size < config.batch_size else "")
            )
        self.share = size // n_processes
        self.first = process * self.share

    def __len__(self) -> int:
        return self.per_epoch * self.config.epochs - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.per_epoch * self.config.epochs):
            epoch, batch = divmod(step, self.per_epoch)
            order = epoch_order(self.seed, epoch, self.n)
            first = batch * self.config.batch_size + self.first
            yield [(epoch, index) for index in order[first : first + self.share]]


def collate(items: list[tuple[Tensor, Tensor, Tensor | None, str]]) -> Batch:
    images, tags, labels, ids = zip(*items, strict=True)
    stacked = torch.stack(images).contiguous(memory_format=torch.channels_last)
    return Batch(stacked, torch.stack(tags), None if labels[0] is None else torch.stack(labels), list(ids))


def loader(images: TrainingImages, batches: Batches) -> DataLoader[Batch]:
    """Batches in order; with workers, decoding overlaps training."""
    return DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=images.config.workers,
        prefetch_factor=4 if images.config.workers else None,
        worker_init_fn=_quiet_worker,
    )


def batches_of(data: DataLoader[Batch]) -> Iterator[Batch]:
    """The loader's batches; an error of ours in a worker comes out as it went in, without the worker's traceback."""
    try:
        yield from data
    except WeaksegError as error:
        name = type(error).__name__
        raise type(error)(str(error).rstrip().rpartition(f"{name}: ")[2]) from None


def _quiet_worker(_: int) -> None:
    cv2.setNumThreads(0)  # several workers each with OpenCV's own threads would oversubscribe the cores
    torch.set_num_threads(1)
