"""Servers as pods: started, asked whether they are ready, stopped, killed; and what Kubernetes would make of them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from benchmarks.cluster_network import Loopback, NameServer, Namespaces
from weakseg.text import table

PROBE_S, PROBE_TIMEOUT_S = 0.3, 2.0
MIN_READY_S = 1.0
READY_WITHIN_S = 120.0
PORT, METRICS_PORT = 8500, 9464
DONE = re.compile(rb'^weakseg_requests_total\{[^}]*code="OK"[^}]*\} (\S+)$', re.MULTILINE)


@dataclass
class Pod:
    """seen: (when, requests answered so far)."""

    name: str
    release: str
    address: str
    process: subprocess.Popen[bytes]
    log: Path
    ready: bool = False
    lost: float | None = None
    seen: list[tuple[float, float]] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        return self.process.poll() is None


class Cluster:
    """Pods behind one name. Those that are ready are what the name server answers with."""

    def __init__(self, network: Namespaces | Loopback, folder: Path, options: Sequence[str], grace_s: float) -> None:
        self.network, self.pods = network, list[Pod]()
        self.names = NameServer(network.here)
        self._folder, self._options, self._grace_s = folder, list(options), grace_s
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch)
        self._watching.start()

    @property
    def target(self) -> str:
        return f"dns://{self.network.here}:{self.names.port}/weakseg.test:{PORT}"

    def start(self, release: str, models: Path) -> Pod:
        """A new pod; returns before it is ready."""
        name = f"pod{len(self.pods)}"
        address, log = self.network.add(name), self._folder / f"{name}.log"
        command = [*self.network.on(name), sys.executable, "-m", "weakseg", "serve", "--models", str(models)]
        command += ["--host", address, "--port", str(PORT), "--metrics-port", str(METRICS_PORT), *self._options]
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        self.pods.append(Pod(name, release, address, process, log))
        return self.pods[-1]

    def wait_ready(self, *pods: Pod) -> None:
        """Until all have been for as long as minReadySeconds."""
        give_up = time.monotonic() + READY_WITHIN_S
        while not all(pod.ready for pod in pods):
            gone = next((pod for pod in pods if not pod.runs), None)
            if gone or time.monotonic() > give_up:
                raise RuntimeError(
                    f"{(gone or pods[0]).name} is not ready: {(gone or pods[0]).log.read_text()[-2000:]}"
                )
            time.sleep(0.05)
        time.sleep(MIN_READY_S)

    def stop(self, *pods: Pod) -> list[int]:
        """As Kubernetes does it: SIGTERM, and wait; exit codes."""
        for pod in pods:
            pod.process.send_signal(signal.SIGTERM)
        return [pod.process.wait(READY_WITHIN_S) for pod in pods]

    def lose(self, pod: Pod) -> None:
        """The node is gone: no packet comes back, and for a while nobody takes it out of the name."""
        self.network.unplug(pod.name)
        pod.process.kill()
        pod.process.wait()
        pod.lost = time.monotonic()

    def running(self) -> list[Pod]:
        return [pod for pod in self.pods if pod.runs]

    def close(self) -> None:
        self._over.set()
        self._watching.join()
        for pod in self.running():
            pod.process.kill()
            pod.process.wait()

    def _watch(self) -> None:
        """Probes, endpoints and scrapes."""
        while not self._over.wait(PROBE_S):
            for pod in list(self.pods):
                if pod.lost is not None:
                    pod.ready = time.monotonic() - pod.lost < self._grace_s
                else:
                    pod.ready = pod.runs and _get(pod, "/readyz") is not None
                if pod.runs and (scraped := _get(pod, "/metrics")) is not None:
                    pod.seen.append((time.monotonic(), sum(map(float, DONE.findall(scraped)))))
            self.names.addresses = [pod.address for pod in self.pods if pod.ready]


def _get(pod: Pod, path: str) -> bytes | None:
    connection = HTTPConnection(pod.address, METRICS_PORT, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        return body if answer.status == 200 else None
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()


def pods_text(pods: Sequence[Pod]) -> str:
    rows = [[pod.name, pod.release, f"{pod.seen[-1][1]:.0f}" if pod.seen else "0"] for pod in pods]
    return table(["pod", "release", "answered"], rows)
