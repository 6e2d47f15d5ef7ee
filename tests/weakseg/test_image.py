import io
import struct
import warnings
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from weakseg.errors import ImageError
from weakseg.image import (
    FILE_FORMATS,
    SERVICE_FORMATS,
    probe,
    read_image,
    read_reduced,
    reduction,
    rgb_from_pillow,
    upright,
)
from weakseg.image_header import MAX_PARTS, MAX_SCANS, orientation_from_exif

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def reason(data: bytes, **options: object) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(data, **options)  # type: ignore[arg-type]
    return caught.value.reason


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_give_the_pixels_that_were_saved(file_format: str) -> None:
    image = read_image(encode(Image.fromarray(RGB), file_format))
    assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable
    np.testing.assert_array_equal(image, RGB)


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    options=st.fixed_dictionaries(
        {"quality": st.sampled_from([5, 75, 100])},
        optional={
            "progressive": st.just(True),
            "subsampling": st.integers(0, 2),
            "restart_marker_rows": st.just(1),
            "keep_rgb": st.just(True),
        },
    ),
)
def test_jpeg_equals_pillow(height: int, width: int, mode: str, options: dict[str, object]) -> None:
    rng = np.random.default_rng(height * width)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    if options.get("keep_rgb") and options.get("subsampling"):
        del options["subsampling"]  # Pillow refuses both
    data = encode(image, "JPEG", **options)
    decoded = read_image(data)
    np.testing.assert_array_equal(decoded, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert decoded.flags.c_contiguous and decoded.flags.writeable


def test_a_jpeg_larger_than_its_first_header_says_is_damaged() -> None:
    """Another frame header before the scan, of 60,000 x 60,000 pixels: nothing is allocated for it."""
    data = encode(Image.fromarray(RGB), "JPEG")
    at = data.index(b"\xff\xc0")
    length = int.from_bytes(data[at + 2 : at + 4])
    frame = data[at : at + 2 + length]
    huge = frame[:5] + struct.pack(">HH", 60_000, 60_000) + frame[9:]
    assert reason(data[:at] + frame + huge + data[at + 2 + length :]) == "IMAGE_UNDECODABLE"


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}])
def test_webp_equals_pillow(options: dict[str, object]) -> None:
    data = encode(Image.fromarray(RGB), "WEBP", **options)
    np.testing.assert_array_equal(read_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_probe_equals_pillow_without_decoding(file_format: str) -> None:
    header = probe(encode(Image.fromarray(RGB), file_format))
    assert (header.width, header.height, header.format, header.orientation) == (30, 20, file_format, 1)
    assert header.oriented_size == (20, 30)


def test_grey_is_repeated() -> None:
    grey = RGB[..., 0]
    np.testing.assert_array_equal(read_image(encode(Image.fromarray(grey), "PNG")), np.stack([grey] * 3, axis=2))


def test_one_bit_becomes_black_and_white() -> None:
    bits = Image.fromarray(RGB[..., 0] > 127)
    assert set(np.unique(read_image(encode(bits, "PNG")))) == {0, 255}


def test_sixteen_bits_keep_the_high_byte() -> None:
    deep = Image.fromarray(RGB[..., 0].astype(np.uint16) * 256 + 17)
    np.testing.assert_array_equal(read_image(encode(deep, "PNG"))[..., 1], RGB[..., 0])


def test_sixteen_bit_colour_keeps_the_high_byte() -> None:
    np.testing.assert_array_equal(read_image(png(RGB.astype(np.uint16) * 256 + 99, bits=16, colour_type=2)), RGB)


def test_palette_is_looked_up() -> None:
    image = Image.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(read_image(encode(image, "PNG")), np.asarray(image.convert("RGB")))


def test_transparent_palette_entry_is_white() -> None:
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode=None).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    data = encode(image, "PNG", transparency=0)
    np.testing.assert_array_equal(read_image(data), [[[255, 255, 255], [40, 50, 60]]])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(mode: str) -> None:
    colour = (100, 100, 100, 51) if mode == "RGBA" else (100, 51)
    data = encode(Image.new(mode, (2, 1), colour), "PNG")
    assert np.unique(read_image(data)).tolist() == [round((100 * 51 + 255 * 204) / 255)]


