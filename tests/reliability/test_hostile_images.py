"""R1: damaged, lying and odd JPEG, PNG and WebP files; each is answered, or refused for what it is.

A mutant is a function of its index alone: what a failure prints is enough to make it again.
"""

import io
import random
import struct
import zlib
from functools import cache

import numpy as np
import pytest
from PIL import Image

from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

SEED = 20261122
LONG_S = 60.0
MIB = 2**20
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ALLOWED = {
    ("OK", ""),
    ("INVALID_ARGUMENT", "IMAGE_UNDECODABLE"),
    ("INVALID_ARGUMENT", "UNSUPPORTED_FORMAT"),
    ("RESOURCE_EXHAUSTED", "IMAGE_TOO_LARGE"),
}
SPECS = [
    [pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)],
    [pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION, mask_encoding=pb.MASK_ENCODING_POLYGON)],
    [pb.OutputSpec(kind=pb.OUTPUT_KIND_PSEUDO_MASK, mask_encoding=pb.MASK_ENCODING_COCO_RLE)],
    [pb.OutputSpec(kind=pb.OUTPUT_KIND_CAM), pb.OutputSpec(kind=pb.OUTPUT_KIND_PSEUDO_MASK, refinement=1)],
]


# Whole files ----------------------------------------------------------------------------------------------------------


def file(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


@cache
def whole_files():
    """{what it is: a file that every reader takes}."""
    noise = np.random.default_rng(SEED).integers(0, 256, (37, 53, 4), dtype=np.uint8)
    rgba, grey16 = Image.fromarray(noise), Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    rgb = rgba.convert("RGB")
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    found = {
        "JPEG": file(rgb, "JPEG"),
        "JPEG, progressive": file(rgb, "JPEG", progressive=True),
        "JPEG, grey": file(rgb.convert("L"), "JPEG"),
        "JPEG, CMYK": file(rgb.convert("CMYK"), "JPEG"),
        "JPEG, restart markers": file(rgb, "JPEG", restart_marker_blocks=1, subsampling=0),
        "JPEG, profile of many segments": file(rgb, "JPEG", icc_profile=bytes(300_000)),
        "MPO": file(rgb, "MPO", **frames),
        "PNG": file(rgb, "PNG"),
        "PNG, alpha": file(rgba, "PNG"),
        "PNG, grey and alpha": file(rgba.convert("LA"), "PNG"),
        "PNG, grey": file(rgb.convert("L"), "PNG"),
        "PNG, 1 bit": file(rgb.convert("1"), "PNG"),
        "PNG, palette": file(palette, "PNG"),
        "PNG, palette with a clear colour": file(palette, "PNG", transparency=3),
        "PNG, 16 bits": file(grey16, "PNG"),
        "PNG, animated": file(rgb, "PNG", **frames),
        "WebP": file(rgb, "WEBP"),
        "WebP, lossless": file(rgb, "WEBP", lossless=True),
        "WebP, alpha": file(rgba, "WEBP"),
        "WebP, animated": file(rgb, "WEBP", **frames),
    }
    for file_format in ("JPEG", "PNG", "WEBP"):
        found |= {f"{file_format}, EXIF {i}": file(rgb, file_format, exif=exif(i)) for i in range(1, 9)}
        for width, height in ((1, 1), (1, 5000), (5000, 1)):
            found[f"{file_format}, {width}x{height}"] = file(Image.new("RGB", (width, height), "red"), file_format)
    return found


def test_every_whole_file_is_answered(watched):
    with watched.channel() as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        for name, data in whole_files().items():
            for spec in SPECS:
                answer = stub.Segment(pb.SegmentRequest(image=pb.Image(encoded=data), outputs=spec), timeout=LONG_S)
                stored = Image.open(io.BytesIO(data)).size
                turned = name.endswith(("EXIF 5", "EXIF 6", "EXIF 7", "EXIF 8"))
                assert (answer.image_width, answer.image_height) == (stored[::-1] if turned else stored), name


# Mutants --------------------------------------------------------------------------------------------------------------


def truncated(data, rng):
    return data[: rng.randrange(len(data) + 1)]


def nothing(data, rng):
    return b""


def flipped(data, rng):
    """Bits near the start, where the headers are, or anywhere."""
    changed = bytearray(data)
    reach = rng.choice((64, 1024, len(data)))
    for _ in range(rng.choice((1, 1, 3, 30))):
        if changed:
            changed[rng.randrange(min(reach, len(changed)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def without_a_slice(data, rng):
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 4, 100)) :]


def with_a_slice_twice(data, rng):
    start = rng.randrange(len(data) + 1)
    return data[: start + rng.choice((1, 20, 1000))] + data[start:]


def with_garbage_behind(data, rng):
    return data + rng.randbytes(rng.choice((1, 100, 100_000)))


def spliced(data, rng):
    """The head of one file on the tail of another."""
    other = rng.choice(list(whole_files().values()))
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]


