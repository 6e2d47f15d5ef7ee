"""A server process of its own that is sent hostile input, and what can be seen of it from outside.

The process is a real one: a crash is one, and its memory is its own.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep
from urllib.error import URLError
from urllib.request import urlopen

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

ROOT = Path(__file__).parents[2]
LONG_S = 60.0
MIB = 2**20
REFUSED_BY_GRPC = re.compile(r"Compression algorithm '\w+' is disabled")  # its own line, not ours


class Watched:
    """`weakseg serve` over the toy bundle: where it listens, its memory, its log."""

    def __init__(self, bundle, log, *flags):
        command = [sys.executable, "-m", "weakseg", "serve", "--json", "--bundle", str(bundle), "--host", "127.0.0.1"]
        command += ["--port", "0", "--metrics-port", "0", "--threads", "1", "--drain-delay-s", "0", *flags]
        self.log = log
        with log.open("w") as stderr:
            self.child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)
        ports = json.loads(self.child.stdout.readline())
        self.target = f"127.0.0.1:{ports['port']}"
        self.admin_target = f"127.0.0.1:{ports['admin_port']}"
        self._readyz = f"http://127.0.0.1:{ports['metrics_port']}/readyz"
        self.metrics_url = f"http://127.0.0.1:{ports['metrics_port']}/metrics"
        self._wait(self._is_ready)
        self._wait(lambda: "dense CRF" in self.log.read_text())  # its kernels are compiled by then

    def channel(self, target=None, **options):
        given = {"grpc.max_receive_message_length": -1, "grpc.max_send_message_length": -1} | options
        return grpc.insecure_channel(target or self.target, list(given.items()))

    @property
    def rss_bytes(self):
        return self._status_kib("VmRSS") * 1024

    @property
    def peak_bytes(self):
        """Largest RSS since `forget_peak`."""
        return self._status_kib("VmHWM") * 1024

    @property
    def address_space_bytes(self):
        return self._status_kib("VmSize") * 1024

    def forget_peak(self):
        Path(f"/proc/{self.child.pid}/clear_refs").write_text("5")

    @property
    def is_alive(self):
        return self.child.poll() is None

    def errors(self):
        """Lines of the log that say that something went wrong here: internal errors, exceptions nobody took."""
        lines = [line for line in self.log.read_text().splitlines() if not REFUSED_BY_GRPC.search(line)]
        return [line for line in lines if not line.startswith("{") or json.loads(line)["level"] in ("error", "warning")]

    def close(self):
        self.child.terminate()
        self.child.communicate(timeout=LONG_S)

    def _status_kib(self, field):
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1])

    def _is_ready(self):
        try:
            return urlopen(self._readyz).status == 200
        except URLError:  # 503 while the model loads
            return False

    def _wait(self, condition):
        deadline = monotonic() + LONG_S
        while not condition():
            assert self.is_alive and monotonic() < deadline, self.log.read_text()
            sleep(0.05)


@pytest.fixture
def watched_process():
    """A function that starts a server process, which may end in any way."""
    started = []

    def start(bundle, log, *flags):
        started.append(Watched(bundle, log, *flags))
        return started[-1]

    yield start
    for server in started:
        server.child.kill()
        server.child.communicate()


@pytest.fixture(scope="session")
def watch():
    """A generator for fixtures: a server process, which must live and have logged no error when they end."""

    def watching(bundle, log, *flags):
        if not Path("/proc/self/clear_refs").exists():
            pytest.skip("memory of a process is read from Linux's /proc")
        server = Watched(bundle, log, *flags)
        yield server
        alive, errors = server.is_alive, server.errors()
        server.close()
        assert alive and not errors

    return watching


@pytest.fixture(scope="module")
def watched(toy_bundle, tmp_path_factory, watch):
    """A server process with defaults, for a module."""
    yield from watch(toy_bundle, tmp_path_factory.mktemp("server") / "log")


@pytest.fixture(scope="session")
def outcome():
    """A function: what is called to (code, reason); the reason is empty for OK, and where gRPC itself answers."""

    def outcome_of(call):
        try:
            call()
        except grpc.RpcError as error:
            return error.code().name, _reason(rpc_status.from_call(error))
        return "OK", ""

    return outcome_of


@pytest.fixture(scope="session")
def outcome_in_stream():
    """The same of a response of a stream."""
    names = {code.value[0]: code.name for code in grpc.StatusCode}

    def outcome_of(response):
        return (names[response.error.code], _reason(response.error)) if response.HasField("error") else ("OK", "")

    return outcome_of


def _reason(status):
    info = error_details_pb2.ErrorInfo()
    return next((info.reason for detail in status.details if detail.Unpack(info)), "") if status is not None else ""
