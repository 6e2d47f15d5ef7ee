"""The parts of `make bench-peers`, with our own server and echoes; the peers themselves need their environments."""

import asyncio
import io
import json
import shutil
import sys
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.load import segment_request
from benchmarks.peers import pairs, peers, stages
from benchmarks.peers.__main__ import main, settings
from benchmarks.peers.http import Http
from benchmarks.peers.measure import PeerError, check, measured
from benchmarks.peers.models import expected, model_folder
from benchmarks.peers.peers import OURS, PEERS, ROOT, SETTINGS, Peer
from benchmarks.peers.processes import cpu_seconds, memory_mib, running
from benchmarks.peers.second_client import h2load, refused
from benchmarks.serving import photograph, server
from serve.inference import grpc_inference_service_pb2 as oip

LONG_S = 60.0


class Here(Peer):
    """One whose environment is that of the tests."""

    python = Path(sys.executable)


def here(peer):
    return Here(**{name: getattr(peer, name) for name in peer.__dataclass_fields__})


def png(labels):
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["echo_grpc", "echo_http"])
def test_an_echo_is_measured(name, tmp_path):
    images = {b"one": None, b"another": None}
    found = measured(
        here(PEERS[name]),
        SETTINGS["defaults"],
        tmp_path,
        images,
        seconds=0.3,
        callers=(1, 16),
        loads=(1,),
        log=tmp_path / "log",
    )
    assert found["start_to_ready_s"] > 0 and found["idle_mib"] > 1
    for at in found["closed"].values():
        assert set(at["codes"]) == {"OK"} and 0 < at["p50_s"] <= at["p99_s"] and at["rate"] > 0
    assert found["open"]["1"]["codes"]["OK"] > 0  # not all: at its capacity a moment's slowness leaves calls too late
    assert all(at["cpu_us"] > 0 for at in found["closed"].values())


def test_ours_is_measured(tmp_path):
    bundle = model_folder("small", tmp_path)
    assert model_folder("small", tmp_path) == bundle
    images = expected(bundle)
    assert all(len(np.unique(labels)) > 5 for labels in images.values())
    log = tmp_path / "log"
    found = measured(
        here(OURS), SETTINGS["defaults"], bundle, images, seconds=0.3, callers=(4, 16), loads=(4,), log=log
    )
    assert set(found["closed"]["4"]["codes"]) == {"OK"}
    assert found["open"]["4"]["offered"] == 4 * found["closed"]["16"]["rate"]


def test_two_that_are_up_are_asked_in_turns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pairs, "OURS", here(PEERS["echo_grpc"]))
    monkeypatch.setattr(pairs, "expected", lambda bundle: {b"one": None})
    with pairs.both(here(PEERS["echo_http"]), "defaults", tmp_path, tmp_path / "logs") as (ours, its):
        pairs.compare("name", ours, its, callers=4, pairs=2, seconds=0.2, goal=1.0)
    said = json.loads(capsys.readouterr().out)
    assert said["name"] == "name" and said["ours"] > 0 and said["half"][0] <= said["ratio"] <= said["half"][1]
    assert cpu_seconds() == 0, "a process of theirs is left"


def test_pairs_need_rounds(tmp_path, capsys):
    assert pairs.main(["--rounds", str(tmp_path)]) == 2
    assert f"expected rounds in {tmp_path / 'network'}, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pairs.main(["--pairs", "1"])


