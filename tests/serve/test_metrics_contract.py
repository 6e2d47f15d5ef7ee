"""R18: metrics are what docs/serving.md says, never fall, and count what clients count."""

import itertools
import re
import threading
from collections import Counter
from pathlib import Path
from urllib.request import urlopen

import grpc
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from serve.drift import DriftGauge
from serve.metrics import Metrics
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
SEGMENTATION = [pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)]
CODES = {code.value[0]: code.name for code in grpc.StatusCode}
SUFFIXES = {"counter": ("_total",), "histogram": ("_seconds", "_bytes", "_size"), "summary": ("_seconds",)}


def documented():
    """{name: its labels} of the table of docs/serving.md."""
    section = DOCS.read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`(?:weakseg|grpc).*?) \| (.*?) ?\|$", section, re.MULTILINE)
    return {
        name: tuple(filter(None, labels.split(":")[0].split(", ")))
        for names, labels in rows
        for name in re.findall(r"`((?:weakseg|grpc)_\w+)`", names)
    }


def instruments():
    metrics = Metrics()
    metrics.watch_certificate(lambda: 0.0)
    return [one for one in vars(metrics).values() if isinstance(one, MetricWrapperBase)]


def name_of(instrument):
    return instrument._name + ("_total" if instrument._type == "counter" else "")


def exposed():
    """{name: its labels} of all that the server can tell."""
    (drift,) = DriftGauge(list).collect()
    return {name_of(one): one._labelnames for one in instruments()} | {drift.name: ("model", "version", "signal")}


def test_r18_names_and_labels_are_those_of_the_documentation():
    assert exposed() == documented()


def test_r18_names_end_with_what_they_are_in_base_units():
    for one in instruments():
        assert name_of(one).endswith(SUFFIXES.get(one._type, "")), name_of(one)
    assert not [name for name in exposed() if re.search(r"_(ms|us|milli|micro|kb|mb|kib|mib|percent)", name)]


def scrape(running):
    """{(name, labels): value} of what may not fall: counters, and the sums and buckets of distributions."""
    with urlopen(f"{running.metrics_url}/metrics", timeout=LONG_S) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        if family.type != "gauge"
        for sample in family.samples
    }


def test_r18_counts_under_load_are_exactly_those_of_the_clients_and_never_fall(serving, png, colours):
    running = serving(queue_limit=2, max_batch=2)
    good, broken = png(colours), png(colours)[:60]
    calls, images, scrapes = Counter(), Counter(), [scrape(running)]

    def request(data):
        return pb.SegmentRequest(image=pb.Image(encoded=data), outputs=SEGMENTATION)

    def send(index):
        with grpc.insecure_channel(running.target) as channel:
            stub = pb_grpc.SegmentationServiceStub(channel)
            for turn in range(20):
                code = "OK"
                try:
                    stub.Segment(request(broken if (index + turn) % 5 == 0 else good), timeout=LONG_S)
                except grpc.RpcError as error:
                    code = error.code().name
                calls["Segment", code] += 1
                images[code] += 1
            stream = [pb.SegmentStreamRequest(request=request(data)) for data in (good, broken, good)]
            for answer in stub.SegmentStream(iter(stream), timeout=LONG_S):
                images[CODES[answer.error.code]] += 1
            calls["SegmentStream", "OK"] += 1

    threads = [threading.Thread(target=send, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        scrapes.append(scrape(running))
    running.until(lambda: running.server._edge.running == 0)
    scrapes.append(scrape(running))

    assert {"OK", "INVALID_ARGUMENT"} <= {code for _, code in calls}
    for earlier, later in itertools.pairwise(scrapes):
        assert not [key for key, value in earlier.items() if later.get(key, -1.0) < value]
    counted, by_code = Counter(), Counter()
    for (name, *labels), value in scrapes[-1].items():
        label = dict(labels)
        if name == "grpc_server_handled_total":
            counted[label["grpc_method"], label["grpc_code"]] += value
        elif name == "weakseg_requests_total":
            by_code[label["code"]] += value
    assert counted == calls and by_code == images
    for metric in ("weakseg_request_duration_seconds_count", "weakseg_priority_requests_total"):
        assert sum(value for (name, *_), value in scrapes[-1].items() if name == metric) == sum(images.values())
