"""R3: small files that are many megapixels, as many at once as the queue takes: what they take together is bounded."""

import io
import re
from urllib.request import urlopen

import pytest
from PIL import Image

from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 300.0
MIB = 2**20
LIMIT_MIB = 640  # two of 40 megapixels at a time, where eight threads could decode eight


@pytest.fixture(scope="module")
def watched(toy_bundle, tmp_path_factory, watch):
    flags = ["--image-memory-mib", str(LIMIT_MIB), "--threads", "8", "--queue-limit", "128"]
    yield from watch(toy_bundle, tmp_path_factory.mktemp("server") / "log", *flags)


def flat_png(width, height):
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def request(data):
    outputs = [pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION, mask_encoding=pb.MASK_ENCODING_COCO_RLE)]
    return pb.SegmentRequest(image=pb.Image(encoded=data), outputs=outputs)


def gauge(watched, name):
    text = urlopen(watched.metrics_url).read().decode()
    return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])


@pytest.mark.parametrize("n", [6, pytest.param(64, marks=pytest.mark.reliability)])
def test_images_of_40_megapixels_wait_for_memory(watched, n):
    large, small = flat_png(8000, 5000), flat_png(64, 48)
    assert len(large) < 10_000
    with watched.channel() as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        stub.Segment(request(small), timeout=LONG_S)
        stub.Segment(request(large), timeout=LONG_S)  # what each thread and library keeps is no image's
        watched.forget_peak()
        before = watched.rss_bytes
        calls = [stub.Segment.future(request(large), timeout=LONG_S) for _ in range(n)]
        among = stub.Segment.future(request(small), timeout=LONG_S)
        gone = [stub.Segment.future(request(large)) for _ in range(n)]
        assert among.result().image_width == 64, "it has its turn"
        for call in gone:
            call.cancel()
        assert all(call.result().image_width == 8000 for call in calls)
        mib = (watched.peak_bytes - before) / MIB
        print(f"{n} of 40 megapixels: {mib:.0f} MiB")
        assert mib < LIMIT_MIB
        stub.Segment(request(small), timeout=LONG_S)
    assert gauge(watched, "weakseg_image_memory_waiting") == 0
    watched._wait(lambda: gauge(watched, "weakseg_image_memory_bytes") == 0)
