"""R10, R11, R12: what happens to requests while servers stop, die, and change their models."""

import json
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from functools import partial
from urllib.error import HTTPError
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.repository import find_bundles
from weakseg.client import Client
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0


class Load:
    """Callers that send one request after the other; `outcomes` are (when it ended, what came of it)."""

    def __init__(self, call, n_callers=4):
        self.outcomes = []
        self._call, self._stopped = call, threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(n_callers)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        for thread in self._threads:
            thread.join(LONG_S)

    def wait_for(self, n):
        """Until so many more have ended."""
        n += len(self.outcomes)
        give_up = time.monotonic() + LONG_S
        while len(self.outcomes) < n:
            assert time.monotonic() < give_up, f"{len(self.outcomes)} of {n} requests ended"
            time.sleep(0.002)

    def _send(self):
        while not self._stopped.is_set():
            try:
                outcome = self._call()
            except Exception as error:
                outcome = error
            self.outcomes.append((time.monotonic(), outcome))


def request(png, colours):
    return pb.SegmentRequest(image=pb.Image(encoded=png(colours)), outputs=[pb.OutputSpec(kind=3)])


def is_ready(channel):
    asked = health_pb2.HealthCheckRequest(service="readiness")
    answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=LONG_S, wait_for_ready=True)
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def wait_ready(target):
    with grpc.insecure_channel(target) as channel:
        give_up = time.monotonic() + LONG_S
        while not is_ready(channel):
            assert time.monotonic() < give_up, "the server does not become ready"


def stop_under_load(process, png, colours):
    """One server, stopped while four callers without retries send to it."""
    delay_s = 0.5
    child, said = process("--drain-delay-s", str(delay_s))
    target = f"127.0.0.1:{said['port']}"
    wait_ready(target)
    with grpc.insecure_channel(target, options=[("grpc.enable_retries", 0)]) as channel:
        segment = partial(pb_grpc.SegmentationServiceStub(channel).Segment, request(png, colours), timeout=LONG_S)
        with Load(segment) as load:
            load.wait_for(20)
            told = time.monotonic()
            child.send_signal(signal.SIGTERM)
            _, log = child.communicate(timeout=LONG_S)
    failed = [(ended, error) for ended, error in load.outcomes if isinstance(error, Exception)]
    assert {error.code() for _, error in failed} <= {grpc.StatusCode.UNAVAILABLE}
    assert all(ended - told >= delay_s for ended, _ in failed), "refused while it should still answer"
    answered = [ended for ended, outcome in load.outcomes if not isinstance(outcome, Exception)]
    assert any(ended > told for ended in answered), "it answered until the delay was over"
    assert child.returncode == 0
    lines = [json.loads(line) for line in log.splitlines()]
    assert lines[-1]["message"] == "stopped" and lines[-1]["all_finished"] is True
    codes = Counter(line["code"] for line in lines if line["message"] == "request")
    assert codes["OK"] == len(answered), "every answer that the server gave arrived"
    assert set(codes) <= {"OK", "UNAVAILABLE"}


def test_r10_a_stop_under_load_loses_no_request(process, png, colours):
    stop_under_load(process, png, colours)


@pytest.mark.reliability
def test_r10_twenty_stops_under_load_lose_no_request(process, png, colours):
    for _ in range(20):
        stop_under_load(process, png, colours)


def test_a_second_signal_cuts_requests_off_and_the_exit_code_says_so(process, png, colours):
    child, said = process("--drain-delay-s", "1000", "--max-delay-ms", "60000", "--max-batch", "2")
    with grpc.insecure_channel(f"127.0.0.1:{said['port']}", options=[("grpc.enable_retries", 0)]) as channel:
        wait_ready(f"127.0.0.1:{said['port']}")
        waits = pb_grpc.SegmentationServiceStub(channel).Segment.future(request(png, colours), timeout=LONG_S)
        # Answered after the request above has arrived, which then waits for a second one to share its batch.
        pb_grpc.SegmentationServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=LONG_S)
        child.send_signal(signal.SIGTERM)
        while is_ready(channel):  # two signals at once would be one
            pass
        child.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError):
            waits.result(LONG_S)
    child.communicate(timeout=LONG_S)
    assert child.returncode == 1