def polyglot(data, rng):
    """Also an archive, a page, a script, a PDF or another image, behind or before the file."""
    other = rng.choice(
        [b"PK\x03\x04" + bytes(26), b"<html><script>", b"#!/bin/sh\n", b"%PDF-1.7\n", b"GIF89a\x01\x00\x01\x00", b"BM"]
        + [data[:20] for data in whole_files().values()]
    )
    return other + data if rng.random() < 0.3 else data + other


SIZES = (0, 1, 2, 63, 64, 255, 8191, 16383, 32767, 40000, 65500, 65535, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def lying(data, rng):
    """Another width or height in the header."""
    width, height = rng.choice(SIZES), rng.choice(SIZES)
    if data.startswith(PNG_SIGNATURE):
        fields = rng.choice([struct.pack(">II", width, height), struct.pack(">I", width)])
        return data[:16] + fields + data[16 + len(fields) :]
    if data[8:12] == b"WEBP":
        at = {b"VP8X": 24, b"VP8L": 21, b"VP8 ": 26}.get(data[12:16], 24)
        return data[:at] + struct.pack("<II", width, height)[: rng.choice((1, 3, 4, 6))] + data[at + 6 :]
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
    return data[:at] + struct.pack(">HH", width & 0xFFFF, height & 0xFFFF) + data[at + 4 :]


def with_a_huge_chunk(data, rng):
    """Metadata that is larger than the image, or says that it is."""
    body = rng.choice((bytes, rng.randbytes))(rng.choice((1000, 65_000, 3_000_000)))
    said = rng.choice((len(body), len(body) + 1, 0, 2**31 - 1, 2**32 - 1))
    if data.startswith(PNG_SIGNATURE):
        kind = rng.choice((b"iCCP", b"eXIf", b"zTXt", b"iTXt", b"tRNS", b"PLTE", b"acTL", b"fdAT", b"IDAT"))
        return (
            data[:33] + struct.pack(">I", said) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) + data[33:]
        )
    if data[8:12] == b"WEBP":
        kind = rng.choice((b"ICCP", b"EXIF", b"XMP ", b"ANIM", b"ANMF", b"ALPH"))
        return data[:12] + kind + struct.pack("<I", said) + body + data[12:]
    marker = rng.choice((0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xDB, 0xC4))
    segment = bytes([0xFF, marker]) + struct.pack(">H", min(said, 65535)) + body[:65533]
    return data[:2] + segment * rng.choice((1, 1, 40)) + data[2:]


def with_checksums(data, rng):
    """PNG only: checksums that fit what was done to the chunks, so that it reaches the decoder."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    changed, at = bytearray(data), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        struct.pack_into(">I", changed, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(changed)


MUTATIONS = (
    [truncated, flipped, lying] * 3
    + [without_a_slice, with_a_slice_twice, with_garbage_behind, spliced, polyglot, with_a_huge_chunk] * 2
    + [nothing]
)


def mutant(index):
    """(what was done, the file, what is asked for)."""
    rng = random.Random(f"{SEED}/{index}")
    name, data = rng.choice(list(whole_files().items()))
    done = [name]
    for mutate in rng.sample(MUTATIONS, rng.choice((1, 1, 2, 3))):
        data = mutate(data, rng)
        done.append(mutate.__name__)
    if rng.random() < 0.7:
        data = with_checksums(data, rng)
    return " > ".join(done), data, rng.choice(SPECS)


@pytest.mark.parametrize("n", [100, pytest.param(2000, marks=pytest.mark.reliability)])
def test_mutants_are_answered_or_refused_for_what_they_are(watched, outcome, n):
    seen, wrong = {}, []
    with watched.channel() as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        for data in whole_files().values():
            stub.Segment(pb.SegmentRequest(image=pb.Image(encoded=data), outputs=SPECS[0]), timeout=LONG_S)
        before = watched.rss_bytes
        for index in range(n):
            done, data, spec = mutant(index)
            request = pb.SegmentRequest(image=pb.Image(encoded=data), outputs=spec)
            got = outcome(lambda request=request: stub.Segment(request, timeout=LONG_S))
            seen[got] = seen.get(got, 0) + 1
            if got not in ALLOWED:
                wrong.append((index, done, got))
            assert watched.is_alive, f"mutant({index}) ended the server: {done}"
    grown = (watched.rss_bytes - before) / MIB
    print(f"{n} mutants: {seen}, RSS {grown:+.1f} MiB")
    assert not wrong, f"mutant(index) of seed {SEED}: {wrong}"
    assert grown < 50
    assert len(seen) == len(ALLOWED), "the mutants reach every answer"
