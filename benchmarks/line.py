"""The one form in which a benchmark says its result: a JSON line, with machine and commit."""

from __future__ import annotations

import json

from weakseg.environment import git_commit, machine


def line(
    name: str, ours: float, peer: float | None = None, *, unit: str, cost: bool = False, goal: float | None = None
) -> dict[str, object]:
    """Print and return one result.

    ratio > 1 means that ours is better: ours / peer for rates, peer / ours for costs (seconds, MiB). Without a peer
    both are null and `ours` is read.

    Args:
        name: topic and what was measured, as in `crf.la_ha`.
        ours, peer: from the same run on the same machine, in `unit`.
        goal: the ratio to reach; without a peer, the value of `ours`.
    """
    ratio = None if peer is None else (peer / ours if cost else ours / peer)
    result: dict[str, object] = {
        "name": name,
        "ours": _short(ours),
        "peer": _short(peer),
        "ratio": _short(ratio),
        "unit": unit,
        "cost": cost,
        "goal": goal,
        "machine": machine_name(),
        "commit": (git_commit() or "unknown")[:10],
    }
    print(json.dumps(result), flush=True)
    return result


def machine_name() -> str:
    """`2 x Intel(R) Xeon(R) …`, with the accelerator when there is one."""
    here = machine()
    return " + ".join([f"{here['cpus']} x {here['cpu']}", *here["gpus"]])


def _short(value: float | None) -> float | None:
    """Four digits: more would pretend."""
    return None if value is None else float(f"{value:.4g}")
