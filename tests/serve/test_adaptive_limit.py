"""The adaptive limit: its fixed point in closed form, a queue that is simulated step by step, and a real server."""

import heapq
import math
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import weakseg
from serve.adaptive_limit import WINDOW, AdaptiveLimit
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0


def fixed_point(work_in_flight):
    """L = C W + √L."""
    return ((1 + math.sqrt(1 + 4 * work_in_flight)) / 2) ** 2


def feed(adaptive, work_s, seen_s, inside, windows=1):
    for _ in range(windows * WINDOW):
        adaptive.worked(work_s)
        adaptive.left(seen_s, inside)


class Simulated:
    """A server of `workers` that each need `work_s` a request, always offered more than it may take."""

    def __init__(self, workers, work_s, adaptive):
        self.workers, self.work_s, self.adaptive = workers, work_s, adaptive
        self.now, self.running, self.waiting, self.limits = 0.0, [], [], []

    def run(self, n):
        for _ in range(n):
            while len(self.running) + len(self.waiting) < self.adaptive.limit:
                self.waiting.append(self.now)
            while self.waiting and len(self.running) < self.workers:
                heapq.heappush(self.running, (self.now + self.work_s, self.waiting.pop(0)))
            inside = len(self.running) + len(self.waiting)
            self.now, came = heapq.heappop(self.running)
            self.adaptive.worked(self.work_s)
            self.adaptive.left(self.now - came, inside)
            self.limits.append(self.adaptive.limit)
        return self


@pytest.mark.parametrize("workers", [1, 4, 16, 40])
def test_it_settles_at_what_is_worked_on_and_its_root(workers):
    limits = Simulated(workers, 0.02, AdaptiveLimit(1, 128)).run(6000).limits
    assert limits[0] == 128
    assert limits[-1] == pytest.approx(fixed_point(workers), abs=1.5)
    assert limits[-1] >= workers, "no worker is idle"


def test_a_slow_period_changes_nothing_for_good():
    server = Simulated(8, 0.02, AdaptiveLimit(1, 128)).run(4000)
    before = server.limits[-1]
    server.work_s = 0.4
    server.run(4000)
    server.work_s = 0.02
    assert abs(server.run(4000).limits[-1] - before) <= 1
    assert min(server.limits) >= 1


def test_a_worker_that_is_lost_and_comes_back_is_followed():
    server = Simulated(16, 0.02, AdaptiveLimit(1, 128)).run(4000)
    server.workers = 2
    assert server.run(4000).limits[-1] == pytest.approx(fixed_point(2), abs=1.5)
    server.workers = 16
    assert server.run(6000).limits[-1] == pytest.approx(fixed_point(16), abs=1.5)


def test_it_never_leaves_its_bounds():
    adaptive = AdaptiveLimit(8, 72)
    feed(adaptive, 0.001, 10.0, inside=72, windows=100)
    assert adaptive.limit == 8
    feed(adaptive, 1.0, 1.0, inside=8, windows=200)
    assert adaptive.limit == 8 + round(adaptive._exact - 8) and adaptive.limit > 8


def test_a_limit_that_is_not_reached_does_not_move():
    adaptive = AdaptiveLimit(8, 72)
    feed(adaptive, 0.001, 10.0, inside=35, windows=10)
    assert adaptive.limit == 72


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1e3), st.integers(0, 100)), max_size=300))
def test_whatever_it_is_told_it_stays_between_floor_and_ceiling(told):
    adaptive = AdaptiveLimit(4, 40)
    for work_s, seen_s, inside in told:
        adaptive.worked(work_s)
        adaptive.left(seen_s, inside)
        assert 4 <= adaptive.limit <= 40


class SleepingRunner:
    """A real runner that takes its time."""

    def __init__(self, inner):
        self.inner, self.provider, self.close = inner, inner.provider, inner.close

    def run(self, graph, images, outputs=None):
        time.sleep(0.005)
        return self.inner.run(graph, images, outputs)


def test_a_server_that_is_offered_more_than_it_can_answer_admits_fewer(serving):
    def load(path):
        model = weakseg.load(path, threads=1)
        model.runner = SleepingRunner(model.runner)
        return model

    running = serving(load=load, max_batch=1, queue_limit=64, adaptive_limit=True)
    assert running.sample("weakseg_queue_limit") == 65
    image = pb.Image(raw=pb.RawImage(width=1, height=1, rgb=b"abc"))
    request = pb.SegmentRequest(image=image, outputs=[pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)])
    with grpc.insecure_channel(running.target, options=[("grpc.enable_retries", 0)]) as channel:
        segment = pb_grpc.SegmentationServiceStub(channel).Segment

        def calls(n):
            codes = set()
            for _ in range(n):
                try:
                    segment(request, timeout=LONG_S)
                except grpc.RpcError as error:
                    codes.add(error.code().name)
                    time.sleep(0.01)
            return codes

        with ThreadPoolExecutor(48) as pool:
            refused = set().union(*pool.map(calls, [20] * 48))
    assert refused == {"RESOURCE_EXHAUSTED"}
    assert 1 <= running.sample("weakseg_queue_limit") < 33
    assert running.server.admission.bulk_limit <= running.server.admission.limit


def test_requests_that_are_given_up_have_waited_too(serving):
    """With deadlines that pass in the queue hardly anything is answered, and the limit must follow all the same."""
    running = serving(max_batch=1, queue_limit=64, adaptive_limit=True)
    running.runner.gate.clear()
    image = pb.Image(raw=pb.RawImage(width=1, height=1, rgb=b"abc"))
    request = pb.SegmentRequest(image=image, outputs=[pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)])
    with grpc.insecure_channel(running.target) as channel:
        segment = pb_grpc.SegmentationServiceStub(channel).Segment
        calls = [segment.future(request, timeout=LONG_S) for _ in range(48)]
        running.until(lambda: running.server.admission.inflight == 48)
        for call in calls:
            call.cancel()
        running.until(lambda: running.server.admission.inflight == 0)
    assert running.sample("weakseg_queue_limit") < 65


def test_bulk_requests_never_take_the_last_places(serving):
    admission = serving(max_batch=4, queue_limit=64, adaptive_limit=True).server.admission
    for _ in range(1000):
        admission.inflight = admission.limit
        admission._adapt(1.0, 1)  # nothing but waiting
    assert admission.limit == 8 and admission.bulk_limit == 4
