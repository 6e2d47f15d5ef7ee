"""The process: ports, signals, drain, reflection, the command."""

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import serve.server
import weakseg
from serve import commands
from serve.logs import JsonFormatter, TextFormatter
from serve.models import ModelState
from serve.repository import BundleFolder
from serve.server import Server, loader
from serve.settings import ServeConfig
from serve.steps import most_of
from weakseg import signature
from weakseg.cli import main
from weakseg.client import Client
from weakseg.errors import ConfigError
from weakseg.model import ON_CPU
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0


@pytest.fixture(autouse=True)
def own_logging():
    """`weakseg serve` sets up the logs of its process, which is that of the tests here."""
    loggers = [logging.getLogger(name) for name in ("serve", "weakseg")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def is_ready(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    status = stub.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=LONG_S, wait_for_ready=True).status
    return status == health_pb2.HealthCheckResponse.SERVING


def image_request(png, colours):
    return pb.SegmentRequest(
        image=pb.Image(encoded=png(colours)), outputs=[pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)]
    )


def test_sigterm_stops_when_all_is_finished(process, png, colours):
    child, said = process("--drain-delay-s", "0.1")
    assert said["models"] == ["toy/1"]
    with grpc.insecure_channel(f"127.0.0.1:{said['port']}") as channel:
        while not is_ready(channel):
            pass
        assert pb_grpc.SegmentationServiceStub(channel).Segment(image_request(png, colours)).outputs
        assert children_of(child.pid) == [], "gRPC does not survive a fork (github.com/grpc/grpc/issues/13873)"
        child.send_signal(signal.SIGTERM)
        _, log = child.communicate(timeout=LONG_S)
    assert child.returncode == 0
    lines = [json.loads(line) for line in log.splitlines()]
    said = [line["message"] for line in lines if line["message"] != "dense CRF"]  # by then, or not yet
    assert said == ["serving", "model ready", "request", "draining", "stopped"]
    assert lines[-1]["all_finished"] is True


def children_of(pid):
    tasks = Path(f"/proc/{pid}/task")
    return [child for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def test_after_sigterm_it_is_not_ready_and_still_answers_until_a_second_signal(process, png, colours):
    child, said = process("--drain-delay-s", "1000")
    with grpc.insecure_channel(f"127.0.0.1:{said['port']}") as channel:
        while not is_ready(channel):
            pass
        child.send_signal(signal.SIGTERM)
        while is_ready(channel):
            pass
        assert pb_grpc.SegmentationServiceStub(channel).Segment(image_request(png, colours)).outputs
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=LONG_S)
    assert child.returncode == 0


def test_requests_inside_are_finished_and_new_ones_refused(serving, png, colours):
    running = serving()
    running.runner.gate.clear()
    with grpc.insecure_channel(running.target) as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        inside = stub.Segment.future(image_request(png, colours))
        running.until(lambda: len(running.runner.batches) == 1)
        running._loop.call_soon_threadsafe(running._stop.set)
        running.until(lambda: running.server.admission.draining)
        with pytest.raises(grpc.RpcError) as raised:
            stub.Segment(image_request(png, colours))
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        running.runner.gate.set()
        assert inside.result(LONG_S).outputs


def test_connections_are_renewed_and_no_call_notices(serving, colours):
    running = serving(max_connection_age_s=0.2)
    peers = set()
    with Client(running.target) as client:
        give_up = time.monotonic() + LONG_S
        while len(peers) < 3:
            assert time.monotonic() < give_up, "the connection is never renewed"
            client.segment(colours)
            peers |= connections_to(running.server.port)


def connections_to(port):
    """Local ports of this process that are connected to one, from the kernel's tables."""
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split()[1:4] for table in tables for line in table]
    return {local for local, remote, state in rows if remote.endswith(f":{port:04X}") and state == "01"}


@pytest.mark.parametrize("installed", [True, False])
def test_it_runs_on_uvloop_where_that_is_installed(monkeypatch, installed):
    pytest.importorskip("uvloop", reason="no uvloop: pip install 'weakseg[uvloop]'")
    if not installed:
        monkeypatch.setitem(sys.modules, "uvloop", None)

    async def module():
        return type(asyncio.get_running_loop()).__module__

    with asyncio.Runner(loop_factory=commands.loop_factory()) as runner:
        assert runner.run(module()) == ("uvloop" if installed else "asyncio.unix_events")


