"""Format, size and orientation of an image file from its first structures, without decoding a pixel.

Written out by hand for the three formats that the service takes, because a decoder that is merely *opened* may already
allocate the canvas that the header announces.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from weakseg.errors import ImageError, TooManyPartsError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF_PREFIX = b"Exif\x00\x00"
ORIENTATION_TAG = 0x0112
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn markers; the three others are DHT, JPG, DAC
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # TEM, RSTn, SOI: markers without a length
_JPEG_SCAN, _JPEG_END = 0xDA, 0xD9
_NOT_FILL = re.compile(rb"[^\xff]")
_NEXT_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # in the pixel data 0xFF stands before 0x00 and RSTn, too
# Of metadata there are dozens, of PNG's IDAT one every few kilobytes; a file of empty ones would be read for minutes.
MAX_PARTS = 50_000
MAX_EXIF_ENTRIES = 1000  # of its first directory, which are sorted: that of the orientation is one of the first dozen
# Of a progressive JPEG; encoders write ten. A hundred bytes of one go over every block of the image once more.
MAX_SCANS = 64


@dataclass(frozen=True)
class ImageHeader:
    """What a file says about itself.

    width, height: pixels as stored, before the orientation is applied.
    format: JPEG, PNG, WEBP, BMP, GIF or TIFF.
    orientation: EXIF orientation, 1 to 8; 1 = upright.
    """

    width: int
    height: int
    format: str
    orientation: int = 1

    @property
    def n_pixels(self) -> int:
        return self.width * self.height

    @property
    def oriented_size(self) -> tuple[int, int]:
        """(H, W) of the decoded image."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def sniff(data: bytes) -> str | None:
    """The format that the leading bytes announce; None = none that is known here."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    signatures = {
        "JPEG": (b"\xff\xd8\xff",),
        "PNG": (PNG_SIGNATURE,),
        "GIF": (b"GIF87a", b"GIF89a"),
        "TIFF": (b"II*\x00", b"MM\x00*"),
        "BMP": (b"BM",),
    }
    return next((name for name, starts in signatures.items() if data.startswith(starts)), None)


def parse_header(data: bytes, file_format: str, max_parts: int = MAX_PARTS) -> ImageHeader:
    """Header of JPEG, PNG or WEBP bytes.

    Raises:
        ImageError: IMAGE_UNDECODABLE, cut off before the size or a size of zero.
        TooManyPartsError: its metadata are in more than `max_parts` segments or chunks.
    """
    parsers: dict[str, Callable[[bytes, int], tuple[int, int, bytes]]] = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp}
    try:
        width, height, exif = parsers[file_format](data, max_parts)
    except (struct.error, IndexError) as error:
        raise ImageError(
            f"expected a whole {file_format} file, got {len(data)} bytes that end in its header"
        ) from error
    if width < 1 or height < 1:
        raise ImageError(f"expected at least 1x1 pixels, got a {file_format} header that says {width}x{height}")
    return ImageHeader(width, height, file_format, orientation_from_exif(exif))


def orientation_from_exif(exif: bytes) -> int:
    """EXIF orientation of a TIFF block (with or without its `Exif` prefix); 1 where absent or damaged."""
    exif = exif.removeprefix(_EXIF_PREFIX)
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (n_entries,) = struct.unpack_from(f"{order}H", exif, start)
        for i in range(min(n_entries, MAX_EXIF_ENTRIES)):
            tag, kind, count, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * i)
            if tag == ORIENTATION_TAG and kind == 3 and count == 1:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def jpeg_segments(data: bytes, max_parts: int = MAX_PARTS) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment between SOI and the pixel data, the last of which is the header of the first
    scan; start is at the 0xFF byte, the length at start + 2, the body at start + 4."""
    at = 2
    for _ in range(max_parts):
        if data[at] != 0xFF:
            raise ImageError(f"expected a JPEG marker at byte {at}, got 0x{data[at]:02x}: the file is damaged")
        found = _NOT_FILL.search(data, at)  # any number of fill bytes may stand before a marker
        if found is None:
            raise IndexError("the file ends in fill bytes")
        start, marker, at = found.start() - 1, data[found.start()], found.end()
        if marker in _JPEG_BARE:
            continue
        if marker == _JPEG_END:
            return
        (length,) = struct.unpack_from(">H", data, at)
        at += max(length, 2)
        yield marker, start, at
        if marker == _JPEG_SCAN:
            return
    raise TooManyPartsError(
        f"expected at most {max_parts} segments before the pixel data, got more: the file is damaged"
    )


