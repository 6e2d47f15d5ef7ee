"""Does a client notice what happens to a cluster? `python -m benchmarks.cluster` (`make bench-cluster`).

Real servers on hosts of their own (benchmarks/cluster_network.py), a name server that knows which are ready, and our
real client, which has the name alone, under constant load: a rolling update to another version of the model, more
servers, new certificates, a canary of a tenth, a node that is lost, fewer servers. Exit code 1 when a call failed, or
when one of these did not have the effect that it should. The model is the tests' toy: what is tried is not how fast it
is.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import ssl
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import quantiles

from benchmarks.cluster_load import IMAGES_OF_A_JOB, Call, Load
from benchmarks.cluster_network import Loopback, Namespaces, isolate
from benchmarks.cluster_pods import PORT, Cluster, Pod, pods_text
from benchmarks.line import line
from benchmarks.timeline import Column, Panel, Series, svg
from weakseg.text import table

ROOT = Path(__file__).parents[1]
TOY = ROOT / "tests/data/bundles/toy/1"
PICTURE = ROOT / "docs/images/cluster.svg"
CANARY = 0.1
OPTIONS = ("--threads", "1", "--poll-s", "0.5", "--max-connection-age-s", "10", "--drain-delay-s", "2")


@dataclass
class Scenario:
    """events: (when, what). faults: what did not have its effect."""

    cluster: Cluster
    load: Load
    folder: Path
    scale: float  # of the pauses
    events: list[tuple[float, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def run(self, pods: list[Pod]) -> None:
        self.pause(8)
        pods = self.rolling_update(pods)
        self.pause(6)
        pods = self.scale_up(pods, 2)
        self.new_certificates(pods)
        self.canary()
        pods = self.lose_a_node(pods)
        self.scale_down(pods, 2)
        self.pause(6)

    def rolling_update(self, pods: list[Pod]) -> list[Pod]:
        """maxSurge 1, maxUnavailable 0: a new one is ready before an old one goes."""
        self.event("rolling update")
        new: list[Pod] = []
        for old in pods:
            new.append(self.cluster.start("b", self.folder / "b"))
            self.cluster.wait_ready(new[-1])
            self.expect(self.cluster.stop(old) == [0], f"{old.name} did not stop as it should")
        self.event("updated")
        return new

    def scale_up(self, pods: list[Pod], n: int) -> list[Pod]:
        self.event(f"{n} more")
        new = [self.cluster.start("b", self.folder / "b") for _ in range(n)]
        self.cluster.wait_ready(*new)
        self.pause(16)
        for pod in new:
            self.expect(bool(pod.seen) and pod.seen[-1][1] > 0, f"{pod.name} is new and gets nothing")
        return pods + new

    def new_certificates(self, pods: Sequence[Pod]) -> None:
        """The authority stays; servers read the new files by themselves, connections are renewed by their age."""
        old = {pod.name: _certificate(pod) for pod in pods}
        self.event("new certificates")
        sign(self.folder)
        self.pause(14)
        for pod in pods:
            self.expect(_certificate(pod) != old[pod.name], f"{pod.name} still shows its old certificate")

    def canary(self) -> None:
        """A share of the clients that come now; those that know their version keep to it."""
        models = self.folder / "b"
        put(models, "3")
        self.label(models, f'stable = "2"\ncanary = "3"\ncanary_percent = {round(100 * CANARY)}\n')
        self.pause(4)
        self.event("canary 10 %")
        began = time.monotonic()
        time.sleep(30)  # about 120 jobs, of which it would be odd if none went to it
        jobs = [call for call in list(self.load.calls) if call.of_a_job and call.began > began]
        share = sum(call.version == "3" for call in jobs) / max(1, len(jobs))
        spread = 4 * (CANARY * (1 - CANARY) * IMAGES_OF_A_JOB / max(1, len(jobs))) ** 0.5  # a job draws once
        self.expect(0 < share <= CANARY + spread, f"{share:.1%} of {len(jobs)} calls went to the canary")
        line("cluster.canary_share", 100 * share, unit="%")
        self.label(models, 'stable = "3"\n')
        self.event("it is stable")
        self.pause(5)

    def lose_a_node(self, pods: list[Pod]) -> list[Pod]:
        self.event("node lost")
        self.cluster.lose(pods[0])
        self.pause(6)
        new = self.cluster.start("b", self.folder / "b")
        self.cluster.wait_ready(new)
        self.event("replaced")
        self.pause(16)
        return [*pods[1:], new]

    def scale_down(self, pods: list[Pod], to: int) -> None:
        self.event(f"{len(pods)} to {to}")
        gone = pods[to:]
        self.expect(self.cluster.stop(*gone) == [0] * len(gone), "one did not stop as it should")

    def pause(self, seconds: float) -> None:
        time.sleep(seconds * self.scale)

    def event(self, what: str) -> None:
        self.events.append((time.monotonic(), what))

    def expect(self, so: bool, otherwise: str) -> None:
        if not so:
            self.faults.append(otherwise)

    def label(self, models: Path, text: str) -> None:
        path = models / "toy" / "labels.toml"
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=12.0, help="calls/s; and 4 jobs of 3 each second")
    parser.add_argument("--scale", type=float, default=1.0, help="of the pauses between events; 0.5 is a short form")
    parser.add_argument("--grace-s", type=float, default=40.0, help="until a lost node is taken out of the name")
    parser.add_argument("--loopback", action="store_true", help="without namespaces, though they could be had")
    parser.add_argument("--picture", type=Path, help="SVG to write")
    args = parser.parse_args(argv)
    alone = not args.loopback and isolate("benchmarks.cluster", sys.argv[1:] if argv is None else argv)
    network = Namespaces() if alone else Loopback()
    print("hosts are network namespaces" if alone else "hosts are addresses of the loopback interface: no link is cut")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        sign(folder)
        put(folder / "a", "1")
        put(folder / "b", "2")
        options = [*OPTIONS, "--tls-cert", f"{folder}/server.crt", "--tls-key", f"{folder}/server.key"]
        cluster = Cluster(network, folder, options, args.grace_s)
        try:
            pods = [cluster.start("a", folder / "a") for _ in range(3)]
            cluster.wait_ready(*pods)
            with Load(cluster.target, folder / "ca.crt", args.rate) as load:
                scenario = Scenario(cluster, load, folder, args.scale)
                scenario.run(pods)
        finally:
            cluster.close()
    return judge(scenario, load.calls, args.picture)


def judge(scenario: Scenario, calls: Sequence[Call], to: Path | None) -> int:
    failed = [call for call in calls if call.error]
    print(phases(scenario.events, calls))
    print(pods_text(scenario.cluster.pods))
    line("cluster.calls", len(calls), unit="calls")
    line("cluster.failed", len(failed), unit="calls", cost=True, goal=0)
    line("cluster.slowest_s", max(call.ended - call.began for call in calls), unit="s", cost=True)
    for error, n in Counter(call.error for call in failed).most_common(5):
        print(f"failed: {n} of {error}")
    for fault in scenario.faults:
        print(f"fault: {fault}")
    if to is not None:
        to.write_text(picture(scenario, calls))
    return 1 if failed or scenario.faults else 0


def phases(events: Sequence[tuple[float, str]], calls: Sequence[Call]) -> str:
    """What callers saw from one event to the next."""
    bounds = [(min(call.began for call in calls), "three servers"), *events, (float("inf"), "")]
    rows = []
    for (begin, what), (end, _) in pairwise(bounds):
        inside = [call for call in calls if begin <= call.began < end]
        took = sorted(call.ended - call.began for call in inside) or [0.0]
        p99 = quantiles(took, n=100, method="inclusive")[98] if len(took) > 1 else took[0]
        versions = " + ".join(f"{v}: {n}" for v, n in sorted(Counter(call.version for call in inside).items()) if v)
        n_failed = sum(bool(call.error) for call in inside)
        rows.append([what, f"{len(inside)}", f"{n_failed}", f"{p99:.2f}", f"{took[-1]:.2f}", versions])
    return table(["from", "calls", "failed", "99 % s", "slowest s", "by version"], rows)


def picture(scenario: Scenario, calls: Sequence[Call], every_s: float = 1.0) -> str:
    zero = min(call.began for call in calls)
    n = int((max(call.began for call in calls) - zero) / every_s)
    x = [i * every_s for i in range(n)]
    by_pod = [
        Series(
            f"release {pod.release}" if pod in (scenario.cluster.pods[0], scenario.cluster.pods[3]) else "",
            x,
            _rates(pod, zero, x, every_s),
            0 if pod.release == "a" else 2,
        )
        for pod in scenario.cluster.pods
    ]
    by_version = []
    for i, version in enumerate(sorted({call.version for call in calls if call.version})):
        counts = Counter(int((call.ended - zero) / every_s) for call in calls if call.version == version)
        by_version.append(Series(f"version {version}", x, [counts[j] / every_s for j in range(n)], (0, 2, 1)[i % 3]))
    slowest = [0.0] * n
    for call in calls:
        j = int((call.began - zero) / every_s)
        if j < n:
            slowest[j] = max(slowest[j], call.ended - call.began)
    panels = [
        Panel("answers/s of each server", by_pod, stacked=True),
        Panel("answers/s to clients", by_version, stacked=True, marks=[c.ended - zero for c in calls if c.error]),
        Panel("slowest call begun, s", [Series("", x, slowest, 3)]),
    ]
    title = f"{len(calls)} calls, {sum(bool(call.error) for call in calls)} failed"
    events = [(when - zero, what) for when, what in scenario.events]
    return svg([Column(title, panels, "seconds", events)], 900, 150)


def _rates(pod: Pod, zero: float, x: Sequence[float], every_s: float) -> list[float]:
    """Answers a second, from the counter between scrapes."""
    rates = [0.0] * len(x)
    for (begin, before), (end, after) in pairwise(pod.seen):
        for j in range(max(0, int((begin - zero) / every_s)), min(len(x), int((end - zero) / every_s) + 1)):
            inside = min(end - zero, x[j] + every_s) - max(begin - zero, x[j])
            rates[j] += max(0.0, inside) * (after - before) / (end - begin) / every_s
    return rates


def put(models: Path, version: str) -> None:
    """The toy as one more version in a folder of models; whole, or not there yet."""
    folder = models / "toy" / version
    made = models / f"{version}.new"
    shutil.copytree(TOY, made)
    manifest = json.loads((made / "manifest.json").read_text())
    (made / "manifest.json").write_text(json.dumps(manifest | {"version": version}))
    folder.parent.mkdir(parents=True, exist_ok=True)
    made.rename(folder)


def sign(folder: Path) -> None:
    """A new certificate for the servers, by the authority of the folder, which is made when there is none."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    now = datetime.datetime.now(datetime.UTC)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    authority_file, plain = folder / "ca.key", serialization.NoEncryption()
    is_new = not authority_file.exists()
    authority: ec.EllipticCurvePrivateKey
    if is_new:
        authority = ec.generate_private_key(ec.SECP256R1())
        authority_file.write_bytes(authority.private_bytes(pem, pkcs8, plain))
    else:
        authority = serialization.load_pem_private_key(authority_file.read_bytes(), None)  # type: ignore[assignment]
    for name in ["ca", "server"] if is_new else ["server"]:
        key = authority if name == "ca" else ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.DNSName("weakseg.test")])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named("ca"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
            .add_extension(names, critical=False)
            .sign(authority, hashes.SHA256())
        )
        files = {f"{name}.crt": certificate.public_bytes(pem), f"{name}.key": key.private_bytes(pem, pkcs8, plain)}
        for file, content in files.items():
            (folder / f"{file}.new").write_bytes(content)
            os.replace(folder / f"{file}.new", folder / file)


def _certificate(pod: Pod) -> str:
    return ssl.get_server_certificate((pod.address, PORT), timeout=30)


if __name__ == "__main__":
    sys.exit(main())