def test_sigint_stops_without_the_delay(process):
    child, _ = process("--drain-delay-s", "1000")
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=LONG_S)
    assert child.returncode == 0


def test_a_port_in_use_is_a_clear_error(shared_serving, toy_bundle, capsys, serving):
    port = shared_serving.server.port
    for share_port in (False, True):
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: stop what uses the port"):
            serving(port=port, share_port=share_port)
    shared = serving(share_port=True).server.port
    with pytest.raises(ConfigError, match=f"127.0.0.1:{shared}: stop what uses the port"):
        serving(port=shared)
    flags = ["--bundle", str(toy_bundle), "--host", "127.0.0.1", "--port", str(port), "--metrics-port", "0"]
    assert main(["serve", *flags]) == 2
    assert "--port" in capsys.readouterr().err


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize(("host", "asked"), [("::1", ["[::1]"]), ("::", ["[::1]", "127.0.0.1"])])
def test_both_ports_listen_on_ipv6(serving, colours, capsys, host, asked):
    server = serving(host=host).server
    for address in asked:
        with Client(f"{address}:{server.port}") as client:
            assert client.segment(colours).mask.shape == colours.shape[:2]
        assert urlopen(f"http://{address}:{server.metrics_port}/livez").status == 200
    commands.print_hint(server)
    hinted = "[::1]" if host == "::1" else "localhost"
    assert f"http://{hinted}:{server.metrics_port}/metrics" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=re.escape(f"[{host}]:{server.metrics_port} for metrics")):
        serving(host=host, metrics_port=server.metrics_port)


class Recorder:
    """A runner that remembers what it was given; `provider` says where it runs."""

    def __init__(self, provider):
        self.provider = provider
        self.runs = []

    def run(self, graph, images, outputs=None):
        self.runs.append((graph, images.shape))

    def close(self):
        pass


@pytest.mark.parametrize(
    ("provider", "sizes", "batches"),
    [
        (ON_CPU, ("56x40",), {(1, 40, 56), (8, 40, 56)}),
        (ON_CPU, ("20000x20000", "40x56"), {(1, 64, 64), (8, 64, 64), (1, 56, 40), (8, 56, 40)}),
        ("CUDAExecutionProvider", ("64x64",), {(1, 64, 64), (8, 64, 64)}),
        (ON_CPU, (), set()),
    ],
)
def test_every_graph_is_run_on_one_image_and_on_a_whole_batch_of_each_size(
    toy_bundle, monkeypatch, provider, sizes, batches
):
    made, load = [], weakseg.load

    def load_recorded(path, **options):
        model = load(path, **options)
        model.runner.close()
        model.runner = Recorder(provider)
        made.append(options["threads"])
        return model

    monkeypatch.setattr(weakseg, "load", load_recorded)
    monkeypatch.setattr(serve.server, "usable_cpus", lambda: 3)
    model = loader(ServeConfig(threads=64, warm_up=sizes, side_by_side=False))(toy_bundle)
    expected = {(graph, (*batch, 3)) for graph in model.manifest.graphs for batch in batches}
    assert set(model.runner.runs) == expected and len(model.runner.runs) == len(expected)
    assert made == [3], "a thread too many slows all of them down"


def test_large_images_are_warmed_up_one_by_one_on_a_cpu():
    model = SimpleNamespace(runner=Recorder(ON_CPU))
    assert most_of(model, (256, 256, 3), 8) == 1 and most_of(model, (512, 512, 3), 8) == 1
    assert most_of(model, (128, 128, 3), 8) == 4 and most_of(model, (8, 8, 3), 8) == 8
    assert most_of(SimpleNamespace(runner=Recorder("CUDAExecutionProvider")), (512, 512, 3), 8) == 8


