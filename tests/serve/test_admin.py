"""weakseg.v1.AdminService: a real server, asked on both of its ports."""

import json
import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

import weakseg
from serve import logs
from serve.admin import MAX_CALLS
from serve.repository import find_bundles
from serve.settings import ServeConfig
from tests import http2
from weakseg.client import Client
from weakseg.errors import ConfigError, ModelNotFoundError
from weakseg.v1 import admin_service_pb2 as pb
from weakseg.v1 import admin_service_pb2_grpc as pb_grpc
from weakseg.v1 import segmentation_service_pb2 as main_pb
from weakseg.v1 import segmentation_service_pb2_grpc as main_pb_grpc
from weakseg.wire_errors import error_from_status

LONG_S = 60.0
ADMIN = "correct horse battery staple"
OTHER = "another token, long enough"


class Folder:
    """A folder of models that can be written, by version of one model."""

    def __init__(self, root, bundle):
        self.root, self._bundle = root, bundle

    def put(self, version, damaged=False):
        folder = self.root / "toy" / version
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._bundle, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"version": version}))
        if damaged:
            (folder / "segmentation.onnx").write_bytes(b"no graph")

    def scan(self):
        return find_bundles([], self.root)


@pytest.fixture
def folder(tmp_path, toy_bundle):
    made = Folder(tmp_path / "models", toy_bundle)
    made.put("1")
    return made


@pytest.fixture
def administered(serving, folder):
    """A function that starts a server over the folder, with an admin port."""
    return partial(serving, folders=folder.scan, load=lambda path: weakseg.load(path, threads=1), admin_port=0)


@pytest.fixture(autouse=True)
def own_levels():
    """The loggers are those of the tests' process."""
    loggers = [logging.getLogger(name) for name in logs.LOGGERS]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


class Admin:
    """A stub: what a call gives, or (code, reason) of its error."""

    def __init__(self, running, token=None, credentials=None):
        target = f"127.0.0.1:{running.server.admin_port}"
        self._channel = grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target)
        self._stub = pb_grpc.AdminServiceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else None

    def __call__(self, method, **fields):
        request = getattr(pb, f"{method}Request")(**fields)
        try:
            return getattr(self._stub, method)(request, timeout=LONG_S, metadata=self._metadata)
        except grpc.RpcError as error:
            status = rpc_status.from_call(error)
            self.message = error.details()
            return error.code().name, error_from_status(status).reason if status else ""

    def load(self, version):
        return self("LoadModel", name="toy", version=version)

    def unload(self, version, force=False):
        return self("UnloadModel", name="toy", version=version, force=force)

    def reload(self):
        """{version: state}, and the versions that are out."""
        answer = self("ReloadModels")
        states = {one.version: main_pb.ModelState.Name(one.state).removeprefix("MODEL_STATE_") for one in answer.models}
        return states, [one.version for one in answer.unloaded]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._channel.close()


def health(running, *services):
    with grpc.insecure_channel(running.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answers = [stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=LONG_S) for name in services]
    return [answer.status == health_pb2.HealthCheckResponse.SERVING for answer in answers]


METHODS = ("LoadModel", "UnloadModel", "ReloadModels", "GetLogLevel", "SetLogLevel")


def test_there_is_no_admin_port_unless_it_is_asked_for_and_never_on_the_main_one(serving):
    for running in (serving(), serving(admin_port=0)):
        with grpc.insecure_channel(running.target) as channel:
            stub = pb_grpc.AdminServiceStub(channel)
            for method in METHODS:
                with pytest.raises(grpc.RpcError) as raised:
                    getattr(stub, method)(getattr(pb, f"{method}Request")(), timeout=LONG_S)
                assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    off, on = serving(), running.server
    assert off.server.admin_port is None and on.admin_port not in (None, on.port)
    with grpc.insecure_channel(f"127.0.0.1:{on.admin_port}") as channel, pytest.raises(grpc.RpcError) as raised:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=LONG_S)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED, "nor is anything else on the admin port"


