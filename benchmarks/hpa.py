"""The HorizontalPodAutoscaler's algorithm (autoscaling/v2), for metrics of type Pods with an AverageValue.

As documented on kubernetes.io (tasks/run-application/horizontal-pod-autoscale): desired = ceil(current x value /
target) of each metric, the largest counts; nothing changes within a tenth of the target; pods without a value count as
idle when that asks for more, and as on target when it asks for fewer; then stabilisation windows, policies and bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SYNC_S = 15.0
TOLERANCE = 0.1


@dataclass(frozen=True)
class Policy:
    """How many replicas may come or go within a period."""

    kind: Literal["Pods", "Percent"]
    value: int
    period_s: float


@dataclass(frozen=True)
class Rules:
    """One direction of `behavior`; the defaults of Kubernetes are those of scaling up."""

    stabilisation_s: float = 0.0
    policies: tuple[Policy, ...] = (Policy("Percent", 100, 15), Policy("Pods", 4, 15))
    select: Literal["Max", "Min", "Disabled"] = "Max"


@dataclass(frozen=True)
class Hpa:
    """targets: {metric: average of a pod}."""

    least: int
    most: int
    targets: Mapping[str, float]
    up: Rules = Rules()
    down: Rules = Rules(300.0, (Policy("Percent", 100, 15),))


@dataclass
class Controller:
    """Asked every SYNC_S; remembers what it recommended, and what it did."""

    hpa: Hpa
    _recommended: list[tuple[float, int]] = field(default_factory=list)
    _changes: list[tuple[float, int]] = field(default_factory=list)  # (when, replicas more or, below 0, fewer)

    def replicas(self, now: float, current: int, values: Mapping[str, Sequence[float | None]]) -> int:
        """How many there should be. values: {metric: that of each pod, None where there is none yet}."""
        desired = max(_proposal(current, values[name], target) for name, target in self.hpa.targets.items())
        new = self._limited(now, current, self._stabilised(now, current, desired))
        if new != current:
            self._changes.append((now, new - current))
        return new

    def _stabilised(self, now: float, current: int, desired: int) -> int:
        up, down = self.hpa.up.stabilisation_s, self.hpa.down.stabilisation_s
        self._recommended = [(at, n) for at, n in self._recommended if now - at < max(up, down)]
        least = min([desired, *(n for at, n in self._recommended if now - at < up)])
        most = max([desired, *(n for at, n in self._recommended if now - at < down)])
        self._recommended.append((now, desired))
        return min(max(current, least), most)

    def _limited(self, now: float, current: int, wanted: int) -> int:
        hpa = self.hpa
        if wanted > current:
            bound = self._bound(now, current, hpa.up, +1)
            return max(min(wanted, bound, hpa.most), hpa.least)
        bound = self._bound(now, current, hpa.down, -1)
        return min(max(wanted, bound, hpa.least), hpa.most)

    def _bound(self, now: float, current: int, rules: Rules, sign: int) -> int:
        """The furthest that the policies allow; what was done within a policy's period counts towards it."""
        if rules.select == "Disabled":
            return current
        bounds = []
        for policy in rules.policies:
            done = sum(n for at, n in self._changes if now - at < policy.period_s and n * sign > 0)
            began = current - done
            if policy.kind == "Pods":
                bounds.append(began + sign * policy.value)
            elif sign > 0:
                bounds.append(math.ceil(began * (1 + policy.value / 100)))
            else:
                bounds.append(int(began * (1 - policy.value / 100)))
        furthest = max if (rules.select == "Max") == (sign > 0) else min
        bound = furthest(bounds)
        return max(bound, current) if sign > 0 else min(bound, current)


def _proposal(current: int, values: Sequence[float | None], target: float) -> int:
    known = [value for value in values if value is not None]
    if not known:
        return current
    ratio = sum(known) / len(known) / target
    if len(known) == len(values):
        return current if abs(ratio - 1) <= TOLERANCE else math.ceil(round(ratio * len(known), 9))
    n_missing = len(values) - len(known)
    total = sum(known) + (0 if ratio > 1 else n_missing * target)
    again = total / len(values) / target
    if abs(again - 1) <= TOLERANCE or (ratio > 1) != (again > 1):
        return current
    wanted = math.ceil(round(again * len(values), 9))
    return current if (again > 1) != (wanted > current) else wanted


def hpa_from_manifest(path: Path) -> Hpa:
    """Raises ValueError for what this simulation does not know."""
    import yaml

    spec = yaml.safe_load(path.read_text())["spec"]
    targets = {}
    for metric in spec["metrics"]:
        if metric["type"] != "Pods" or metric["pods"]["target"]["type"] != "AverageValue":
            raise ValueError(f"{path}: expected metrics of type Pods with an AverageValue, got {metric}")
        targets[metric["pods"]["metric"]["name"]] = _quantity(metric["pods"]["target"]["averageValue"])
    behaviour = spec.get("behavior", {})
    return Hpa(
        spec.get("minReplicas", 1),
        spec["maxReplicas"],
        targets,
        _rules(behaviour.get("scaleUp", {}), Hpa.up),
        _rules(behaviour.get("scaleDown", {}), Hpa.down),
    )


def _rules(given: Mapping[str, Any], default: Rules) -> Rules:
    policies = tuple(Policy(one["type"], one["value"], one["periodSeconds"]) for one in given.get("policies", ()))
    return Rules(
        given.get("stabilizationWindowSeconds", default.stabilisation_s),
        policies or default.policies,
        given.get("selectPolicy", "Max"),
    )


def _quantity(text: object) -> float:
    """Of Kubernetes: 4, "4" or "1500m"."""
    said = str(text)
    return float(said[:-1]) / 1000 if said.endswith("m") else float(said)
