"""Our server beside its peers, in turns on one machine: `python -m benchmarks.peers` (`make bench-peers`).

Each server gets the same JPEG files of 500 x 375 pixels over the loopback interface and answers with the PNG of the
label map that the same graph makes; before it is timed its answers are compared with ours. Callers are a process of
their own on the same cores. docs/benchmarks.md says how each is configured and what is measured.

Rounds are kept in --out, one file a start of a server; what is there is not measured again. The first round tries every
setting of a server (benchmarks/peers/peers.py), the others those that were fastest at some number of callers.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks import serving
from benchmarks.peers.measure import CALLERS, LOADS, PeerError, install_mib, measured, versions
from benchmarks.peers.models import MODELS, expected, model_folder
from benchmarks.peers.peers import PEERS, SETTINGS, Peer
from benchmarks.peers.report import INFER, failed, report
from weakseg.environment import git_commit
from weakseg.files import write_json_atomic
from weakseg.manifest import SEGMENTATION

BARE_S = 2.0  # before each server, and after


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--callers", nargs="+", type=int, default=list(CALLERS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-peers"))
    parser.add_argument("--pictures", type=Path, help="folder to draw into")
    args = parser.parse_args(argv)
    peers = [PEERS[name] for name in args.peers]
    if missing := [str(peer.python) for peer in peers if not peer.python.is_file()]:
        print(f"expected the environments of `make bench-peers`, got none at {', '.join(missing)}", file=sys.stderr)
        return 2
    lengths = {json.loads(file.read_text())["seconds"] for file in args.out.glob("*/round-*/*-*.json")}
    if lengths - {args.seconds}:
        print(f"{args.out} has rounds of {lengths} s, not {args.seconds} s: use another --out", file=sys.stderr)
        return 2
    for peer in peers:
        print(f"{peer.name} ({peer.api}): {', '.join(' '.join(pair) for pair in versions(peer).items())}", flush=True)
    missed = False
    for turn in range(args.rounds):
        for model in args.models:
            folder = args.out / model
            for peer in peers:
                for setting in settings(peer, folder, turn):
                    missed |= not one(peer, setting, model, folder / f"round-{turn}", args)
    report(args.out, args.pictures)
    return 1 if missed else 0


def settings(peer: Peer, folder: Path, turn: int) -> list[str]:
    """Those to measure in a round."""
    tried = {name: folder / "round-0" / f"{peer.name}-{name}.json" for name in peer.settings}
    if turn == 0:
        return list(tried)
    closed = {name: json.loads(file.read_text())["closed"] for name, file in tried.items() if file.is_file()}
    best = {max(closed, key=lambda name: closed[name][n]["rate"]) for n in next(iter(closed.values()), ())}
    return [name for name in tried if name in best]


def one(peer: Peer, setting: str, model: str, folder: Path, args: argparse.Namespace) -> bool:
    """Measure unless that was done. Returns: there is a result."""
    file = folder / f"{peer.name}-{setting}.json"
    if file.is_file():
        return True
    bundle = model_folder(model, args.out / "models")
    print(f"{time.strftime('%H:%M:%S')} {folder.name} {model}: {peer.name}, {setting}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    before = bare(bundle)
    try:
        result = measured(
            peer,
            SETTINGS[setting],
            bundle,
            expected(bundle),
            seconds=args.seconds,
            callers=args.callers,
            loads=LOADS if model == INFER and peer.checked else (),  # callers of the others would be the bound
            log=file.with_suffix(".log"),
        )
    except PeerError as error:
        print(f"  {error}", file=sys.stderr, flush=True)
        return False
    about = {"peer": peer.name, "api": peer.api, "setting": setting, "versions": versions(peer)}
    about |= {"install_mib": install_mib(peer), "seconds": args.seconds, "commit": git_commit()}
    about |= {"bare_rate": mean((before, bare(bundle)))}
    write_json_atomic(file, about | result)
    rates = ", ".join(f"{at['rate']:.1f} at {n}" for n, at in result["closed"].items())
    rates += f"; {lost} of calls failed" if (lost := failed(result)) else ""
    print(f"  images/s: {rates}; ready in {result['start_to_ready_s']:.1f} s, {result['idle_mib']:.0f} MiB", flush=True)
    return True


def bare(bundle: Path) -> float:
    """Images/s of the same work in a loop without a server, a thread a core: how fast the machine is right now."""
    return serving.bare_rate(bundle / f"{SEGMENTATION}.onnx", serving.photograph(), BARE_S, by_image=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server that runs is ended, too
    sys.exit(main())
