"""Label maps for the tests of formats: empty, full, of one pixel, at borders, with holes, of many classes."""

import cv2
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np

from weakseg.classes import ClassTable
from weakseg.masks.labelled import LabelledImage

CLASSES = ClassTable(("cat", "dog", 'a "bird" & <co>', "Füße"))
MANY = ClassTable(tuple(f"class {value}" for value in range(1, 401)))
SEEDS = range(500)

_shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)
small_maps = hnp.arrays(np.uint8, _shapes, elements=st.sampled_from([0, 0, 1, 1, 2, 4, 255])) | hnp.arrays(
    np.uint8, _shapes, elements=st.integers(0, 1)
)
wide_maps = hnp.arrays(np.uint16, _shapes, elements=st.sampled_from([0, 1, 255, 256, 400, 65535]))


def random_map(seed, n_classes):
    """One of 500: (H, W) uint8, or uint16 above 254 classes, with IGNORE in it now and then."""
    rng = np.random.default_rng(seed)
    kind = seed % 10
    height, width = rng.integers(1, 15 if kind == 3 else 60, 2).tolist()  # noise has as many parts as pixels
    labels = np.zeros((height, width), np.int32)
    if kind == 1:
        labels[:] = rng.integers(1, n_classes + 1)
    elif kind == 2:
        labels[rng.integers(height), rng.integers(width)] = rng.integers(1, n_classes + 1)
    elif kind == 3:
        labels[:] = rng.integers(0, n_classes + 1, labels.shape)
    elif kind > 3:
        for _ in range(kind):  # rings, discs and lines, over each other and over the borders
            value, thickness = int(rng.integers(0, n_classes + 1)), int(rng.choice([-1, -1, 1, 3]))
            centre, axes = rng.integers([0, 0], [width, height]).tolist(), rng.integers(1, 25, 2).tolist()
            cv2.ellipse(labels, centre, axes, int(rng.integers(180)), 0, 360, value, thickness)
    dtype = np.uint8 if n_classes <= 254 else np.uint16
    if kind in (3, 8):
        labels[rng.random(labels.shape) < 0.1] = np.iinfo(dtype).max
    return labels.astype(dtype)


def random_images(classes=CLASSES):
    """500 label maps with names and now and then a confidence."""
    for seed in SEEDS:
        labels = random_map(seed, len(classes))
        present = [int(value) for value in np.unique(labels) if 0 < value <= len(classes)]
        confidence = {value: value / 1000 for value in present if (value + seed) % 3}
        yield LabelledImage(f"folder {seed % 3}/image-{seed}.jpg", labels, confidence)


def without_ignore(labels):
    return np.where(labels == np.iinfo(labels.dtype).max, 0, labels).astype(labels.dtype)


def assert_same(found, expected, ignore=False):
    """The same image, but for IGNORE, which is background unless `ignore`."""
    labels = expected.labels if ignore else without_ignore(expected.labels)
    np.testing.assert_array_equal(found.labels, labels)
    assert (found.name, found.labels.dtype) == (expected.name, expected.labels.dtype)