def test_adobe_cmyk_is_not_inverted() -> None:
    data = encode(Image.new("RGB", (16, 16), (200, 40, 30)).convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(read_image(data).astype(int) - [200, 40, 30]).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(Image.fromarray(RGB), file_format, exif=exif.tobytes(), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB")))
    if file_format == "TIFF":
        expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(read_image(data), expected)
    assert probe(data).oriented_size == expected.shape[:2]


@pytest.mark.parametrize("orientation", [*range(1, 9), 9])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_ignored_where_that_is_asked(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    image = Image.fromarray(RGB)
    stored = read_image(encode(image, file_format, **options))
    turned = encode(image, file_format, exif=exif.tobytes(), **options)
    np.testing.assert_array_equal(read_image(turned, ignore_orientation=True), stored)


@given(orientation=st.integers(1, 8), height=st.integers(1, 4), width=st.integers(1, 4))
def test_upright_equals_pillow(orientation: int, height: int, width: int) -> None:
    image = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pillow = Image.open(io.BytesIO(encode(Image.fromarray(image), "PNG", exif=exif.tobytes())))
    np.testing.assert_array_equal(upright(image, orientation), np.asarray(ImageOps.exif_transpose(pillow)))


@pytest.mark.parametrize(
    "exif", [b"", b"II", b"II*\x00\xff\xff\xff\x7f", b"XX*\x00\x08\x00\x00\x00", b"Exif\x00\x00MM"]
)
def test_damaged_exif_means_upright(exif: bytes) -> None:
    assert orientation_from_exif(exif) == 1


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientation_out_of_range_means_upright(value: int) -> None:
    block = b"II*\x00" + struct.pack("<IHHHIHH", 8, 1, 0x0112, 3, 1, value, 0)
    assert orientation_from_exif(block) == 1


def test_damaged_exif_neither_warns_nor_fails() -> None:
    plain = encode(Image.fromarray(RGB), "JPEG")
    body = b"Exif\x00\x00II*\x00" + struct.pack("<IH", 8, 500) + b"\xff" * 20
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]
    np.testing.assert_array_equal(read_image(data), read_image(plain))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("file_format", SERVICE_FORMATS)
def test_extreme_shapes(file_format: str, height: int, width: int) -> None:
    data = encode(Image.new("RGB", (width, height), (9, 9, 9)), file_format)
    assert read_image(data).shape == (height, width, 3)


@pytest.mark.parametrize("file_format", [*SERVICE_FORMATS, "TIFF"])
def test_every_truncation_is_an_error(file_format: str) -> None:
    data = encode(Image.fromarray(RGB), file_format)
    end = len(data) - (13 if file_format == "PNG" else 1)  # a PNG without its empty last chunk is whole
    for length in range(end):
        assert reason(data[:length]) in ("IMAGE_UNDECODABLE", "UNSUPPORTED_FORMAT")


def test_truncated_progressive_jpeg_is_an_error() -> None:
    data = encode(Image.fromarray(np.kron(RGB, np.ones((8, 8, 1), dtype=np.uint8))), "JPEG", progressive=True)
    for length in range(0, len(data) - 1, 101):
        assert reason(data[:length]) in ("IMAGE_UNDECODABLE", "UNSUPPORTED_FORMAT")


@settings(max_examples=200, deadline=None)
@given(
    file_format=st.sampled_from(FILE_FORMATS),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_bytes_give_an_image_or_an_image_error(file_format: str, edits: list[tuple[int, int]]) -> None:
    data = bytearray(encode(Image.fromarray(RGB), file_format))
    for at, value in edits:
        data[at % len(data)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TIFF, read from files only, may warn about its tags
        try:
            image = read_image(bytes(data), max_pixels=10**6)
        except ImageError:
            return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


@settings(max_examples=100)
@given(
    data=st.binary(max_size=200), start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF0000WEBP"])
)
def test_arbitrary_bytes_are_an_image_error(data: bytes, start: bytes) -> None:
    with pytest.raises(ImageError):
        read_image(start + data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: png_header(60_000, 60_000), id="png"),
        pytest.param(
            lambda: b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 11, 8, 60_000, 60_000, 1) + b"\1\x11\0", id="jpeg"
        ),
        pytest.param(lambda: b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\0\xff\xff\0", id="webp"),
    ],
)
def test_a_huge_header_is_refused_before_decoding(data) -> None:  # type: ignore[no-untyped-def]
    data = data() + (b"\xff\xda\0\2" if data()[:2] == b"\xff\xd8" else b"")
    assert probe(data).n_pixels > 3_000_000_000
    assert reason(data) == "IMAGE_TOO_LARGE"


def test_pixel_limit_is_inclusive() -> None:
    data = encode(Image.fromarray(RGB), "PNG")
    assert read_image(data, max_pixels=600).shape == (20, 30, 3)
    assert reason(data, max_pixels=599) == "IMAGE_TOO_LARGE"


def test_above_pillows_own_limit_nothing_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for file_format in ("JPEG", "PNG", "BMP"):
        assert read_image(encode(Image.fromarray(RGB), file_format)).shape == RGB.shape


def test_zero_size_is_undecodable() -> None:
    assert reason(png_header(0, 5)) == "IMAGE_UNDECODABLE"


@pytest.mark.parametrize("data", [b"", b"hello", b"%PDF-1.7", b"<svg/>"])
def test_other_files_are_unsupported(data: bytes) -> None:
    assert reason(data) == "UNSUPPORTED_FORMAT"


def test_formats_are_restricted_to_those_asked_for() -> None:
    assert reason(encode(Image.fromarray(RGB), "GIF"), formats=SERVICE_FORMATS) == "UNSUPPORTED_FORMAT"


def test_float_samples_are_unsupported() -> None:
    assert reason(encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")) == "UNSUPPORTED_FORMAT"


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for file_format in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if file_format == "WEBP" else {}
        data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
        assert read_image(data)[0, 0].tolist() == [255, 0, 0]


def test_paths_are_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(encode(Image.fromarray(RGB), "JPEG")[:400])
    with pytest.raises(ImageError, match="broken.jpg: expected a whole JPEG"):
        read_image(path)
    with pytest.raises(ImageError, match="absent.jpg: expected an image file, got: No such file"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match="directory"):
        read_image(str(tmp_path))


def png(pixels: np.ndarray, bits: int, colour_type: int) -> bytes:
    """A PNG of big-endian samples without filtering."""
    height, width = pixels.shape[:2]
    rows = pixels.astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    return png_header(width, height, bits, colour_type) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def png_header(width: int, height: int, bits: int = 8, colour_type: int = 2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


# What would keep a decoder busy -------------------------------------------------------------------------------------


def jpeg_with(segments: bytes) -> bytes:
    data = encode(Image.fromarray(RGB), "JPEG")
    return data[:2] + segments + data[2:]


@pytest.mark.parametrize("segments", [b"\xff\xfe\0\2", b"\xff\xe1\0\2", b"\xff\xd0", b"\xff\xff\xfe\0\2"])
def test_a_jpeg_may_have_many_segments_but_not_any_number(segments: bytes) -> None:
    plain = read_image(jpeg_with(b""))
    np.testing.assert_array_equal(read_image(jpeg_with(segments * 1000)), plain)
    assert reason(jpeg_with(segments * MAX_PARTS)) == "IMAGE_UNDECODABLE"


def test_fill_bytes_are_skipped() -> None:
    np.testing.assert_array_equal(read_image(jpeg_with(b"\xff" * 1_000_000)), read_image(jpeg_with(b"")))
    assert reason(b"\xff\xd8" + b"\xff" * 1_000_000) == "IMAGE_UNDECODABLE"


def test_a_png_or_webp_may_have_many_chunks_but_not_any_number() -> None:
    png = encode(Image.fromarray(RGB), "PNG")
    text = struct.pack(">I", 0) + b"tEXt" + struct.pack(">I", zlib.crc32(b"tEXt"))
    np.testing.assert_array_equal(read_image(png[:33] + text * 1000 + png[33:]), RGB)
    assert reason(png[:33] + text * MAX_PARTS + png[33:]) == "IMAGE_UNDECODABLE"
    webp = encode(Image.fromarray(RGB), "WEBP", exif=Image.Exif(), icc_profile=b"profile")
    assert webp[12:16] == b"VP8X"
    assert reason(webp + b"XMP \0\0\0\0" * MAX_PARTS) == "IMAGE_UNDECODABLE"


def test_scans_are_counted_and_what_follows_the_image_is_not() -> None:
    data = encode(Image.fromarray(RGB[..., 0]), "JPEG", progressive=True)
    n_scans, last, end = data.count(b"\xff\xda"), data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")

    def with_scans(n: int) -> bytes:
        """The last scan again; it refines what it refined before."""
        return data[:end] + data[last:end] * (n - n_scans) + data[end:]

    assert read_image(with_scans(MAX_SCANS)).shape == RGB.shape
    assert reason(with_scans(MAX_SCANS + 1)) == "IMAGE_UNDECODABLE"
    np.testing.assert_array_equal(read_image(data + b"\xff\xda" * 1000), read_image(data))


PHOTO = np.asarray(
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((700, 501))
)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_is_reduced_to_means_of_its_blocks(mode: str, options: dict[str, object], n: int) -> None:
    """Sides are rounded up; the last block may reach past the image, so it is left out here."""
    data = encode(Image.fromarray(PHOTO).convert(mode), "JPEG", quality=95, **options)
    rgb, size = read_reduced(data, 700 // n)
    assert size == (501, 700) and rgb.shape == (-(-501 // n), -(-700 // n), 3)
    height, width = 501 // n, 700 // n
    blocks = read_image(data)[: height * n, : width * n].reshape(height, n, width, n, 3)
    assert np.abs(blocks.mean(axis=(1, 3)) - rgb[:height, :width]).mean() < 1.5


@given(width=st.integers(1, 300), height=st.integers(1, 300), least=st.integers(1, 300))
@settings(max_examples=50)
def test_a_reduced_jpeg_is_never_smaller_than_asked_for(width: int, height: int, least: int) -> None:
    data = encode(Image.new("L", (width, height)), "JPEG")
    rgb, size = read_reduced(data, least)
    assert size == (height, width)
    n = reduction(probe(data), least)
    assert rgb.shape == (-(-height // n), -(-width // n), 3)
    assert n == 1 or max(rgb.shape) >= least
    assert n == 8 or max(width, height) // (2 * n) < least or min(width, height) < 2 * n


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_only_large_jpegs_are_reduced(file_format: str) -> None:
    data = encode(Image.fromarray(RGB), file_format)
    least = 16 if file_format == "JPEG" else 1
    np.testing.assert_array_equal(read_reduced(data, least)[0], read_image(data))
    np.testing.assert_array_equal(read_reduced(data, None)[0], read_image(data))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_is_turned(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encode(Image.fromarray(PHOTO), "JPEG", exif=exif)
    stored, size = read_reduced(data, 100, ignore_orientation=True)
    assert size == (501, 700)
    turned, size = read_reduced(data, 100)
    assert size == read_image(data).shape[:2]
    np.testing.assert_array_equal(turned, upright(stored, orientation))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_damaged_jpeg_fails_reduced_as_it_fails_whole(progressive: bool) -> None:
    data = encode(Image.fromarray(PHOTO), "JPEG", progressive=progressive)
    for end in range(0, len(data) - 2, 97):
        with pytest.raises(ImageError) as whole:
            read_image(data[:end])
        with pytest.raises(ImageError) as reduced:
            read_reduced(data[:end], 100)
        assert (reduced.value.reason, str(reduced.value)) == (whole.value.reason, str(whole.value))


@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    orientation=st.integers(1, 8),
    mode=st.sampled_from(["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16"]),
    strip_pixels=st.integers(1, 200),
)
def test_strips_make_the_whole(width: int, height: int, orientation: int, mode: str, strip_pixels: int) -> None:
    rng = np.random.default_rng(width * 41 + height)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (height, width)).astype(np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8)).convert(mode)
    with mock.patch("weakseg.image._STRIP_PIXELS", height * width):
        whole = rgb_from_pillow(image)
    with mock.patch("weakseg.image._STRIP_PIXELS", strip_pixels):
        rgb = rgb_from_pillow(image, orientation)
    assert rgb.flags.c_contiguous and rgb.flags.owndata
    np.testing.assert_array_equal(rgb, upright(whole, orientation))
