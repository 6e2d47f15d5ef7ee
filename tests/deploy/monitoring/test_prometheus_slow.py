"""A real Prometheus scrapes a real server by the real rules: an overload makes alerts fire, its end clears them.

Nobody waits for days: a minute of the rules is a second here, in every window and every `for`. Nothing else is changed.
"""

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import grpc
import pytest
import yaml

import weakseg
from tests.deploy.monitoring.test_dashboards import BOARDS, expressions
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

RULES = Path(__file__).parents[3] / "deploy" / "monitoring" / "rules.yaml"
LONG_S = 120.0
EXECUTION_S = 0.05
SECONDS = {"m": 1, "h": 60, "d": 24 * 60}
OVERLOAD = {("WeaksegOverloaded", "warning"), ("WeaksegAvailabilityBudgetBurn", "critical")}
# What nothing is asked for here, or nothing is wrong with.
EMPTY = {"Answers from the cache", "Refinements cut short", "Firing alerts", "Brightness", "Confidence", "Classes"}

pytestmark = pytest.mark.slow


def quickened(rules):
    """The rules, a minute of which is a second."""

    def seconds(match):
        return f"{int(match[1]) * SECONDS[match[2]]}s"

    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"(?<=\[)(\d+)([mhd])(?=\])", seconds, rule["expr"])
            if "for" in rule:
                rule["for"] = re.sub(r"(\d+)([mhd])", seconds, rule["for"])
    return rules


class Prometheus:
    def __init__(self, binary, folder, target):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        (folder / "rules.yaml").write_text(yaml.safe_dump(quickened(yaml.safe_load(RULES.read_text()))))
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(folder / "rules.yaml")],
            "scrape_configs": [{"job_name": "weakseg", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        flags = {
            "config.file": folder / "prometheus.yaml",
            "storage.tsdb.path": folder / "data",
            "web.listen-address": self.url.removeprefix("http://"),
        }
        self.log = folder / "log"
        with self.log.open("w") as log:
            command = [binary, *(f"--{flag}={value}" for flag, value in flags.items())]
            self.process = subprocess.Popen(command, stderr=log, stdout=log)

    def get(self, path, **query):
        with urlopen(f"{self.url}/api/v1/{path}?{urlencode(query)}", timeout=LONG_S) as answer:
            told = json.load(answer)
        assert told["status"] == "success", told
        return told["data"]

    def firing(self):
        alerts = self.get("alerts")["alerts"]
        return {(a["labels"]["alertname"], a["labels"]["severity"]) for a in alerts if a["state"] == "firing"}

    def until(self, condition):
        deadline = time.monotonic() + LONG_S
        while True:
            try:
                if condition():
                    return
            except URLError:  # it does not listen yet
                pass
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"still not so, firing: {self.firing()}"
            time.sleep(0.2)

    def close(self):
        self.process.terminate()
        self.process.wait(LONG_S)


class SlowRunner:
    """A real runner of known capacity: an execution each EXECUTION_S."""

    def __init__(self, inner):
        self.inner = inner
        self.provider = inner.provider

    def run(self, graph, images, outputs=None):
        time.sleep(EXECUTION_S)
        return self.inner.run(graph, images, outputs)

    def close(self):
        self.inner.close()


@pytest.fixture
def server(serving):
    def load(path):
        model = weakseg.load(path, threads=1)
        model.runner = SlowRunner(model.runner)
        return model

    return serving(load=load, max_batch=1, queue_limit=2)


@pytest.fixture
def prometheus(server, tmp_path):
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    started = Prometheus(binary, tmp_path, server.metrics_url.removeprefix("http://"))
    yield started
    started.close()


@pytest.fixture
def callers(server, png, colours):
    """A function: so many callers from now on, each of which asks again soon after it has its answer."""
    outputs = [pb.OutputSpec(kind=pb.OUTPUT_KIND_PSEUDO_MASK), pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)]
    request = pb.SegmentRequest(image=pb.Image(encoded=png(colours)), outputs=outputs)
    running = []

    def ask(stop):
        with grpc.insecure_channel(server.target, options=[("grpc.enable_retries", 0)]) as channel:
            stub = pb_grpc.SegmentationServiceStub(channel)
            while not stop.wait(EXECUTION_S):
                with suppress(grpc.RpcError):  # QUEUE_FULL
                    stub.Segment(request, timeout=LONG_S)

    def change(n):
        for stop, thread in running:
            stop.set()
            thread.join(LONG_S)
        running.clear()
        for _ in range(n):
            stop = threading.Event()
            running.append((stop, threading.Thread(target=ask, args=(stop,))))
            running[-1][1].start()

    yield change
    change(0)


def test_an_overload_fires_and_its_end_clears(server, prometheus, callers):
    callers(1)
    prometheus.until(lambda: burn(prometheus, "1h") == 0)
    assert not prometheus.firing()

    callers(12)
    prometheus.until(lambda: prometheus.firing() >= OVERLOAD)

    callers(1)
    prometheus.until(lambda: not prometheus.firing() & OVERLOAD)
    names = {name for name, _ in prometheus.firing()}
    assert names <= {"WeaksegAvailabilityBudgetBurn", "WeaksegLatencyBudgetBurn", "WeaksegQueueWaitBudgetBurn"}

    for board in BOARDS:
        for panel, _, expr in expressions(board):
            found = prometheus.get("query", query=expr.replace("[5m]", "[10s]"))["result"]
            assert found or board == "batch" or panel["title"] in EMPTY, (board, panel["title"])

    server.call(server.server.health.drain())
    prometheus.until(lambda: ("WeaksegNoneReady", "critical") in prometheus.firing())


def burn(prometheus, window):
    """How fast the budget of errors was spent of late; None before there is a rate."""
    found = prometheus.get("query", query=f'slo:weakseg_burn:rate{window}{{slo="availability"}}')["result"]
    return float(found[0]["value"][1]) if found else None
