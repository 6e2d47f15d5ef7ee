"""Does the autoscaler keep the objectives? `python -m benchmarks.autoscaling` (`make bench-autoscaling`).

Simulates every request of a steady, a daily and a sudden load, on pods that are as fast as a measured server, scaled by
deploy's HPA (benchmarks/hpa.py) from gauges that are scraped as Prometheus does it. Clients are ours: balanced over the
pods that they know, they learn of new ones when a connection has reached its age, and ask again when a queue is full.
Then other targets, and how many pods a given load takes. Nothing is measured here: it takes the figures of
`make bench-serving` from a file of its lines or, without one, from docs/results.md.
"""

from __future__ import annotations

import heapq
import json
import math
import random
from argparse import ArgumentParser
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.hpa import SYNC_S, Controller, Hpa, hpa_from_manifest
from benchmarks.line import line
from benchmarks.timeline import Column, Panel, Series, svg
from weakseg.channel import MOST_TRIES
from weakseg.text import table

ROOT = Path(__file__).parents[1]
MANIFEST = ROOT / "deploy/kustomize/components/hpa/hpa.yaml"
SETTINGS = ROOT / "deploy/kustomize/base/settings.env"

SCRAPE_S, WINDOW_S = 15.0, 30.0  # of Prometheus, and of the average that the HPA is given
RETRY_S = 0.25  # of QUEUE_FULL, serve/interceptors.py
GOALS = {"refused": 0.005, "late": 0.01, "waited": 0.05}  # shares, as deploy/monitoring/rules.yaml has them
LATE_S, WAITED_S = 2.5, 0.5
UTILISATION = 0.7  # of what a pod can do: what is above it makes requests wait, and is there for a pod that is lost


@dataclass(frozen=True)
class Server:
    """What was measured of one, on `cores` cores: images/s with one caller and with many, MiB when idle.

    The defaults are those of docs/results.md, Serving: MobileNetV2 DeepLabV3+, JPEG files of 500 x 375, 2 cores.
    """

    cores: int = 2
    alone: float = 17.9  # serving.vs_bare.1
    busy: float = 21.8  # serving.vs_bare.4
    idle_mib: float = 401.0  # serving.idle_rss_mib
    queue: int = 64 + 8  # --queue-limit and --max-batch


@dataclass(frozen=True)
class Cluster:
    """start_s: from the decision to a pod that is ready, on nodes that are there and have the image.

    age_s: of connections, --max-connection-age-s; 0 = a proxy balances each request over all pods.
    """

    server: Server = Server()
    start_s: float = 30.0
    age_s: float = 300.0
    n_clients: int = 20


class Pod:
    """First come, first served, by as many executions at a time as there are cores; alone an image has all of them."""

    def __init__(self, server: Server, ready: float) -> None:
        self.ready = ready
        self._alone_s, self._busy_s = 1 / server.alone, server.cores / server.busy
        self._limit = server.queue
        self._free = [0.0] * server.cores  # when each core is
        self._inside: list[tuple[float, float]] = []  # (ends, begins) of requests, a heap
        self._gauges: deque[tuple[float, int, int]] = deque()  # (when, inside, waiting)

    def take(self, now: float) -> tuple[float, float] | None:
        """(begins, ends); None when the queue is full."""
        self._leave(now)
        if len(self._inside) >= self._limit:
            return None
        begins = max(now, heapq.heappop(self._free))
        ends = begins + (self._alone_s if all(free <= begins for free in self._free) else self._busy_s)
        heapq.heappush(self._free, ends)
        heapq.heappush(self._inside, (ends, begins))
        return begins, ends

    def scrape(self, now: float) -> None:
        if now >= self.ready:
            self._leave(now)
            self._gauges.append((now, len(self._inside), sum(begins > now for _, begins in self._inside)))
            while self._gauges[0][0] <= now - WINDOW_S:
                self._gauges.popleft()

    def values(self) -> dict[str, float | None]:
        """Averages over the window, None before the first scrape."""
        n = len(self._gauges)
        if not n:
            return {"weakseg_inflight": None, "weakseg_queue_depth": None}
        return {
            "weakseg_inflight": sum(inside for _, inside, _ in self._gauges) / n,
            "weakseg_queue_depth": sum(waiting for _, _, waiting in self._gauges) / n,
        }

    def _leave(self, now: float) -> None:
        while self._inside and self._inside[0][0] <= now:
            heapq.heappop(self._inside)


