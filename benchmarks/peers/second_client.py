"""Our callers' figures, confirmed by callers that others wrote: `python -m benchmarks.peers.second_client`.

h2load (Debian: nghttp2-client) speaks HTTP/2, which gRPC is, and sends the same request over as many connections; it
and our callers take turns at one server of ours. It looks at HTTP's status alone, so the server is asked for gRPC's.

serving.second_client.<model>.<callers>   calls a second as our callers have them; peer: as h2load has them
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from benchmarks import serving
from benchmarks.line import line_of_pairs
from benchmarks.load import CHANNELS, SEGMENT, WARM_UP_S, closed_loop, segment_request
from benchmarks.peers.models import MODELS, model_folder
from weakseg.local_server import Ports

ROUNDS = 6
CALLERS = (4, 16)  # multiples of CHANNELS
WITHIN = 0.1  # of h2load's rate
DONE = ("OK", "CANCELLED")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.second_client", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["network", "small"])
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    args = parser.parse_args(argv)
    if shutil.which("h2load") is None:
        print("expected h2load, got none on the PATH: Debian has it in nghttp2-client", file=sys.stderr)
        return 2
    request, apart = segment_request(serving.photograph()), False
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for model in args.models:
            with serving.server(root, model_folder(model, root), "--log-level", "warning") as ports:
                for callers in CALLERS:
                    ours, its = [], []
                    for _ in range(ROUNDS):
                        ours.append(closed_loop(ports.target, request, callers=callers, seconds=args.seconds).rate)
                        its.append(h2load(ports.target, request, root, callers=callers, seconds=args.seconds))
                    said = line_of_pairs(f"serving.second_client.{model}.{callers}", ours, its, unit="calls/s")
                    refused(ports)
                    apart |= abs(said["ratio"] - 1) > WITHIN
    if apart:
        print(f"expected the two within {100 * WITHIN:.0f} %", file=sys.stderr)
    return 1 if apart else 0


def refused(ports: Ports) -> None:
    """Raises RuntimeError: the server answered a request with an error; h2load leaves some without waiting for them."""
    with urlopen(f"{ports.metrics}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        for family in families:
            for sample in family.samples:
                if sample.name == "weakseg_requests_total" and sample.value and sample.labels["code"] not in DONE:
                    raise RuntimeError(f"expected answers, got {sample.value:.0f} times {sample.labels['code']}")


def h2load(target: str, request: bytes, folder: Path, *, callers: int, seconds: float) -> float:
    """Calls a second. Raises RuntimeError: a call failed, or h2load did."""
    data = folder / "request"
    data.write_bytes(b"\0" + len(request).to_bytes(4, "big") + request)  # not compressed, its length
    command = ["h2load", f"--duration={max(1, round(seconds))}", f"--warm-up-time={1000 * WARM_UP_S:.0f}ms"]
    command += [f"--clients={CHANNELS}", f"--max-concurrent-streams={callers // CHANNELS}", f"--data={data}"]
    command += ["--header=content-type: application/grpc", "--header=te: trailers", f"http://{target}{SEGMENT}"]
    said = subprocess.run(command, check=False, capture_output=True, text=True)
    rate = re.search(r"^finished in .*?, ([\d.]+) req/s", said.stdout, re.MULTILINE)
    failed = re.search(r"(\d+) failed, (\d+) errored", said.stdout)
    if rate is None or failed is None or failed.group(1) != "0":
        raise RuntimeError(f"expected h2load's rate without failures, got {said.stdout}{said.stderr}")
    return float(rate.group(1))


if __name__ == "__main__":
    sys.exit(main())
