"""TLS for the gRPC port: certificates from files, taken anew when these change."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from serve.stamp import stamp
from weakseg.errors import ConfigError

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
