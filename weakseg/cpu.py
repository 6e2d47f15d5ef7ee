"""How many cores this process may really use: affinity and container quota, not what the host has."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cpus(root: Path = Path("/")) -> int:
    """min(affinity, ceil(cgroup CPU quota)), at least 1.

    Runtimes size their thread pools from the host's cores; under a quota of two cores, eight threads are several times
    slower than two. Both cgroup versions are read, and every ancestor of this process's group, as any may set a limit.

    Args:
        root: where /proc and /sys/fs/cgroup are found; tests put a tree of their own there.
    """
    quota = cpu_quota(root)
    return max(1, affinity() if quota is None else min(affinity(), math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores that the cgroups of this process allow, the smallest of all; None = any."""
    quotas = (_quota_v2(folder) if version == 2 else _quota_v1(folder) for folder, version in cgroups("cpu", root))
    return min((quota for quota in quotas if quota is not None), default=None)


def affinity() -> int:
    """Cores the scheduler may put this process on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS and Windows have no affinity call


def cgroups(controller: str, root: Path = Path("/")) -> list[tuple[Path, int]]:
    """(folder, cgroup version) of this process's "cpu" or "memory" groups, innermost first, up to the mount points."""
    mount = root / "sys/fs/cgroup"
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, version = mount, 2
        elif controller in controllers.split(","):
            base, version = mount / controller, 1
        else:
            continue
        # Inside a container the path may be the host's, which is not mounted: then only the mount point itself exists.
        inner = base / path.strip("/")
        chain = [inner, *inner.parents]
        found += [(folder, version) for folder in chain[: chain.index(base) + 1]]
    return found


def _quota_v2(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.max").split())


def _quota_v1(folder: Path) -> float | None:
    return _ratio(
        [
            _read(folder / "cpu.cfs_quota_us").strip(),
            _read(folder / "cpu.cfs_period_us").strip(),
        ]
    )


def _ratio(fields: list[str]) -> float | None:
    """Cores from [quota, period] in microseconds; None when unlimited ("max" or -1) or not readable."""
    try:
        quota, period = int(fields[0]), int(fields[1])
    except (ValueError, IndexError):
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