def check_scans(data: bytes) -> None:
    """Refuse a JPEG of more than MAX_SCANS scans: 30 MiB could keep a decoder busy for hours.

    Raises:
        ImageError: IMAGE_UNDECODABLE.
    """
    mark = bytes([0xFF, _JPEG_SCAN])
    if data.count(mark) <= MAX_SCANS:  # as good as always; more may also be in a video that a phone has put behind it
        return
    *_, (_, _, at) = jpeg_segments(data)
    n_scans = 1
    for _ in range(MAX_PARTS):
        found = _NEXT_MARKER.search(data, at)
        if found is None or found[1][0] == _JPEG_END:
            return
        at = found.end()
        if found[1][0] not in _JPEG_BARE:
            at += max(int.from_bytes(data[at : at + 2]), 2)
        n_scans += found[1][0] == _JPEG_SCAN
        if n_scans > MAX_SCANS:
            break
    raise ImageError(f"expected a JPEG of at most {MAX_SCANS} scans, got more: write the image again")


def png_chunks(data: bytes, max_parts: int = MAX_PARTS) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each whole chunk, length and checksum included; stops where the file does."""
    at = len(PNG_SIGNATURE)
    for _ in range(max_parts):
        if at + 12 > len(data):
            return
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 12 + length
        if end > len(data):
            return
        yield data[at + 4 : at + 8], at, end
        at = end
    raise TooManyPartsError(f"expected at most {max_parts} chunks, got more: write the image again")


def _jpeg(data: bytes, max_parts: int) -> tuple[int, int, bytes]:
    size, exif = (0, 0), b""
    for marker, start, end in jpeg_segments(data, max_parts):
        body = start + 4
        if marker in _JPEG_SIZES and size == (0, 0):
            height, width = struct.unpack_from(">HH", data, body + 1)
            size = (width, height)
        elif marker == 0xE1 and not exif and data.startswith(_EXIF_PREFIX, body):
            exif = data[body:end]
    if size == (0, 0):
        raise ImageError("expected a JPEG frame header before the pixel data, got none: the file is damaged")
    return *size, exif


def _png(data: bytes, max_parts: int) -> tuple[int, int, bytes]:
    if data[12:16] != b"IHDR":
        raise ImageError("expected IHDR as the first PNG chunk: the file is damaged")
    width, height = struct.unpack_from(">II", data, 16)
    chunks = png_chunks(data, max_parts)
    exif = next((data[start + 8 : end - 4] for kind, start, end in chunks if kind == b"eXIf"), b"")
    return width, height, exif


def _webp(data: bytes, max_parts: int) -> tuple[int, int, bytes]:
    kind = data[12:16]
    if kind == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
        struct.unpack_from("<B", data, 29)  # too short a file must not pass for 1x1
        exif = [data[start + 8 : end] for chunk, start, end in _webp_chunks(data, max_parts) if chunk == b"EXIF"]
        return width, height, exif[0] if exif else b""
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), b""
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF, b""
    raise ImageError(f"expected a VP8, VP8L or VP8X chunk in WEBP, got {kind!r}: the file is damaged")


def _webp_chunks(data: bytes, max_parts: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each chunk, its header included; the last may end behind the file."""
    at = 12
    for _ in range(max_parts):
        if at + 8 > len(data):
            return
        (length,) = struct.unpack_from("<I", data, at + 4)
        yield data[at : at + 4], at, at + 8 + length
        at += 8 + length + (length & 1)
    raise TooManyPartsError(f"expected at most {max_parts} chunks, got more: write the image again")
