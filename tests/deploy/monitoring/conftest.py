"""What a real server and a real batch job expose, and the rules, read."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import Counter
from prometheus_client.parser import text_string_to_metric_families

from serve.drift import LEAST
from serve.models import ModelState
from serve.repository import BundleFolder
from serve.requests import PRIORITY_NAMES
from weakseg.batch.telemetry import Telemetry
from weakseg.errors import ServiceError, WeaksegError
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

ROOT = Path(__file__).parents[3]
RULES = ROOT / "deploy" / "monitoring" / "rules.yaml"
LONG_S = 60.0
# Of Prometheus and Kubernetes, not of the process that is scraped.
OF_TARGETS = {"namespace", "job", "instance"}
# Labels that only some events bring, with the values that they may have.
ENUMS = {
    "reason": lambda: {kind.reason for kind in _all_kinds(WeaksegError)} | {"CANCELLED", "INTERNAL"},
    "code": lambda: {code.name for code in grpc.StatusCode},
    "grpc_code": lambda: {code.name for code in grpc.StatusCode},
    "state": lambda: {state.name for state in ModelState},
    "priority": lambda: set(PRIORITY_NAMES.values()),
}


def _all_kinds(kind):
    return {kind}.union(*map(_all_kinds, kind.__subclasses__()))


@pytest.fixture(scope="session")
def service_reasons():
    """Every reason for which the service refuses."""
    return {kind.reason for kind in _all_kinds(ServiceError)}


@dataclass
class Exposed:
    """labels: {metric: {label: values}}, as a scrape has them."""

    labels: dict[str, dict[str, set[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))

    def read(self, text):
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values = self.labels[sample.name]
                for label, value in sample.labels.items():
                    values[label].add(value)

    def values(self, metric, label):
        """What a label of it may be."""
        return self.labels[metric][label] | (ENUMS[label]() if label in ENUMS else set())


@pytest.fixture(scope="session")
def exposed(tmp_path_factory, png, colours):
    """Names and labels of what a server tells that has answered, refused and seen drift, and of a batch job."""
    from tests.conftest import Serving

    bundle = ROOT / "tests" / "data" / "bundles_of_schema_3" / "toy" / "3"  # which tells every signal of drift
    running = Serving(folders=[BundleFolder("toy", "3", bundle)])
    running.server.metrics.watch_certificate(lambda: 0.0)  # what a server with TLS has besides
    found = Exposed()
    try:
        outputs = [pb.OutputSpec(kind=pb.OUTPUT_KIND_PSEUDO_MASK), pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)]
        with grpc.insecure_channel(running.target) as channel:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=LONG_S)
            stub = pb_grpc.SegmentationServiceStub(channel)
            for image in [png(colours)] * LEAST:
                stub.Segment(pb.SegmentRequest(image=pb.Image(encoded=image), outputs=outputs), timeout=LONG_S)
            with pytest.raises(grpc.RpcError):
                stub.Segment(pb.SegmentRequest(image=pb.Image(encoded=b"none")), timeout=LONG_S)
        for one in vars(running.server.metrics).values():
            if isinstance(one, Counter):  # which has no series before it counts something
                found.labels[f"{one._name}_total"] = defaultdict(set, {name: set() for name in one._labelnames})
        with urlopen(f"{running.metrics_url}/metrics", timeout=LONG_S) as answer:
            found.read(answer.read().decode())
    finally:
        running.close()
    textfile = tmp_path_factory.mktemp("batch") / "job.prom"
    Telemetry(4, 2, 1, silent=True, timings=None, textfile=textfile).close()
    found.read(textfile.read_text())
    found.labels["up"] = {}  # Prometheus' own
    return found


@pytest.fixture(scope="session")
def groups():
    return yaml.safe_load(RULES.read_text())["groups"]


@pytest.fixture(scope="session")
def rules(groups):
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="session")
def recorded(rules):
    return {rule["record"] for rule in rules if "record" in rule}
