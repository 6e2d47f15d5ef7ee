"""R5, R6, R7, R8: more requests than a server can answer, too little time, and clients that go away or do not read.

The runner sleeps instead of computing, so that a server's capacity is known: one image each EXECUTION_S.
"""

import asyncio
import contextlib
import random
import socket
import threading
import time
from collections import Counter
from functools import partial

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import benchmarks.load
import serve.service
import weakseg
from tests import http2
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
EXECUTION_S = 0.02


class SleepingRunner:
    """A real runner that takes its time; `started` are the clock's readings at which executions began."""

    def __init__(self, inner):
        self.inner = inner
        self.started = []

    @property
    def provider(self):
        return self.inner.provider

    def run(self, graph, images, outputs=None):
        self.started.append(time.monotonic())
        time.sleep(EXECUTION_S * len(images))
        return self.inner.run(graph, images, outputs)

    def close(self):
        self.inner.close()


@pytest.fixture
def slow(serving):
    """A function that starts a server of known capacity; returns it and its runner."""

    def start(**options):
        runners = []

        def load(path):
            model = weakseg.load(path, threads=1)
            model.runner = SleepingRunner(model.runner)
            runners.append(model.runner)
            return model

        running = serving(load=load, max_batch=1, **options)
        return running, runners[0]

    return start


@pytest.fixture
def request_(png, colours):
    return pb.SegmentRequest(image=pb.Image(encoded=png(colours)), outputs=[pb.OutputSpec(kind=3)])


async def ask(stub, request, timeout_s=LONG_S):
    """(code, seconds that it took, seconds to wait that the answer gave)."""
    began = time.monotonic()
    try:
        await stub.Segment(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        status = rpc_status.from_call(error)
        retry = error_details_pb2.RetryInfo()
        told = [retry.retry_delay.ToNanoseconds() / 1e9 for d in (status.details if status else ()) if d.Unpack(retry)]
        return error.code().name, time.monotonic() - began, *(told or [None])
    return "OK", time.monotonic() - began, None


def drive(target, use):
    """Run `use(stub)` on a channel without retries."""

    async def main():
        options = [("grpc.enable_retries", 0)]
        async with grpc.aio.insecure_channel(target, options=options) as channel:
            return await use(pb_grpc.SegmentationServiceStub(channel))

    return asyncio.run(asyncio.wait_for(main(), 10 * LONG_S))


def open_loop(target, request, rate, seconds):
    """What comes of requests that are sent at a rate, whether or not earlier ones have been answered."""

    async def use(stub):
        tasks, began = [], time.monotonic()
        for n in range(round(rate * seconds)):
            await asyncio.sleep(max(0.0, began + n / rate - time.monotonic()))
            tasks.append(asyncio.create_task(ask(stub, request)))
        return await asyncio.gather(*tasks)

    return drive(target, use)


def is_idle(running):
    gauges = ("weakseg_inflight", "weakseg_queue_depth", "weakseg_image_memory_bytes", "weakseg_unread_bytes")
    return all(running.sample(gauge) == 0 for gauge in gauges) and running.server._edge.running == 0


def seconds_until_idle(running):
    began = time.monotonic()
    running.until(lambda: is_idle(running))
    return time.monotonic() - began


def test_r5_more_than_it_can_answer_is_refused_at_once_and_told_when_to_come_again(slow, request_):
    running, runner = slow(queue_limit=8)
    outcomes = open_loop(running.target, request_, rate=4 / EXECUTION_S, seconds=1.0)
    codes = Counter(code for code, *_ in outcomes)
    assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}
    assert all(retry_s for code, _, retry_s in outcomes if code != "OK")
    assert len(runner.started) == codes["OK"], "nothing was computed that nobody got"
    assert running.sample("weakseg_rejected_total", reason="QUEUE_FULL") == codes["RESOURCE_EXHAUSTED"]
    running.until(lambda: is_idle(running))


@pytest.mark.reliability
def test_r5_a_minute_at_four_times_the_capacity(slow, request_):
    queue_limit, seconds = 16, 60.0
    running, _ = slow(queue_limit=queue_limit)
    alone = drive(running.target, lambda stub: _one_after_the_other(stub, request_, 100))
    capacity = 1 / np.median([took for _, took, _ in alone])
    # From a process of its own: this one has the server, and would wait for it with its own clock.
    sent = request_.SerializeToString()
    load = benchmarks.load.open_loop(running.target, sent, rate=4 * capacity, seconds=seconds, timeout_s=LONG_S)
    p99_s, refused_s, goodput = load.quantile_s(0.99), np.median(load.refused_s), load.rate / capacity
    print(f"capacity {capacity:.0f}/s, goodput {goodput:.2f}, p99 {p99_s:.3f} s, refused in {refused_s * 1e3:.1f} ms")
    assert set(load.codes) == {"OK", "RESOURCE_EXHAUSTED"}
    assert goodput >= 0.9
    assert p99_s <= (queue_limit + 1) / capacity + 2 / capacity
    assert refused_s < 0.02


