"""Answers that are not read: by calls whose clients give the server no window to send them in."""

import asyncio
import contextlib
import time
from functools import partial
from types import SimpleNamespace

import grpc
import numpy as np
import pytest

from serve.access import CLIENT
from serve.idle import MOST_IDLE
from serve.inference import grpc_inference_service_pb2 as oip
from serve.server import CALLS_BEYOND, HOLD_S, REFUSALS_S
from serve.unread import COPIES, Unread
from tests import http2
from weakseg.client import Client
from weakseg.errors import QueueFullError
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
MIB = 2**20
SIDE = 512
RAW = [pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION, mask_encoding=pb.MASK_ENCODING_RAW_U8)]
SEGMENT, STREAM = (f"/weakseg.v1.SegmentationService/{method}" for method in ("Segment", "SegmentStream"))
INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture
def taken():
    """What an Unread told last."""
    return []


def as_client(name):
    CLIENT.set(name)


async def test_one_client_has_a_share_and_all_together_the_limit(taken):
    unread = Unread(1200 * COPIES, taken.append)
    with contextlib.ExitStack() as answers:
        for client in ("a", "b", "c"):
            as_client(client)
            for n_bytes in (300, 1):
                unread.check()
                answers.enter_context(unread.holding(n_bytes))
            with pytest.raises(QueueFullError, match="earlier answers have not been read"):
                unread.check()
            unread.check(inside=True)
        as_client("d")
        for n_bytes in (297, 1):
            unread.check()
            answers.enter_context(unread.holding(n_bytes))
        for client in ("d", "e"):
            as_client(client)
            with pytest.raises(QueueFullError, match="answers of others"):
                unread.check()
        assert taken[-1] == unread.taken_bytes == 1201 * COPIES
    unread.check()
    assert taken[-1] == 0 and not unread._by_client, "and nobody is remembered"


async def test_one_answer_may_be_as_large_as_it_is(taken):
    unread = Unread(100 * COPIES, taken.append)
    as_client("a")
    with unread.holding(60):
        unread.check()
        with unread.holding(1), pytest.raises(QueueFullError):
            unread.check()
        unread.check()


async def test_an_answer_is_its_clients_who_ever_ends_the_call(taken):
    unread, ended = Unread(1000, taken.append), []
    as_client("a")
    unread.until_sent(100, SimpleNamespace(add_done_callback=ended.append))
    as_client("b")
    unread.check()
    assert unread._by_client == {"a": [100 * COPIES]}
    ended[0](None)
    assert not unread._by_client and taken == [100 * COPIES, 0]


async def test_an_answer_that_has_just_been_sent_is_waited_for(taken):
    unread, ended = Unread(1000, taken.append), []
    assert await unread.wait_sent(0.0)
    context = SimpleNamespace(add_done_callback=ended.append)
    unread.until_sent(1, context)
    asyncio.get_running_loop().call_soon(lambda: ended.pop()(None))
    assert await unread.wait_sent(0.0), "gRPC says so a moment after the client has it"
    unread.until_sent(0, context)
    assert not await unread.wait_sent(0.0)


def big(png):
    return png(np.zeros((SIDE, SIDE, 3), np.uint8))


def segment(png):
    return pb.SegmentRequest(image=pb.Image(encoded=big(png)), outputs=RAW)


def infer(png):
    data = big(png)
    request = oip.ModelInferRequest(raw_input_contents=[len(data).to_bytes(4, "little") + data])
    request.inputs.add(name="image", datatype="BYTES", shape=[1])
    request.outputs.add(name="segmentation")
    return request


METHODS = {
    SEGMENT: segment,
    STREAM: lambda png: pb.SegmentStreamRequest(request=segment(png)),
    INFER: infer,
}


def ask(connection, path, stream, message):
    frames = http2.frame(http2.HEADERS, http2.END_HEADERS, stream, http2.headers(path))
    frames += http2.frame(http2.DATA, 0, stream, http2.message(message.SerializeToString()))
    end = b"" if path == STREAM else http2.frame(http2.DATA, http2.END_STREAM, stream)
    assert http2.send(connection, frames + end)


