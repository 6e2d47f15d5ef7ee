"""Whether files have changed since they were last read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def stamp(paths: Iterable[Path]) -> tuple[Any, ...]:
    """Changes when one of the files is replaced or written, symbolic links (Kubernetes' way) followed, or goes."""
    found: list[Any] = []
    for path in paths:
        try:
            status = path.stat()
            found.append((str(path), status.st_mtime_ns, status.st_size, status.st_ino))
        except OSError:
            found.append((str(path), None))
    return tuple(found)