class Client:
    """Takes the pods that it knows in turns. It looks for others when a connection has reached its age, or has gone."""

    def __init__(self, cluster: Cluster, draw: random.Random) -> None:
        self._age_s, self._draw = cluster.age_s, draw
        self._until: dict[Pod, float] = {}
        self._turn = draw.randrange(1000)
        self._known: list[Pod] = []
        self._next = 0.0

    def pod(self, now: float, pods: Sequence[Pod]) -> Pod:
        if now >= self._next or not self._age_s:
            self._resolve(now, pods)
        self._turn += 1
        return self._known[self._turn % len(self._known)]

    def forget(self, pod: Pod) -> None:
        """It was stopped: its connections say so."""
        if self._until.pop(pod, None) is not None:
            self._next = 0.0

    def _resolve(self, now: float, pods: Sequence[Pod]) -> None:
        self._known = [pod for pod in pods if pod.ready <= now]
        if self._age_s:
            for pod in self._known:
                if self._until.get(pod, 0.0) <= now:  # gRPC spreads ages by a tenth
                    self._until[pod] = now + self._age_s * self._draw.uniform(0.9, 1.1)
            self._next = min(self._until[pod] for pod in self._known)


@dataclass
class Outcome:
    """Of one run. Rows of `seconds`: (until, offered/s, pods, ready pods, p99 s of what ended, refused)."""

    seconds: float
    n: int = 0
    refused: int = 0  # by a full queue, before clients ask again
    failed: int = 0  # after the last try
    late: int = 0
    waited: int = 0
    pod_seconds: float = 0.0
    rows: list[tuple[float, float, int, int, float, int]] = field(default_factory=list)

    @property
    def shares(self) -> dict[str, float]:
        return {name: getattr(self, name) / max(1, self.n) for name in ("refused", "failed", "late", "waited")}

    @property
    def kept(self) -> bool:
        return all(self.shares[name] <= goal for name, goal in GOALS.items())


def simulate(hpa: Hpa, cluster: Cluster, load: Callable[[float], float], most: float, seconds: float) -> Outcome:
    """load: requests/s at a time, at most `most`. Begins with as many pods as the first load takes."""
    draw = random.Random(0)
    began = math.ceil(load(0.0) / (0.7 * cluster.server.busy))
    pods = [Pod(cluster.server, 0.0) for _ in range(min(max(began, hpa.least), hpa.most))]
    clients = [Client(cluster, draw) for _ in range(cluster.n_clients)]
    controller, outcome = Controller(hpa), Outcome(seconds)
    again: list[tuple[float, int, float]] = []  # (when, tries so far, when it first came)
    arrival, tick, every = 0.0, SCRAPE_S, max(SCRAPE_S, SCRAPE_S * round(seconds / 300 / SCRAPE_S))
    took: list[float] = []
    n_row = refused_row = 0
    while True:
        now = min(arrival, tick, again[0][0] if again else math.inf)
        if now >= seconds:
            return outcome
        if now == tick:
            for pod in pods:
                pod.scrape(now)
            wanted = controller.replicas(now, len(pods), _values(hpa, pods)) if not now % SYNC_S else len(pods)
            pods = _scaled(pods, wanted, now, cluster, clients)
            outcome.pod_seconds += SCRAPE_S * len(pods)
            if not now % every:
                p99 = sorted(took)[int(0.99 * len(took))] if took else 0.0
                ready = sum(pod.ready <= now for pod in pods)
                outcome.rows.append((now, n_row / every, len(pods), ready, p99, refused_row))
                took, n_row, refused_row = [], 0, 0
            tick += SCRAPE_S
            continue
        if now == arrival:
            first, tries = now, 1
            arrival += draw.expovariate(most)
            if draw.random() * most > load(now):  # thinning, so that the rate may change
                continue
            outcome.n += 1
            n_row += 1
        else:
            _, tries, first = heapq.heappop(again)
        times = draw.choice(clients).pod(now, pods).take(now)
        if times is None:
            outcome.refused += 1
            refused_row += 1
            if tries < MOST_TRIES:
                wait_s = RETRY_S * draw.uniform(1, 1.5) * 2 ** (tries - 1)
                heapq.heappush(again, (now + wait_s, tries + 1, first))
            else:
                outcome.failed += 1
            continue
        begins, ends = times
        took.append(ends - first)
        outcome.late += ends - first > LATE_S
        outcome.waited += begins - now > WAITED_S


