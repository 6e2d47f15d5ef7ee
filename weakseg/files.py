"""Files that are whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, a crash or a full disk never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomic(path: Path, value: Any) -> None:
    """The same for JSON: two spaces, keys as given, a final newline. NaN is refused (ValueError)."""
    write_bytes_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it takes the place of `path` only if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        put_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_folder(folder: Path, path: Path) -> None:
    """Rename a folder to `path`; what is there is removed. Both are on one file system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        old = path.with_name(f".{path.name}.old-{uuid.uuid4().hex}")
        path.rename(old)
        folder.rename(path)
        shutil.rmtree(old)
    else:
        folder.rename(path)
