"""Counts of one split: what is in it, what occurs together, how big the images are. Nothing here looks at a mask."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weakseg.datasets.sample import Dataset
from weakseg.errors import ImageError
from weakseg.image import probe


@dataclass(frozen=True)
class Stats:
    """Image-level statistics.

    counts: images that show each class, in class order.
    co_occurrence: (C, C) int64; [a, b] = images that show both, [a, a] = counts[a].
    tags_per_image: number of tags -> images.
    sizes: (n, 2) int64, H and W of each image, upright.
    """

    split: str
    classes: tuple[str, ...]
    n_images: int
    counts: tuple[int, ...]
    co_occurrence: NDArray[np.int64]
    tags_per_image: dict[int, int]
    sizes: NDArray[np.int64]

    def as_json(self) -> dict[str, object]:
        """Plain values; sizes as least, median and greatest."""
        height, width = self.sizes[:, 0], self.sizes[:, 1]
        return {
            "split": self.split,
            "n_images": self.n_images,
            "classes": dict(zip(self.classes, self.counts, strict=True)),
            "co_occurrence": self.co_occurrence.tolist(),
            "tags_per_image": {str(n): count for n, count in self.tags_per_image.items()},
            "height": _range(height),
            "width": _range(width),
        }

    def as_text(self) -> str:
        """A table: classes with their counts, and how often each pair is in one image."""
        wide = max(len(name) for name in self.classes)
        columns = range(len(self.classes))
        cell = max(4, len(str(self.n_images)) + 1)
        head = f"{'':>{wide + 5}} {'images':>7}  " + "".join(f"{f'[{c}]':>{cell}}" for c in columns)
        rows = [
            f"{f'[{a}]':>4} {name:<{wide}} {self.counts[a]:>7}  "
            + "".join(f"{'.' if a == b else self.co_occurrence[a, b]:>{cell}}" for b in columns)
            for a, name in enumerate(self.classes)
        ]
        tags = ", ".join(f"{count} with {n}" for n, count in self.tags_per_image.items())
        height, width = _range(self.sizes[:, 0]), _range(self.sizes[:, 1])
        tail = [
            f"tags: {tags}",
            f"width {width['min']} to {width['max']}, median {width['median']:g}; "
            f"height {height['min']} to {height['max']}, median {height['median']:g}",
        ]
        return "\n".join([f"split {self.split}: {self.n_images} images", head, *rows, *tail])


def stats(dataset: Dataset) -> Stats:
    """Statistics of a split; image headers are read, pixels are not decoded.

    Raises:
        ImageError: a file is no image; the message names it.
    """
    tags = np.array([sample.tag_vector(len(dataset.classes)) for sample in dataset], dtype=np.int64)  # (n, C)
    per_image = Counter(tags.sum(axis=1).tolist())
    sizes = [_size(sample.image.read_bytes(), str(sample.image)) for sample in dataset]
    return Stats(
        dataset.split,
        dataset.classes.names,
        len(dataset),
        tuple(tags.sum(axis=0).tolist()),
        tags.T @ tags,
        {n: per_image[n] for n in sorted(per_image)},
        np.array(sizes, dtype=np.int64).reshape(-1, 2),
    )


def _size(data: bytes, path: str) -> tuple[int, int]:
    try:
        return probe(data).oriented_size
    except ImageError as error:
        raise ImageError(f"{path}: {error}", error.reason) from error


def _range(values: NDArray[np.int64]) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}
