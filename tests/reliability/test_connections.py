"""R8, R9: slow clients and those that do not read, floods of connections and of resets, streams that never say
anything, and bytes that are no HTTP/2 or no TLS.
"""

import contextlib
import io
import os
import re
import socket
import threading
import time
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from tests import http2
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
MIB = 2**20
SEGMENT, STREAM = (f"/weakseg.v1.SegmentationService/{method}" for method in ("Segment", "SegmentStream"))
WATCH = "/grpc.health.v1.Health/Watch"
STREAMS = 100  # per connection that stays


@pytest.fixture
def ask(outcome):
    """A function: what another client is told meanwhile."""
    request = pb.SegmentRequest(
        image=pb.Image(raw=pb.RawImage(width=1, height=1, rgb=b"abc")), outputs=[pb.OutputSpec(kind=3)]
    )

    def asking(server, credentials=None):
        options = [("grpc.enable_retries", 0)]
        channel = grpc.secure_channel(server.target, credentials, options) if credentials else server.channel()
        with channel:
            return outcome(lambda: pb_grpc.SegmentationServiceStub(channel).Segment(request, timeout=LONG_S))

    return asking


@pytest.fixture
def bounded(watched, ask):
    """The server, which is asked before and after, and takes less than 100 MiB in between."""
    assert ask(watched) == ("OK", "")
    before = watched.rss_bytes
    watched.forget_peak()
    yield watched
    while ask(watched) != ("OK", ""):
        assert watched.is_alive
    print(f"+{(watched.peak_bytes - before) / MIB:.0f} MiB")
    assert watched.peak_bytes - before < 100 * MIB


def address(server):
    host, _, port = server.target.rpartition(":")
    return host, int(port)


def sizes(short, full):
    return [short, pytest.param(full, marks=pytest.mark.reliability)]


@pytest.mark.parametrize("n", sizes(200, 2000))
def test_r9_connections_that_come_and_go(bounded, n):
    openings = [
        b"",
        b"\0",
        http2.PREFACE,
        http2.PREFACE[:12],
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\n\r\n",
    ]
    for i in range(n):
        with socket.create_connection(address(bounded), LONG_S) as connection:
            connection.sendall(openings[i % len(openings)])


@pytest.mark.parametrize("n", sizes(2000, 20_000))
def test_r9_streams_that_are_reset_as_soon_as_they_begin(bounded, ask, n):
    block, n_sent, n_connections = http2.headers(SEGMENT), 0, 0
    while n_sent < n:
        connection = http2.connect(bounded.target)
        n_connections += 1
        with connection:
            for first in range(1, 40_000, 40):
                streams = range(first, first + 40, 2)
                pairs = [
                    http2.frame(http2.HEADERS, http2.END_HEADERS, s, block)
                    + http2.frame(http2.RST_STREAM, 0, s, http2.CANCEL)
                    for s in streams
                ]
                if n_sent >= n or not http2.send(connection, b"".join(pairs)):
                    break
                n_sent += len(pairs)
            # Of more than 1000 calls that wait to be taken gRPC's core drops some by lot.
            assert ask(bounded)[0] in ("OK", "RESOURCE_EXHAUSTED", "CANCELLED")
    print(f"{n_sent} streams on {n_connections} connections")


@pytest.mark.parametrize("n", sizes(1000, 10_000))
@pytest.mark.parametrize("method", [SEGMENT, STREAM, WATCH])
def test_r9_streams_that_say_nothing(bounded, ask, method, n):
    """Of calls that only wait the server holds some, and gives their places to others, while all of them stay open."""
    frames = []
    for stream in range(1, 2 * STREAMS, 2):
        frames.append(http2.frame(http2.HEADERS, http2.END_HEADERS, stream, http2.headers(method)))
        if method == WATCH:  # it may speak: a health that nobody changes has no news
            frames.append(http2.frame(http2.DATA, http2.END_STREAM, stream, http2.message(b"")))
    opened = [http2.connect(bounded.target) for _ in range(n // STREAMS)]
    try:
        for connection in opened:
            http2.send(connection, b"".join(frames))
        give_up = time.monotonic() + LONG_S
        while [ask(bounded) for _ in range(20)] != [("OK", "")] * 20:  # while they arrive, some calls may be dropped
            assert time.monotonic() < give_up, "silent streams keep others out"
        with bounded.channel() as channel:
            said = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=LONG_S)
        assert said.status == health_pb2.HealthCheckResponse.SERVING
    finally:
        for connection in opened:
            connection.close()


def test_r9_a_flood_of_pings(bounded, ask):
    """gRPC ends the connection, unless it is too busy with its pings to come to that; others are answered."""
    ping = http2.frame(http2.PING, 0, 0, bytes(8))
    with http2.connect(bounded.target) as connection:
        for i in range(2000):
            if not http2.send(connection, 100 * ping):
                break
            assert i % 500 or ask(bounded) == ("OK", "")


@pytest.mark.reliability
def test_a_connection_that_pings_now_and_then_is_kept(watched, ask):
    """As clients do every 30 s, ours too, also those that ask nothing: gRPC's own servers end them at the third."""
    with http2.connect(watched.target) as connection:
        for _ in range(5):
            connection.sendall(http2.frame(http2.PING, 0, 0, bytes(8)))
            kinds = http2.received(connection, 10.5)
            assert http2.PING in kinds and http2.GOAWAY not in kinds


@pytest.mark.parametrize("n", sizes(40, 100))
def test_r8_connections_that_send_a_byte_now_and_then(bounded, ask, n):
    """Half prefaces, silence, and requests of 30 MiB that never come to their end."""
    begun = http2.headers(SEGMENT)
    start = (
        http2.frame(http2.HEADERS, http2.END_HEADERS, 1, begun) + (1000).to_bytes(3, "big") + b"\0\0" + bytes(3) + b"\1"
    )
    openings = [b"", http2.PREFACE[:12], http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0) + start + b"\0\1\xe0\0\0"]
    opened = [socket.create_connection(address(bounded), LONG_S) for _ in range(n)]
    try:
        for i, connection in enumerate(opened):
            connection.sendall(openings[i % len(openings)])
        for _ in range(10):
            for connection in opened:
                with contextlib.suppress(OSError):  # the server has had enough of it
                    connection.send(b"x")
            assert ask(bounded) == ("OK", "")
    finally:
        for connection in opened:
            connection.close()


