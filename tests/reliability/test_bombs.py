"""R3: small files and messages that would unfold. They are refused from what they say, and the server stays small."""

import io
import struct
import zlib
from functools import cache
from time import monotonic

import grpc
import numpy as np
import pytest
from PIL import Image

from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
MIB = 2**20
SEGMENT = "/weakseg.v1.SegmentationService/Segment"
INFER = "/inference.GRPCInferenceService/ModelInfer"
SEGMENTATION = [pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)]
TOO_LARGE = ("RESOURCE_EXHAUSTED", "IMAGE_TOO_LARGE")
UNDECODABLE = ("INVALID_ARGUMENT", "IMAGE_UNDECODABLE")
INVALID = ("INVALID_ARGUMENT", "INVALID_REQUEST")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@cache
def zeros(n_bytes):
    """So many zeros, deflated."""
    deflate, part = zlib.compressobj(9), bytes(MIB)
    return b"".join(deflate.compress(part[: min(MIB, n_bytes - at)]) for at in range(0, n_bytes, MIB)) + deflate.flush()


def png(width, height, bits, colour_type, *extra):
    """A black image, whole and valid. extra: chunks before the pixels."""
    samples = {0: 1, 2: 3}[colour_type]
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    pixels = zeros(height * (1 + (width * bits * samples + 7) // 8))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def jpeg(width, height, **options):
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def jpeg_that_says(width, height):
    return jpeg(64, 64).replace(struct.pack(">HH", 64, 64), struct.pack(">HH", height, width))


def webp_that_says(width, height):
    """A lossless WebP of a few pixels whose header says another size."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "WEBP", lossless=True)
    data = bytearray(buffer.getvalue())
    (bits,) = struct.unpack_from("<I", data, 21)
    struct.pack_into("<I", data, 21, bits & ~0xFFFFFFF | (height - 1) << 14 | (width - 1))
    return bytes(data)


def webp_canvas_that_says(width, height):
    canvas = struct.pack("<I", 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas + webp_that_says(8, 8)[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of_many_scans():
    """Each scan of a progressive JPEG goes over all of its blocks again."""
    data = jpeg(1000, 1000, progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * 100_000 + data[end:]


def many(n_bytes, part):
    return part * (n_bytes // len(part))


# Refused from the header alone, whatever follows.
HUGE = {
    "PNG of 40000 x 40000, 1 bit": lambda: png(40000, 40000, 1, 0),
    "PNG of 12000 x 12000": lambda: png(12000, 12000, 1, 0),
    "PNG that says 2^31 - 1 squared": lambda: png(1, 1, 8, 2).replace(
        struct.pack(">II", 1, 1), struct.pack(">II", 2**31 - 1, 2**31 - 1)
    ),
    "JPEG that says 65500 x 65500": lambda: jpeg_that_says(65500, 65500),
    "WebP that says 16384 x 16384": lambda: webp_that_says(16384, 16384),
    "WebP whose canvas says 2^24 x 200": lambda: webp_canvas_that_says(2**24, 200),
}
# Refused, or answered without what they carry beside their pixels.
UNFOLDING = {
    "PNG, zTXt of 512 MiB": (lambda: png(8, 8, 8, 2, chunk(b"zTXt", b"Comment\0\0" + zeros(512 * MIB))), ("OK", "")),
    "PNG, iTXt of 512 MiB": (
        lambda: png(8, 8, 8, 2, chunk(b"iTXt", b"Comment\0\1\0\0\0" + zeros(512 * MIB))),
        ("OK", ""),
    ),
    "PNG, iCCP of 512 MiB": (lambda: png(8, 8, 8, 2, chunk(b"iCCP", b"profile\0\0" + zeros(512 * MIB))), ("OK", "")),
    "PNG, 512 MiB behind its last row": (
        lambda: png(8, 8, 8, 2).replace(chunk(b"IDAT", zeros(8 * 25)), chunk(b"IDAT", zeros(512 * MIB))),
        ("OK", ""),
    ),
    "PNG of a million chunks": (lambda: png(8, 8, 8, 2, many(12 * MIB, chunk(b"tEXt", b""))), UNDECODABLE),
    "JPEG of three million segments": (lambda: b"\xff\xd8" + many(12 * MIB, b"\xff\xe1\0\2"), UNDECODABLE),
    "JPEG of fill bytes": (lambda: b"\xff\xd8" + many(12 * MIB, b"\xff"), UNDECODABLE),
    "JPEG of six million markers": (lambda: b"\xff\xd8" + many(12 * MIB, b"\xff\xd0"), UNDECODABLE),
    "JPEG of 100000 scans": (jpeg_of_many_scans, UNDECODABLE),
    "WebP whose canvas says more than its pixels": (lambda: webp_canvas_that_says(2000, 2000), UNDECODABLE),
    "WebP of a million chunks": (
        lambda: webp_canvas_that_says(8, 8)[:30] + many(12 * MIB, b"XMP \0\0\0\0") + webp_that_says(8, 8)[12:],
        UNDECODABLE,
    ),
}
MESSAGES = {
    "four million outputs": (SEGMENT, lambda: many(8 * MIB, b"\x22\0")),
    "one output of four million classes": (SEGMENT, lambda: b"\x22\x80\x80\x80\4" + many(8 * MIB, b"\x28\1")),
    "eight million tags, packed": (SEGMENT, lambda: b"\x2a\x85\x80\x80\4\x0a\x80\x80\x80\4" + many(8 * MIB, b"\1")),
    "four million inputs": (INFER, lambda: many(8 * MIB, b"\x2a\0")),
    "a tensor of eight million dimensions": (
        INFER,
        lambda: b"\x2a\x85\x80\x80\4\x1a\x80\x80\x80\4" + many(8 * MIB, b"\1"),
    ),
    "three million groups in each other": (SEGMENT, lambda: many(3 * MIB, b"\x7b")),
}


@cache
def made(make):
    return make()


def growth(watched, call):
    """(what `call` gives, MiB that the server's memory grew by at its largest, seconds)."""
    watched.forget_peak()
    before, started = watched.rss_bytes, monotonic()
    got = call()
    seconds = monotonic() - started
    return got, (watched.peak_bytes - before) / MIB, seconds


@pytest.fixture
def ask(watched, outcome):
    """A function: bytes of an image to what `growth` gives, after another request has made the server ready for it."""
    with watched.channel() as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        stub.Segment(pb.SegmentRequest(image=pb.Image(encoded=jpeg(8, 8)), outputs=SEGMENTATION), timeout=LONG_S)

        def asking(data):
            message = pb.SegmentRequest(image=pb.Image(encoded=data), outputs=SEGMENTATION)
            return growth(watched, lambda: outcome(lambda: stub.Segment(message, timeout=LONG_S)))

        yield asking


@pytest.mark.parametrize("name", HUGE)
def test_a_header_is_enough_to_refuse(ask, name):
    data = made(HUGE[name])
    assert len(data) < 0.5 * MIB
    got, mib, _ = ask(data)
    assert got == TOO_LARGE
    assert mib < 20


@pytest.mark.reliability
@pytest.mark.parametrize("name", HUGE)
def test_it_takes_no_time(ask, name):
    """The median of many, since machines are busy with other things, too."""
    data = made(HUGE[name])
    seconds = float(np.median([ask(data)[2] for _ in range(21)]))
    print(f"{name}: refused in {seconds * 1000:.1f} ms")
    assert seconds < 0.05


@pytest.mark.parametrize("name", UNFOLDING)
def test_what_a_file_carries_is_not_unfolded(ask, name):
    make, expected = UNFOLDING[name]
    data = made(make)
    got, mib, seconds = ask(data)
    print(f"{name}: {len(data)} bytes, {mib:.1f} MiB, {seconds:.2f} s")
    assert got == expected
    assert mib < 20 + 3 * len(data) / MIB, "the message, the file in it, and its pixel data"


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_is_not_unfolded(watched, outcome, name):
    path, make = MESSAGES[name]
    data = made(make)
    with watched.channel() as channel:
        channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=LONG_S)
        got, mib, seconds = growth(watched, lambda: outcome(lambda: channel.unary_unary(path)(data, timeout=LONG_S)))
    print(f"{name}: {len(data)} bytes, {mib:.1f} MiB, {seconds:.2f} s")
    assert got == INVALID
    assert mib < 20 + 3 * len(data) / MIB


@pytest.mark.parametrize("n_mib", [64, pytest.param(512, marks=pytest.mark.reliability)])
@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_compressed_message_is_refused_before_it_is_inflated(watched, outcome, n_mib, compression):
    with watched.channel(**{"grpc.default_compression_algorithm": compression.value}) as channel:
        call = channel.unary_unary(SEGMENT)
        assert outcome(lambda: call(b"", timeout=LONG_S)) == ("UNIMPLEMENTED", "")
        data = bytes(n_mib * MIB)
        got, mib, _ = growth(watched, lambda: outcome(lambda: call(data, timeout=LONG_S)))
    print(f"{len(zlib.compress(bytes(MIB))) * n_mib} bytes of {compression.name}, {mib:.1f} MiB")
    assert got == ("UNIMPLEMENTED", "")
    assert mib < 20
