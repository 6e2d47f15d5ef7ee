"""Label Studio's brush masks: run lengths of RGBA pixels as a stream of bits, which are not COCO's.

    32 bits   number of values, 4 H W
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

_CHANNELS = 4
_VALUE_BITS = 8
_SIZES = (3, 4, 8, 16)  # what we write, as Label Studio does; what is read says its own
_OPAQUE = 128  # alpha from which on a pixel is painted: brushes have soft edges
_TAG_BITS = 3  # before a length
_HEADER_BITS = 32 + 5 + 4 * len(_SIZES)
_LONGEST = 2 ** _SIZES[-1]
_CUT_OFF = "expected whole Label Studio run lengths, got some that are cut off"
_U = np.uint64  # NumPy makes floats of it together with signed integers


def rle_from_mask(mask: NDArray[np.bool_]) -> list[int]:
    """Bytes of a (H, W) bool mask, H, W >= 1, as the list of numbers that JSON holds."""
    flat = mask.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = _CHANNELS * np.diff(starts, append=flat.size)
    n_parts = -(-lengths // _LONGEST)  # of runs that are longer than a length can say
    length = np.full(n_parts.sum(), _LONGEST)
    length[np.cumsum(n_parts) - 1] = lengths - (n_parts - 1) * _LONGEST
    which = np.searchsorted(2 ** np.array(_SIZES), length)
    size = np.array(_SIZES)[which]
    token = (((0b100 | which) << size) | (length - 1)) << _VALUE_BITS | np.repeat(
        np.where(flat[starts], 255, 0), n_parts
    )
    header = [(flat.size * _CHANNELS, 32), (_VALUE_BITS - 1, 5), *((size - 1, 4) for size in _SIZES)]
    words = np.concatenate([[word for word, _ in header], token])
    n_bits = np.concatenate([[bits for _, bits in header], _TAG_BITS + size + _VALUE_BITS])
    return list(_packed(words.astype(_U), n_bits))


def mask_from_rle(rle: Sequence[Any], height: int, width: int) -> NDArray[np.bool_]:
    """(height, width) bool.

    Memory is that of the input and of the mask, whose size is compared with the header's before.

    Raises:
        DataError: no bytes, of another number of pixels, or cut off.
    """
    data, sizes = _opened(rle, height, width)
    n_values = _CHANNELS * height * width
    # One element for each byte, the eight from there on: more than 7 bits before a token and its 27 with one value.
    windows = np.ndarray((len(data) + 1,), ">u8", data + bytes(8), strides=(1,))
    begin = _tokens(data, sizes)
    bits = windows[begin >> 3].astype(_U) << (begin & 7).astype(_U)
    size = np.array(sizes, _U)[bits >> _U(61) & _U(3)]
    length = ((bits << _U(_TAG_BITS)) >> (_U(64) - size)).astype(np.int64) + 1
    n_tokens = int(np.searchsorted(np.cumsum(length), n_values)) + 1  # that are needed; what follows is no token
    if n_tokens > len(begin):
        raise DataError(_CUT_OFF)
    repeated, length, place = bits[:n_tokens] >> _U(63) == 1, length[:n_tokens], begin[:n_tokens]
    place = place + _TAG_BITS + size[:n_tokens].astype(np.int64)  # of the value, or of the first one
    n_listed = np.where(repeated, 1, length)
    if place[-1] + _VALUE_BITS * n_listed[-1] > 8 * len(data):
        raise DataError(_CUT_OFF)
    if not repeated.all():
        nth = np.arange(n_listed.sum()) - np.repeat(np.cumsum(n_listed) - n_listed, n_listed)
        place = np.repeat(place, n_listed) + _VALUE_BITS * nth
        length = np.repeat(np.where(repeated, length, 1), n_listed)
    alpha = (windows[place >> 3].astype(_U) << (place & 7).astype(_U)) >> _U(64 - _VALUE_BITS)
    ends = np.minimum(np.cumsum(length), n_values)
    n_pixels = np.diff(ends // _CHANNELS, prepend=0)  # whose last value lies in the run
    return np.repeat(alpha >= _OPAQUE, n_pixels).reshape(height, width)


def _packed(words: NDArray[np.uint64], n_bits: NDArray[np.int64]) -> bytes:
    """Numbers of up to 32 bits, highest bit first, one after the other; zeros up to a whole byte."""
    ends = np.cumsum(n_bits)
    begins = ends - n_bits
    first = begins >> 5  # of the two 32-bit words that a number lies in
    placed = words << (64 - n_bits - (begins & 31)).astype(_U)
    groups = np.flatnonzero(np.diff(first, prepend=-1))
    together = np.bitwise_or.reduceat(placed, groups)
    stream = np.zeros(first[-1] + 2, dtype=_U)
    stream[first[groups]] = together >> _U(32)
    stream[first[groups] + 1] |= together & _U(0xFFFFFFFF)
    return stream.astype(">u4").tobytes()[: -(-int(ends[-1]) // 8)]


def _opened(rle: Sequence[Any], height: int, width: int) -> tuple[bytes, list[int]]:
    """The bytes and the four sizes of lengths, where the header is of an image of this size."""
    if not isinstance(rle, list | bytes):  # bytes() makes as many zeros of a number
        raise DataError(f"expected Label Studio's run lengths as bytes, got: {type(rle).__name__}")
    try:
        data = bytes(rle)
    except (TypeError, ValueError) as error:
        raise DataError(f"expected Label Studio's run lengths as bytes, got: {error}") from error
    if 8 * len(data) < _HEADER_BITS:
        raise DataError(_CUT_OFF)
    header = int.from_bytes(data[:7], "big") >> (56 - _HEADER_BITS)
    n_values, value_bits = header >> 21, (header >> 16 & 31) + 1
    if n_values != _CHANNELS * height * width or value_bits != _VALUE_BITS:
        raise DataError(
            f"expected run lengths of {height} x {width} pixels in four channels of 8 bits, got {n_values} values of "
            f"{value_bits} bits: is it another image's mask?"
        )
    return data, [(header >> shift & 15) + 1 for shift in (12, 8, 4, 0)]


def _tokens(data: bytes, sizes: list[int]) -> NDArray[np.int64]:
    """Where tokens begin, in bits; what comes after the last one may look like some more.

    A plain loop, for only a token says where the next one begins. How long it would be is known of every bit before.
    """
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    tags = bits[:-2] << 2 | bits[1:-1] << 1 | bits[2:]
    n_bits = tags.tobytes().translate(bytes([0] * 4 + [_TAG_BITS + size + _VALUE_BITS for size in sizes]).ljust(256))
    begins = []
    at, end = _HEADER_BITS, len(n_bits)
    while at < end:
        begins.append(at)
        at += n_bits[at] or _listing_bits(data, at, sizes)
    return np.array(begins, dtype=np.int64)


def _listing_bits(data: bytes, at: int, sizes: list[int]) -> int:
    """How long a token is that lists its values."""
    window = int.from_bytes(data[at >> 3 : (at >> 3) + 4].ljust(4, b"\0"), "big") << (at & 7)
    size = sizes[window >> 29 & 3]
    length = (window >> (29 - size) & ((1 << size) - 1)) + 1
    return _TAG_BITS + size + _VALUE_BITS * length
