"""grpc.health.v1 through loading, failure and drain."""

import asyncio
import socket
import struct
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import weakseg
from serve.repository import BundleFolder

LONG_S = 60.0
READY = ("", "readiness", "weakseg.v1.SegmentationService", "inference.GRPCInferenceService")
SERVING, NOT_SERVING = "SERVING", "NOT_SERVING"


def check(running, *services):
    with grpc.insecure_channel(running.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answers = [stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=LONG_S) for name in services]
    return [health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) for answer in answers]


def test_ready(shared_serving):
    assert check(shared_serving, *READY, "liveness", "toy", "toy/1") == [SERVING] * 7


def test_an_unknown_service_is_not_found(shared_serving):
    with pytest.raises(grpc.RpcError) as raised:
        check(shared_serving, "dog")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_alive_but_not_ready_while_a_model_loads(serving):
    may_load = threading.Event()

    def load(path):
        assert may_load.wait(LONG_S)
        return weakseg.load(path, threads=1)

    running = serving(load=load, wait_loaded=False)
    assert check(running, "liveness", *READY, "toy", "toy/1") == [SERVING] + [NOT_SERVING] * 6
    may_load.set()
    running.call(running.server.wait_loaded())
    assert check(running, *READY, "toy", "toy/1") == [SERVING] * 6


def test_a_model_that_failed_keeps_the_server_out_of_rotation(serving, toy_bundle, tmp_path):
    running = serving(folders=[BundleFolder("good", "1", toy_bundle), BundleFolder("bad", "1", tmp_path)])
    assert check(running, "good/1", "good", "bad/1", "bad") == [SERVING, SERVING, NOT_SERVING, NOT_SERVING]
    assert check(running, "liveness", *READY) == [SERVING] + [NOT_SERVING] * 4


def test_draining_is_alive_and_not_ready(serving):
    running = serving()
    running.call(running.server.health.drain())
    assert check(running, "liveness", *READY, "toy", "toy/1") == [SERVING] + [NOT_SERVING] * 6


def test_a_watcher_is_told(serving):
    running = serving()
    with grpc.insecure_channel(running.target) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        running.call(running.server.health.drain())
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


def test_a_watcher_that_does_not_read_holds_nothing_up(serving):
    """It opens its streams with a flow-control window of 0: no answer can be written to it, ever."""
    running = serving()
    with socket.create_connection(("127.0.0.1", running.server.port)) as hostile:
        hostile.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)))
        watch = health_pb2.HealthCheckRequest(service="readiness").SerializeToString()
        hostile.sendall(frame(HEADERS, END_HEADERS, 1, headers("/grpc.health.v1.Health/Watch")))
        hostile.sendall(frame(DATA, END_STREAM, 1, b"\0" + struct.pack(">I", len(watch)) + watch))
        labels = {"grpc_type": "unary_stream", "grpc_service": "grpc.health.v1.Health", "grpc_method": "Watch"}
        running.until(lambda: running.sample("grpc_server_started_total", **labels) == 1)
        running.call(asyncio.wait_for(running.server.health.drain(), LONG_S / 4))  # after LONG_S gRPC ends the watch
        assert check(running, "readiness") == [NOT_SERVING]


DATA, HEADERS, SETTINGS = 0, 1, 4  # RFC 9113, section 6
END_STREAM, END_HEADERS = 1, 4


def frame(kind, flags, stream, payload):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers(path):
    """HPACK's plainest form: each a literal without indexing, its name spelt out (RFC 7541, section 6.2.2)."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    pairs = (fields | {"content-type": "application/grpc"}).items()
    return b"".join(b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in pair) for pair in pairs)
