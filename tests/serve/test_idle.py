"""Calls that wait for their client: how many are held, and which one goes."""

import asyncio
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.idle import MOST_IDLE, Idle
from tests import http2
from weakseg.errors import QueueFullError
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
SERVICE = "weakseg.v1.SegmentationService"
SEGMENT = f"/{SERVICE}/Segment"


def segment(data):
    return pb.SegmentRequest(image=pb.Image(encoded=data), outputs=[pb.OutputSpec(kind=3)])


async def waits(idle, *clients):
    """A task and what it waits for, of each client in turn."""
    made = []
    for client in clients:
        news = asyncio.get_running_loop().create_future()
        made.append((asyncio.create_task(idle.wait(news, client)), news))
        await asyncio.sleep(0)
    return made


async def gone(made):
    """Which have gone; the others get what they wait for."""
    await asyncio.sleep(0.01)
    for i, (_, news) in enumerate(made):
        if not news.done():
            news.set_result(i)
    outcomes = await asyncio.gather(*(task for task, _ in made), return_exceptions=True)
    assert all(isinstance(one, QueueFullError) or one == i for i, one in enumerate(outcomes))
    return [i for i, one in enumerate(outcomes) if isinstance(one, QueueFullError)]


@pytest.mark.parametrize(
    ("clients", "expected"),
    [
        ("aaa", []),
        ("aaaa", [0]),
        ("aaaaaa", [0, 1, 2]),
        ("abcd", [0]),
        ("abbc", [1]),
        ("abbbb", [1, 2]),
        ("baaabb", [1, 0, 2]),
    ],
)
async def test_the_oldest_of_whom_has_the_most_goes(clients, expected):
    idle = Idle(most=3)
    assert await gone(await waits(idle, *clients)) == sorted(expected)
    assert len(idle) == 0


async def test_a_wait_that_is_over_leaves_its_place():
    idle = Idle(most=1)
    for _ in range(3):
        [(task, news)] = await waits(idle, "a")
        news.set_result("news")
        assert await task == "news"
    [(cancelled, _)] = await waits(idle, "a")
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert len(idle) == 0


async def test_a_call_that_is_cancelled_as_it_goes_is_cancelled():
    idle = Idle(most=1)
    [(first, _), (second, news)] = await waits(idle, "a", "b")
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    news.set_result("news")
    assert await second == "news"


async def test_an_error_of_what_is_waited_for_is_its_own():
    async def fail():
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await Idle().wait(fail(), "a")


def silent(target, n):
    """A connection with calls that begin and send nothing."""
    connection = http2.connect(target)
    block = http2.headers(SEGMENT)
    frames = [http2.frame(http2.HEADERS, http2.END_HEADERS, 2 * i + 1, block) for i in range(n)]
    assert http2.send(connection, b"".join(frames))
    return connection


def test_health_and_requests_are_answered_among_more_silent_calls_than_are_held(serving, colours, png):
    running = serving()
    calls, beyond = running.server._edge._idle_calls, 100
    labels = {"grpc_type": "unary_unary", "grpc_service": SERVICE, "grpc_method": "Segment"}
    gone = labels | {"grpc_code": "RESOURCE_EXHAUSTED"}
    with silent(running.target, MOST_IDLE + beyond), grpc.insecure_channel(running.target) as channel:
        running.until(lambda: running.sample("grpc_server_handled_total", **gone) == beyond)
        assert len(calls) == MOST_IDLE
        stub, request = pb_grpc.SegmentationServiceStub(channel), segment(png(colours))
        for _ in range(20):
            assert stub.Segment(request, timeout=LONG_S).image_width == colours.shape[1]
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=LONG_S)
        assert len(calls) == MOST_IDLE - 1, "the first of these took a place, and has given it back"
    running.until(lambda: len(calls) == 0)


def test_a_call_that_ends_without_a_message_is_told_so(serving):
    running = serving()
    with grpc.insecure_channel(running.target) as channel, pytest.raises(grpc.RpcError) as raised:
        channel.stream_unary(SEGMENT)(iter(()), timeout=LONG_S)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "expected a message" in raised.value.details()


def test_a_stream_that_goes_is_answered_first_and_told_why(serving, colours, png):
    """One image is in work when others want its place."""
    running = serving()
    running.runner.gate.clear()
    calls, end = running.server._edge._idle_calls, threading.Event()

    def images():
        yield pb.SegmentStreamRequest(request=segment(png(colours)))
        end.wait(LONG_S)

    with grpc.insecure_channel(running.target) as channel:
        stream = pb_grpc.SegmentationServiceStub(channel).SegmentStream(images(), timeout=LONG_S)
        running.until(lambda: running.server.admission.inflight == 1 and len(calls) == 1)
        with silent(running.target, MOST_IDLE):
            running.until(lambda: running.server.admission.inflight == 1 and len(calls) == MOST_IDLE)
            running.runner.gate.set()
            assert next(stream).response.image_width == colours.shape[1]
            with pytest.raises(grpc.RpcError) as raised:
                next(stream)
            end.set()
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    running.until(lambda: len(calls) == 0)
