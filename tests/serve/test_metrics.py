"""Metrics as a scrape sees them, and the HTTP port that shows them."""

import itertools
import json
import urllib.error
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2
from prometheus_client.openmetrics.parser import text_string_to_metric_families as families_of_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from serve.inference import grpc_inference_service_pb2 as oip
from serve.inference import grpc_inference_service_pb2_grpc as oip_grpc
from serve.interceptors import TABLE
from serve.metrics import KEPT_VERSIONS, Metrics, MetricsServer
from serve.repository import BundleFolder
from serve.requests import PRIORITY_NAMES
from weakseg.errors import ConfigError, ServiceError, WeaksegError
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
    "weakseg_unread_bytes",
    "weakseg_rejected",
    "weakseg_refinements_cut_short",
    "weakseg_cache_hits",
    "weakseg_cache_misses",
    "weakseg_cache_bytes",
    "weakseg_model_state",
    "weakseg_model_unhealthy",
    "weakseg_hung_executions",
    "weakseg_ready",
    "weakseg_memory_limit_bytes",
    "weakseg_model_load_seconds",
    "weakseg_model_info",
    "weakseg_response_bytes",
    "weakseg_event_loop_lag_seconds",
    "weakseg_drift_score",
    "grpc_server_started",
    "grpc_server_handled",
    "grpc_server_handling_seconds",
    "process_cpu_seconds",
    "process_resident_memory_bytes",
}


