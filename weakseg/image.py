"""Image files to (H, W, 3) uint8 RGB, upright or as stored. The header is checked before anything is decoded."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from weakseg.errors import ImageError
from weakseg.image_header import (
    MAX_PARTS,
    ORIENTATION_TAG,
    PNG_SIGNATURE,
    ImageHeader,
    check_scans,
    jpeg_segments,
    parse_header,
    png_chunks,
    sniff,
)

SERVICE_FORMATS = ("JPEG", "PNG", "WEBP")
FILE_FORMATS = (*SERVICE_FORMATS, "BMP", "GIF", "TIFF")  # first frame of GIF and TIFF
MAX_PIXELS = 80_000_000  # 240 MB decoded; below Pillow's own limit, which its WEBP and TIFF readers check in any case

# The classes, not Image.open: that one warns or raises at a pixel limit of its own, which is a global of the process.
_OPENERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
# APPn and COM, but for JFIF (APP0) and Adobe (APP14), which say what the samples are.
_JPEG_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
_BACK = {6: 8, 8: 6}  # orientations that undo another one; the rest undo themselves
_STRIP_PIXELS = 2**16
_PNG_PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})


def probe(data: bytes, *, formats: Collection[str] = FILE_FORMATS, max_parts: int = MAX_PARTS) -> ImageHeader:
    """Format, size and orientation without decoding.

    Raises:
        ImageError: UNSUPPORTED_FORMAT (not one of `formats`) or IMAGE_UNDECODABLE (the header is damaged).
        TooManyPartsError: the metadata of a JPEG, PNG or WEBP are in more than `max_parts` segments or chunks.
    """
    file_format = sniff(data)
    if file_format is None or file_format not in formats:
        got = file_format or ("an empty file" if not data else "an unknown file type")
        raise ImageError(f"expected {', '.join(formats)}, got {got}: convert the image first", "UNSUPPORTED_FORMAT")
    if file_format in SERVICE_FORMATS:
        return parse_header(data, file_format, max_parts)
    width, height = _open(data, file_format).size
    return ImageHeader(width, height, file_format)  # a TIFF is turned by Pillow itself; BMP and GIF have no orientation


def check_pixels(header: ImageHeader, max_pixels: int) -> None:
    """Raises ImageError, IMAGE_TOO_LARGE, for an image of more than `max_pixels`."""
    if header.n_pixels > max_pixels:
        raise ImageError(
            f"expected at most {max_pixels} pixels, got {header.width}x{header.height}: scale the image down",
            "IMAGE_TOO_LARGE",
        )


def read_image(
    source: str | Path | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    formats: Collection[str] = FILE_FORMATS,
    ignore_orientation: bool = False,
) -> NDArray[np.uint8]:
    """Decode one image.

    Transparency is laid over white, 16-bit samples keep their high byte, CMYK is converted without a profile, colour
    profiles are ignored. A truncated file is an error, never half a picture.

    Args:
        source: a path, or the bytes of the file.
        max_pixels: width x height above which nothing is decoded.
        formats: subset of FILE_FORMATS; the service passes SERVICE_FORMATS.
        ignore_orientation: leave the pixels as they are stored.
    Returns:
        (H, W, 3) uint8 RGB, C-contiguous, writable, EXIF orientation applied unless that is ignored.
    Raises:
        ImageError: IMAGE_TOO_LARGE, UNSUPPORTED_FORMAT or IMAGE_UNDECODABLE; the message names the file.
    """
    return read_reduced(source, None, max_pixels=max_pixels, formats=formats, ignore_orientation=ignore_orientation)[0]


def read_reduced(
    source: str | Path | bytes,
    least_side: int | None,
    *,
    max_pixels: int = MAX_PIXELS,
    formats: Collection[str] = FILE_FORMATS,
    ignore_orientation: bool = False,
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Decode one image, a JPEG at 1/2, 1/4 or 1/8 where its longer side then still has `least_side` pixels.

    Reduced sides are rounded up. None = every image whole. The rest is as `read_image` has it.

    Returns:
        rgb, and (height, width) of the whole image, oriented alike.
    """
    if isinstance(source, bytes):
        return _decode(source, least_side, max_pixels, formats, ignore_orientation)
    try:
        data = Path(source).read_bytes()
    except OSError as error:
        raise ImageError(f"{source}: expected an image file, got: {error.strerror or error}") from error
    try:
        return _decode(data, least_side, max_pixels, formats, ignore_orientation)
    except ImageError as error:
        raise ImageError(f"{source}: {error}", error.reason) from error


