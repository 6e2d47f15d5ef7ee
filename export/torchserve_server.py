"""A TorchServe on this machine over one model bundle: what `make torchserve` runs, and the tests.

    python -m export.torchserve_server BUNDLE [--folder build/torchserve]

It listens on the loopback interface and asks for tokens, as TorchServe does by itself, until Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from export.torchserve import export_archive
from weakseg.errors import ServiceError, UsageError, WeaksegError

MAX_MESSAGE_BYTES = 32 * 2**20  # as `weakseg serve`; TorchServe's own 6.5 MB refuse many photographs
READY_TIMEOUT_S = 300.0  # each worker imports torch, for TorchServe's sake
STOP_TIMEOUT_S = 30.0
POLL_S = 0.25
_WORKER_DIED = "Backend worker process died"  # as TorchServe 0.12 says it


@dataclass(frozen=True)
class Ports:
    """TorchServe's own."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071


@dataclass(frozen=True)
class Running:
    """A server whose worker is ready. log: what it and its workers say. ready_s: how long that took."""

    process: subprocess.Popen[bytes]
    model: str
    ports: Ports
    key_file: Path
    log: Path
    ready_s: float

    def key(self, api: str = "inference") -> str:
        """The token of `inference` or `management`; valid for an hour after the start."""
        key: str = json.loads(self.key_file.read_text())[api]["key"]
        return key


@contextmanager
def local_torchserve(
    archive: Path,
    model: str,
    folder: Path,
    *,
    ports: Ports = Ports(),
    torchserve: Path | None = None,
    properties: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Serve one archive on the loopback interface; the server and its workers end with the block.

    Args:
        archive: a .mar; model: its name and version, name/version.
        folder: its working folder: configuration, logs, key_file.json while it runs.
        torchserve: the command; None = the one beside this Python.
        properties: further lines of config.properties.
    Raises:
        UsageError: no TorchServe or no Java. ServiceError: it does not start, or its worker is not ready in time.
    """
    command = _command(torchserve or Path(sys.executable).with_name("torchserve"))
    folder.mkdir(parents=True, exist_ok=True)
    folder, log = folder.resolve(), folder.resolve() / "torchserve.log"
    (folder / "config.properties").write_text(_properties(ports, properties or {}))
    command += ["--start", "--foreground", "--no-config-snapshots", "--ts-config", str(folder / "config.properties")]
    command += ["--model-store", str(archive.resolve().parent), "--models", archive.name]
    key_file = folder / "key_file.json"
    key_file.unlink(missing_ok=True)  # of an earlier server
    # A temporary folder of its own: TorchServe keeps its pid there, and knows one server in each. A short path, too:
    # the workers' sockets are in it.
    with tempfile.TemporaryDirectory(prefix="weakseg-ts-") as temporary, log.open("w") as out:
        env = os.environ | {"TMPDIR": temporary, "TEMP": temporary}
        # A session of its own, so that server and workers can be ended together.
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
        try:
            started = time.monotonic()
            _wait_until_ready(process, model, ports, key_file, log)
            yield Running(process, model, ports, key_file, log, time.monotonic() - started)
        finally:
            _end_group(process)
            key_file.unlink(missing_ok=True)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m export.torchserve_server", description="Serve a model bundle by TorchServe, until Ctrl-C."
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a model bundle, or a run folder that has one")
    parser.add_argument("--folder", type=Path, default=Path("build/torchserve"), help="for archive, logs and keys")
    args = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_once)
    try:
        made = export_archive(args.bundle, args.folder / "models")
        print(f"archive: {made['archive']} ({made['mib']} MiB); TorchServe starts, which takes a while", flush=True)
        with local_torchserve(Path(made["archive"]), made["model"], args.folder) as server:
            print(_greeting(server), flush=True)
            server.process.wait()
            raise ServiceError(f"TorchServe ended by itself: see {server.log}")
    except WeaksegError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("TorchServe has stopped")
    return 0


def _stop_once(*_: object) -> None:
    """The first signal ends the server; a second one must not end its ending."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _greeting(server: Running) -> str:
    url = f"http://127.0.0.1:{server.ports.inference}/predictions/{server.model}"
    return (
        f"TorchServe serves {server.model}, ready after {server.ready_s:.1f} s; Ctrl-C stops it\n"
        f"  REST {url}, gRPC 127.0.0.1:{server.ports.grpc_inference}\n"
        f"  tokens {server.key_file}, log {server.log}\n"
        f"try it: python examples/torchserve_client.py {server.model} IMAGE"
    )


def _command(torchserve: Path) -> list[str]:
    java = Path(os.environ["JAVA_HOME"], "bin/java") if "JAVA_HOME" in os.environ else shutil.which("java")
    if java is None or not Path(java).is_file():
        raise UsageError(
            f"TorchServe needs Java, got {java or 'none on the PATH'}: install Java 17 "
            "(Debian: openjdk-17-jre-headless), or set JAVA_HOME"
        )
    if not torchserve.is_file():
        raise UsageError(f"expected TorchServe at {torchserve}, got none: `make torchserve` installs it")
    return [str(torchserve)]


def _properties(ports: Ports, further: Mapping[str, str]) -> str:
    lines = {
        f"{api}_address": f"http://127.0.0.1:{getattr(ports, api)}" for api in ("inference", "management", "metrics")
    }
    for api in ("grpc_inference", "grpc_management"):
        lines |= {f"{api}_address": "127.0.0.1", f"{api}_port": str(getattr(ports, api))}
    lines |= {"max_request_size": str(MAX_MESSAGE_BYTES), "max_response_size": str(MAX_MESSAGE_BYTES)}
    return "".join(f"{key}={value}\n" for key, value in (lines | dict(further)).items())


def _wait_until_ready(process: subprocess.Popen[bytes], model: str, ports: Ports, key_file: Path, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if key_file.is_file() and _worker_is_ready(model, ports, key_file):
            return
        if _WORKER_DIED in log.read_text():  # TorchServe would try again for minutes
            raise ServiceError(f"the worker of TorchServe died while it loaded {model}: see {log}")
        time.sleep(POLL_S)
    if process.poll() is not None:
        raise ServiceError(
            f"TorchServe did not start, perhaps as one of the ports {astuple(ports)} is taken: see {log}"
        )
    raise ServiceError(f"no worker of TorchServe got ready in {READY_TIMEOUT_S:.0f} s: see {log}")


def _worker_is_ready(model: str, ports: Ports, key_file: Path) -> bool:
    try:
        key = json.loads(key_file.read_text())["management"]["key"]
        request = urllib.request.Request(
            f"http://127.0.0.1:{ports.management}/models/{model}", headers={"Authorization": f"Bearer {key}"}
        )
        with urllib.request.urlopen(request, timeout=5) as response:
            described = json.loads(response.read())
    except (OSError, ValueError):  # not there yet, or half written
        return False
    return any(worker["status"] == "READY" for worker in described[0]["workers"])


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server and its workers, SIGKILL to what is left of them after a while."""
    for sent, wait_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, STOP_TIMEOUT_S)):
        deadline = time.monotonic() + wait_s
        try:
            os.killpg(process.pid, sent)
            while time.monotonic() < deadline:
                process.poll()  # reaps the launcher, which would keep the group alive
                os.killpg(process.pid, 0)
                time.sleep(POLL_S)
        except ProcessLookupError:
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
