"""R13: less memory than images need. The limit is on the address space, a little above what the server has taken.

A request that there is no memory for is refused, and those after it are answered. Where others have left none at all
gRPC may say so in words of its own, or the process ends at once, and not well; it never hangs.
"""

import io
import resource
from collections import Counter
from time import monotonic

import numpy as np
import pytest
from PIL import Image

from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
MIB = 2**20
NO_MEMORY = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
REFUSED = {NO_MEMORY, ("INTERNAL", "INTERNAL"), ("UNKNOWN", "")}
pytestmark = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of other processes are Linux's")


def request(side):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(buffer, "PNG")
    outputs = [pb.OutputSpec(kind=kind) for kind in (pb.OUTPUT_KIND_SEGMENTATION, pb.OUTPUT_KIND_CAM)]
    return pb.SegmentRequest(image=pb.Image(encoded=buffer.getvalue()), outputs=outputs)


SMALL, HUGE, LARGE = request(64), request(5000), request(1500)


@pytest.fixture
def limited(toy_bundle, tmp_path, watched_process):
    """A function that starts a server which may take so many MiB more than it has after its first request."""

    def start(mib):
        server = watched_process(toy_bundle, tmp_path / "log", "--max-batch", "8")
        with server.channel() as channel:
            pb_grpc.SegmentationServiceStub(channel).Segment(SMALL, timeout=LONG_S)
        limit = server.address_space_bytes + mib * MIB
        resource.prlimit(server.child.pid, resource.RLIMIT_AS, (limit, limit))
        return server

    return start


def ask(server, outcome, *requests):
    """(code, reason) of requests that are sent together, counted."""
    with server.channel(**{"grpc.enable_retries": 0}) as channel:
        segment = pb_grpc.SegmentationServiceStub(channel).Segment
        calls = [segment.future(request, timeout=LONG_S) for request in requests]
        return Counter(outcome(call.result) for call in calls)


def test_r13_a_huge_image_is_refused_and_the_next_is_answered(limited, outcome):
    server = limited(mib=64)
    for _ in range(2):
        assert ask(server, outcome, HUGE) == {NO_MEMORY: 1}
    assert ask(server, outcome, SMALL) == {("OK", ""): 1}
    assert server.is_alive


@pytest.mark.reliability
@pytest.mark.parametrize("mib", [0, 4, 16, 64])
def test_r13_with_any_memory_requests_are_answered_or_refused_or_the_process_ends(limited, outcome, mib):
    server = limited(mib)
    for _ in range(3):
        began = monotonic()
        codes = ask(server, outcome, SMALL, HUGE, *[LARGE] * 16, SMALL)
        print(f"{mib} MiB: {dict(codes)} in {monotonic() - began:.1f} s")
        if not server.is_alive:
            server.child.wait(LONG_S)
            print(f"exit code {server.child.returncode}")
            assert server.child.returncode != 0
            return
        assert set(codes) <= {("OK", ""), *REFUSED}
    assert ask(server, outcome, SMALL) == {("OK", ""): 1}