def reduction(header: ImageHeader, least_side: int | None) -> int:
    """What `read_reduced` divides the sides of an image by: 1, 2, 4 or 8."""
    if least_side is None or header.format != "JPEG":
        return 1
    short, long = sorted((header.width, header.height))
    return next((n for n in (8, 4, 2) if long // n >= least_side and short >= n), 1)


def upright(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn and mirror (H, W, ...) so that an EXIF orientation of 1 to 8 becomes 1; a view."""
    swapped = image.swapaxes(0, 1)
    turned = {
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: swapped,
        6: swapped[:, ::-1],
        7: swapped[::-1, ::-1],
        8: swapped[::-1],
    }
    return turned.get(orientation, image)


def _decode(
    data: bytes, least_side: int | None, max_pixels: int, formats: Collection[str], ignore_orientation: bool
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    header = probe(data, formats=formats)
    check_pixels(header, max_pixels)
    divisor = reduction(header, least_side)
    if header.format == "JPEG":
        check_scans(data)
        whole = _whole_jpeg(data, header) if divisor == 1 else None
        if whole is not None:
            rgb = whole if ignore_orientation else np.ascontiguousarray(upright(whole, header.orientation))
            return rgb, (rgb.shape[0], rgb.shape[1])
    image = _open(_pixel_data(data, header.format), header.format)
    if image.size != (header.width, header.height):
        raise ImageError(
            f"the header says {header.width}x{header.height}, the decoder {image.size}: the file is damaged"
        )
    # Pillow turns a TIFF upright as it loads it, and forgets how it was.
    turned: int = image.tag_v2.get(ORIENTATION_TAG, 1) if isinstance(image, TiffImagePlugin.TiffImageFile) else 1
    if divisor > 1:  # libjpeg leaves the high frequencies out, which is most of the work
        image.draft(image.mode, (header.width // divisor, header.height // divisor))
    orientation = _BACK.get(turned, turned) if ignore_orientation else header.orientation
    try:
        rgb = rgb_from_pillow(image, orientation)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever they met: OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageError(f"expected a whole {header.format} image, got damaged or truncated data: {error}") from error
    if divisor == 1:
        return rgb, (rgb.shape[0], rgb.shape[1])
    return rgb, (header.height, header.width) if ignore_orientation else header.oriented_size


def _whole_jpeg(data: bytes, header: ImageHeader) -> NDArray[np.uint8] | None:
    """(H, W, 3) uint8 RGB as stored, of a JPEG that is not reduced; None = Pillow must read it, or say why not.

    Both call libjpeg-turbo, so pixels are the same, but this takes them from it without Pillow's copies: half to
    two thirds of the time. Where that warns, this is an error; Pillow tells damaged files from those that are cut off.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (width, height) != (header.width, header.height) or colours in ("CMYK", "YCCK"):
            return None
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False), np.uint8)
    except ValueError:
        return None


def _open(data: bytes, file_format: str) -> Image.Image:
    try:
        return _OPENERS[file_format](io.BytesIO(data))
    except MemoryError:
        raise
    except Exception as error:  # as in _decode
        raise ImageError(f"expected a whole {file_format} image, got a damaged header: {error}") from error


def _pixel_data(data: bytes, file_format: str) -> bytes:
    """The file without its metadata: damaged EXIF, text bombs and animation marks then cannot warn or fail."""
    if file_format == "JPEG":
        segments = [*jpeg_segments(data)]
        kept = [data[start:end] for marker, start, end in segments if marker not in _JPEG_METADATA]
        data = b"".join([data[:2], *kept, data[segments[-1][2] :]])
    elif file_format == "PNG":
        kept = [data[start:end] for kind, start, end in png_chunks(data) if kind in _PNG_PIXEL_CHUNKS]
        data = PNG_SIGNATURE + b"".join(kept)
    return data


def rgb_from_pillow(image: Image.Image, orientation: int = 1) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB in memory of its own, turned as `upright` does.

    Strip by strip: what a conversion needs beside the two images then stays small, and in the cache.

    Raises:
        ImageError: UNSUPPORTED_FORMAT, samples of 32 bits.
    """
    image.load()  # which may turn it
    width, height = image.size
    rgb = np.empty((width, height, 3) if orientation in (5, 6, 7, 8) else (height, width, 3), np.uint8)
    stored = upright(rgb, _BACK.get(orientation, orientation))
    n_rows = max(1, _STRIP_PIXELS // max(1, width))
    for top in range(0, height, n_rows):
        strip = stored[top : top + n_rows]
        strip[:] = _rgb_from_strip(image.crop((0, top, width, top + len(strip))))
    return rgb


def _rgb_from_strip(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16"):
        return (np.asarray(image) >> 8).astype(np.uint8)[..., None]
    if image.mode in ("I", "F"):
        raise ImageError(f"expected 8 or 16 bits a sample, got Pillow mode {image.mode}", "UNSUPPORTED_FORMAT")
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
        colour, alpha = rgba[..., :3], rgba[..., 3:]
        return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
