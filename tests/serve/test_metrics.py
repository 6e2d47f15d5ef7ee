"""Metrics as a scrape sees them, and the HTTP port that shows them."""

import json
import urllib.error
import urllib.request

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.metrics import Metrics, MetricsServer
from weakseg.errors import ConfigError
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
NAMES = {
    "weakseg_requests",
    "weakseg_priority_requests",
    "weakseg_queue_duration_seconds",
    "weakseg_request_duration_seconds",
    "weakseg_stage_duration_seconds",
    "weakseg_batch_size",
    "weakseg_images",
    "weakseg_executions",
    "weakseg_queue_depth",
    "weakseg_queue_limit",
    "weakseg_inflight",
    "weakseg_rejected",
    "weakseg_model_state",
    "weakseg_model_load_seconds",
    "weakseg_model_info",
    "weakseg_response_bytes",
    "weakseg_event_loop_lag_seconds",
    "grpc_server_started",
    "grpc_server_handled",
    "grpc_server_handling_seconds",
    "process_cpu_seconds",
    "process_resident_memory_bytes",
}


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=LONG_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def segment(running, *images):
    """Status codes of unary calls."""
    codes = []
    with grpc.insecure_channel(running.target) as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        for data in images:
            try:
                stub.Segment(request(data), timeout=LONG_S)
                codes.append("OK")
            except grpc.RpcError as error:
                codes.append(error.code().name)
    return codes


def request(data):
    outputs = [pb.OutputSpec(kind=pb.OUTPUT_KIND_PSEUDO_MASK), pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)]
    return pb.SegmentRequest(image=pb.Image(encoded=data), outputs=outputs)


def test_a_scrape_has_every_name_and_the_counts_of_the_client(serving, colours, png):
    running = serving()
    data = png(colours)
    assert segment(running, data, b"no image", data) == ["OK", "INVALID_ARGUMENT", "OK"]
    running.until(lambda: running.server._edge.running == 0)
    status, text = get(f"{running.metrics_url}/metrics")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert status == 200 and families.keys() >= NAMES
    samples = {(s.name, *sorted(s.labels.values())): s.value for f in families.values() for s in f.samples}
    service = "weakseg.v1.SegmentationService"
    assert samples["weakseg_requests_total", "1", "OK", "toy"] == 2
    assert samples["weakseg_requests_total", "1", "INVALID_ARGUMENT", "toy"] == 1
    assert samples["weakseg_rejected_total", "UNSUPPORTED_FORMAT"] == 1
    assert samples["grpc_server_started_total", "Segment", "unary_unary", service] == 3
    assert samples["grpc_server_handled_total", "OK", "Segment", "unary_unary", service] == 2
    assert samples["grpc_server_handled_total", "INVALID_ARGUMENT", "Segment", "unary_unary", service] == 1
    assert samples["grpc_server_handling_seconds_count", "Segment", "unary_unary", service] == 3
    assert samples["weakseg_images_total", "1", "toy"] == 4  # two graphs each
    assert samples["weakseg_executions_total", "1", "toy"] == 4
    assert samples["weakseg_batch_size_sum", "1", "toy"] == 4
    assert samples["weakseg_inflight",] == 0 and samples["weakseg_queue_limit",] == 72
    assert samples["weakseg_response_bytes_count",] == 2
    for stage in ("queue", "decode", "infer", "postprocess", "encode"):
        assert samples["weakseg_stage_duration_seconds_count", stage] == 2
    assert samples["weakseg_model_state", "1", "READY", "toy"] == 1
    assert samples["weakseg_model_state", "1", "LOADING", "toy"] == 0
    assert len(samples) < 500


def test_streams_are_counted_by_image_and_by_call(serving, colours, png):
    running = serving()
    with grpc.insecure_channel(running.target) as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        requests = (pb.SegmentStreamRequest(request=request(data)) for data in (png(colours), b"", png(colours)))
        assert len(list(stub.SegmentStream(requests, timeout=LONG_S))) == 3
    running.until(lambda: running.server._edge.running == 0)
    assert running.sample("weakseg_requests_total", model="toy", version="1", code="OK") == 2
    assert running.sample("weakseg_requests_total", model="toy", version="1", code="INVALID_ARGUMENT") == 1
    labels = {"grpc_type": "stream_stream", "grpc_service": "weakseg.v1.SegmentationService"}
    assert running.sample("grpc_server_handled_total", grpc_method="SegmentStream", grpc_code="OK", **labels) == 1


def test_probes(serving):
    running = serving()
    assert get(f"{running.metrics_url}/livez") == (200, "ok\n")
    status, text = get(f"{running.metrics_url}/readyz")
    assert (status, json.loads(text)) == (200, {"draining": False, "models": {"toy/1": "READY"}})
    running.call(running.server.health.drain())
    status, text = get(f"{running.metrics_url}/readyz")
    assert (status, json.loads(text)["draining"]) == (503, True)
    assert get(f"{running.metrics_url}/livez")[0] == 200
    assert get(f"{running.metrics_url}/dog")[0] == 404


def test_a_port_in_use_is_a_clear_error():
    first = MetricsServer(Metrics(), "127.0.0.1", 0, lambda: (True, {}))
    try:
        with pytest.raises(ConfigError, match=f"{first.port} for metrics.*--metrics-port"):
            MetricsServer(Metrics(), "127.0.0.1", first.port, lambda: (True, {}))
    finally:
        first.close()
