"""TLS for the gRPC port: certificates from files, taken anew when these change."""

from __future__ import annotations

import logging
import math
import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from serve.stamp import stamp
from weakseg.errors import ConfigError

NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME of openssl/x509_vfy.h, which `ssl` has no name for

log = logging.getLogger("serve.tls")


@dataclass(frozen=True)
class TlsFiles:
    """PEM files. client_ca: the authorities of which one must have signed a client's certificate; None = any client."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def paths(self) -> list[Path]:
        return [path for path in (self.cert, self.key, self.client_ca) if path is not None]


class Certificates:
    """What the files say. A new handshake takes new files; of damaged ones, or halves of a pair, the old stay in use.

    Raises:
        ConfigError: files that cannot be used, or a key of another certificate.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._stamp = stamp(files.paths())
        self._current = _read(files)

    def credentials(self) -> Any:
        """grpc.ServerCredentials."""
        return grpc.dynamic_ssl_server_credentials(
            self._current, self._changed, require_client_authentication=self._files.client_ca is not None
        )

    def _changed(self) -> Any:
        """For gRPC, before each handshake: the new configuration, None = as before."""
        now = stamp(self._files.paths())
        if now == self._stamp:
            return None
        self._stamp = now
        try:
            self._current = _read(self._files)
        except ConfigError as error:
            log.error("certificates not reloaded", extra={"fields": {"failure": str(error)}})
            return None
        log.info("certificates reloaded")
        return self._current


class Expiry:
    """Until when the certificate is valid that the next handshake takes. Files that cannot be used change nothing."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._stamp: object = None
        self._seconds = math.nan

    def seconds(self) -> float:
        """Unix time; NaN for a certificate that no client could verify. Reads the files where they have changed."""
        now = stamp(self._files.paths())
        if now != self._stamp:
            self._stamp = now
            with suppress(OSError, ssl.SSLError):
                leaf = leaf_of(self._files, check_time=False)
                self._seconds = ssl.cert_time_to_seconds(leaf["notAfter"])
        return self._seconds


def leaf_of(files: TlsFiles, *, check_time: bool = True) -> dict[str, Any]:
    """The server's certificate as `ssl` tells it to a client that trusts all of the chain, by a handshake in memory.

    Raises:
        ssl.SSLError: files that cannot be used; ssl.SSLCertVerificationError: the client would not accept it.
    """
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(files.cert, files.key)
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_side.check_hostname = False
    client_side.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | (0 if check_time else NO_CHECK_TIME)
    client_side.load_verify_locations(files.cert)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_side.wrap_bio(to_client, to_server)
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):
        with suppress(ssl.SSLWantReadError):  # its turn comes again
            side.do_handshake()
    return client.getpeercert() or {}


def _read(files: TlsFiles) -> Any:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # checks what gRPC would only find out at the first handshake
    try:
        cert, key = files.cert.read_bytes(), files.key.read_bytes()
        ca = None if files.client_ca is None else files.client_ca.read_bytes()
        context.load_cert_chain(files.cert, files.key)
        if files.client_ca is not None:
            context.load_verify_locations(files.client_ca)
    except (OSError, ssl.SSLError) as error:
        names = ", ".join(map(str, files.paths()))
        raise ConfigError(f"expected a PEM certificate and its key in {names}, got: {error}") from error
    return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)