async def _one_after_the_other(stub, request, n):
    return [await ask(stub, request) for _ in range(n)]


def deadlines(running, runner, request, n):
    """Requests at twice the capacity with 1 ms to 10 s each: what came of them."""
    draw = random.Random(0)
    times = [10 ** draw.uniform(-3, 1) for _ in range(n)]

    async def use(stub):
        tasks = []
        for timeout_s in times:
            tasks.append(asyncio.create_task(ask(stub, request, timeout_s)))
            await asyncio.sleep(EXECUTION_S / 2)
        return await asyncio.gather(*tasks)

    outcomes = drive(running.target, use)
    running.until(lambda: is_idle(running))
    codes = Counter(code for code, *_ in outcomes)
    assert set(codes) <= {"OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    assert codes["DEADLINE_EXCEEDED"] and codes["OK"]
    # A client may give up while its image is in the network; before that, nothing of an expired one is begun.
    expired = running.sample("weakseg_requests_total", model="toy", version="1", code="DEADLINE_EXCEEDED")
    assert codes["OK"] <= len(runner.started) <= codes["OK"] + expired
    return list(zip(times, outcomes, strict=True))


def test_r6_what_has_expired_is_not_begun(slow, request_):
    running, runner = slow(queue_limit=64)
    deadlines(running, runner, request_, 60)


@pytest.mark.reliability
def test_r6_no_answer_comes_after_its_deadline(slow, request_):
    running, runner = slow(queue_limit=64)
    late = [took - timeout_s for timeout_s, (_, took, _) in deadlines(running, runner, request_, 1000)]
    print(f"latest end of a call after its deadline: {max(late) * 1e3:.0f} ms")
    assert max(late) < 0.05


def cancel_all(running, request, n):
    """Calls that are cancelled at any moment of their life, streams among them; seconds until nothing is left."""
    draw = random.Random(0)

    async def use(stub):
        calls = []
        for i in range(n):
            if i % 4 == 3:
                call = stub.SegmentStream(iter([pb.SegmentStreamRequest(request=request)] * 3))
                asyncio.get_running_loop().call_later(draw.uniform(0, 3 * EXECUTION_S), call.cancel)
                calls.append(asyncio.ensure_future(_read(call)))
            else:
                call = stub.Segment(request, timeout=LONG_S)
                asyncio.get_running_loop().call_later(draw.uniform(0, 3 * EXECUTION_S), call.cancel)
                calls.append(asyncio.ensure_future(_wait(call)))
            await asyncio.sleep(EXECUTION_S / 2)
        return await asyncio.gather(*calls)

    codes = Counter(drive(running.target, use))
    assert set(codes) <= {"OK", "CANCELLED", "RESOURCE_EXHAUSTED"} and codes["CANCELLED"], codes
    return seconds_until_idle(running)


async def _wait(call):
    try:
        await call
    except asyncio.CancelledError:
        return "CANCELLED"
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def _read(call):
    try:
        async for _ in call:
            pass
    except asyncio.CancelledError:
        return "CANCELLED"
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


class Turnstile:
    """A real function that a test can hold: calls wait until they are let through. `reached` counts those that came."""

    def __init__(self, function):
        self._function, self._let_through = function, threading.Semaphore(0)
        self.reached = 0

    def __call__(self, *args, **kwargs):
        self.reached += 1
        assert self._let_through.acquire(timeout=LONG_S), "the test never let it through"
        return self._function(*args, **kwargs)

    def let_through(self):
        self._let_through.release()


def cancel_at(running, turnstile, request, n, *, queued):
    """Calls that are cancelled at the turnstile, one after the other; or behind one that stands there.

    Returns: seconds until nothing is left.
    """
    labels = {"grpc_type": "unary_unary", "grpc_service": "weakseg.v1.SegmentationService", "grpc_method": "Segment"}
    n_cancelled = partial(running.sample, "grpc_server_handled_total", **labels, grpc_code="CANCELLED")
    queue_depth = partial(running.sample, "weakseg_queue_depth")
    with grpc.insecure_channel(running.target, options=[("grpc.enable_retries", 0)]) as channel:
        segment = pb_grpc.SegmentationServiceStub(channel).Segment
        if queued:
            first = segment.future(request, timeout=LONG_S)
            running.until(lambda: turnstile.reached == 1)
        for i in range(n):
            call = segment.future(request, timeout=LONG_S)
            running.until(lambda i=i: queue_depth() == 1 if queued else turnstile.reached == i + 1)
            call.cancel()
            running.until(lambda i=i: n_cancelled() == i + 1)
            if not queued:
                turnstile.let_through()
        if queued:
            assert running.sample("weakseg_inflight") == 1
            turnstile.let_through()
            first.result()
            assert turnstile.reached == 1, "nothing was computed for those that were cancelled"
    return seconds_until_idle(running)


def reset_while_sent(running, request, n):
    """Streams that are reset while their answer waits for a window, one after the other.

    Returns: seconds until nothing is left.
    """
    service, method = "weakseg.v1.SegmentationService", "SegmentStream"
    labels = {"grpc_type": "stream_stream", "grpc_service": service, "grpc_method": method}
    n_cancelled = partial(running.sample, "grpc_server_handled_total", **labels, grpc_code="CANCELLED")
    begun = http2.headers(f"/{service}/{method}")
    data = http2.message(pb.SegmentStreamRequest(request=request).SerializeToString())
    with http2.connect(running.target, http2.NO_WINDOW) as connection:
        for i in range(n):
            connection.sendall(http2.frame(http2.HEADERS, http2.END_HEADERS, 2 * i + 1, begun))
            connection.sendall(http2.frame(http2.DATA, 0, 2 * i + 1, data))
            running.until(lambda: running.sample("weakseg_unread_bytes") > 0)
            connection.sendall(http2.frame(http2.RST_STREAM, 0, 2 * i + 1, http2.CANCEL))
            running.until(lambda i=i: n_cancelled() == i + 1)
        return seconds_until_idle(running)


@pytest.mark.parametrize(("n", "within_s"), [(10, LONG_S), pytest.param(200, 2.0, marks=pytest.mark.reliability)])
@pytest.mark.parametrize("stage", ["queue", "decode", "infer", "encode", "send"])
@pytest.mark.parametrize("max_batch", [8, 1], ids=["in pools", "in one thread"])
def test_r7_calls_that_are_cancelled_at_a_stage_leave_nothing_behind(
    serving, request_, monkeypatch, stage, n, within_s, max_batch
):
    names = {"decode": (weakseg.model, "read_reduced"), "encode": (serve.service, "response_from_answer")}
    if stage in names:
        turnstile = Turnstile(getattr(*names[stage]))
        monkeypatch.setattr(*names[stage], turnstile)
    running = serving(max_batch=max_batch)
    if stage == "send":
        assert reset_while_sent(running, request_, n) < within_s
        return
    if stage not in names:
        turnstile = running.runner.run = Turnstile(running.runner.run)
    assert cancel_at(running, turnstile, request_, n, queued=stage == "queue") < within_s


def test_r7_cancelled_calls_leave_nothing_behind(slow, request_):
    running, _ = slow(queue_limit=64)
    cancel_all(running, request_, 40)


@pytest.mark.reliability
def test_r7_eight_hundred_cancelled_calls_leave_nothing_behind(slow, request_):
    running, _ = slow(queue_limit=64)
    assert cancel_all(running, request_, 800) < 2.0


def idle_connections(target, n):
    """Sockets that say nothing, half a preface, or send one byte now and then."""
    host, _, port = target.rpartition(":")
    opened = []
    for i in range(n):
        connection = socket.create_connection((host, int(port)), LONG_S)
        connection.sendall((b"", b"PRI * HTT", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n")[i % 4])
        opened.append(connection)
    return opened


def test_r8_clients_that_neither_send_nor_read_do_not_keep_others_waiting(slow, request_):
    running, _ = slow()
    opened = idle_connections(running.target, 40)
    try:
        outcomes = drive(running.target, lambda stub: _beside_one_that_does_not_read(stub, request_))
    finally:
        for connection in opened:
            connection.close()
    assert [code for code, *_ in outcomes] == ["OK"] * 10
    running.until(lambda: is_idle(running))


@pytest.mark.reliability
def test_r8_a_hundred_slow_connections_cost_a_fast_client_nothing(slow, request_):
    running, _ = slow()
    stop = threading.Event()

    def dribble(connections):
        while not stop.wait(1.0):
            for connection in connections:
                with contextlib.suppress(OSError):  # the server has had enough of it
                    connection.send(b"x")

    def p99_s():
        return np.quantile([took for _, took, _ in drive(running.target, ask_two_hundred)], 0.99)

    def ask_two_hundred(stub):
        return _one_after_the_other(stub, request_, 200)

    alone_s, opened = p99_s(), idle_connections(running.target, 100)
    thread = threading.Thread(target=dribble, args=(opened,))
    thread.start()
    try:
        assert p99_s() <= 1.5 * alone_s
    finally:
        stop.set()
        thread.join()
        for connection in opened:
            connection.close()


async def _beside_one_that_does_not_read(stub, request):
    async def requests():
        while True:
            yield pb.SegmentStreamRequest(request=request)

    unread = stub.SegmentStream(requests())
    try:
        return await _one_after_the_other(stub, request, 10)
    finally:
        unread.cancel()
