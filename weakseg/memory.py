"""How much memory this process may take, and may still take: of the machine and within its container's limit.

And whether an error says that it was too little.
"""

from __future__ import annotations

import re
from pathlib import Path

from weakseg.cpu import cgroups
from weakseg.errors import WeaksegError

FILES = {  # by cgroup version: limit, usage, and in memory.stat the page cache that gives way
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}

# Of C++, OpenCV, Pillow and CUDA, ONNX Runtime, protobuf, Python's threads (their stacks).
_NO_MEMORY = re.compile(
    "bad_alloc|insufficient memory|out of memory|failed to allocate|alloc failed|can't start new thread", re.IGNORECASE
)


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is that there was no memory.

    Python and NumPy raise MemoryError; of others only the text says so. Texts of ours may quote a client.
    """
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if not isinstance(error, WeaksegError) and _NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def limit_bytes(root: Path = Path("/")) -> int | None:
    """min(MemTotal, limit of every memory cgroup above this process); None where neither can be read."""
    total = _field(root / "proc/meminfo", "MemTotal:")
    limits = [] if total is None else [total * 1024]
    limits += filter(None, (_number(folder / FILES[version][0]) for folder, version in cgroups("memory", root)))
    return min(limits, default=None)


def available_bytes(root: Path = Path("/")) -> int | None:
    """min(MemAvailable, limit - usage of every memory cgroup above this process); None where neither can be read.

    Args:
        root: where /proc and /sys/fs/cgroup are found; tests put a tree of their own there.
    """
    available = _field(root / "proc/meminfo", "MemAvailable:")
    left = [] if available is None else [available * 1024]
    for folder, version in cgroups("memory", root):
        limit_name, usage_name, cache_name = FILES[version]
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and usage is not None:
            left.append(limit - usage + (_field(folder / "memory.stat", cache_name) or 0))
    return max(0, min(left)) if left else None


def _number(path: Path) -> int | None:
    """None for "max" and what cannot be read."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str) -> int | None:
    """The number behind a name in a file of `name number` lines."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), None)
