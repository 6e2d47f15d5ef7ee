"""Spans over a real server, taken from the SDK's own exporter into memory, and over OTLP."""

import itertools
import json
import logging
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from serve.inference import grpc_inference_service_pb2 as oip
from serve.inference import grpc_inference_service_pb2_grpc as oip_grpc
from weakseg.client import AsyncClient, Client
from weakseg.errors import ConfigError, ImageError
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
SEGMENT = "weakseg.v1.SegmentationService/Segment"
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, DROPPED = (f"00-{TRACE_ID}-{PARENT_ID}-{flags}" for flags in ("01", "00"))

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed: pip install 'weakseg[tracing]'")
from opentelemetry import trace  # noqa: E402
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402
from opentelemetry.trace import SpanKind, StatusCode  # noqa: E402


class Traced:
    """A server, and the spans that it made."""

    def __init__(self, running):
        self.running = running
        self._exporter = InMemorySpanExporter()
        running.server.tracing.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def spans(self):
        self.running.until(lambda: self.running.server._edge.running == 0)
        return self._exporter.get_finished_spans()

    def named(self, name):
        return [span for span in self.spans if span.name == name]

    def children(self, of):
        return [span for span in self.spans if span.parent and span.parent.span_id == of.context.span_id]


@pytest.fixture
def traced(serving, monkeypatch):
    """A function that starts a server whose spans stay in memory."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    return lambda **options: Traced(serving(tracing=True, **options))


def request(data, **fields):
    outputs = [pb.OutputSpec(kind=pb.OUTPUT_KIND_PSEUDO_MASK), pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)]
    return pb.SegmentRequest(image=pb.Image(encoded=data), outputs=outputs, **fields)


def segment(running, message, traceparent=None):
    """Status code of a call."""
    metadata = None if traceparent is None else (("traceparent", traceparent),)
    with grpc.insecure_channel(running.target) as channel:
        try:
            pb_grpc.SegmentationServiceStub(channel).Segment(message, metadata=metadata, timeout=LONG_S)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


@pytest.mark.parametrize(
    ("max_batch", "first"),
    [(8, ["decode", "queue", "infer", "queue", "infer"]), (1, ["queue", "decode", "infer", "infer"])],
    ids=["in pools", "in one thread"],
)
def test_a_request_is_a_span_with_a_child_per_stage(traced, colours, png, max_batch, first):
    made = traced(max_batch=max_batch)
    assert segment(made.running, request(png(colours), request_id="mine"), SAMPLED) == "OK"
    (span,) = made.named(SEGMENT)
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE_ID, PARENT_ID)
    assert span.kind is SpanKind.SERVER and span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes) == {
        "rpc.system.name": "grpc",
        "rpc.method": SEGMENT,
        "rpc.response.status_code": "OK",
        "weakseg.request_id": "mine",
        "weakseg.model": "toy",
        "weakseg.version": "1",
        "weakseg.priority": "interactive",
        "weakseg.width": 56,
        "weakseg.height": 40,
        "weakseg.batch_size": 1,
    }
    children = sorted(made.children(span), key=lambda child: child.start_time)
    # Of the classifier, then of the segmentation network.
    assert [child.name for child in children] == [*first, "postprocess", "encode"]
    # Their times follow each other within the request's; a microsecond for two clocks read one after the other.
    slack_ns = 10**6
    assert all(one.end_time <= two.start_time + slack_ns for one, two in itertools.pairwise(children))
    assert span.start_time <= children[0].start_time + slack_ns and children[-1].end_time <= span.end_time + slack_ns
    assert {span.context.trace_id for span in made.spans} == {span.context.trace_id}


def test_images_of_a_batch_are_linked_to_their_execution(traced, colours, png):
    made = traced(max_batch=2)
    made.running.runner.gate.clear()
    outputs = [pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)]
    message = pb.SegmentRequest(image=pb.Image(encoded=png(colours)), outputs=outputs)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(segment, made.running, message)
        made.running.until(lambda: len(made.running.runner.batches) == 1)
        others = [pool.submit(segment, made.running, message) for _ in range(2)]
        made.running.until(lambda: made.running.server.pipeline._batcher.depth == 2)
        made.running.runner.gate.set()
        assert [future.result() for future in (first, *others)] == ["OK"] * 3
    alone, shared = sorted(made.named("execution"), key=lambda span: span.start_time)
    assert [span.attributes["weakseg.batch_size"] for span in (alone, shared)] == [1, 2]
    assert shared.attributes["weakseg.graph"] == "segmentation"
    of_shared = [span for span in made.named("infer") if shared.context in [link.context for link in span.links]]
    assert len({span.context.trace_id for span in of_shared}) == 2
    linked = {shared.parent.span_id, *(link.context.span_id for link in shared.links)}
    assert linked == {span.context.span_id for span in of_shared}


def test_each_image_of_a_stream_and_each_batch_of_the_open_inference_protocol_is_a_span(traced, colours, png):
    made = traced()
    tensor = oip.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[2])
    file = png(colours)
    message = oip.ModelInferRequest(
        inputs=[tensor],
        outputs=[oip.ModelInferRequest.InferRequestedOutputTensor(name="segmentation")],
        raw_input_contents=[2 * (len(file).to_bytes(4, "little") + file)],
    )
    metadata = (("traceparent", SAMPLED),)
    with grpc.insecure_channel(made.running.target) as channel:
        images = (pb.SegmentStreamRequest(request=request(data)) for data in (file, b""))
        list(pb_grpc.SegmentationServiceStub(channel).SegmentStream(images, metadata=metadata, timeout=LONG_S))
        oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message, metadata=metadata, timeout=LONG_S)
    streamed = made.named("weakseg.v1.SegmentationService/SegmentStream")
    assert {span.attributes["rpc.response.status_code"] for span in streamed} == {"OK", "INVALID_ARGUMENT"}
    (batch,) = made.named("inference.GRPCInferenceService/ModelInfer")
    assert batch.attributes["weakseg.images"] == 2
    stages = [child.name for child in made.children(batch)]
    assert sorted(stages) == sorted([*["decode", "queue", "infer", "postprocess"] * 2, "encode"])
    assert {f"{span.parent.span_id:016x}" for span in (*streamed, batch)} == {PARENT_ID}


def test_the_status_is_the_code_s_and_only_faults_of_the_server_are_errors(traced, colours, png):
    made = traced()
    broken = b"a secret that is no image"
    assert segment(made.running, request(broken)) == "INVALID_ARGUMENT"
    made.running.runner.error = RuntimeError("another secret")
    assert segment(made.running, request(png(colours))) == "INTERNAL"
    client_fault, our_fault = made.named(SEGMENT)
    assert client_fault.status.status_code is StatusCode.UNSET
    assert client_fault.attributes["error.type"] == "UNSUPPORTED_FORMAT"
    assert our_fault.status.status_code is StatusCode.ERROR
    assert our_fault.attributes["rpc.response.status_code"] == our_fault.attributes["error.type"] == "INTERNAL"
    (execution,) = made.named("execution")
    assert execution.status.status_code is StatusCode.ERROR
    assert "secret" not in "".join(span.to_json() for span in made.spans)


def test_a_request_that_is_cancelled_in_the_queue_ends_its_span(traced, colours, png):
    made = traced()
    made.running.runner.gate.clear()
    with grpc.insecure_channel(made.running.target) as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        inside = stub.Segment.future(request(png(colours)))
        made.running.until(lambda: made.running.runner.batches)
        waiting = stub.Segment.future(request(png(colours)))
        made.running.until(lambda: made.running.sample("weakseg_queue_depth") == 1)
        waiting.cancel()
        made.running.until(lambda: made.running.sample("weakseg_queue_depth") == 0)
        made.running.runner.gate.set()
        assert inside.result(LONG_S).outputs
    codes = sorted(span.attributes["rpc.response.status_code"] for span in made.named(SEGMENT))
    assert codes == ["CANCELLED", "OK"]


def test_what_is_sampled_is_an_exemplar_and_in_the_log(traced, caplog, colours, png):
    made = traced()
    with caplog.at_level(logging.INFO, "serve.requests"):
        assert segment(made.running, request(png(colours)), SAMPLED) == "OK"
        assert segment(made.running, request(png(colours)), DROPPED.replace("4bf", "4be")) == "OK"
        assert len(made.named(SEGMENT)) == 1
    logged = [record.fields["trace_id"] for record in caplog.records]
    assert logged == [TRACE_ID, TRACE_ID.replace("4bf", "4be")]  # that of a caller who did not sample, too
    text, _ = made.running.server.metrics.text("application/openmetrics-text; version=1.0.0")
    exemplars = {
        (family.name, sample.labels.get("stage", "")): sample.exemplar.labels
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.exemplar
    }
    stages = ("decode", "queue", "infer", "postprocess", "encode")
    names = {("weakseg_stage_duration_seconds", stage) for stage in stages}
    assert exemplars.keys() == names | {("weakseg_request_duration_seconds", "")}
    assert all(labels == {"trace_id": TRACE_ID} for labels in exemplars.values())


@pytest.mark.parametrize("traceparent", ["", "00-", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "zz" * 500])
def test_a_damaged_header_begins_a_trace_of_its_own(traced, colours, png, traceparent):
    made = traced()
    assert segment(made.running, request(png(colours)), traceparent) == "OK"
    (span,) = made.named(SEGMENT)
    assert span.parent is None


async def test_the_clients_pass_the_span_that_runs_on(traced, colours, png):
    made = traced()
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    with tracer.start_as_current_span("caller") as caller, Client(made.running.target) as client:
        client.segment(png(colours))
        with pytest.raises(ImageError):
            client.segment(png(colours)[:60])
        assert len(list(client.segment_many([png(colours)]))) == 1
        async with AsyncClient(made.running.target) as asking:
            await asking.segment(png(colours))
    spans = [span for span in made.spans if span.kind is SpanKind.SERVER]
    assert len(spans) == 4
    assert {span.parent.span_id for span in spans} == {caller.get_span_context().span_id}
    assert trace.get_current_span().get_span_context().is_valid is False


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self):
        self.resources = []

    def Export(self, request, context):  # noqa: N802
        self.resources += request.resource_spans
        return trace_service_pb2.ExportTraceServiceResponse()


def segment_when_ready(said, data):
    with Client(f"127.0.0.1:{said['port']}") as client:
        while client.model().state != "ready":
            pass
        client.segment(data)


def test_spans_reach_a_collector_by_the_time_that_the_server_has_stopped(process, monkeypatch, colours, png):
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "masks")
    server.start()
    try:
        child, said = process("--tracing", "--drain-delay-s", "0")
        segment_when_ready(said, png(colours))
        child.terminate()
        _, log = child.communicate(timeout=LONG_S)
        assert child.returncode == 0
    finally:
        server.stop(0).wait()
    (line,) = [json.loads(line) for line in log.splitlines() if '"request"' in line]
    (resource,) = {
        json.dumps(sorted((a.key, a.value.string_value) for a in r.resource.attributes)) for r in collector.resources
    }
    attributes = dict(json.loads(resource))
    assert attributes["service.name"] == "masks" and attributes["service.version"]
    spans = [span for r in collector.resources for scope in r.scope_spans for span in scope.spans]
    assert {span.name for span in spans} >= {SEGMENT, "decode", "queue", "infer", "execution", "postprocess", "encode"}
    assert {span.trace_id.hex() for span in spans} == {line["trace_id"]}


def test_a_collector_that_is_not_there_neither_fails_requests_nor_keeps_the_server_from_stopping(
    process, monkeypatch, colours, png
):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    child, said = process("--tracing", "--drain-delay-s", "0")
    segment_when_ready(said, png(colours))
    child.terminate()
    _, log = child.communicate(timeout=LONG_S)
    lines = [json.loads(line) for line in log.splitlines()]  # what the exporter has to say, too
    assert child.returncode == 0 and lines[-1]["message"] == "stopped"


@pytest.mark.parametrize(
    ("variable", "value"), [("OTEL_TRACES_EXPORTER", "zipkin"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")]
)
def test_variables_that_ask_for_what_is_not_there_are_errors(serving, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"{variable} must be .*{value}"):
        serving(tracing=True)
