"""COCO run lengths: column-major, the first run is zeros, packed into printable ASCII."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import BACKGROUND
from weakseg.errors import DataError

_BITS = 5  # of payload in each character
_MORE, _SIGN, _PAYLOAD = 0x20, 0x10, 0x1F
_OFFSET = 48  # "0"


def rles_from_labels(labels: NDArray[Any]) -> dict[int, bytes]:
    """Compressed counts of every value of a label map but background, IGNORE included, by mask value in order.

    Args:
        labels: (H, W) integers >= 0.
    """
    flat = labels.T.reshape(-1)  # column-major
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1]) if flat.size else np.zeros(0, np.int64)
    ends = np.append(starts[1:], flat.size)
    values = flat[starts]
    out = {}
    for value in np.unique(values):
        if value != BACKGROUND:
            mine = values == value
            out[int(value)] = string_from_counts(_counts(starts[mine], ends[mine], flat.size))
    return out


def rle_from_mask(mask: NDArray[np.bool_]) -> bytes:
    """Compressed counts of one (H, W) bool mask."""
    return rles_from_labels(mask.astype(np.uint8)).get(1) or string_from_counts(np.array([mask.size], dtype=np.int64))


def mask_from_rle(rle: bytes, height: int, width: int) -> NDArray[np.bool_]:
    """(height, width) bool.

    Raises:
        DataError: damaged characters, a negative run, or runs that do not add up to height x width.
    """
    counts = counts_from_string(rle)
    # Each by itself first: a sum of numbers up to 2^60 may wrap around to anything.
    if (counts < 0).any() or (counts > height * width).any() or int(counts.sum()) != height * width:
        total = sum(counts.tolist())
        raise DataError(f"expected run lengths of {height} x {width} pixels, got a sum of {total}")
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(width, height).T


def labels_from_rles(
    rles: Mapping[int, bytes],
    height: int,
    width: int,
    dtype: type[np.uint8 | np.uint16] = np.uint8,
) -> NDArray[Any]:
    """The label map of several classes' counts; where they overlap, the last one wins."""
    labels = np.full((height, width), BACKGROUND, dtype=dtype)
    for value, rle in rles.items():
        labels[mask_from_rle(rle, height, width)] = value
    return labels


def string_from_counts(counts: NDArray[np.int64]) -> bytes:
    """COCO's compressed form: from the fourth on, each count is its difference to the one two before it; each number
    is written in 5-bit groups, lowest first, with a sign bit in the last and a continuation bit in the others.

    Source: cocoapi common/maskApi.c, `rleToString`.
    """
    numbers = counts.astype(np.int64)
    numbers[3:] -= counts[1:-2]
    columns, used = [], np.ones(len(numbers), dtype=bool)
    while used.any():
        group, numbers = numbers & _PAYLOAD, numbers >> _BITS
        # The last group is the one whose sign bit already says what all higher bits are.
        more = used & (numbers != np.where(group & _SIGN, -1, 0))
        columns.append((np.where(more, group | _MORE, group) + _OFFSET, used))
        used = more
    if not columns:
        return b""
    characters = np.stack([column for column, _ in columns], axis=1)
    written = np.stack([column for _, column in columns], axis=1)
    return bytes(characters[written].astype(np.uint8))


def counts_from_string(rle: bytes) -> NDArray[np.int64]:
    """Inverse of `string_from_counts`. Source: maskApi.c, `rleFrString`."""
    characters = np.frombuffer(rle, dtype=np.uint8).astype(np.int64) - _OFFSET
    if not len(characters):
        return np.zeros(0, dtype=np.int64)
    last = (characters & _MORE) == 0
    if characters.min() < 0 or characters.max() > 0x3F or not last[-1]:
        raise DataError("expected COCO run lengths (characters 0 to o, ended), got damaged ones")
    firsts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    lengths = np.diff(np.append(firsts, len(characters)))
    if lengths.max() > 12:
        raise DataError("expected COCO run lengths below 2^60, got a longer number")
    place = np.arange(len(characters)) - np.repeat(firsts, lengths)
    numbers = np.add.reduceat((characters & _PAYLOAD) << (_BITS * place), firsts)
    negative = (characters[last] & _SIGN) != 0
    numbers[negative] -= np.int64(1) << (_BITS * lengths[negative])
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def _counts(starts: NDArray[np.int64], ends: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Alternating runs of zeros and ones from the [start, end) of the ones, which never touch."""
    edges = np.empty(2 * len(starts) + 2, dtype=np.int64)
    edges[0], edges[-1] = 0, size
    edges[1:-1:2], edges[2:-1:2] = starts, ends
    counts = np.diff(edges)
    return counts if counts[-1] else counts[:-1]
