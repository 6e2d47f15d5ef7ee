"""The one form in which a benchmark says its result: a JSON line, with machine and commit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from weakseg.environment import git_commit, machine


def line(
    name: str, ours: float, peer: float | None = None, *, unit: str, cost: bool = False, goal: float | None = None
) -> dict[str, Any]:
    """Print and return one result.

    ratio > 1 means that ours is better: ours / peer for rates, peer / ours for costs (seconds, MiB). Without a peer
    both are null and `ours` is read.

    Args:
        name: topic and what was measured, as in `crf.la_ha`.
        ours, peer: from the same run on the same machine, in `unit`.
        goal: the ratio to reach; without a peer, the value of `ours`.
    """
    ratio = None if peer is None else (peer / ours if cost else ours / peer)
    return _said(name, {"ours": _short(ours), "peer": _short(peer), "ratio": _short(ratio)}, unit, cost, goal)


def line_of_pairs(
    name: str, ours: Sequence[float], peer: Sequence[float], *, unit: str, goal: float | None = None
) -> dict[str, Any]:
    """The same of rates that were measured in turns: medians, and the median of the pairs' ratios.

    A machine whose speed changes from minute to minute leaves the ratio of a pair alone. `half`: what the middle half
    of the ratios lies between.
    """
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    values = {"ours": _short(median(ours)), "peer": _short(median(peer)), "ratio": _short(median(ratios))}
    return _said(name, values | {"half": [_short(low), _short(high)]}, unit, False, goal)


def _said(name: str, values: Mapping[str, Any], unit: str, cost: bool, goal: float | None) -> dict[str, Any]:
    about = {"machine": machine_name(), "commit": (git_commit() or "unknown")[:10]}
    result = {"name": name, **values, "unit": unit, "cost": cost, "goal": goal, **about}
    print(json.dumps(result), flush=True)
    return result


def machine_name() -> str:
    """`2 x Intel(R) Xeon(R) …`, with the accelerator when there is one."""
    here = machine()
    return " + ".join([f"{here['cpus']} x {here['cpu']}", *here["gpus"]])


def _short(value: float | None) -> float | None:
    """Four digits: more would pretend."""
    return None if value is None else float(f"{value:.4g}")
