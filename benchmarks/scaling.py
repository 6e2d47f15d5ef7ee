"""What a million images cost, and how 100 million would be done: `python -m benchmarks.scaling lines.jsonl`.

Reads lines of `make bench-pseudo-label` (or standard input) and prints the tables of docs/scaling.md. Everything is
arithmetic on measured figures and on the assumptions that are its flags.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from weakseg.batch.journal import FLUSH_S
from weakseg.text import table

MILLION = 10**6


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, nargs="?", help="JSON lines of make bench-pseudo-label")
    parser.add_argument("--core-hour", type=float, default=0.04, help="price of a core for an hour")
    parser.add_argument("--gib-month", type=float, default=0.023, help="price of a GiB in an object store for a month")
    parser.add_argument("--images", type=float, default=100 * MILLION, help="of the large job")
    parser.add_argument("--days", type=float, default=7.0, help="that the large job may take")
    parser.add_argument("--cores", type=int, default=16, help="of a node")
    parser.add_argument(
        "--node-mtbf-h", type=float, default=12.0, help="hours until a node is lost; spot ones go often"
    )
    args = parser.parse_args(argv)
    text = args.lines.read_text() if args.lines is not None else sys.stdin.read()
    lines = {row["name"]: row for row in map(json.loads, filter(None, text.splitlines()))}
    rate, cores = lines["pseudo_label.two_workers"]["ours"], 2  # images/s of two workers on two cores
    mib = lines["pseudo_label.disk"]["ours"] / 1000
    peer_rate = lines["pseudo_label.vs_peer"]["peer"]
    peer_mib = lines["pseudo_label.disk"]["peer"] / 1000
    ray = min(1.0, lines["pseudo_label.ray_vs_local"]["ratio"]) if "pseudo_label.ray_vs_local" in lines else 1.0
    print(million([("weakseg", rate / cores, mib), ("the field's way", peer_rate / cores, peer_mib)], args))
    print()
    print(large(rate / cores, ray, mib, args))


def million(rows: Sequence[tuple[str, float, float]], args: argparse.Namespace) -> str:
    """A line for each way: (name, images a second and core, MiB an image)."""
    head = ["1,000,000 images", "images/s a core", "core-hours", "price", "GiB written", "a month of it"]
    cells = []
    for name, per_core, mib in rows:
        core_hours, gib = MILLION / per_core / 3600, MILLION * mib / 1024
        price, kept = core_hours * args.core_hour, gib * args.gib_month
        cells.append([name, f"{per_core:.2f}", f"{core_hours:.0f}", f"{price:.2f}", f"{gib:.1f}", f"{kept:.2f}"])
    return table(head, cells)


def large(per_core: float, ray: float, mib: float, args: argparse.Namespace) -> str:
    """Nodes, shards and what failures cost."""
    core_hours = args.images / (per_core * ray) / 3600
    nodes = core_hours / (args.days * 24) / args.cores
    n_shards = max(1, round(core_hours / args.cores))  # a node an hour each
    losses = args.days * 24 * nodes / args.node_mtbf_h
    again_s = FLUSH_S + 60  # the rows that were not stored, and a node's start
    return table(
        ["", ""],
        [
            ["images", f"{args.images:,.0f}"],
            ["core-hours", f"{core_hours:,.0f}"],
            [f"nodes of {args.cores} cores for {args.days:g} days", f"{nodes:.1f}"],
            ["price of the cores", f"{core_hours * args.core_hour:,.0f}"],
            ["shards of one node-hour", f"{n_shards:,}"],
            ["images a shard", f"{args.images / n_shards:,.0f}"],
            ["masks and maps", f"{args.images * mib / 1024**2:,.1f} TiB in {2 * args.images:,.0f} objects"],
            [f"nodes lost, one in {args.node_mtbf_h:g} h", f"{losses:,.0f}"],
            ["done again for them", f"{100 * losses * again_s / (args.days * 86400 * nodes):.2f} % of the work"],
        ],
    )


if __name__ == "__main__":
    main()