def test_more_threads_than_cores_decode_and_do_not_compute(serving, monkeypatch):
    monkeypatch.setattr(serve.server, "usable_cpus", lambda: 2)
    running = serving(threads=5)
    pipeline = running.server.pipeline
    assert (pipeline._batcher._workers, pipeline._decoders._max_workers) == (2, 5)
    (info,) = running.server.metrics.model_info.collect()
    assert {sample.labels["threads"] for sample in info.samples} == {"2"}


def test_reflection_only_on_demand(serving):
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    def services(running):
        with grpc.insecure_channel(running.target) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            answers = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            return {service.name for answer in answers for service in answer.list_services_response.service}

    ours = {"weakseg.v1.SegmentationService", "inference.GRPCInferenceService"}
    assert services(serving(reflection=True)) >= ours | {"grpc.health.v1.Health"}
    with pytest.raises(grpc.RpcError) as raised:
        services(serving())
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_reflection_has_every_file_that_a_client_needs_to_call_us(serving):
    """As grpcurl asks: the file of a service, and what it imports, until nothing is missing."""
    from google.protobuf import descriptor_pb2
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    todo, found = [], {}
    with grpc.insecure_channel(serving(reflection=True).target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        def ask(**asked):
            (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**asked)]))
            for data in answer.file_descriptor_response.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(data)
                found[file.name] = file
                todo.extend(file.dependency)

        for service in ("weakseg.v1.SegmentationService", "inference.GRPCInferenceService", "grpc.health.v1.Health"):
            ask(file_containing_symbol=service)
        while todo:
            if (name := todo.pop()) not in found:
                ask(file_by_filename=name)
    methods = {method.name for file in found.values() for service in file.service for method in service.method}
    assert {"Segment", "SegmentStream", "ModelInfer", "Check", "Watch"} <= methods


def test_wrong_flags_and_variables_are_usage_errors(monkeypatch, capsys):
    assert main(["serve"]) == 2
    assert "--bundle" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--prot", "1"])
    assert stopped.value.code == 2
    assert "--port" in capsys.readouterr().err
    monkeypatch.setenv("WEAKSEG_PORT", "http")
    assert main(["serve"]) == 2
    assert "WEAKSEG_PORT" in capsys.readouterr().err