def test_r11_a_server_that_is_killed_is_not_noticed_by_clients_that_try_again(process, png, colours):
    children = [process("--log-level", "warning") for _ in range(2)]  # nobody reads their logs
    addresses = [f"127.0.0.1:{said['port']}" for _, said in children]
    for address in addresses:
        wait_ready(address)
    target = "ipv4:" + ",".join(addresses)
    balanced = [("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]}))]
    with Client(target) as client, grpc.insecure_channel(target, balanced) as channel:
        segment = partial(pb_grpc.SegmentationServiceStub(channel).Segment, request(png, colours), timeout=LONG_S)
        with Load(partial(client.segment, colours)) as tries_again, Load(segment) as tries_once:
            tries_once.wait_for(40)
            tries_again.wait_for(40)
            children[0][0].send_signal(signal.SIGKILL)
            tries_once.wait_for(100)
            tries_again.wait_for(100)
    assert [str(error) for _, error in tries_again.outcomes if isinstance(error, Exception)] == []
    failed = [error for _, error in tries_once.outcomes if isinstance(error, Exception)]
    assert len(failed) <= 4, "no more than were on their way to it"
    assert {error.code() for error in failed} <= {grpc.StatusCode.UNAVAILABLE}
    children[1][0].send_signal(signal.SIGTERM)


def n_answered(said):
    text = urlopen(f"http://127.0.0.1:{said['metrics_port']}/metrics", timeout=LONG_S).read().decode()
    return sum(float(n) for n in re.findall(r'^weakseg_requests_total{.*code="OK".*} (\S+)$', text, re.M))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not spread connections over those that share")
def test_servers_on_one_port_share_its_connections_and_one_takes_over_from_another(process, png, colours):
    told = ("--share-port", "--log-level", "warning", "--drain-delay-s", "0")
    first, said = process(*told)
    port, target = ("--port", str(said["port"])), f"127.0.0.1:{said['port']}"
    wait_ready(target)
    second, said_second = process(*told, *port)
    while not is_http_ready(said_second):
        time.sleep(0.01)
    for _ in range(40):  # connections: that all go to one of two happens once in 10^12
        with grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            pb_grpc.SegmentationServiceStub(channel).Segment(request(png, colours), timeout=LONG_S)
    assert n_answered(said) + n_answered(said_second) == 40
    assert n_answered(said) > 0 and n_answered(said_second) > 0

    children, loads = [first, second], []
    for _ in range(3):
        with Client(target) as client, Load(partial(client.segment, colours)) as load:
            load.wait_for(20)
            children[0].send_signal(signal.SIGTERM)
            children.pop(0).communicate(timeout=LONG_S)
            load.wait_for(40)
            new, said_new = process(*told, *port)
            children.append(new)
            while not is_http_ready(said_new):
                time.sleep(0.01)
        loads += load.outcomes
    assert [str(error) for _, error in loads if isinstance(error, Exception)] == []


def is_http_ready(said):
    try:
        return urlopen(f"http://127.0.0.1:{said['metrics_port']}/readyz", timeout=LONG_S).status == 200
    except HTTPError:
        return False


def put(bundle, root, version, damage=None):
    """A bundle of this version in a folder of models, or one with a fault."""
    folder = root / "toy" / version
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["version"] = version
    (folder / "manifest.json").write_text(json.dumps(manifest))
    graph = folder / "segmentation.onnx"
    if damage == "bit":
        data = bytearray(graph.read_bytes())
        data[len(data) // 2] ^= 1
        graph.write_bytes(data)
    elif damage == "half":
        graph.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")


def reload_under_load(serving, bundle, root, png, colours, n_reloads):
    """Each reload brings a version and takes the one before; every third brings a damaged one beside, too."""
    put(bundle, root, "0")
    running = serving(folders=partial(find_bundles, [], root), load=open_bundle)
    asked = request(png, colours)
    with grpc.insecure_channel(running.target) as channel:
        segment = partial(pb_grpc.SegmentationServiceStub(channel).Segment, asked, timeout=LONG_S)
        with Load(segment, n_callers=2) as load:
            for i in range(1, n_reloads + 1):
                damage = ("bit", "half", "manifest")[i // 3 % 3] if i % 3 == 0 else None
                put(bundle, root, str(i))
                if damage:
                    put(bundle, root, str(1000 + i), damage)
                shutil.rmtree(root / "toy" / str(i - 1))
                running.call(running.server.lifecycle.reload())
                load.wait_for(4)
                states = {entry.version: entry.state.name for entry in running.server.models.entries()}
                assert states == {str(i): "READY"} | ({str(1000 + i): "FAILED"} if damage else {})
                assert running.server.models.ready
                if damage:
                    shutil.rmtree(root / "toy" / str(1000 + i))
    assert [outcome for _, outcome in load.outcomes if isinstance(outcome, Exception)] == []
    answers = [outcome for _, outcome in load.outcomes]
    assert len({(answer.model.version, answer.model_sha256) for answer in answers}) == n_reloads + 1, "none was mixed"
    assert len({answer.model_sha256 for answer in answers}) == n_reloads + 1
    assert len({answer.outputs[0].mask.data for answer in answers}) == n_reloads + 1  # its PNG names the model, too


def open_bundle(path):
    import weakseg

    return weakseg.load(path, threads=1)


def test_r12_reloads_under_load_fail_no_request(serving, toy_bundle, tmp_path, png, colours):
    reload_under_load(serving, toy_bundle, tmp_path, png, colours, n_reloads=6)


@pytest.mark.reliability
def test_r12_fifty_reloads_under_load_fail_no_request(serving, toy_bundle, tmp_path, png, colours):
    before = resident_mib()
    reload_under_load(serving, toy_bundle, tmp_path / "warm", png, colours, n_reloads=10)
    warm = resident_mib()
    reload_under_load(serving, toy_bundle, tmp_path / "measured", png, colours, n_reloads=50)
    print(f"resident: {before:.0f} MiB, after 10 reloads {warm:.0f}, after 50 more {resident_mib():.0f}")
    assert resident_mib() < 1.1 * warm


def resident_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) / 1024


def test_sighup_reloads(process, toy_bundle, tmp_path, png, colours):
    put(toy_bundle, tmp_path, "5")
    child, said = process("--models", str(tmp_path))
    assert said["models"] == ["toy/1", "toy/5"]
    wait_ready(f"127.0.0.1:{said['port']}")
    put(toy_bundle, tmp_path, "6")
    child.send_signal(signal.SIGHUP)
    with grpc.insecure_channel(f"127.0.0.1:{said['port']}") as channel:
        segment = pb_grpc.SegmentationServiceStub(channel).Segment
        give_up = time.monotonic() + LONG_S
        while segment(request(png, colours)).model.version != "6":
            assert time.monotonic() < give_up, "the new version is not served"
            time.sleep(0.01)