def _values(hpa: Hpa, pods: Sequence[Pod]) -> dict[str, list[float | None]]:
    values = [pod.values() for pod in pods]
    return {name: [one[name] for one in values] for name in hpa.targets}


def _scaled(pods: list[Pod], wanted: int, now: float, cluster: Cluster, clients: Sequence[Client]) -> list[Pod]:
    for gone in pods[wanted:]:  # the newest; what is inside them is finished
        for client in clients:
            client.forget(gone)
    new = [Pod(cluster.server, now + cluster.start_s) for _ in range(wanted - len(pods))]
    return [*pods[:wanted], *new]


@dataclass(frozen=True)
class Load:
    """Requests/s over time; `unit_s` is what its picture counts in."""

    name: str
    seconds: float
    most: float
    at: Callable[[float], float]
    unit: str = "minutes"
    unit_s: float = 60.0


def loads(peak: float) -> list[Load]:
    """peak: requests/s of the busiest hour of a day, and of what a spike comes to, four times what was before."""

    def daily(s: float) -> float:
        return peak * (0.55 - 0.45 * math.cos(2 * math.pi * s / 86400))

    def spike(s: float) -> float:
        return peak if 1200 <= s < 2400 else peak / 4

    return [
        Load("steady", 3600, peak, lambda _: peak),
        Load("day", 86400, peak, daily, "hours", 3600),
        Load("spike", 5400, peak, spike),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lines", type=Path, nargs="?", help="JSON lines of make bench-serving; else docs/results.md's")
    parser.add_argument("--hpa", type=Path, default=MANIFEST, help="manifest whose targets and behaviour are used")
    parser.add_argument("--peak", type=float, default=100.0, help="requests/s; default %(default)g")
    parser.add_argument("--start-s", type=float, default=Cluster.start_s, help="of a new pod; default %(default)g")
    parser.add_argument("--age-s", type=float, help="of connections; default: that of deploy; 0 = behind a proxy")
    parser.add_argument("--sweep", action="store_true", help="also with other targets and ages; minutes")
    parser.add_argument("--picture", type=Path, help="SVG to write")
    args = parser.parse_args(argv)
    server = Server() if args.lines is None else server_from_lines(args.lines)
    age_s = age_from_settings(SETTINGS) if args.age_s is None else args.age_s
    hpa, cluster = hpa_from_manifest(args.hpa), Cluster(server, args.start_s, age_s)
    chosen = loads(args.peak)
    outcomes = {load.name: simulate(hpa, cluster, load.at, load.most, load.seconds) for load in chosen}
    print(f"{targets_text(hpa)}; connections of {age_s:g} s, pods ready after {args.start_s:g} s")
    print(report(outcomes))
    for name, outcome in outcomes.items():
        line(f"autoscaling.{name}.late", 100 * outcome.shares["late"], unit="%", cost=True, goal=100 * GOALS["late"])
        line(f"autoscaling.{name}.failed", 100 * outcome.shares["failed"], unit="%", cost=True)
    if args.sweep:
        print(sweep(hpa, cluster, chosen))
    print(sizing(server, settings_number(SETTINGS, "WEAKSEG_IMAGE_MEMORY_MIB", 1024)))
    if args.picture:
        args.picture.write_text(picture(chosen, outcomes, server))


def targets_text(hpa: Hpa) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in hpa.targets.items())


