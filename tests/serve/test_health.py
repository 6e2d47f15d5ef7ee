"""grpc.health.v1 through loading, failure and drain."""

import asyncio
import contextlib
import itertools
import threading
import urllib.error
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import weakseg
from serve.repository import BundleFolder
from tests import http2

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


# What each service says in each phase of a server, "" standing for all of READY; /readyz is HTTP.
PHASES = {
    "a model loads": {"liveness": 1, "": 0, "toy": 0, "toy/1": 0, "toy/2": None, "/readyz": 503},
    "it is ready": {"liveness": 1, "": 1, "toy": 1, "toy/1": 1, "toy/2": None, "/readyz": 200},
    "a newer version is damaged": {"liveness": 1, "": 1, "toy": 1, "toy/1": 1, "toy/2": 0, "/readyz": 200},
    "it is mended": {"liveness": 1, "": 1, "toy": 1, "toy/1": 1, "toy/2": 1, "/readyz": 200},
    "the old one goes": {"liveness": 1, "": 1, "toy": 1, "toy/1": 0, "toy/2": 1, "/readyz": 200},
    "it drains": {"liveness": 1, "": 0, "toy": 0, "toy/1": 0, "toy/2": 0, "/readyz": 503},
}
ANSWERS = {0: NOT_SERVING, 1: SERVING, None: "SERVICE_UNKNOWN"}  # the last where Check is NOT_FOUND


class Watcher:
    """A Watch stream in a thread of its own; `seen` is all that it was told."""

    def __init__(self, channel, service):
        self.seen = []
        self._call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def close(self):
        self._call.cancel()
        self._thread.join(LONG_S)

    def _watch(self):
        with contextlib.suppress(grpc.RpcError):
            for answer in self._call:
                self.seen.append(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def readyz(running):
    try:
        with urllib.request.urlopen(f"{running.metrics_url}/readyz", timeout=LONG_S) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_r17_every_service_in_every_phase_by_check_and_by_watch(serving, toy_bundle, tmp_path):
    may_load = threading.Event()
    folders = [BundleFolder("toy", "1", toy_bundle)]

    def load(path):
        assert may_load.wait(LONG_S)
        return weakseg.load(path, threads=1)

    running = serving(load=load, wait_loaded=False, folders=lambda: list(folders))

    def enter(phase):
        if phase == "it is ready":
            may_load.set()
            running.call(running.server.wait_loaded())
        elif phase == "a newer version is damaged":
            folders.append(BundleFolder("toy", "2", tmp_path))
        elif phase == "it is mended":
            folders[1] = BundleFolder("toy", "2", toy_bundle)
        elif phase == "the old one goes":
            del folders[0]
        if phase == "it drains":
            running.call(running.server.health.drain())
        elif phase != "a model loads":
            running.call(running.server.lifecycle.reload())

    rows = {service: "" if service in READY else service for service in (*READY, "liveness", "toy", "toy/1", "toy/2")}
    with grpc.insecure_channel(running.target) as channel:
        watchers = {service: Watcher(channel, service) for service in rows}
        try:
            for phase, table in PHASES.items():
                enter(phase)
                said = {service: ANSWERS[table[row]] for service, row in rows.items()}
                running.until(lambda said=said: all(watchers[one].seen[-1:] == [said[one]] for one in rows))
                assert readyz(running) == table["/readyz"], phase
                assert running.sample("weakseg_ready") == (table["/readyz"] == 200), phase
                known = [one for one in rows if said[one] != ANSWERS[None]]
                assert check(running, *known) == [said[one] for one in known], phase
            for service, row in rows.items():
                column = [ANSWERS[table[row]] for table in PHASES.values()]
                assert watchers[service].seen == [key for key, _ in itertools.groupby(column)], service
        finally:
            for watcher in watchers.values():
                watcher.close()


def test_a_watcher_that_does_not_read_holds_nothing_up(serving):
    """It opens its streams with a flow-control window of 0: no answer can be written to it, ever."""
    running = serving()
    with http2.connect(running.target, http2.NO_WINDOW) as hostile:
        watch = http2.message(health_pb2.HealthCheckRequest(service="readiness").SerializeToString())
        block = http2.headers("/grpc.health.v1.Health/Watch")
        hostile.sendall(http2.frame(http2.HEADERS, http2.END_HEADERS, 1, block))
        hostile.sendall(http2.frame(http2.DATA, http2.END_STREAM, 1, watch))
        labels = {"grpc_type": "unary_stream", "grpc_service": "grpc.health.v1.Health", "grpc_method": "Watch"}
        running.until(lambda: running.sample("grpc_server_started_total", **labels) == 1)
        running.call(asyncio.wait_for(running.server.health.drain(), LONG_S / 4))  # after LONG_S gRPC ends the watch
        assert check(running, "readiness") == [NOT_SERVING]
