"""Ports, certificates and tokens."""

from __future__ import annotations

import errno
import socket
import ssl
import stat
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from serve.access import read_tokens
from serve.doctor.finding import Finding, failed, ok, warning
from serve.settings import ServeConfig
from serve.tls import Certificates, TlsFiles, leaf_of
from weakseg.errors import ConfigError

SOON_DAYS = 14
LIVEZ_TIMEOUT_S = 2.0
HIDE = "chmod o-r; of a Secret's volume defaultMode: 0440, with fsGroup in the pod's securityContext"


def ports(config: ServeConfig) -> Iterator[Finding]:
    """Whether they can be listened on. Beside a server that runs, as in its pod, they are its own."""
    wanted = [("port", config.host, config.port), ("metrics_port", config.host, config.metrics_port)]
    if config.admin_port is not None:
        wanted.append(("admin_port", config.admin_host, config.admin_port))
    times = Counter(port for _, _, port in wanted if port)
    is_ours = _answers(config.host, config.metrics_port)
    for name, host, port in wanted:
        check = f"{name} {port}"
        flag = f"--{name.replace('_', '-')}"
        if times[port] > 1:
            yield failed(check, f"{times[port]} settings name it", f"give {flag} another")
        elif not port:
            yield ok(check, "a free one will be taken")
        else:
            yield _free(check, host, port, flag, is_ours)


def _free(check: str, host: str, port: int, flag: str, is_ours: bool) -> Finding:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do; one that listens still shows
            tried.bind(address)
    except socket.gaierror as error:
        return failed(
            check, f"{host} is no address: {error.strerror}", "0.0.0.0 or :: is every address of this machine"
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE and is_ours:
            return warning(check, "in use, by a weakseg server that runs here", f"for another one, {flag}")
        if error.errno == errno.EADDRINUSE:
            return failed(check, f"in use on {host}", f"stop what uses it (`ss -ltnp`), or {flag}")
        todo = f"{flag} above 1023" if error.errno == errno.EACCES else "name an address of this machine"
        return failed(check, f"{host}: {error.strerror}", todo)
    return ok(check, f"free on {host}")


def _answers(host: str, metrics_port: int) -> bool:
    if not metrics_port:
        return False
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = HTTPConnection(here, metrics_port, timeout=LIVEZ_TIMEOUT_S)
    try:
        connection.request("GET", "/livez")
        answer = connection.getresponse()
        return answer.status == 200 and answer.read(8) == b"ok\n"
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def certificates(config: ServeConfig) -> Iterator[Finding]:
    """A server reads anything that belongs together; what clients will say is found by a handshake in memory."""
    files = config.tls
    if files is None:
        yield ok("certificate", "none: the port speaks no TLS")
        return
    try:
        Certificates(files)
    except ConfigError as error:
        yield failed("certificate", str(error), "give a PEM chain, leaf first, and the key of the leaf")
        return
    yield _leaf(files)
    if _mode(files.key) & stat.S_IROTH:
        yield warning("certificate's key", f"{files.key} can be read by every user", HIDE)
    if files.client_ca is not None:
        yield _authorities(files.client_ca)


def _leaf(files: TlsFiles) -> Finding:
    """What a client finds that trusts the last certificate of the chain, of which no more need be known here."""
    try:
        seen = leaf_of(files)
    except ssl.SSLCertVerificationError as error:
        expired, early = "expired" in error.verify_message, "not yet valid" in error.verify_message
        todo = "renew it" if expired else "set the clock, or wait" if early else "give the whole chain, leaf first"
        return failed("certificate", f"{files.cert}: {error.verify_message}", f"{todo}: no client will accept it")
    until, names = _time(seen["notAfter"]), [value for _, value in seen.get("subjectAltName", ())]
    days = (until - datetime.now(UTC)).days
    if not names:
        return failed(
            "certificate", f"{files.cert} has no subjectAltName", "name the host in it: clients take no other name"
        )
    found = f"for {', '.join(names)}; valid until {until:%Y-%m-%d}, {days} days"
    if days < SOON_DAYS:
        return warning("certificate", found, "renew it: the server takes new files by itself")
    return ok("certificate", found)


def _authorities(path: Path) -> Finding:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_verify_locations(path)
    now = datetime.now(UTC)
    found: list[Any] = context.get_ca_certs()
    if not found:
        return failed("clients' authority", f"{path} has no certificate of an authority", "give that of the issuer")
    valid = [one for one in found if _time(one["notBefore"]) <= now < _time(one["notAfter"])]
    if not valid:
        return failed("clients' authority", f"{path}: none of {len(found)} is valid now", "renew it, or set the clock")
    days = (max(_time(one["notAfter"]) for one in valid) - now).days
    return ok("clients' authority", f"{len(valid)} of {len(found)} valid, {days} days")


def _time(text: str) -> datetime:
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(text), UTC)


def tokens(config: ServeConfig) -> Finding:
    if config.tokens is None:
        return ok("tokens", "none: everybody may call")
    try:
        callers = read_tokens(config.tokens)
    except ConfigError as error:
        return failed("tokens", str(error), "see docs/security.md for what the file looks like")
    found = f"{len(callers)} callers: {', '.join(caller.name for caller in callers)}"
    if _mode(config.tokens) & stat.S_IROTH:
        return warning("tokens", f"{found}; {config.tokens} can be read by every user", HIDE)
    return ok("tokens", found)


def _mode(path: Path) -> int:
    return path.stat().st_mode
