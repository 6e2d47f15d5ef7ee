"""Locks of real processes, one of them killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from weakseg.errors import InUseError
from weakseg.locks import locked

HOLDER = """
import os, sys, time
from pathlib import Path
from weakseg.locks import locked
with locked(Path(sys.argv[1])):
    child = os.fork()
    if child:
        if sys.argv[2] == "ends":
            os.waitpid(child, 0)
        print(child, flush=True)
        time.sleep(600)
if sys.argv[2] == "lives on":  # the child comes here at once: out of the block, as if it had the lock
    time.sleep(600)
"""


def hold(path: Path, child: str) -> tuple[subprocess.Popen[str], int]:
    """(a process that has the lock, the process id of its child)."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), child], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder.stdout:
        return holder, int(holder.stdout.readline())


def test_it_goes_with_its_process_though_a_child_lives_on(tmp_path: Path) -> None:
    """As the workers of a DataLoader do when a training is killed."""
    path = tmp_path / "run/.lock"
    holder, child = hold(path, "lives on")
    try:
        with pytest.raises(InUseError, match=r"run is in use by another run: wait for it"), locked(path):
            pass
        holder.kill()
        assert holder.wait(30) == -signal.SIGKILL
        os.kill(child, 0)  # it is there
        with locked(path):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_a_child_that_ends_takes_it_not_along(tmp_path: Path) -> None:
    holder, _ = hold(tmp_path / ".lock", "ends")
    try:
        with pytest.raises(InUseError), locked(tmp_path / ".lock"):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_whatever_is_raised_within_comes_out_and_lets_go(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(BlockingIOError), locked(tmp_path / ".lock"):
            raise BlockingIOError
