"""R14: a runner that fails, hangs, lies or dies under a real server: who is told what, and what goes on."""

import io
import json
import logging
import subprocess
import sys
import threading

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from PIL import Image

import serve.breaker
import serve.server
import weakseg
from serve.breaker import FAILURES
from serve.repository import BundleFolder
from weakseg import errors
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc
from weakseg.wire_errors import error_from_rpc

LONG_S = 60.0
SHORT_S = 0.1
SECRET = "/etc/models/secret"
BAD = 7  # an image of this value is what the runner below cannot compute
SHAPES = {
    "a row too many": lambda array: np.concatenate([array, array]),
    "no batch axis": lambda array: array[0],
    "other classes": lambda array: array[:, :2],
    "a scalar": lambda array: np.float32(0),
    "text": lambda array: np.full(array.shape, "x"),
    "objects": lambda array: np.full(array.shape, None),
    "NaN": lambda array: np.full_like(array, np.nan),
    "infinity": lambda array: np.full_like(array, -np.inf),
    "nothing": lambda array: None,
}


class FaultyRunner:
    """A real runner with faults. error: what it raises. change: what becomes of its outputs. hang: until `gate` opens.

    only_bad: it is images of BAD alone that it fails on.
    """

    def __init__(self, inner):
        self.inner = inner
        self.gate = threading.Event()
        self.error = self.change = None
        self.hang = self.only_bad = self.closed = False
        self.n_runs = 0

    @property
    def provider(self):
        return self.inner.provider

    def run(self, graph, images, outputs=None):
        self.n_runs += 1
        if self.hang:
            assert self.gate.wait(LONG_S), "the test never opened the gate"
        if self.error is not None and (not self.only_bad or (images == BAD).all(axis=(1, 2, 3)).any()):
            raise self.error
        got = self.inner.run(graph, images, outputs)
        return got if self.change is None else {name: self.change(array) for name, array in got.items()}

    def close(self):
        self.closed = True
        self.inner.close()


@pytest.fixture(params=[{}, {"max_batch": 1}], ids=["in pools", "in one thread"])
def faulty(request, serving, toy_bundle):
    """A function that starts a server; returns it and the runners of its models by name."""
    made = []

    def start(*names, **options):
        options = request.param | options
        runners = {}

        def load(path):
            model = weakseg.load(path, threads=1)
            name = sorted(names)[len(runners) % len(names)] if names else "toy"
            runners[name] = model.runner = FaultyRunner(model.runner)
            made.append(model.runner)
            return model

        folders = [BundleFolder(name, "1", toy_bundle) for name in names] or None
        return serving(load=load, folders=folders, **options), runners

    yield start
    for runner in made:
        runner.gate.set()


@pytest.fixture
def quick(monkeypatch):
    """Breakers that pause for a moment."""
    monkeypatch.setattr(serve.breaker, "FIRST_PAUSE_S", SHORT_S)


