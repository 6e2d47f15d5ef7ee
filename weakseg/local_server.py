"""A server process of our own on this machine, for the demo, the benchmarks and tests."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

from weakseg.errors import ServiceError

READY_TIMEOUT_S = 60.0
POLL_S = 0.05


class Ports(NamedTuple):
    """Where a server answers."""

    target: str  # gRPC, host:port
    metrics: str  # HTTP, http://host:port


@contextmanager
def local_server(bundle: Path, log: Path, *options: str) -> Iterator[Ports]:
    """`weakseg serve` over one bundle on free ports of the loopback interface, ended when the block is left.

    Args:
        log: what the server says goes here.
        options: further flags of `weakseg serve`.
    Yields:
        Once the model is ready.
    Raises:
        ServiceError: it does not start, or is not ready in time.
    """
    command = [sys.executable, "-m", "weakseg", "serve", "--json", "--bundle", str(bundle), "--host", "127.0.0.1"]
    command += ["--port", "0", "--metrics-port", "0", "--drain-delay-s", "0", *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            opened = json.loads(process.stdout.readline() or "{}")  # the ports, an error, or nothing when it crashes
            if "port" not in opened:
                why = opened["error"]["message"] if "error" in opened else _last_line(log)
                raise ServiceError(f"the server did not start: {why} (more in {log})")
            _wait_until_ready(opened["metrics_port"], process, log)
            yield Ports(f"127.0.0.1:{opened['port']}", f"http://127.0.0.1:{opened['metrics_port']}")
        finally:
            process.terminate()
            process.wait()


def _wait_until_ready(metrics_port: int, process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        connection = HTTPConnection("127.0.0.1", metrics_port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        finally:
            connection.close()
        time.sleep(POLL_S)
    raise ServiceError(f"the server did not get ready: {_last_line(log)} (more in {log})")


def _last_line(log: Path) -> str:
    return next(iter(reversed(log.read_text().splitlines())), "")
