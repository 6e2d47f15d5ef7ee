"""A server with certificates, real handshakes, clients with the wrong ones."""

import datetime
import ipaddress
import logging
import math
import os
import socket
from dataclasses import dataclass
from urllib.request import urlopen

import grpc
import pytest
from PIL import Image

from serve.settings import ServeConfig
from serve.tls import Certificates, Expiry, TlsFiles
from weakseg.cli import main
from weakseg.client import AsyncClient, Client
from weakseg.errors import ConfigError, ServiceError, UnauthenticatedError
from weakseg.masks.png import labels_from_png
from weakseg.v1 import admin_service_pb2 as admin_pb
from weakseg.v1 import admin_service_pb2_grpc as admin_grpc

pytest.importorskip("cryptography", reason="makes the certificates")
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@dataclass
class Signed:
    """A certificate with its key, as objects and as PEM files."""

    certificate: object
    key: object
    cert_file: object
    key_file: object


def sign(folder, name, by=None, until=NOW + DAY):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.certificate.subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - 2 * DAY)
        .not_valid_after(until)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
    )
    certificate = builder.sign(by.key if by else key, hashes.SHA256())
    signed = Signed(certificate, key, folder / f"{name}.crt", folder / f"{name}.key")
    pem = serialization.Encoding.PEM
    signed.cert_file.write_bytes(certificate.public_bytes(pem))
    no_password = serialization.NoEncryption()
    signed.key_file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, no_password))
    return signed


@pytest.fixture
def ca(tmp_path):
    return sign(tmp_path, "ca")


@pytest.fixture
def secure(serving, tmp_path, ca):
    """A function that starts a server with a certificate for this machine."""

    def start(**options):
        server = sign(tmp_path, "server", by=ca)
        return serving(tls_cert=server.cert_file, tls_key=server.key_file, **options)

    return start


def fails(target, **access):
    with Client(target, timeout_s=5, **access) as client, pytest.raises(ServiceError) as raised:
        client.model()
    return raised.value


def test_whoever_trusts_the_authority_gets_masks(secure, ca, colours):
    running = secure()
    with Client(running.target, ca=ca.cert_file) as client:
        assert client.segment(colours).segmentation.shape == colours.shape[:2]


async def test_the_async_client_too(secure, ca, colours):
    async with AsyncClient(secure().target, ca=ca.cert_file) as client:
        assert (await client.segment(colours)).segmentation.shape == colours.shape[:2]


def test_another_authority_a_plain_client_and_no_authority_fail(secure, ca, tmp_path):
    target = secure().target
    other = sign(tmp_path, "other-ca")
    for access in ({"ca": other.cert_file}, {}, {"tls": True}):
        assert fails(target, **access).reason == "UNAVAILABLE"
    assert Client(target, ca=ca.cert_file).model().state == "ready"


def test_an_expired_certificate_fails(serving, ca, tmp_path):
    server = sign(tmp_path, "server", by=ca, until=NOW - DAY)
    running = serving(tls_cert=server.cert_file, tls_key=server.key_file)
    assert fails(running.target, ca=ca.cert_file).reason == "UNAVAILABLE"


def test_mutual_tls_wants_a_certificate_of_its_authority(secure, ca, tmp_path, colours):
    clients = sign(tmp_path, "clients-ca")
    running = secure(tls_client_ca=clients.cert_file)
    good, foreign = sign(tmp_path, "good", by=clients), sign(tmp_path, "foreign", by=ca)
    expired = sign(tmp_path, "expired", by=clients, until=NOW - DAY)
    with Client(running.target, ca=ca.cert_file, cert=good.cert_file, key=good.key_file) as client:
        assert client.segment(colours).segmentation.shape == colours.shape[:2]
    assert fails(running.target, ca=ca.cert_file).reason == "UNAVAILABLE"
    for wrong in (foreign, expired):
        assert fails(running.target, ca=ca.cert_file, cert=wrong.cert_file, key=wrong.key_file).reason == "UNAVAILABLE"


def test_a_token_over_tls(secure, ca, tmp_path, colours):
    (tmp_path / "tokens.toml").write_text('[tool]\ntoken = "correct horse battery staple"\n')
    running = secure(tokens=tmp_path / "tokens.toml", host="0.0.0.0")
    target = f"localhost:{running.server.port}"
    with Client(target, ca=ca.cert_file, token="correct horse battery staple") as client:
        assert client.segment(colours).segmentation.shape == colours.shape[:2]
    assert isinstance(fails(target, ca=ca.cert_file, token="wrong horse battery staple"), UnauthenticatedError)


def test_predict_finds_its_token_in_the_environment(secure, ca, tmp_path, colours, monkeypatch, capsys):
    (tmp_path / "tokens.toml").write_text('[tool]\ntoken = "correct horse battery staple"\n')
    target = secure(tokens=tmp_path / "tokens.toml").target
    Image.fromarray(colours).save(tmp_path / "colours.png")
    predict = ["predict", str(tmp_path / "colours.png"), "--endpoint", target, "--ca", str(ca.cert_file)]
    predict += ["--output", str(tmp_path / "masks")]
    assert main(predict) == 1
    assert "expected a token, got none" in capsys.readouterr().err
    monkeypatch.setenv("WEAKSEG_TOKEN", "correct horse battery staple")
    assert main(predict) == 0
    assert labels_from_png((tmp_path / "masks/colours.png").read_bytes()).shape == colours.shape[:2]


