"""Label maps as PNG files whose pixels are mask values, with how they were made as text inside."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from weakseg.classes import voc_palette
from weakseg.errors import DataError

PROVENANCE = "weakseg"  # key of the text that says how a mask was made, a JSON object

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3  # PNG colour types
_FILTER_UP = 2


def png_from_labels(
    labels: NDArray[Any], palette: NDArray[np.uint8] | None = None, text: Mapping[str, str] | None = None
) -> bytes:
    """Encode losslessly; the same labels and text give the same bytes wherever zlib is the same.

    Rows are stored as differences to the row above and compressed as run lengths: label maps are flat, so this is both
    smaller and faster than a general encoder's search (12 KiB in 0.8 ms against Pillow's 17 KiB in 1.7 ms, level 1).

    Args:
        labels: (H, W) uint8 or uint16, H, W >= 1.
        palette: (n <= 256, 3) uint8 RGB, row = mask value, for uint8; None = the VOC colours.
        text: what else the file says, {key: value}; keys of 1 to 79 printable ASCII characters, values of any but NUL.
    Returns:
        8-bit palette PNG for uint8, 16-bit grey for uint16 (PNG has no larger palette).
    """
    if labels.ndim != 2 or labels.dtype not in (np.uint8, np.uint16) or 0 in labels.shape:
        raise DataError(f"labels must be (H, W) uint8 or uint16, got {labels.shape} {labels.dtype}")
    height, width = labels.shape
    colour_type = _PALETTE if labels.dtype == np.uint8 else _GREY
    header = struct.pack(">IIBBBBB", width, height, 8 * labels.dtype.itemsize, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header)]
    if colour_type == _PALETTE:
        chunks.append((b"PLTE", (voc_palette() if palette is None else palette).tobytes()))
    # Before the pixels, where a reader of headers finds it.
    chunks += [_text_chunk(key, value) for key, value in sorted((text or {}).items())]
    chunks += [(b"IDAT", _compressed_rows(labels)), (b"IEND", b"")]
    return _SIGNATURE + b"".join(_chunk(kind, data) for kind, data in chunks)


def labels_from_png(data: bytes) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Mask values of an index PNG: palette index, or grey value of 8 or 16 bits.

    Raises:
        DataError: not a whole PNG, or one with colours instead of indices.
    """
    image = _decoded(data)
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in ("P", "L"):
        return np.array(image, dtype=np.uint8)
    raise DataError(
        f"expected a PNG whose pixels are class ids (palette or grey), got Pillow mode {image.mode}: "
        "convert colours to ids first"
    )


def text_of(data: bytes) -> dict[str, str]:
    """The text in a PNG, {key: value}; of any PNG, ours or not.

    Raises:
        DataError: not a whole PNG.
    """
    return {key: str(value) for key, value in _decoded(data).text.items()}


def provenance_text(fields: Mapping[str, Any]) -> dict[str, str]:
    """`text` for `png_from_labels` from what is to be known of a mask, as JSON can hold it."""
    return {PROVENANCE: json.dumps(fields, ensure_ascii=False, separators=(",", ":"))}


def provenance_of(data: bytes) -> dict[str, Any]:
    """The fields of `provenance_text` in a PNG; empty where it has none that can be read.

    Raises:
        DataError: not a whole PNG.
    """
    try:
        fields = json.loads(text_of(data).get(PROVENANCE, ""))
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _decoded(data: bytes) -> PngImageFile:
    try:
        image = PngImageFile(io.BytesIO(data))
        image.load()
    except Exception as error:  # Pillow raises whatever its parser met: OSError, SyntaxError, ValueError, struct.error
        raise DataError(f"expected a whole PNG label map, got damaged or other data: {error}") from error
    return image


def _text_chunk(key: str, value: str) -> tuple[bytes, bytes]:
    """tEXt, which every reader knows, for ASCII; iTXt for the rest of Unicode (PNG specification, 11.3.3)."""
    if not (key.isascii() and key.isprintable() and key == key.strip() and 0 < len(key) < 80) or "\0" in value:
        raise DataError(f"a PNG's text needs a key of 1 to 79 printable ASCII characters and no NUL, got {key!r}")
    if value.isascii():
        return b"tEXt", key.encode() + b"\0" + value.encode()
    return b"iTXt", key.encode() + b"\0" + bytes(2) + b"\0\0" + value.encode()  # not compressed, no language


def _compressed_rows(labels: NDArray[Any]) -> bytes:
    # PNG wants 16-bit samples in big-endian order; filters work on bytes.
    big_endian = np.ascontiguousarray(labels, dtype=labels.dtype.newbyteorder(">"))
    pixels = big_endian.view(np.uint8).reshape(len(labels), -1)
    rows = np.empty((len(labels), pixels.shape[1] + 1), dtype=np.uint8)
    rows[:, 0] = _FILTER_UP
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
    compressor = zlib.compressobj(level=1, strategy=zlib.Z_RLE)
    return compressor.compress(rows.tobytes()) + compressor.flush()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