def test_help_says_what_every_setting_is(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--help"])
    assert stopped.value.code == 0
    shown = re.sub(r", --no-[a-z-]+|\{[^}]*\}", "", capsys.readouterr().out)
    said = dict(re.findall(r"(--[a-z-]+)(.*?)\(default:", shown, re.DOTALL))
    for name in ServeConfig.model_fields:
        text = said["--" + name.replace("_", "-")]
        assert len(re.findall(r"\b[a-z]{2,}\b", text)) > 1, f"{name}: {text}"


def test_check_loads_the_bundles_prints_the_settings_and_opens_no_port(toy_bundle, tmp_path, monkeypatch, capsys):
    assert main(["serve", "--check", "--bundle", str(toy_bundle), "--port", "1", "--max-batch", "3"]) == 0
    shown = tomllib.loads(capsys.readouterr().out)
    assert (shown["port"], shown["max_batch"], shown["bundle"]) == (1, 3, [str(toy_bundle)])

    (tmp_path / "settings.toml").write_text(f"bundle = [{json.dumps(str(toy_bundle))}]\nmax_batch = 3\n")
    monkeypatch.setenv("WEAKSEG_PORT", "1")
    assert main(["serve", "--check", "--json", "--config", str(tmp_path / "settings.toml"), "--max-batch", "4"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["settings"]["port"], shown["settings"]["max_batch"], shown["failures"]) == (1, 4, {})
    assert shown["models"] == [f"{toy_bundle.parent.name}/{toy_bundle.name}"]

    broken = tmp_path / "toy" / "2"
    shutil.copytree(toy_bundle, broken)
    (broken / "segmentation.onnx").write_bytes(b"no graph")
    assert main(["serve", "--check", "--bundle", str(broken)]) == 1
    assert "segmentation.onnx" in capsys.readouterr().err
    assert main(["serve", "--check", "--bundle", str(toy_bundle), "--max-batch", "0"]) == 2
    assert "--max-batch must be at least 1" in capsys.readouterr().err
    missing = ["--tokens", str(tmp_path / "none.toml"), "--host", "127.0.0.1"]
    assert main(["serve", "--check", "--bundle", str(toy_bundle), *missing]) == 2
    assert "expected a file of tokens" in capsys.readouterr().err

    unreadable = ["--tls-cert", "none.crt", "--tls-key", "none.key"]
    assert main(["serve", "--check", "--bundle", str(toy_bundle), *unreadable]) == 2
    assert "expected a PEM certificate" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
        assert main(["serve", "--check", "--bundle", str(toy_bundle), "--tracing"]) == 2
        assert "OTEL_TRACES_EXPORTER" in capsys.readouterr().err

    models = shutil.copytree(toy_bundle.parents[1], tmp_path / "models")
    (models / "toy" / "labels.toml").write_text('stable = "1"\ncanary = "9"\n')
    assert main(["serve", "--check", "--models", str(models)]) == 1
    assert "toy/canary: the label names version 9, there is 1" in capsys.readouterr().err
    (models / "toy" / "labels.toml").write_text("stable = 1\n")
    assert main(["serve", "--check", "--models", str(models)]) == 2
    assert "labels.toml: expected a version as text" in capsys.readouterr().err


def test_demo_serves_the_newest_bundle_and_makes_one_where_there_is_none(tmp_path, monkeypatch, capsys):
    made = []

    class Demo:
        @staticmethod
        def main(argv):
            made.append(argv)
            for age, version in ((100, "old"), (0, "new")):
                manifest = tmp_path / "toy" / version / "manifest.json"
                manifest.parent.mkdir(parents=True)
                manifest.touch()
                os.utime(manifest, (1e9 - age, 1e9 - age))

    monkeypatch.setitem(sys.modules, "weakseg.demo", Demo)
    assert commands.demo_bundle(tmp_path) == tmp_path / "toy" / "new"
    assert "weakseg demo" in capsys.readouterr().err
    assert commands.demo_bundle(tmp_path) == tmp_path / "toy" / "new"
    assert made == [[]]


def test_log_lines():
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("serve", logging.INFO, "", 0, "said %s", ("so",), sys.exc_info())
    record.fields = {"request_id": "a\nforged line", "ms": 1.5}
    line = json.loads(JsonFormatter().format(record))
    assert (line["level"], line["logger"], line["message"]) == ("info", "serve", "said so")
    assert (line["request_id"], line["ms"]) == ("a\nforged line", 1.5)
    assert "ValueError: why" in line["trace"]
    first, *trace = TextFormatter().format(record).split("\n")
    assert first.endswith('info serve: said so request_id="a\\nforged line" ms=1.5')
    assert trace[-1] == "ValueError: why"


async def test_a_bundle_without_the_signature_is_failed_and_says_why(toy_bundle, tmp_path):
    public, _ = signature.keygen(tmp_path / "signing.pem")
    signed = shutil.copytree(toy_bundle, tmp_path / "signed")
    made = signature.sign((signed / "manifest.json").read_bytes(), tmp_path / "signing.pem")
    (signed / "manifest.sig").write_bytes(made)
    folders = [BundleFolder("signed", "1", signed), BundleFolder("unsigned", "1", toy_bundle)]
    config = ServeConfig(host="127.0.0.1", port=0, metrics_port=0, threads=1, public_key=public)
    server = Server(config, lambda: folders)
    await server.start()
    try:
        await server.wait_loaded()
        ready, failed = server.models.entries()
    finally:
        await server.stop(delay_s=0.0, grace_s=LONG_S)
    assert (ready.state, failed.state) == (ModelState.READY, ModelState.FAILED)
    assert "expected manifest.sig by a key in" in failed.failure


def test_tracing_without_its_extra_is_a_clear_error(serving, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    for name in [name for name in sys.modules if name.startswith(("opentelemetry.", "serve.tracing"))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="--tracing needs OpenTelemetry.*weakseg\\[tracing\\]"):
        serving(tracing=True)


def test_without_tracing_nothing_of_it_is_imported():
    code = (
        "import sys, serve.commands, weakseg.client; print([name for name in sys.modules if 'opentelemetry' in name])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