def test_a_pair_that_does_not_start_leaves_the_others(tmp_path, monkeypatch, capsys):
    echo = here(PEERS["echo_http"])
    monkeypatch.setattr(pairs, "OURS", here(PEERS["echo_grpc"]))
    monkeypatch.setattr(pairs, "PEERS", {"none_such": replace(echo, name="none_such"), "echo_http": echo})
    monkeypatch.setattr(pairs, "expected", lambda bundle: {b"one": None})
    monkeypatch.setattr(pairs, "results", lambda folder: ["a round"])
    monkeypatch.setattr(pairs, "rivals", lambda *_: {(name, "workers"): [4] for name in pairs.PEERS})
    asked = ["--models", "noop", "--rounds", str(tmp_path), "--pairs", "2", "--seconds", "0.2"]
    assert pairs.main(asked) == 1
    said = capsys.readouterr()
    assert [json.loads(row)["name"] for row in said.out.splitlines()] == ["serving.pairs.noop.echo_http.c4"]
    assert "none_such ended with exit code 1: see " in said.err
    assert "none_such" in (tmp_path / "noop" / "pairs" / "none_such.log").read_text()


def test_a_server_that_does_not_start(tmp_path):
    with pytest.raises(PeerError, match="weakseg ended with exit code 1: see "):
        measured(here(OURS), SETTINGS["defaults"], tmp_path, {b"": None}, seconds=0.1, log=tmp_path / "log")
    assert "manifest.json" in (tmp_path / "log").read_text()


def test_answers_are_checked():
    labels = np.arange(2000, dtype=np.uint8).reshape(40, 50)
    assert check("peer", b"before" + png(labels) + b"after", labels) == 1
    labels[0, 0] += 1
    assert check("peer", png(np.arange(2000, dtype=np.uint8).reshape(40, 50)), labels) == 1999 / 2000
    with pytest.raises(PeerError, match=r"ours makes of peer, got .* % of its pixels"):
        check("peer", png(labels + 1), labels)
    with pytest.raises(PeerError, match=r"expected a label map of \(40, 50\) of peer, got \(50, 40\)"):
        check("peer", png(labels.T.copy()), labels)
    with pytest.raises(PeerError, match="expected a PNG of peer, got b'no'"):
        check("peer", b"no", labels)


REPLIES = {
    "/length": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc",
    "/chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2;x=y\r\nbc\r\n0\r\n\r\n",
    "/close": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc",
    "/busy": b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
    "/fault": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
    "/short": b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\nabc",
    "/never": b"",
}