def test_new_files_are_taken_at_the_next_handshake_and_damaged_ones_are_not(secure, tmp_path, ca, caplog):
    running = secure()
    assert Client(running.target, ca=ca.cert_file).model().state == "ready"
    successor = sign(tmp_path, "successor-ca")
    replaced = sign(tmp_path, "replacement", by=successor)
    old_key = (tmp_path / "server.key").read_bytes()
    with caplog.at_level(logging.ERROR, "serve.tls"):
        os.replace(replaced.key_file, tmp_path / "server.key")  # half of the pair
        assert Client(running.target, ca=ca.cert_file).model().state == "ready"
    assert "certificates not reloaded" in caplog.text and old_key.decode() not in caplog.text
    os.replace(replaced.cert_file, tmp_path / "server.crt")
    assert Client(running.target, ca=successor.cert_file).model().state == "ready"
    assert fails(running.target, ca=ca.cert_file).reason == "UNAVAILABLE"


def test_the_admin_port_has_the_same_certificates_and_takes_new_ones_by_itself(secure, tmp_path, ca):
    clients = sign(tmp_path, "clients-ca")
    running = secure(admin_port=0, tls_client_ca=clients.cert_file)
    target = f"localhost:{running.server.admin_port}"
    client = sign(tmp_path, "operator", by=clients)

    def code(authority, *client_files):
        files = [file.read_bytes() for file in (authority.cert_file, *client_files)]
        with grpc.secure_channel(target, grpc.ssl_channel_credentials(*files)) as channel:
            return code_of(channel)

    def code_of(channel):
        try:
            admin_grpc.AdminServiceStub(channel).GetLogLevel(admin_pb.GetLogLevelRequest(), timeout=60)
        except grpc.RpcError as error:
            return error.code().name
        return "OK"

    pair = (client.key_file, client.cert_file)
    with grpc.insecure_channel(target) as plain:
        assert (code(ca, *pair), code(ca), code_of(plain)) == ("OK", "UNAVAILABLE", "UNAVAILABLE")
    successor = sign(tmp_path, "successor-ca")
    replaced = sign(tmp_path, "replacement", by=successor)
    os.replace(replaced.key_file, tmp_path / "server.key")
    os.replace(replaced.cert_file, tmp_path / "server.crt")
    with Client(running.target, ca=successor.cert_file, cert=client.cert_file, key=client.key_file) as main:
        assert main.model().state == "ready", "the main port has seen them"
    assert (code(successor, *pair), code(ca, *pair)) == ("OK", "UNAVAILABLE")


def test_files_that_do_not_fit_are_refused_at_the_start(tmp_path, ca):
    server, other = sign(tmp_path, "server", by=ca), sign(tmp_path, "other", by=ca)
    for cert, key in (
        (server.cert_file, other.key_file),
        (server.key_file, server.key_file),
        (tmp_path / "none", server.key_file),
    ):
        with pytest.raises(ConfigError, match="expected a PEM certificate and its key in"):
            Certificates(TlsFiles(cert, key))


def test_the_end_of_a_certificate_is_known_also_when_it_is_past(tmp_path, ca):
    files = TlsFiles(tmp_path / "server.crt", tmp_path / "server.key")
    sign(tmp_path, "server", by=ca)
    expiry = Expiry(files)
    assert expiry.seconds() == int((NOW + DAY).timestamp())
    past = sign(tmp_path, "past", by=ca, until=NOW - DAY)
    os.replace(past.key_file, files.key)
    assert expiry.seconds() == int((NOW + DAY).timestamp()), "half of a pair is not in use"
    os.replace(past.cert_file, files.cert)
    assert expiry.seconds() == int((NOW - DAY).timestamp())
    assert Expiry(files).seconds() == int((NOW - DAY).timestamp())
    assert math.isnan(Expiry(TlsFiles(tmp_path / "none", files.key)).seconds())


def test_it_is_in_the_metrics_of_a_server_with_certificates(serving, tmp_path, ca):
    signed = sign(tmp_path, "server", by=ca)
    name = "weakseg_certificate_expiry_timestamp_seconds"
    plain, secret = serving(), serving(tls_cert=signed.cert_file, tls_key=signed.key_file)
    assert name not in urlopen(f"{plain.metrics_url}/metrics", timeout=60).read().decode()
    assert secret.sample(name) == int((NOW + DAY).timestamp())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tls_cert": "a"}, "tls_cert and tls_key go together"),
        ({"tls_client_ca": "a"}, "tls_client_ca needs tls_cert and tls_key"),
        ({"tokens": "a"}, "tokens need tls_cert and tls_key"),
    ],
)
def test_settings_that_protect_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ServeConfig(**fields)
    ServeConfig(tokens="a", plaintext_tokens=True)
    ServeConfig(tokens="a", host="127.0.0.1")


def test_half_a_pair_and_files_beside_tls_false_are_refused_by_the_client(tmp_path, ca):
    with pytest.raises(ConfigError, match="expected cert and key together"):
        Client("localhost:1", cert=ca.cert_file)
    with pytest.raises(ConfigError, match="expected no ca beside tls=False"):
        Client("localhost:1", tls=False, ca=ca.cert_file)
    with pytest.raises(ConfigError, match="expected a PEM file as ca, got .*: No such file"):
        Client("localhost:1", ca=tmp_path / "none")


@pytest.fixture
def silent():
    with socket.socket() as one:
        yield one


def test_no_handshake_that_is_under_way_keeps_a_server_from_stopping(silent, secure, ca):
    running = secure()
    silent.connect(("127.0.0.1", running.server.port))  # open until the server is closed: `secure` comes after it
    with Client(running.target, ca=ca.cert_file) as client:
        assert client.model().state == "ready"
