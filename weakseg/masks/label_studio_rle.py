"""Label Studio's brush masks: run lengths of RGBA pixels as a stream of bits, which are not COCO's.

    32 bits   number of bytes that follow from it, 4 H W
     5 bits   bits of a value - 1
    4 x 4     the four sizes that lengths may have, - 1
    then      1 bit  1 = one value many times, 0 = many values
              2 bits which size the length has, length - 1, and the value or the values
    zeros up to a whole byte

All four channels of a pixel have its value, 0 or 255; what is read is the last one, alpha.
Source: thi.ng/rle-pack; HumanSignal/label-studio-converter, label_studio_converter/brush.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.errors import DataError

CHANNELS = 4
VALUE_BITS = 8
SIZES = (3, 4, 8, 16)
OPAQUE = 128  # alpha from which on a pixel is painted: brushes have soft edges
_HEADER_BITS = 32 + 5 + 4 * len(SIZES)
_LONGEST = 2 ** SIZES[-1]
_BLOCK_PX = 2**20


def rle_from_mask(mask: NDArray[np.bool_]) -> list[int]:
    """Bytes of a (H, W) bool mask, as the list of numbers that JSON holds."""
    flat = mask.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = CHANNELS * np.diff(np.append(starts, flat.size))
    values = np.where(flat[starts], 255, 0)
    n_parts = -(-lengths // _LONGEST)  # of runs that are longer than a length can say
    part = np.arange(n_parts.sum()) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
    length = np.minimum(np.repeat(lengths, n_parts) - part * _LONGEST, _LONGEST)
    which = np.searchsorted(2 ** np.array(SIZES), length)
    size = np.array(SIZES)[which]
    token = (((0b100 | which) << size) | (length - 1)) << VALUE_BITS | np.repeat(values, n_parts)
    header = [(mask.size * CHANNELS, 32), (VALUE_BITS - 1, 5), *((size - 1, 4) for size in SIZES)]
    words = np.concatenate([[word for word, _ in header], token])
    n_bits = np.concatenate([[bits for _, bits in header], 3 + size + VALUE_BITS])
    return np.packbits(_bits(words, n_bits)).tolist()


def mask_from_rle(rle: Sequence[Any], height: int, width: int) -> NDArray[np.bool_]:
    """(height, width) bool.

    Raises:
        DataError: no bytes, of another number of pixels, or cut off.
    """
    try:
        data = bytes(rle)
    except (TypeError, ValueError) as error:
        raise DataError(f"expected Label Studio's run lengths as bytes, got: {error}") from error
    reader = _Reader(data)
    n_values = reader.read(32)
    value_bits = reader.read(5) + 1
    sizes = [reader.read(4) + 1 for _ in SIZES]
    if n_values != CHANNELS * height * width or value_bits != VALUE_BITS:
        raise DataError(
            f"expected run lengths of {height} x {width} pixels in four channels of 8 bits, got {n_values} values of "
            f"{value_bits} bits: is it another image's mask?"
        )
    lengths: list[int] = []
    values: list[int] = []
    left = n_values
    while left > 0:
        repeated = reader.read(1)
        length = min(reader.read(sizes[reader.read(2)]) + 1, left)
        left -= length
        if repeated:
            lengths.append(length)
            values.append(reader.read(VALUE_BITS))
        else:
            lengths += [1] * length
            values += [reader.read(VALUE_BITS) for _ in range(length)]
    ends, painted = np.cumsum(lengths), np.array(values) >= OPAQUE
    mask = np.zeros(height * width, dtype=bool)
    for start in range(0, mask.size, _BLOCK_PX):  # a large image must not take 8 bytes for each of its pixels
        alpha = CHANNELS * np.arange(start, min(start + _BLOCK_PX, mask.size)) + CHANNELS - 1
        mask[start : start + len(alpha)] = painted[np.searchsorted(ends, alpha, side="right")]
    return mask.reshape(height, width)


def _bits(words: NDArray[np.int64], n_bits: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The bits of each word, its highest first, one after the other."""
    word = np.repeat(words, n_bits)
    place = np.repeat(np.cumsum(n_bits), n_bits) - 1 - np.arange(len(word))
    return ((word >> place) & 1).astype(np.uint8)


class _Reader:
    """Numbers of up to 32 bits from bytes, highest bit first."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._end = data, 0, 8 * len(data)

    def read(self, n_bits: int) -> int:
        start, self._at = self._at, self._at + n_bits
        if self._at > self._end:
            raise DataError("expected whole Label Studio run lengths, got some that are cut off")
        first, last = start >> 3, (self._at + 7) >> 3
        word = int.from_bytes(self._data[first:last], "big")
        return (word >> (8 * last - self._at)) & ((1 << n_bits) - 1)
