"""Certificates, made by openssl's library: what is found is what a client's handshake says."""

import datetime
import ipaddress

import pytest

from serve.doctor import network
from serve.settings import ServeConfig

pytest.importorskip("cryptography", reason="makes the certificates: pip install 'weakseg[sign]'")
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@pytest.fixture
def sign(tmp_path):
    """A function: name and validity in days from now to (certificate, key, PEM files of both)."""

    def make(name, begin=-2, end=90, by=None, named=True):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(by[0].subject if by else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW + begin * DAY)
            .not_valid_after(NOW + end * DAY)
            .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
        )
        if named:
            names = [x509.DNSName("weakseg.example"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(by[1] if by else key, hashes.SHA256())
        cert_file, key_file = tmp_path / f"{name}.crt", tmp_path / f"{name}.key"
        cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        no_password = serialization.NoEncryption()
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, no_password)
        key_file.write_bytes(pem)
        key_file.chmod(0o600)
        return certificate, key, cert_file, key_file

    return make


def found(signed, **settings):
    config = ServeConfig(tls_cert=signed[2], tls_key=signed[3], **settings)
    return {one.check: one for one in network.certificates(config)}


@pytest.mark.parametrize(
    ("validity", "status", "said", "todo"),
    [
        ({}, "ok", "for weakseg.example, 127.0.0.1; valid until", ""),
        ({"end": 5}, "warning", "4 days", "renew"),
        ({"end": -1}, "failed", "certificate has expired", "renew"),
        ({"begin": 1}, "failed", "not yet valid", "set the clock"),
        ({"named": False}, "failed", "no subjectAltName", "name the host"),
    ],
)
def test_what_clients_will_say(sign, validity, status, said, todo):
    ca = sign("ca")
    one = found(sign("server", by=ca, **validity))["certificate"]
    assert one.status == status and said in one.found and todo in one.todo


def test_a_whole_chain_and_a_self_signed_one(sign):
    ca = sign("ca")
    server = sign("server", by=ca)
    server[2].write_bytes(server[2].read_bytes() + ca[2].read_bytes())
    assert found(server)["certificate"].status == "ok"
    assert found(ca)["certificate"].status == "ok"


def test_an_authority_in_the_chain_that_has_expired(sign):
    ca = sign("ca", end=-1)
    server = sign("server", by=ca)
    server[2].write_bytes(server[2].read_bytes() + ca[2].read_bytes())
    assert found(server)["certificate"].status == "failed"


def test_a_key_of_another_certificate_and_a_file_that_is_none(sign, tmp_path):
    server, other = sign("server"), sign("other")
    one = found((*server[:3], other[3]))["certificate"]
    assert one.status == "failed" and "leaf first" in one.todo
    assert found((*server[:2], tmp_path / "absent.crt", server[3]))["certificate"].status == "failed"


def test_a_key_that_everybody_can_read(sign):
    server = sign("server")
    server[3].chmod(0o644)
    assert found(server)["certificate's key"].status == "warning"
    server[3].chmod(0o640)
    assert "certificate's key" not in found(server)


def test_the_authority_of_clients(sign):
    server = sign("server")
    assert found(server, tls_client_ca=sign("ca")[2])["clients' authority"].status == "ok"
    assert found(server, tls_client_ca=sign("old", end=-1)[2])["clients' authority"].status == "failed"
    leaf = sign("leaf", by=sign("ca"))
    assert found(server, tls_client_ca=leaf[2])["clients' authority"].status == "failed"


def test_without_tls_there_is_none():
    assert next(iter(network.certificates(ServeConfig()))).found.startswith("none")
