"""How the clients of weakseg/client.py reach a server: retries, balancing, TLS and tokens."""

from __future__ import annotations

import ipaddress
import json
import random
import sys
import time
from pathlib import Path
from typing import Any, TypedDict

import grpc

from weakseg.errors import ConfigError, QueueFullError, RateLimitedError, WeaksegError

KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 30_000, 10_000
MOST_TRIES = 4  # of a call that a busy server refuses, and of one that gRPC finds no server for
MOST_PAUSE_S = 0.05
CONNECT_AGAIN_MS = 100  # after a connection that failed; then 1.6 times as long each time, up to two minutes
ASK_AGAIN_MS = 1000  # for a name's addresses, at the least, when a server is lost
TOKEN_VARIABLE = "WEAKSEG_TOKEN"  # where commands find theirs: a command line is seen by all users of a machine
SERVICE = "weakseg.v1.SegmentationService"

Metadata = tuple[tuple[str, str], ...]


class AccessOptions(TypedDict, total=False):
    """Whom a client trusts, and who it says it is.

    tls: whether to speak TLS; implied by `ca`, `cert` and `key`.
    ca: PEM file of the authorities to trust; left out = those of gRPC's own list.
    cert, key: PEM files of the client's certificate chain and its key, where the server asks for one (mTLS).
    token: a bearer token. Without TLS it goes to this machine only, unless `plaintext_token` is set: for networks that
        encrypt by themselves, as a service mesh does.
    """

    tls: bool
    ca: str | Path
    cert: str | Path
    key: str | Path
    token: str
    plaintext_token: bool


class Patience:
    """The time that a call has, tries and waits together.

    gRPC itself tries again where no server answers (`channel_options`). A server that answers that it is busy, and for
    how long (RetryInfo), is asked again here, after a little more than that: not everybody at once.
    """

    def __init__(self, timeout_s: float) -> None:
        self._ends = time.monotonic() + timeout_s
        self._tries = 1

    @property
    def left_s(self) -> float:
        return max(0.0, self._ends - time.monotonic())

    def wait_s(self, error: WeaksegError, cause: Exception) -> float:
        """How long to wait before the next try; raises `error` where there is to be none."""
        retry_s = getattr(error, "retry_s", None)
        if isinstance(error, QueueFullError | RateLimitedError) and retry_s is not None and self._tries < MOST_TRIES:
            wait_s: float = retry_s * random.uniform(1.0, 1.5) * 2 ** (self._tries - 1)
            if wait_s < self.left_s:
                self._tries += 1
                return wait_s
        raise error from cause

    def pause_s(self, error: WeaksegError) -> float:
        """A moment, before another server is asked; raises `error` when the time is over."""
        if self.left_s < MOST_PAUSE_S:
            raise error
        return random.uniform(0.0, MOST_PAUSE_S)


def credentials(options: AccessOptions) -> grpc.ChannelCredentials | None:
    """None = no TLS.

    Raises:
        ConfigError: a file that cannot be read, half a pair, or files given beside tls=False.
    """
    files = [name for name in ("ca", "cert", "key") if options.get(name) is not None]
    if not options.get("tls", bool(files)):
        if files:
            raise ConfigError(f"expected no {' or '.join(files)} beside tls=False: leave tls out")
        return None
    if ("cert" in files) != ("key" in files):
        raise ConfigError("expected cert and key together, got one of them: mTLS needs the certificate and its key")
    ca, cert, key = (_read(options, name) if name in files else None for name in ("ca", "cert", "key"))
    return grpc.ssl_channel_credentials(ca, key, cert)


def metadata(options: AccessOptions, target: str, *, encrypted: bool) -> Metadata:
    """What goes with every call.

    Raises:
        ConfigError: a token that anybody on the way could read.
    """
    token = options.get("token")
    if token is None:
        return ()
    if not (encrypted or options.get("plaintext_token") or is_local(target)):
        raise ConfigError(
            f"expected TLS to {target}, got a token without it, which anybody on the way could read: pass tls=True, or "
            f"plaintext_token=True where the network encrypts"
        )
    return (("authorization", f"Bearer {token}"),)


def trace_metadata() -> Metadata:
    """W3C trace context of the span that runs, in programs that use OpenTelemetry; the server's become its children."""
    if "opentelemetry.trace" not in sys.modules:  # who has a span has imported it
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers)
    return tuple(headers.items())


def is_local(target: str) -> bool:
    """Whether what is sent to a gRPC name, or listens on a host, stays on this machine."""
    if target.startswith("unix:"):
        return True
    host = target.rpartition("/")[2]
    host = host if host.count(":") != 1 else host.partition(":")[0]
    host = host[1:].partition("]")[0] if host.startswith("[") else host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def channel_options(max_message_bytes: int) -> list[tuple[str, Any]]:
    retry = {
        "maxAttempts": MOST_TRIES,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        # The second, of calls that their caller has not cancelled: a server that stops has received but not begun them.
        "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
    }
    # Not SegmentStream: what it was sent before it broke is lost.
    methods = [{"service": SERVICE, "method": method} for method in ("Segment", "GetModel", "ListModels")]
    config = {
        "methodConfig": [{"name": methods, "retryPolicy": retry}],
        # Fifty failures beyond a tenth of the successes, and calls are not tried again until the servers are better:
        # to ask four times would keep them from it (github.com/grpc/proposal/blob/master/A6-client-retries.md).
        "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
        "loadBalancingConfig": [{"round_robin": {}}],
    }
    return [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.enable_retries", 1),
        # A request above this is never sent again; gRPC's default is 256 KiB, less than most photographs.
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes + 65536),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # gRPC's default is 1 s, longer than all tries of a call take: where one address stands for several servers, a
        # connection that one of them drops as it stops would fail calls that the others could answer.
        ("grpc.initial_reconnect_backoff_ms", CONNECT_AGAIN_MS),
        # gRPC's default is 30 s, in which an update may have replaced every server that is known.
        ("grpc.dns_min_time_between_resolutions_ms", ASK_AGAIN_MS),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        # Also how long Linux waits for an answer to what was sent: of a machine that is gone nothing else comes.
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ]


def _read(options: AccessOptions, name: str) -> bytes:
    path = Path(options[name])  # type: ignore[literal-required]
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"expected a PEM file as {name}, got {path}: {error.strerror}") from error