def test_load_and_unload_and_what_health_says_at_once(administered, folder, colours):
    running = administered()
    folder.put("2")
    with Admin(running) as admin, Client(running.target) as client:
        answer = admin.load("2").model
        assert (answer.name, answer.version, answer.state) == ("toy", "2", main_pb.MODEL_STATE_READY)
        assert health(running, "toy/1", "toy/2", "toy", "readiness") == [True] * 4
        segmented = client.segment(colours)
        assert segmented.model == "toy/2" and client.model().sha256 == answer.sha256
        assert admin.unload("1") == pb.UnloadModelResponse()
        assert health(running, "toy/1", "toy/2", "toy", "readiness") == [False, True, True, True]
        assert admin.unload("2") == ("FAILED_PRECONDITION", "MODEL_NEEDED")
        assert "the last version of toy that answers: load another first, or use force" in admin.message
        assert health(running, "toy/2", "readiness") == [True] * 2
        assert admin.unload("2", force=True) == pb.UnloadModelResponse()
        assert health(running, "liveness", "toy/2", "toy", "readiness", "") == [True] + [False] * 4
        with pytest.raises(ModelNotFoundError):
            Client(running.target).segment(colours)
        assert admin.load("1").model.state == main_pb.MODEL_STATE_READY
        assert health(running, "toy/1", "toy/2", "toy", "readiness") == [True, False, True, True]
        assert admin.reload() == ({"1": "READY"}, ["2"])


def test_a_version_with_a_label_needs_force(administered, folder):
    folder.put("2")
    (folder.root / "toy" / "labels.toml").write_text('stable = "1"\n')
    with Admin(administered()) as admin:
        assert admin.unload("1") == ("FAILED_PRECONDITION", "MODEL_NEEDED")
        assert admin.unload("1", force=True) == pb.UnloadModelResponse()


def test_what_is_unloaded_stays_out_over_polls_and_reloads(administered, folder):
    folder.put("2")
    running = administered(poll_s=0.01)
    with Admin(running) as admin:
        admin.unload("2")
        folder.put("2")
        folder.put("3")
        running.until(lambda: "3" in {entry.version for entry in running.server.models.entries()})
        assert admin.reload() == ({"1": "READY", "3": "READY"}, ["2"])
        admin.load("2")
        assert admin.reload() == ({"1": "READY", "2": "READY", "3": "READY"}, [])


def test_a_broken_bundle_is_told_and_what_answered_still_does(administered, folder, colours):
    running = administered()
    with Admin(running) as admin, Client(running.target) as client:
        before = client.segment(colours)
        folder.put("1", damaged=True)
        assert admin.load("1") == ("FAILED_PRECONDITION", "MODEL_FAILED")
        assert "toy/1 could not be loaded" in admin.message and "segmentation.onnx" in admin.message
        assert (client.segment(colours).mask == before.mask).all()
        assert health(running, "toy/1", "readiness") == [True, True]
        (status,) = admin("ReloadModels").models
        assert status.state == main_pb.MODEL_STATE_READY and "segmentation.onnx" in status.failure and status.sha256
        folder.put("2", damaged=True)
        assert admin.load("2") == ("FAILED_PRECONDITION", "MODEL_FAILED")
        assert admin.reload() == ({"1": "READY", "2": "FAILED"}, [])
        assert health(running, "toy/1", "toy/2", "toy", "readiness") == [True, False, True, True]
        for version in "12":
            folder.put(version)
            assert admin.load(version).model.failure == ""


def test_requests_that_name_no_model_there_is(administered, folder):
    with Admin(administered()) as admin:
        for method in ("LoadModel", "UnloadModel"):
            for fields in ({}, {"name": "toy"}, {"version": "1"}):
                assert admin(method, **fields) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
            for version in ("2", "stable", "../toy/1", str(folder.root / "toy" / "1"), "1\0"):
                assert admin(method, name="toy", version=version) == ("NOT_FOUND", "MODEL_NOT_FOUND")
        assert admin("LoadModel", name="x" * 5000, version="1") == ("RESOURCE_EXHAUSTED", "")
        (folder.root / "toy" / "labels.toml").write_text("damaged")
        assert admin("ReloadModels") == ("FAILED_PRECONDITION", "FOLDERS_UNREADABLE")
        assert "labels.toml" in admin.message


def test_the_log_level_changes_at_once(administered):
    with Admin(administered()) as admin:
        for name in ("DEBUG", "ERROR", "WARNING", "INFO"):
            previous = admin("GetLogLevel").level
            assert admin("SetLogLevel", level=f"LOG_LEVEL_{name}").previous_level == previous
            assert admin("GetLogLevel").level == pb.LogLevel.Value(f"LOG_LEVEL_{name}")
            for logger in ("serve.requests", "weakseg"):
                assert logging.getLogger(logger).getEffectiveLevel() == getattr(logging, name)
        for level in (0, 9, -1):
            assert admin("SetLogLevel", level=level) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
        assert admin("GetLogLevel").level == pb.LOG_LEVEL_INFO


def test_at_debug_every_call_has_a_line(administered, colours, caplog):
    running = administered()
    with Admin(running) as admin, Client(running.target) as client:
        client.segment(colours)
        assert not [record for record in caplog.records if record.name == "serve.calls"]
        admin("SetLogLevel", level="LOG_LEVEL_DEBUG")
        client.segment(colours)
    lines = [record.fields for record in caplog.records if record.name == "serve.calls"]
    assert [(line["method"].rpartition("/")[2], line["code"]) for line in lines] == [("Segment", "OK")]


