"""Ours beside one of the others, both up, asked in turns: `python -m benchmarks.peers.pairs`.

On a machine whose speed changes from minute to minute a server's turn in a round says as much of the minute as of the
server. Here the two of a pair are measured within seconds of each other, and what counts is the median of the pairs'
ratios. Settings are those that were fastest in the rounds of `python -m benchmarks.peers`: of every server at 16
callers, of the network at 1, 4 and 64 those of the fastest that speaks gRPC and the fastest that speaks HTTP.

serving.pairs.<model>.<server>.c<callers>   images/s of ours over its
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.line import line_of_pairs
from benchmarks.peers.measure import PeerError, Server, started
from benchmarks.peers.models import expected, model_folder
from benchmarks.peers.peers import OURS, PEERS, SETTINGS, Peer
from benchmarks.peers.report import AT, GOALS, INFER, PATHS, Result, callers_of, fastest, rate, results

PAIRS = 6


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.pairs", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=[INFER, *PATHS], default=[INFER, *PATHS])
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=Path, default=Path("runs/bench-peers"), help="what benchmarks.peers has left")
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error(f"expected 2 pairs or more, got {args.pairs}")
    missed = False
    for model in args.models:
        folder = args.rounds / model
        found = results(folder)
        if not found:
            print(f"expected rounds in {folder}, got none: python -m benchmarks.peers first", file=sys.stderr)
            return 2
        for (name, setting), callers in rivals(found, callers_of(found) if model == INFER else [AT]).items():
            peer = PEERS[name]
            goal = GOALS["vs_best"] if model == INFER else GOALS[peer.api]
            try:
                with both(peer, setting, model_folder(model, args.rounds / "models"), folder / "pairs") as (ours, its):
                    for n in callers:
                        compare(f"serving.pairs.{model}.{name}.c{n}", ours, its, n, args.pairs, args.seconds, goal)
            except PeerError as error:
                print(f"  {error}", file=sys.stderr, flush=True)
                missed = True
    return 1 if missed else 0


def rivals(found: list[Result], callers: Sequence[int]) -> dict[tuple[str, str], list[int]]:
    """(server, setting) -> the numbers of callers to compare it at: AT of every server, others of the fastest only."""
    chosen: dict[tuple[str, str], list[int]] = defaultdict(list)
    for n in callers:
        others = [r for r in fastest(found, n).values() if r["peer"] != OURS.name and PEERS[r["peer"]].checked]
        others.sort(key=rate(n), reverse=True)
        of_api = {result["api"]: result for result in reversed(others)}
        for result in others if n == AT else of_api.values():
            chosen[result["peer"], result["setting"]].append(n)
    return dict(chosen)


@contextmanager
def both(peer: Peer, setting: str, bundle: Path, logs: Path) -> Iterator[tuple[Server, Server]]:
    """Ours and the other. logs: the folder that what they say goes to."""
    images = expected(bundle)
    logs.mkdir(parents=True, exist_ok=True)
    with (
        started(OURS, SETTINGS["defaults"], bundle, images, logs / f"{OURS.name}-beside-{peer.name}.log") as ours,
        started(peer, SETTINGS[setting], bundle, images, logs / f"{peer.name}.log") as its,  # its end is that of both
    ):
        yield ours, its


def compare(name: str, ours: Server, its: Server, callers: int, pairs: int, seconds: float, goal: float) -> None:
    rates: dict[Server, list[float]] = {ours: [], its: []}
    for i in range(pairs):
        for server in (ours, its) if i % 2 else (its, ours):
            rates[server].append(server.closed_loop(callers, seconds).rate)
    line_of_pairs(name, rates[ours], rates[its], unit="images/s", goal=goal)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the servers that run are ended, too
    sys.exit(main())
