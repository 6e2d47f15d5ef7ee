"""A pod's life as the manifests write it, but for its places: a real fetch, a real server, its probes, its end."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deploy.kubernetes.manifests import combined, container, needs_kubectl, settings
from tests.web import web_server
from weakseg import signature
from weakseg.bundle import MANIFEST, SIGNATURE

pytestmark = needs_kubectl
LONG_S = 60.0


@pytest.fixture
def places(toy_bundle, tmp_path):
    """{what the manifests say: what it is here}, with a signed model on a web server."""
    served = tmp_path / "served" / "toy" / "1"
    served.mkdir(parents=True)
    for path in toy_bundle.iterdir():
        (served / path.name).write_bytes(path.read_bytes())
    manifest = (served / MANIFEST).read_bytes()
    signature.keygen(tmp_path / "signing.pem")
    (served / SIGNATURE).write_bytes(signature.sign(manifest, tmp_path / "signing.pem"))

    with web_server(tmp_path / "served") as server:
        yield {
            "$(MODEL_SOURCE)": f"{server.url}/toy/1",
            "$(MODEL_SHA256)": hashlib.sha256(manifest).hexdigest(),
            "/models": str(tmp_path / "models"),
            "/etc/weakseg/signing": str(tmp_path),
        }


def put(text, places):
    for said, here in places.items():
        text = text.replace(said, here)
    return text


def command(of, places):
    assert of["command"][0] == "weakseg"
    return [sys.executable, "-m", *(put(word, places) for word in (*of["command"], *of.get("args", [])))]


def test_from_fetch_to_drain(places, tmp_path):
    (tmp_path / "overlay").mkdir()
    found = combined([], tmp_path / "overlay")
    fetched = subprocess.run(
        command(container(found, "fetch-model"), places), capture_output=True, text=True, check=False
    )
    assert fetched.returncode == 0 and "signature: by key" in fetched.stdout, fetched.stderr

    own = {"WEAKSEG_PORT": "0", "WEAKSEG_METRICS_PORT": "0", "WEAKSEG_THREADS": "1", "WEAKSEG_DRAIN_DELAY_S": "0.2"}
    environment = os.environ | {key: put(value, places) for key, value in settings(found).items()} | own
    server = container(found, "server")
    child = subprocess.Popen(
        [*command(server, places), "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        told = json.loads(child.stdout.readline())
        assert told["models"] == ["toy/1"]
        with grpc.insecure_channel(f"127.0.0.1:{told['port']}") as channel:
            health = health_pb2_grpc.HealthStub(channel)

            def wait_until_serving(probe):
                for answer in health.Watch(
                    health_pb2.HealthCheckRequest(service=probe["grpc"]["service"]), timeout=LONG_S
                ):
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return

            for name in ("startup", "liveness", "readiness"):
                wait_until_serving(server[f"{name}Probe"])
        (tmp_path / "mtls").mkdir()
        for name in ("startup", "liveness", "readiness"):  # the same by HTTP, as with mTLS
            path = container(combined(["mtls"], tmp_path / "mtls"), "server")[f"{name}Probe"]["httpGet"]["path"]
            assert (
                urllib.request.urlopen(f"http://127.0.0.1:{told['metrics_port']}{path}", timeout=LONG_S).status == 200
            )
        child.send_signal(signal.SIGTERM)
        assert child.wait(LONG_S) == 0
    finally:
        child.kill()
        child.communicate()
