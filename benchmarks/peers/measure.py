"""One server, started, checked against ours, measured, stopped."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.load import Load, Service, ask, closed_loop, open_loop
from benchmarks.peers.peers import OURS, ROOT, Peer, Setting
from benchmarks.peers.processes import cpu_seconds, free_port, memory_mib, running
from weakseg.tolerance import FP32

CALLERS = (1, 4, 16, 64)
CAPACITY_AT = 16  # callers whose rate is the capacity
LOADS = (1, 2, 4)  # times the capacity
DEADLINE_S = 2.0  # of calls that come by themselves: three times what 16 callers wait for the network
START_S = 180.0
POLL_S = 0.05
REST_S = 0.5
PNG = b"\x89PNG\r\n"


class PeerError(Exception):
    """A server that does not start, or does not answer as ours does."""


@dataclass(frozen=True)
class Server:
    """One that has answered. requests: what it is asked, in its own form. log: what it says goes there."""

    name: str
    service: Service
    requests: tuple[bytes, ...]
    start_to_ready_s: float
    log: Path

    def closed_loop(self, callers: int, seconds: float) -> Load:
        """Raises PeerError: no call was answered."""
        load = closed_loop(self.service, *self.requests, callers=callers, seconds=seconds)
        if not load.answered_s:
            raise PeerError(
                f"expected answers of {self.name} to {callers} callers, got {dict(load.codes)}: see {self.log}"
            )
        return load


@contextmanager
def started(peer: Peer, setting: Setting, bundle: Path, images: Mapping[bytes, Any], log: Path) -> Iterator[Server]:
    """A server whose answers to these images are as ours has them; it is ended when the block is left.

    Args:
        images: JPEG files and the label maps that ours makes of them.
        log: what the server says goes here.
    Raises:
        PeerError: it does not start, or answers something else.
    """
    port = free_port()
    requests = tuple(peer.request(image) for image in images)
    env = {
        "PEER_BUNDLE": str(bundle.resolve()),
        "PEER_PORT": str(port),
        "PEER_WORKERS": str(setting.workers),
        "PEER_THREADS": str(setting.threads),
        "PEER_BATCH": str(setting.batch),
        "PYTHONPATH": str(ROOT),
    }
    command = [str(peer.python), "-m", f"benchmarks.peers.servers.{peer.name}"]
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        service = peer.service(port)
        began = time.monotonic()
        with running(command, folder=Path(folder), log=log, env=env) as process:
            answers = [_first_answer(process, peer, service, requests[0], log)]
            start_s = time.monotonic() - began
            answers += [ask(service, request, START_S)[1] for request in requests[1:]]
            if peer.checked:
                for answer, labels in zip(answers, images.values(), strict=True):
                    check(peer.name, answer, labels)
            yield Server(peer.name, service, requests, start_s, log)


def measured(
    peer: Peer,
    setting: Setting,
    bundle: Path,
    images: Mapping[bytes, Any],
    *,
    seconds: float,
    callers: Sequence[int] = CALLERS,
    loads: Sequence[int] = LOADS,
    log: Path,
) -> dict[str, Any]:
    """What one start of a server gives.

    Args:
        seconds: of each measurement.
        loads: of calls that come by themselves; none where the callers would be the bound.
        images, log: as in `started`, and so is what is raised.
    """
    with started(peer, setting, bundle, images, log) as server:
        at_rest = _cores_used()  # some look for work all the time
        result: dict[str, Any] = {"start_to_ready_s": server.start_to_ready_s}
        result |= {"idle_mib": memory_mib(), "idle_cores": at_rest, "closed": {}, "open": {}}
        for n in callers:
            before = cpu_seconds()
            load = server.closed_loop(n, seconds)
            spent, answered = cpu_seconds() - before, load.codes["OK"] + load.warmed_up
            result["closed"][str(n)] = {**_said(load), "cpu_us": 1e6 * spent / answered}
        for times in loads:
            _until_idle(at_rest)
            rate = times * result["closed"][str(CAPACITY_AT)]["rate"]
            load = open_loop(server.service, *server.requests, rate=rate, seconds=2 * seconds, timeout_s=DEADLINE_S)
            result["open"][str(times)] = {**_said(load), "offered": rate}
    return result


def check(name: str, answer: bytes, labels: Any) -> float:
    """The share of pixels that are as ours has them. Raises PeerError: too few, or no PNG of that size."""
    at = answer.find(PNG)
    if at < 0:
        raise PeerError(f"expected a PNG of {name}, got {answer[:200]!r}")
    its = np.asarray(Image.open(io.BytesIO(answer[at:])))
    if its.shape != labels.shape:
        raise PeerError(f"expected a label map of {labels.shape} of {name}, got {its.shape}")
    share = float((its == labels).mean())
    if share < FP32.label_agreement:
        raise PeerError(f"expected the label map that ours makes of {name}, got {100 * share:.2f} % of its pixels")
    return share


def install_mib(peer: Peer) -> float:
    """The environment's packages; of ours, which is installed from the checkout, the checkout's too."""
    folders = [peer.site_packages]
    if peer is OURS:
        folders += [ROOT / name for name in ("weakseg", "training", "export", "serve")]
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return sum(file.stat().st_size for file in files) / 2**20


def versions(peer: Peer) -> dict[str, str]:
    every = {d.name.lower().replace("_", "-"): d.version for d in distributions(path=[str(peer.site_packages)])}
    named = (peer.package, "onnxruntime", "numpy", "opencv-python-headless", "grpcio")
    return {name: every[name] for name in named if name in every}


def _first_answer(process: Any, peer: Peer, service: Any, request: bytes, log: Path) -> bytes:
    ends = time.monotonic() + START_S
    said = "nothing"
    while time.monotonic() < ends:
        code, answer = ask(service, request, START_S)
        if code == "OK":
            return answer
        said = f"{code} {answer[:300].decode(errors='replace')}".strip()
        if process.poll() is not None:
            raise PeerError(f"{peer.name} ended with exit code {process.returncode}: see {log}")
        time.sleep(POLL_S)
    raise PeerError(f"expected an answer of {peer.name} within {START_S:.0f} s, got {said}: see {log}")


def _said(load: Load) -> dict[str, Any]:
    quantiles = {"p50_s": 0.5, "p99_s": 0.99} if load.answered_s else {}
    return {
        "rate": load.rate,
        **{name: load.quantile_s(q) for name, q in quantiles.items()},
        "codes": dict(load.codes),
    }


def _cores_used() -> float:
    """By the server, in the next REST_S seconds."""
    before = cpu_seconds()
    time.sleep(REST_S)
    return (cpu_seconds() - before) / REST_S


def _until_idle(at_rest: float) -> None:
    """What nobody waits for any more is still computed by some servers."""
    ends = time.monotonic() + START_S
    while _cores_used() > at_rest + 0.1 and time.monotonic() < ends:
        pass