def test_every_admin_call_leaves_a_line_at_any_level(process, folder):
    child, said = process("--models", str(folder.root), "--bundle", str(folder.root / "toy" / "1"), "--admin-port", "0")
    with grpc.insecure_channel(f"127.0.0.1:{said['admin_port']}") as channel:
        stub = pb_grpc.AdminServiceStub(channel)
        stub.ReloadModels(pb.ReloadModelsRequest(), timeout=LONG_S, wait_for_ready=True)
        stub.SetLogLevel(pb.SetLogLevelRequest(level=pb.LOG_LEVEL_ERROR), timeout=LONG_S)
        with pytest.raises(grpc.RpcError):
            stub.UnloadModel(pb.UnloadModelRequest(name="toy", version="7", force=True), timeout=LONG_S)
        raw = channel.unary_unary("/weakseg.v1.AdminService/LoadModel")
        with pytest.raises(grpc.RpcError) as raised:
            raw(b"\x0a\xff", timeout=LONG_S)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    child.terminate()
    _, log = child.communicate(timeout=LONG_S)
    lines = [line for line in map(json.loads, log.splitlines()) if line["logger"] == "serve.audit"]
    assert [(line["method"].rpartition("/")[2], line["asked"], line["code"]) for line in lines] == [
        ("ReloadModels", {}, "OK"),
        ("SetLogLevel", {"level": "LOG_LEVEL_ERROR"}, "OK"),
        ("UnloadModel", {"name": "toy", "version": "7", "force": True}, "NOT_FOUND"),
        ("LoadModel", {}, "INVALID_ARGUMENT"),
    ]
    assert all(line["client"] == "ipv4:127.0.0.1" and line["peer"].startswith("ipv4:127.0.0.1:") for line in lines)


def test_tokens_need_a_permission_of_its_own(administered, tmp_path, caplog):
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(f'[operator]\ntoken = "{ADMIN}"\nallow = ["admin"]\n[tool]\ntoken = "{OTHER}"\n')
    running = administered(tokens=tokens)
    asked = {"SetLogLevel": {"level": "LOG_LEVEL_INFO"}, "LoadModel": {"name": "toy", "version": "1"}}
    asked["UnloadModel"] = asked["LoadModel"] | {"force": True}
    for token, code in ((None, "UNAUTHENTICATED"), ("x" * 20, "UNAUTHENTICATED"), (OTHER, "PERMISSION_DENIED")):
        with Admin(running, token) as admin:
            for method in METHODS:
                assert admin(method, **asked.get(method, {})) == (code, code)
    denied = [record for record in caplog.records if record.name == "serve.audit"]
    assert len(denied) == 3 * len(METHODS) and {record.message for record in denied} == {"denied"}
    assert [entry.state.name for entry in running.server.models.entries()] == ["READY"], "nothing was done"
    caplog.clear()
    with Admin(running, ADMIN) as admin, caplog.at_level(logging.INFO, "serve.audit"):
        for method in METHODS:
            assert not isinstance(admin(method, **asked.get(method, {})), tuple)
    assert [record.fields["client"] for record in caplog.records if record.name == "serve.audit"] == ["operator"] * 5
    labels = {"grpc_type": "unary_unary", "grpc_service": "weakseg.v1.AdminService", "grpc_method": "LoadModel"}
    assert running.sample("grpc_server_handled_total", grpc_code="OK", **labels) == 1
    assert running.sample("grpc_server_handled_total", grpc_code="PERMISSION_DENIED", **labels) == 1
    assert ADMIN not in caplog.text and OTHER not in caplog.text


def test_other_machines_only_with_tokens_and_these_only_with_tls():
    with pytest.raises(ValueError, match="admin_port without tokens is for this machine only"):
        ServeConfig(admin_port=1, admin_host="0.0.0.0")
    with pytest.raises(ValueError, match="tokens need tls_cert"):
        ServeConfig(admin_port=1, admin_host="0.0.0.0", tokens="a", host="127.0.0.1")
    ServeConfig(admin_host="0.0.0.0")
    ServeConfig(admin_port=1, admin_host="0.0.0.0", tokens="a", plaintext_tokens=True)
    ServeConfig(admin_port=1, admin_host="0.0.0.0", tokens="a", tls_cert="b", tls_key="c")


def test_a_port_in_use_is_a_clear_error(serving, shared_serving):
    port = shared_serving.server.port
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: .* choose another with --admin-port"):
        serving(admin_port=port)