def png(value=0, side=8):
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def ask(running, model="", image=None, timeout_s=LONG_S):
    """The response, or the error of a call."""
    request = pb.SegmentRequest(
        image=pb.Image(encoded=image or png()), outputs=[pb.OutputSpec(kind=3)], model=pb.ModelRef(name=model)
    )
    with grpc.insecure_channel(running.target, options=[("grpc.enable_retries", 0)]) as channel:
        try:
            return pb_grpc.SegmentationServiceStub(channel).Segment(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return error


def details(error):
    """(code, reason, error_id, seconds to wait)."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for packed in rpc_status.from_call(error).details:
        packed.Unpack(info), packed.Unpack(retry)
    return error.code().name, info.reason, info.metadata["error_id"], retry.retry_delay.ToNanoseconds() / 1e9


def is_internal(error):
    code, reason, error_id, _ = details(error)
    return (code, reason) == ("INTERNAL", "INTERNAL") and error.details().startswith(f"internal error {error_id}")


def serving_of(running, *services):
    with grpc.insecure_channel(running.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return [
            stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=LONG_S).status == 1 for name in services
        ]


# What a client sees ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", SHAPES.values(), ids=SHAPES)
def test_outputs_that_cannot_be_are_internal_errors_and_the_next_request_is_answered(faulty, change):
    running, runners = faulty()
    runners["toy"].change = change
    assert is_internal(ask(running))
    runners["toy"].change = None
    assert ask(running).outputs


@pytest.mark.parametrize("error", [RuntimeError(SECRET), SystemExit(SECRET), StopIteration(SECRET)], ids=repr)
def test_a_client_is_told_an_id_and_the_log_the_rest(faulty, caplog, error):
    running, runners = faulty()
    runners["toy"].error = error
    with caplog.at_level(logging.ERROR, "serve"):
        failed = ask(running)
    assert is_internal(failed)
    told = repr(rpc_status.from_call(failed)) + repr(failed.trailing_metadata()) + failed.details()
    assert SECRET not in told and "Traceback" not in told and ".py" not in told
    (record,) = [record for record in caplog.records if record.name == "serve.errors"]
    assert record.fields["error_id"] == details(failed)[2] and record.exc_info


def test_a_bad_image_fails_alone_and_not_those_of_its_batch(faulty):
    running, runners = faulty(max_batch=4, max_delay_ms=100.0)
    runners["toy"].error, runners["toy"].only_bad = RuntimeError(SECRET), True
    with grpc.insecure_channel(running.target) as channel:
        segment = pb_grpc.SegmentationServiceStub(channel).Segment
        calls = [
            segment.future(pb.SegmentRequest(image=pb.Image(encoded=png(value)), outputs=[pb.OutputSpec(kind=3)]))
            for value in (1, BAD, 2, 3)
        ]
        failed = [call.exception(LONG_S) for call in calls]
    assert [error is not None for error in failed] == [False, True, False, False]
    assert is_internal(failed[1])


def test_a_provider_that_is_not_there_fails_the_model_and_says_which(serving):
    from serve.server import loader
    from serve.settings import ServeConfig

    running = serving(load=loader(ServeConfig(provider="cuda")))
    with grpc.insecure_channel(running.target) as channel:
        found = pb_grpc.SegmentationServiceStub(channel).GetModel(pb.GetModelRequest()).model
    assert found.state == pb.MODEL_STATE_FAILED
    assert "CUDAExecutionProvider" in found.failure and "onnxruntime-gpu" in found.failure
    code, reason, *_ = details(ask(running))
    assert (code, reason) == ("FAILED_PRECONDITION", "MODEL_FAILED")


# The breaker ----------------------------------------------------------------------------------------------------------


def test_a_model_that_only_fails_is_refused_without_being_run(faulty):
    running, runners = faulty("bad", "good")
    runners["bad"].error = RuntimeError(SECRET)
    assert all(is_internal(ask(running, "bad")) for _ in range(FAILURES))
    refused = ask(running, "bad")
    code, reason, _, retry_s = details(refused)
    assert (code, reason) == ("UNAVAILABLE", "MODEL_UNHEALTHY") and 0 < retry_s <= 1
    error = error_from_rpc(refused, running.target)
    assert type(error) is errors.ModelUnhealthyError and error.retry_s == retry_s
    assert runners["bad"].n_runs == FAILURES
    assert running.sample("weakseg_rejected_total", reason="MODEL_UNHEALTHY") == 1
    assert ask(running, "good").outputs


def test_health_says_which_model_does_not_answer_and_one_of_two_takes_no_server_out(faulty, monkeypatch):
    monkeypatch.setattr(serve.breaker, "FIRST_PAUSE_S", LONG_S)
    running, runners = faulty("bad", "good")
    unhealthy = {"model": "bad", "version": "1"}
    assert running.sample("weakseg_model_unhealthy", **unhealthy) == 0
    runners["bad"].error = runners["good"].error = RuntimeError(SECRET)
    for _ in range(FAILURES):
        ask(running, "bad")
    services = ("liveness", "readiness", "good", "good/1", "bad", "bad/1")
    assert serving_of(running, *services) == [True] * 4 + [False] * 2
    assert running.sample("weakseg_model_unhealthy", **unhealthy) == 1
    assert running.sample("weakseg_model_state", state="READY", **unhealthy) == 1
    assert running.server._ready() == (
        True,
        {"draining": False, "models": {"bad/1": "READY", "good/1": "READY"}, "unhealthy": ["bad/1"]},
    )
    for _ in range(FAILURES):
        ask(running, "good")
    assert serving_of(running, *services) == [True] + [False] * 5


def test_a_model_that_works_again_is_asked_again(faulty, quick):
    running, runners = faulty()
    runners["toy"].error = RuntimeError(SECRET)
    for _ in range(FAILURES):
        ask(running)
    runners["toy"].error = None
    running.until(lambda: running.server.health.ready)
    assert ask(running).outputs
    assert running.sample("weakseg_model_unhealthy", model="toy", version="1") == 0
    assert serving_of(running, "toy", "readiness") == [True, True]


@pytest.mark.parametrize(
    "error", [errors.DataError("too large"), MemoryError(), RuntimeError("std::bad_alloc")], ids=repr
)
def test_images_and_memory_open_no_breaker(faulty, error):
    running, runners = faulty()
    runners["toy"].error = error
    for _ in range(2 * FAILURES):
        ask(running)
    assert runners["toy"].n_runs == 2 * FAILURES


def test_a_new_version_in_its_place_is_asked_at_once(faulty, monkeypatch, toy_bundle):
    monkeypatch.setattr(serve.breaker, "FIRST_PAUSE_S", LONG_S)
    running, runners = faulty()
    broken = runners["toy"]
    broken.error = RuntimeError(SECRET)
    for _ in range(FAILURES):
        ask(running)
    for entry in running.server.models.entries():
        entry.stamp = None  # as if its files had changed
    running.call(running.server.lifecycle.reload())
    assert runners["toy"] is not broken and broken.closed
    assert ask(running).outputs


# Executions that hang -------------------------------------------------------------------------------------------------


def test_a_hanging_execution_is_given_up_and_others_are_answered(faulty, quick):
    running, runners = faulty("hangs", "good", execution_timeout_s=SHORT_S)
    runners["hangs"].hang = True
    assert is_internal(ask(running, "hangs"))
    assert ask(running, "good").outputs
    assert running.sample("weakseg_hung_executions") == 1
    runners["hangs"].hang = False
    runners["hangs"].gate.set()
    running.until(lambda: running.server.pipeline.hung == 0)
    running.until(lambda: running.server.admission.breakers.answers(running.server.models.get("hangs", "").model))
    assert ask(running, "hangs").outputs


def test_a_model_that_hangs_is_refused_at_once_afterwards(faulty):
    running, runners = faulty(execution_timeout_s=SHORT_S)
    runners["toy"].hang = True
    assert is_internal(ask(running))
    assert details(ask(running))[1] == "MODEL_UNHEALTHY"
    assert runners["toy"].n_runs == 1


def test_who_has_a_deadline_is_told_by_it_and_the_next_waits_for_the_same_thread(faulty):
    running, runners = faulty(execution_timeout_s=LONG_S)
    runners["toy"].hang = True
    assert ask(running, timeout_s=SHORT_S).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    running.until(lambda: running.server.admission.inflight == 0)
    runners["toy"].gate.set()
    assert ask(running).outputs


def test_a_model_is_not_closed_while_an_execution_of_it_hangs(faulty):
    running, runners = faulty(execution_timeout_s=SHORT_S)
    hangs = runners["toy"]
    hangs.hang = True
    ask(running)
    for entry in running.server.models.entries():
        entry.stamp = None
    running.call(running.server.lifecycle.reload())
    assert runners["toy"] is not hangs and not hangs.closed
    assert ask(running).outputs


def test_after_three_that_hang_the_server_asks_for_a_restart(faulty, quick, caplog):
    running, runners = faulty("a", "b", "c", execution_timeout_s=SHORT_S)
    told = threading.Event()
    running.server._on_broken = told.set
    for name, runner in runners.items():
        runner.hang = True
        assert not running.server.broken
        assert is_internal(ask(running, name))
    assert told.wait(LONG_S) and running.server.broken
    assert serving_of(running, "liveness") == [True]


def test_a_server_that_is_stopping_gives_those_inside_their_time_though_three_hang(faulty, quick):
    """To be told to stop a second time means to wait for nobody."""
    running, runners = faulty("a", "b", "c", execution_timeout_s=SHORT_S)
    told = []
    running.server._on_broken = lambda: told.append(True)
    running.call(running.server.health.drain())
    for name, runner in runners.items():
        runner.hang = True
        assert is_internal(ask(running, name))
    running.until(lambda: running.server.broken)
    assert not told, "its exit code says it"


# As a process of its own: hanging threads keep Python from ending, and exit codes are those of a process.

HANGING = """
import sys, threading
from weakseg.runners.onnxruntime import OnnxRuntimeRunner
run, n = OnnxRuntimeRunner.run, 0

def hang(self, graph, images, outputs=None):
    if images.shape[1] == 8:
        threading.Event().wait()
    return run(self, graph, images, outputs)

OnnxRuntimeRunner.run = hang
import serve.breaker
serve.breaker.FIRST_PAUSE_S = serve.breaker.LONGEST_PAUSE_S = 0.01
from serve.commands import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def hanging(toy_bundle):
    """A server process that hangs on images of 8 x 8, and its target."""
    started = []

    def start(*flags):
        args = ["--json", "--bundle", str(toy_bundle), "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
        args += ["--threads", "1", "--drain-delay-s", "0", "--execution-timeout-s", "0.2", *flags]
        child = subprocess.Popen([sys.executable, "-c", HANGING, *args], stdout=subprocess.PIPE, text=True)
        started.append(child)
        target = f"127.0.0.1:{json.loads(child.stdout.readline())['port']}"
        with grpc.insecure_channel(target) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service="readiness"), wait_for_ready=True, timeout=LONG_S
            )
            assert any(answer.status == 1 for answer in watch)
        return child, target

    yield start
    for child in started:
        child.kill()
        child.communicate()


class Process:
    def __init__(self, target):
        self.target = target


@pytest.mark.parametrize("n_hung", [0, 1])
def test_a_stop_does_not_wait_for_what_hangs(hanging, n_hung):
    child, target = hanging()
    for _ in range(n_hung):
        assert is_internal(ask(Process(target)))
    child.terminate()
    child.communicate(timeout=LONG_S)
    assert child.returncode == 0, "every request was answered"


def test_too_many_that_hang_end_the_process_with_exit_code_1(hanging):
    child, target = hanging()
    n_hung = 0
    while n_hung < 1 + serve.server.MORE_HUNG:
        error = ask(Process(target))
        n_hung += is_internal(error)
    child.communicate(timeout=LONG_S)
    assert child.returncode == 1