def report(outcomes: dict[str, Outcome]) -> str:
    head = ["load", "requests", "refused", "failed", "late", "waited", "kept", "pods", "most"]
    rows = []
    for name, one in outcomes.items():
        shares = [f"{100 * one.shares[what]:.2f} %" for what in ("refused", "failed", "late", "waited")]
        kept = "yes" if one.kept else "no"
        pods = [f"{one.pod_seconds / one.seconds:.1f}", str(max(row[2] for row in one.rows))]
        rows.append([name, f"{one.n}", *shares, kept, *pods])
    return table(head, rows)


def sweep(hpa: Hpa, cluster: Cluster, chosen: Sequence[Load]) -> str:
    head = ["in flight", "queue", "age s", "kept", *[f"{load.name}: pods, late, failed" for load in chosen]]
    rows = []
    for inflight, queue in ((8, 4), (3, 2), (2, 1), (1.6, 0.8), (1.2, 0.6)):
        for age_s in (300.0, 60.0, 0.0):
            targets = {"weakseg_queue_depth": queue, "weakseg_inflight": inflight}
            other, there = replace(hpa, targets=targets), replace(cluster, age_s=age_s)
            results = [simulate(other, there, load.at, load.most, load.seconds) for load in chosen]
            cells = [
                f"{one.pod_seconds / one.seconds:.1f}, {100 * one.shares['late']:.2f} %, "
                f"{100 * one.shares['failed']:.2f} %"
                for one in results
            ]
            kept = ", ".join(load.name for load, one in zip(chosen, results, strict=True) if one.kept) or "none"
            rows.append([f"{inflight:g}", f"{queue:g}", f"{age_s:g}", kept, *cells])
    return table(head, rows)


def sizing(server: Server, image_memory_mib: int) -> str:
    """Pods for a load, one more than it takes, so that one may be lost or replaced; memory at the most."""
    memory_mib = server.idle_mib + 3 * image_memory_mib  # images, and answers that clients do not read
    rows = []
    for rate in (10, 30, 100, 300, 1000):
        pods = 1 + math.ceil(rate / (UTILISATION * server.busy))
        rows.append([f"{rate}", f"{pods}", f"{pods * server.cores}", f"{pods * memory_mib / 1024:.1f}"])
    per_core = server.busy / server.cores
    head = ["requests/s", "pods", "cores", "GiB"]
    note = f"{per_core:.1f} images/s a core, {memory_mib:.0f} MiB a pod at the most, {UTILISATION:.0%} of it used"
    return f"{table(head, rows)}\n{note}"


def server_from_lines(path: Path) -> Server:
    found = {row["name"]: row["ours"] for row in map(json.loads, filter(None, path.read_text().splitlines()))}
    cores = int(json.loads(path.read_text().splitlines()[0])["machine"].split(" x ")[0])
    idle_mib = found.get("serving.idle_rss_mib", Server.idle_mib)
    return Server(cores, found["serving.vs_bare.1"], found["serving.vs_bare.4"], idle_mib)


def age_from_settings(path: Path) -> float:
    return settings_number(path, "WEAKSEG_MAX_CONNECTION_AGE_S", 300)


def settings_number(path: Path, name: str, default: int) -> int:
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(text.partition("=")[2]) for text in lines if text.startswith(f"{name}=")), default)


def picture(chosen: Sequence[Load], outcomes: dict[str, Outcome], server: Server) -> str:
    columns = []
    for load in chosen:
        rows = outcomes[load.name].rows
        x = [row[0] / load.unit_s for row in rows]
        panels = [
            Panel(
                "requests/s",
                [
                    Series("offered", x, [row[1] for row in rows]),
                    Series("ready pods could", x, [row[3] * server.busy for row in rows], 2, dashed=True),
                ],
            ),
            Panel("pods", [Series("", x, [row[2] for row in rows], 4)]),
            Panel(
                "99 % within, s",
                [Series("", x, [row[4] for row in rows], 1), Series("objective", x, [LATE_S] * len(x), 7, dashed=True)],
            ),
        ]
        columns.append(Column(f"{load.name}{'' if outcomes[load.name].kept else ', missed'}", panels, load.unit))
    return svg(columns, 380, 120)


if __name__ == "__main__":
    main()