@pytest.mark.parametrize("path", METHODS)
def test_who_does_not_read_is_refused_and_others_are_answered(serving, png, colours, path):
    running = serving(image_memory_mib=4)
    message, answer_bytes = METHODS[path](png), SIDE * SIDE * COPIES
    unread = partial(running.sample, "weakseg_unread_bytes")
    most = 3  # of 2 MiB: the one that goes beyond them, too
    with http2.connect(running.target, http2.NO_WINDOW, source="127.0.0.2") as connection:
        for n in range(1, most + 1):
            ask(connection, path, 2 * n - 1, message)
            running.until(lambda n=n: n * answer_bytes <= unread() < (n + 0.1) * answer_bytes)
        ask(connection, path, 2 * most + 1, message)
        running.until(lambda: running.sample("weakseg_rejected_total", reason="QUEUE_FULL") == 1)
        assert len(running.runner.batches) == most, "nothing was computed for it"
        with Client(running.target) as client:
            assert client.segment(colours).mask.shape == colours.shape[:2]
        connection.sendall(http2.frame(http2.RST_STREAM, 0, 1, http2.CANCEL))
        running.until(lambda: unread() < most * answer_bytes)
        ask(connection, path, 2 * most + 3, message)
        running.until(lambda: unread() >= most * answer_bytes)
    running.until(lambda: unread() == 0 and running.server._edge.running == 0)


def test_a_request_that_waited_for_memory_is_refused_when_others_have_filled_it(serving, png):
    """What waits has been let in: it must not leave more behind than what is inside when its share is reached."""
    running = serving(image_memory_mib=4, max_batch=1)
    running.runner.gate.clear()
    with http2.connect(running.target, http2.NO_WINDOW) as connection:
        for n in range(12):
            ask(connection, SEGMENT, 2 * n + 1, segment(png))
        running.until(lambda: running.sample("weakseg_image_memory_waiting") == 10)
        running.runner.gate.set()
        running.until(lambda: running.server.admission.inflight == 0)
        answered = running.sample("weakseg_requests_total", model="toy", version="1", code="OK")
        assert answered == len(running.runner.batches)
        assert 6 <= answered <= 8, "4 MiB of answers, and two images inside"


def test_so_many_calls_are_held_whatever_their_answers_are(serving):
    """Beyond these gRPC refuses all, until connections go."""
    running = serving(queue_limit=1, max_batch=1)
    most, path = MOST_IDLE + 2 + CALLS_BEYOND, "/weakseg.v1.SegmentationService/GetModel"
    streams = range(1, 200, 2)
    with contextlib.ExitStack() as opened, grpc.insecure_channel(running.target) as channel:
        get_model = partial(pb_grpc.SegmentationServiceStub(channel).GetModel, pb.GetModelRequest(), timeout=LONG_S)
        for _ in range(most // len(streams)):
            connection = opened.enter_context(http2.connect(running.target, http2.NO_WINDOW))
            for stream in streams:
                ask(connection, path, stream, pb.GetModelRequest())
            assert get_model().model.ref.name == "toy", "so many are held"
        for stream in streams:
            ask(connection, path, 200 + stream, pb.GetModelRequest())
        assert outcome_of(get_model) == grpc.StatusCode.RESOURCE_EXHAUSTED
        opened.close()
        assert outcome_of(get_model, unlike=grpc.StatusCode.RESOURCE_EXHAUSTED) == grpc.StatusCode.OK


def outcome_of(call, unlike=grpc.StatusCode.OK):
    """The code that a call ends with as soon as it is another one; what was sent before may still be on its way."""
    give_up = time.monotonic() + LONG_S
    while time.monotonic() < give_up:
        try:
            call()
            code = grpc.StatusCode.OK
        except grpc.RpcError as error:
            code = error.code()
        if code is not unlike:
            return code
    raise AssertionError(f"it is always {unlike}")


@pytest.mark.parametrize("path", METHODS)
def test_a_drain_waits_for_answers_that_are_on_their_way(serving, png, path):
    running = serving()
    with http2.connect(running.target, http2.NO_WINDOW) as connection:
        ask(connection, path, 1, METHODS[path](png))
        if path == STREAM:
            connection.sendall(http2.frame(http2.DATA, http2.END_STREAM, 1))
        running.until(lambda: running.sample("weakseg_unread_bytes") > 0)
        running._loop.call_soon_threadsafe(running._stop.set)
        running.until(lambda: running.server.admission.draining)
        time.sleep(HOLD_S + REFUSALS_S + 0.5)  # for which a server waits that thinks it has answered
        for stream in (0, 1):
            connection.sendall(http2.frame(http2.WINDOW_UPDATE, 0, stream, http2.MORE_WINDOW))
        n_bytes = 0
        while (data := connection.recv(2**16)) and n_bytes < SIDE * SIDE:
            n_bytes += len(data)
    assert n_bytes >= SIDE * SIDE
