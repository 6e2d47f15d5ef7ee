"""Locks of folders between processes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weakseg.errors import InUseError

_held: set[int] = set()  # open files of the locks that this process has


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file, which is made and stays; it goes with the process, however that ends.

    Raises:
        InUseError: another has it, where this one is not to wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(lock)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InUseError(f"{path.parent} {InUseError.SAYS}: wait for it, or choose another --folder") from None
        yield
    finally:
        if lock in _held:  # it is not in a process that was forked meanwhile
            _held.remove(lock)
            os.close(lock)


def _let_go() -> None:
    """In a forked process, which may outlive the one with the lock: workers of a DataLoader do, by 5 s, a kill."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