def get(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=LONG_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def code_of(method, message, **options):
    """Status code of a unary call."""
    try:
        method(message, timeout=LONG_S, **options)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def segment(running, *images):
    with grpc.insecure_channel(running.target) as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        return [code_of(stub.Segment, request(data)) for data in images]


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
    assert samples["weakseg_ready",] == 1
    assert samples["weakseg_memory_limit_bytes",] > samples["process_resident_memory_bytes",]


def test_counts_are_those_of_clients_of_both_services_denied_ones_too(serving, colours, png, tmp_path):
    (tmp_path / "tokens.toml").write_text(
        '[me]\ntoken = "a token that is mine"\n[other]\ntoken = "a token of another"\nallow = ["models"]'
    )
    running = serving(tokens=tmp_path / "tokens.toml")
    me, other = ((("authorization", f"Bearer {token}"),) for token in ("a token that is mine", "a token of another"))
    file, broken = (
        oip.ModelInferRequest(
            inputs=[oip.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[2])],
            raw_input_contents=[2 * (len(data).to_bytes(4, "little") + data)],
        )
        for data in (png(colours), b"no image")
    )
    with grpc.insecure_channel(running.target) as channel:
        ours, theirs = pb_grpc.SegmentationServiceStub(channel), oip_grpc.GRPCInferenceServiceStub(channel)
        counts = {
            ("Segment", code_of(ours.Segment, request(png(colours)), metadata=me)): 1,
            ("Segment", code_of(ours.Segment, request(png(colours)))): 1,
            ("Segment", code_of(ours.Segment, request(png(colours)), metadata=other)): 1,
            ("ModelInfer", code_of(theirs.ModelInfer, file, metadata=me)): 1,
            ("ModelInfer", code_of(theirs.ModelInfer, broken, metadata=me)): 1,
            ("ModelInfer", code_of(theirs.ModelInfer, file)): 1,
            ("ServerLive", code_of(theirs.ServerLive, oip.ServerLiveRequest())): 1,
        }
    running.until(lambda: running.server._edge.running == 0)
    _, text = get(f"{running.metrics_url}/metrics")
    handled = {
        (sample.labels["grpc_method"], sample.labels["grpc_code"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "grpc_server_handled_total"
    }
    assert handled == counts and len(counts) == 7
    images = {code: running.sample("weakseg_requests_total", model="toy", version="1", code=code) for _, code in counts}
    assert images == {"OK": 3, "INVALID_ARGUMENT": 2, "UNAUTHENTICATED": 0, "PERMISSION_DENIED": 0}
    assert running.sample("weakseg_rejected_total", reason="UNAUTHENTICATED") == 2
    assert running.sample("weakseg_rejected_total", reason="PERMISSION_DENIED") == 1
    assert running.sample("weakseg_rejected_total", reason="UNSUPPORTED_FORMAT") == 2


def test_one_model_has_at_most_500_series_whatever_was_asked_and_however_it_ended(serving, colours, png):
    running = serving(reflection=True)
    assert segment(running, png(colours), b"no image") == ["OK", "INVALID_ARGUMENT"]
    metrics = running.server.metrics
    codes = {row.code.name for row in TABLE.values()} | {"OK", "CANCELLED", "INTERNAL", "UNKNOWN"}
    services = [
        pb.DESCRIPTOR.services_by_name["SegmentationService"],
        oip.DESCRIPTOR.services_by_name["GRPCInferenceService"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
    ]
    methods = [
        ("unary_unary", method.containing_service.full_name, method.name) for s in services for method in s.methods
    ]
    methods.append(("stream_stream", "grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo"))
    assert len(methods) >= 13
    for method, code in itertools.product(methods, codes):
        metrics.grpc_started.labels(*method).inc()
        metrics.grpc_handled.labels(*method, code).inc()
        if method[1] in {service.full_name for service in services[:2]}:
            metrics.grpc_seconds.labels(*method).observe(1.0)
    for model, code in itertools.product([("toy", "1"), ("", "")], codes):  # none, where it was refused before
        metrics.requests.labels(*model, code).inc()
        metrics.request_seconds.labels(*model).observe(1.0)
    metrics.refinements_cut.labels("toy", "1").inc()
    reasons = {kind.reason for kind in all_kinds(WeaksegError)} | {"CANCELLED", "INTERNAL"}
    assert {kind.reason for kind in all_kinds(ServiceError)} <= reasons
    for reason in reasons:
        metrics.rejected.labels(reason).inc()
    for priority in PRIORITY_NAMES.values():
        metrics.priorities.labels(priority).inc()
        metrics.queue_seconds.labels(priority).observe(1.0)
    _, text = get(f"{running.metrics_url}/metrics")
    n_series = sum(len(family.samples) for family in text_string_to_metric_families(text))
    n_signals = 3  # of weakseg_drift_score, which has none before many images
    assert 400 < n_series + n_signals <= 500


def all_kinds(kind):
    return {kind}.union(*map(all_kinds, kind.__subclasses__()))


def test_versions_that_come_and_go_leave_a_bounded_number_of_series(serving, toy_bundle, png, colours):
    served = ["1"]
    running = serving(folders=lambda: [BundleFolder("toy", served[0], toy_bundle)])

    def versions(metric):
        return {sample.labels["version"] for family in metric.collect() for sample in family.samples}

    metrics = running.server.metrics
    for version in range(2, 52):
        assert segment(running, png(colours)) == ["OK"]
        served[0] = str(version)
        running.call(running.server.lifecycle.reload())
        for state in (metrics.model_state, metrics.model_load_seconds, metrics.model_info):
            assert versions(state) == {str(version)}
    kept = {str(51 - back) for back in range(1, KEPT_VERSIONS + 1)}
    for counter in (
        metrics.requests,
        metrics.request_seconds,
        metrics.batch_size,
        metrics.images,
        metrics.executions,
    ):
        assert versions(counter) == kept


def test_the_counters_of_a_version_that_comes_back_go_on():
    metrics = Metrics()
    for version in ("1", *map(str, range(10, 13))):
        metrics.requests.labels("toy", version, "OK").inc()
        metrics.forget_model("toy", version)
    metrics.keep_model("toy", "1")
    for version in map(str, range(20, 30)):
        metrics.forget_model("toy", version)
    labels = {"model": "toy", "code": "OK"}
    assert metrics.registry.get_sample_value("weakseg_requests_total", labels | {"version": "1"}) == 1
    assert metrics.registry.get_sample_value("weakseg_requests_total", labels | {"version": "10"}) is None


def test_openmetrics_where_it_is_asked_for(serving):
    running = serving()
    _, plain = get(f"{running.metrics_url}/metrics", Accept="text/plain;version=0.0.4;q=0.5,*/*;q=0.1")
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    request = urllib.request.Request(f"{running.metrics_url}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=LONG_S) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        modern = answer.read().decode()
    assert modern.endswith("# EOF\n") and "# EOF" not in plain
    names = {family.name for family in families_of_openmetrics(modern)}
    assert names >= NAMES


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
    assert (status, json.loads(text)) == (200, {"draining": False, "models": {"toy/1": "READY"}, "unhealthy": []})
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