@asynccontextmanager
async def replying():
    """The port of a server that replies as the path says, and hangs up where the reply says so or is short."""
    handlers = set()

    async def reply(reader, writer):
        handlers.add(asyncio.current_task())
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            ends = False
            while not ends:
                path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
                await reader.readexactly(4)
                writer.write(REPLIES[path])
                ends = path in ("/close", "/short")
        writer.close()

    server = await asyncio.start_server(reply, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    await asyncio.gather(*handlers)


@pytest.mark.parametrize(
    ("path", "ended"),
    [
        ("/length", ("OK", b"abc")),
        ("/chunks", ("OK", b"abc")),
        ("/close", ("OK", b"abc")),
        ("/busy", ("RESOURCE_EXHAUSTED", b"")),
        ("/fault", ("HTTP 500", b"")),
        ("/never", ("DEADLINE_EXCEEDED", b"")),
    ],
)
async def test_how_calls_over_http_end(path, ended):
    async with replying() as port:
        connections = Http(port, path).connect()
        for _ in range(3):
            assert await connections.call(b"body", 0.2 if path == "/never" else LONG_S) == ended
        await connections.close()


async def test_a_server_that_goes_away():
    async with replying() as port:
        connections = Http(port, "/short").connect()
        assert (await connections.call(b"body", LONG_S))[0] == "UNAVAILABLE"
        await connections.close()
    assert (await Http(port, "/length").connect().call(b"body", LONG_S))[0] == "UNAVAILABLE"


ORPHANS = """
import os, subprocess, sys, time
child = "import os, time; os.setsid(); print(os.getpid(), flush=True); data = b'x' * (50 << 20); time.sleep(1000)"
first = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]])"
subprocess.run([sys.executable, "-c", first, child])
while True:
    sum(range(10000))
"""


def test_nothing_is_left_of_a_server(tmp_path):
    log = tmp_path / "log"
    with running([sys.executable, "-c", ORPHANS], folder=tmp_path, log=log, env={"A": "b"}) as process:
        ends = time.monotonic() + LONG_S
        while not log.read_text().strip() or memory_mib() < 50 or cpu_seconds() < 0.2:
            assert time.monotonic() < ends
            time.sleep(0.05)
        orphan = int(log.read_text())
        assert Path(f"/proc/{process.pid}").exists() and Path(f"/proc/{orphan}").exists()
    assert not Path(f"/proc/{process.pid}").exists() and not Path(f"/proc/{orphan}").exists()
    assert cpu_seconds() == memory_mib() == 0


def test_later_rounds_measure_the_settings_that_were_fastest(tmp_path):
    peer = Peer("p", "p", "HTTP", lambda port: Http(port, "/"))
    assert settings(peer, tmp_path, 0) == ["workers", "batches", "threads"]
    rates = {"workers": (1, 5), "batches": (2, 4), "threads": (3, 3)}
    (tmp_path / "round-0").mkdir()
    for name, (one, sixteen) in rates.items():
        closed = {"1": {"rate": one}, "16": {"rate": sixteen}}
        (tmp_path / "round-0" / f"p-{name}.json").write_text(json.dumps({"closed": closed}))
    assert settings(peer, tmp_path, 1) == ["workers", "threads"]
    assert settings(peer, tmp_path / "none", 1) == []


def test_requests_hold_the_image():
    asked = oip.ModelInferRequest.FromString(PEERS["mlserver"].request(b"jpeg"))
    assert (asked.inputs[0].datatype, list(asked.inputs[0].shape)) == ("BYTES", [1])
    assert list(asked.raw_input_contents) == [b"\x04\0\0\0jpeg"]
    assert list(oip.ModelInferRequest.FromString(PEERS["triton"].request(b"jpeg")).inputs[0].shape) == [1, 1]
    assert PEERS["torchserve"].request(b"jpeg") == b"\x0a\x05model" + b"\x1a\x0c" + b"\x0a\x04data" + b"\x12\x04jpeg"
    image = bytes(70_000)
    length = b"\xf0\xa2\x04"  # 70000 in groups of seven bits
    assert PEERS["torchserve"].request(image).endswith(b"\x0a\x04data\x12" + length + image)
    assert PEERS["litserve"].request(image) == image
    for peer in PEERS.values():
        assert image in peer.request(image)
        assert set(peer.settings) <= set(SETTINGS)
        assert (ROOT / "benchmarks" / "peers" / "servers" / f"{peer.name}.py").is_file()


def test_environments_that_are_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    assert main(["--peers", "triton", "ray", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "make bench-peers" in said and ".venv-peer-triton" in said and ".venv-peer-ray" in said


def test_rounds_of_another_length(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(Peer, "python", Path(sys.executable))
    (tmp_path / "noop" / "round-0").mkdir(parents=True)
    (tmp_path / "noop" / "round-0" / "ray-workers.json").write_text('{"seconds": 2.0}')
    assert main(["--peers", "ray", "--seconds", "3", "--out", str(tmp_path)]) == 2
    assert "has rounds of {2.0} s, not 3.0 s: use another --out" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("h2load") is None, reason="no h2load: install nghttp2-client")
def test_h2load_asks_as_our_callers_do(tmp_path):
    with server(tmp_path, model_folder("noop", tmp_path), "--log-level", "warning") as ports:
        assert h2load(ports.target, segment_request(photograph()), tmp_path, callers=4, seconds=1) > 0
        refused(ports)
        h2load(ports.target, segment_request(b"no image"), tmp_path, callers=4, seconds=1)  # HTTP's status is 200
        with pytest.raises(RuntimeError, match="times INVALID_ARGUMENT"):
            refused(ports)


def test_the_stages_of_ours(tmp_path, capsys):
    stages.measure("test", tmp_path, model_folder("noop", tmp_path), segment_request(photograph()), 0.3)
    said = capsys.readouterr().out
    assert '"serving.test"' in said and "decode: " in said and "an image waits" in said