UNREAD_MIB = 64


@pytest.fixture(scope="module")
def small(toy_bundle, tmp_path_factory, watch):
    """A server with little memory for images."""
    flags = ("--image-memory-mib", str(UNREAD_MIB))
    yield from watch(toy_bundle, tmp_path_factory.mktemp("small") / "log", *flags)


def gauge(server, name):
    return float(re.search(rf"^{name} (\S+)$", urlopen(server.metrics_url).read().decode(), re.M)[1])


@pytest.mark.parametrize("n", sizes(40, 400))
@pytest.mark.parametrize("path", [SEGMENT, STREAM])
def test_r8_answers_that_are_not_read(small, ask, path, n):
    """Each is 4 MB, three times, for a request of 600 bytes."""
    buffer = io.BytesIO()
    Image.new("1", (2000, 2000)).save(buffer, "PNG")
    spec = pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION, mask_encoding=pb.MASK_ENCODING_RAW_U8)
    request = pb.SegmentRequest(image=pb.Image(encoded=buffer.getvalue()), outputs=[spec])
    asked = pb.SegmentStreamRequest(request=request) if path == STREAM else request
    data = http2.message(asked.SerializeToString())
    assert ask(small) == ("OK", "")
    before = small.rss_bytes
    small.forget_peak()
    with contextlib.ExitStack() as opened:
        for i in range(n):
            if i % STREAMS == 0:
                connection = opened.enter_context(http2.connect(small.target, http2.NO_WINDOW, source="127.0.0.2"))
            stream = 2 * (i % STREAMS) + 1
            end = 0 if path == STREAM else http2.END_STREAM
            http2.send(connection, http2.frame(http2.HEADERS, http2.END_HEADERS, stream, http2.headers(path)))
            http2.send(connection, http2.frame(http2.DATA, end, stream, data))
        give_up = time.monotonic() + LONG_S
        while gauge(small, "weakseg_inflight") or not gauge(small, "weakseg_unread_bytes"):
            assert time.monotonic() < give_up
        assert ask(small) == ("OK", ""), "another client"
        grown = (small.peak_bytes - before) / MIB
    print(f"{n} answers: +{grown:.0f} MiB")
    assert grown < 3 * UNREAD_MIB
    while gauge(small, "weakseg_unread_bytes"):
        assert time.monotonic() < give_up


def test_r8_streams_that_are_left_open_hold_no_image(bounded):
    """20 of 6 MB, each answered before the next is sent."""
    image = pb.Image(raw=pb.RawImage(width=1000, height=2000, rgb=bytes(6_000_000)))
    request = pb.SegmentRequest(image=image, outputs=[pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)])
    sent = pb.SegmentStreamRequest(request=request)
    leave = threading.Event()

    def one():
        yield sent
        leave.wait(LONG_S)

    with bounded.channel() as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        calls = []
        for _ in range(20):
            calls.append(stub.SegmentStream(one()))
            assert next(calls[-1]).HasField("response")
        leave.set()


def test_r9_bytes_that_are_no_tls_and_clients_without_it(toy_bundle, tmp_path, watched_process, ask):
    tls = pytest.importorskip("cryptography", reason="makes the certificate") and _certificate(tmp_path)
    server = watched_process(toy_bundle, tmp_path / "log", "--tls-cert", str(tls[0]), "--tls-key", str(tls[1]))
    for garbage in (b"", http2.PREFACE, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff", os.urandom(4096)) * 10:
        with socket.create_connection(address(server), LONG_S) as connection:
            connection.sendall(garbage)
    assert ask(server)[0] == "UNAVAILABLE", "a client that speaks no TLS"
    trusted = grpc.ssl_channel_credentials(tls[0].read_bytes())
    assert ask(server, trusted) == ("OK", "")
    assert "Traceback" not in server.log.read_text()


def _certificate(folder):
    """PEM files of a certificate for 127.0.0.1 that has signed itself, and its key."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "server")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, files = serialization.Encoding.PEM, (folder / "server.crt", folder / "server.key")
    files[0].write_bytes(certificate.public_bytes(pem))
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    files[1].write_bytes(secret)
    return files