def test_calls_that_say_nothing_are_few(administered):
    running = administered()
    block = http2.headers("/weakseg.v1.AdminService/GetLogLevel")
    with Admin(running) as admin, http2.connect(f"127.0.0.1:{running.server.admin_port}") as connection:
        for call in range(MAX_CALLS + 10):
            connection.sendall(http2.frame(http2.HEADERS, http2.END_HEADERS, 2 * call + 1, block))
        running.until(lambda: len(running.server._edge._idle_calls) == MAX_CALLS)
        assert admin("GetLogLevel") == ("RESOURCE_EXHAUSTED", "")
        connection.close()
        running.until(lambda: len(running.server._edge._idle_calls) == 0)
        assert admin("GetLogLevel").level


def test_an_overloaded_and_draining_server_is_administered(serving, png, colours, folder):
    running = serving(folders=folder.scan, admin_port=0, queue_limit=1, max_batch=1, rate_limit=0.001, rate_burst=2)
    folder.put("2")
    running.runner.gate.clear()
    image = main_pb.SegmentRequest(image=main_pb.Image(encoded=png(colours)), outputs=[main_pb.OutputSpec(kind=3)])
    with grpc.insecure_channel(running.target) as channel, Admin(running) as admin:
        segment = main_pb_grpc.SegmentationServiceStub(channel).Segment
        inside = [segment.future(image, timeout=LONG_S) for _ in range(2)]
        running.until(lambda: running.server.admission.inflight == len(inside))
        with pytest.raises(grpc.RpcError) as raised:
            segment(image, timeout=LONG_S)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        held = running.runner
        assert admin.load("2").model.version == "2"
        running._loop.call_soon_threadsafe(running._stop.set)
        running.until(lambda: running.server.admission.draining)
        assert admin.reload() == ({"1": "READY", "2": "READY"}, [])
        running.runner = held  # which is let go when the server is closed


def test_unloading_under_load_loses_no_request(administered, folder, colours):
    folder.put("2")
    running = administered()
    stop = threading.Event()

    def ask():
        answered = []
        with Client(running.target, model="toy") as client:
            while not stop.is_set():
                answered.append(client.segment(colours).model)
        return answered

    with Admin(running) as admin, ThreadPoolExecutor(3) as callers:
        asking = [callers.submit(ask) for _ in range(3)]
        try:
            for _ in range(4):
                running.until(lambda: running.server.admission.inflight > 0)
                assert not isinstance(admin.unload("2"), tuple)
                running.until(lambda: running.server.admission.inflight > 0)
                assert not isinstance(admin.load("2"), tuple)
        finally:
            stop.set()
        answered = [model for caller in asking for model in caller.result(LONG_S)]
    assert set(answered) <= {"toy/1", "toy/2"} and answered


def test_loading_and_unloading_at_once_end_in_one_state(administered, folder, colours):
    folder.put("2")
    running = administered()

    def change(i):
        with Admin(running) as admin:
            return admin.load("2") if i % 2 else admin.unload("2", force=True)

    with ThreadPoolExecutor(6) as callers:
        answers = list(callers.map(change, range(12)))
    assert not any(isinstance(answer, tuple) for answer in answers)
    with Admin(running) as admin, Client(running.target) as client:
        states, out = admin.reload()
        assert (states, out) in [({"1": "READY"}, ["2"]), ({"1": "READY", "2": "READY"}, [])]
        assert client.segment(colours).model == f"toy/{max(states)}"


def test_a_caller_that_goes_away_leaves_nothing_half_done(serving, folder, toy_bundle):
    may_load = threading.Event()

    def load(path):
        assert path.name == "1" or may_load.wait(LONG_S)
        return weakseg.load(path, threads=1)

    running = serving(folders=folder.scan, load=load, admin_port=0)
    folder.put("2")
    with grpc.insecure_channel(f"127.0.0.1:{running.server.admin_port}") as channel, Admin(running) as admin:
        call = pb_grpc.AdminServiceStub(channel).LoadModel.future(pb.LoadModelRequest(name="toy", version="2"))
        running.until(lambda: [e.state.name for e in running.server.models.entries()] == ["READY", "LOADING"])
        call.cancel()
        labels = {"grpc_type": "unary_unary", "grpc_service": "weakseg.v1.AdminService", "grpc_method": "LoadModel"}
        running.until(lambda: running.sample("grpc_server_handled_total", grpc_code="CANCELLED", **labels) == 1)
        assert health(running, "toy", "readiness") == [True, True], "what is there goes on"
        may_load.set()
        assert admin.reload() == ({"1": "READY", "2": "READY"}, [])
