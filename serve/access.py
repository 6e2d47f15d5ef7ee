"""Who may call what: bearer tokens from a file, read again when it changes.

    [annotation-tool]                    # a name for logs and rate limits
    sha256 = "9f86d081884c7d65..."       # of the token; or token = "...", the token itself
    allow = ["segment", "models"]        # left out: all but "admin"

Without such a file everybody may do everything. Health checks never need a token.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import tomllib
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.stamp import stamp
from weakseg.errors import ConfigError, PermissionDeniedError, UnauthenticatedError

OPEN_SERVICES = ("grpc.health.v1.Health",)
OPEN_METHODS = ("ServerLive", "ServerReady", "ModelReady")  # health checks of the Open Inference Protocol
PERMISSIONS = {"Segment": "segment", "SegmentStream": "segment", "ModelInfer": "segment"}  # others: "models"
ADMIN_SERVICE = "weakseg.v1.AdminService"
DEFAULT = frozenset({"segment", "models"})
ALL = DEFAULT | {"admin"}
LEAST_LENGTH = 16

# Whom the call that runs counts for: the name of its token or, where there is none, its address.
CLIENT: ContextVar[str] = ContextVar("client", default="")

log = logging.getLogger("serve.access")


@dataclass(frozen=True)
class Caller:
    """A row of the file."""

    name: str
    digest: bytes
    allow: frozenset[str]


class Access:
    """Decides about calls. path: None = no tokens.

    Raises:
        ConfigError: a file that cannot be read or says what cannot be.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp = () if path is None else stamp([path])
        self._callers = () if path is None else read_tokens(path)

    def caller(self, method: str, authorization: str | None) -> str:
        """Name of who calls `/<service>/<method>`; empty where no token is needed.

        Raises:
            UnauthenticatedError: no token, or one that is not in the file. PermissionDeniedError: not allowed to it.
        """
        service, name = method.strip("/").rsplit("/", 1)
        if self._path is None or service in OPEN_SERVICES or name in OPEN_METHODS:
            return ""
        self._refresh(self._path)
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise UnauthenticatedError("expected a token, got none: send the metadata `authorization: Bearer <token>`")
        caller = _find(self._callers, token.strip())
        if caller is None:
            raise UnauthenticatedError("expected a token that this server knows, got another")
        needed = "admin" if service == ADMIN_SERVICE else PERMISSIONS.get(name, "models")
        if needed not in caller.allow:
            raise PermissionDeniedError(f"{caller.name} may not call {name}: its token does not allow {needed!r}")
        return caller.name

    def _refresh(self, path: Path) -> None:
        """A damaged file changes nothing: whoever could call still can, and the log says why."""
        now = stamp([path])
        if now == self._stamp:
            return
        self._stamp = now
        try:
            self._callers = read_tokens(path)
        except ConfigError as error:
            log.error("tokens not reloaded", extra={"fields": {"failure": str(error)}})
        else:
            log.info("tokens reloaded", extra={"fields": {"callers": [caller.name for caller in self._callers]}})


def read_tokens(path: Path) -> tuple[Caller, ...]:
    """Raises ConfigError; the message has no token in it."""
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"expected a file of tokens, got {path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        # The parser's message may quote the line.
        raise ConfigError(f"expected a TOML file of tokens, got {path}: it cannot be parsed") from None
    if not rows:
        raise ConfigError(f"expected tokens in {path}, got none: nobody could call")
    return tuple(_caller(name, row, path) for name, row in rows.items())


def _caller(name: str, row: Any, path: Path) -> Caller:
    where = f"{path}: [{name}]"
    if (
        not isinstance(row, dict)
        or not row.keys() <= {"token", "sha256", "allow"}
        or ("token" in row) == ("sha256" in row)
    ):
        raise ConfigError(f"{where}: expected token or sha256, and allow if not all is allowed")
    allow = row.get("allow", sorted(DEFAULT))
    if not isinstance(allow, list) or not ALL.issuperset(map(str, allow)):
        raise ConfigError(f"{where}: allow must be a list of {', '.join(sorted(ALL))}, got {allow!r}")
    if "token" in row:
        if not isinstance(row["token"], str) or len(row["token"]) < LEAST_LENGTH:
            raise ConfigError(f"{where}: token must have at least {LEAST_LENGTH} characters: `openssl rand -hex 32`")
        digest = hashlib.sha256(row["token"].encode()).digest()
    else:
        try:
            digest = bytes.fromhex(row["sha256"])
        except (TypeError, ValueError):
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            raise ConfigError(f"{where}: sha256 must be 64 hexadecimal digits: `printf %s TOKEN | sha256sum`")
    return Caller(name, digest, frozenset(map(str, allow)))


def _find(callers: Iterable[Caller], token: str) -> Caller | None:
    """Every row is compared, whichever matches: the time says nothing about the tokens."""
    digest = hashlib.sha256(token.encode()).digest()
    found = None
    for caller in callers:
        if hmac.compare_digest(caller.digest, digest):
            found = caller
    return found
