"""The ports that gRPC listens on."""

from __future__ import annotations

from typing import Any

from serve.tls import Certificates, TlsFiles
from weakseg.errors import ConfigError


def listen(server: Any, host: str, port: int, tls: TlsFiles | None, *, flag: str) -> int:
    """Bind a grpc.aio server; the port that was bound, which 0 leaves open.

    Each port has certificates of its own: whoever asks for changed files first would keep them from the others.

    Raises:
        ConfigError: the port cannot be had, `flag` sets another; or files of certificates that cannot be used.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if tls is None:
            bound: int = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, Certificates(tls).credentials())
    except RuntimeError as error:  # gRPC says why in its own log only
        raise ConfigError(
            f"cannot listen on {address}: stop what uses the port or choose another with {flag} (0 = a free one)"
        ) from error
    return bound
