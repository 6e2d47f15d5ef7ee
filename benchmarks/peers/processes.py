"""A server and all that it starts: how it is started and ended, its memory and its time. Linux.

Servers are started in sessions of their own, and what they leave behind comes to this process. So the processes below
this one that are of another session than this one are the server's, whatever they did to get away from it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
STOP_S = 30.0
POLL_S = 0.05
TICKS = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


@contextmanager
def running(
    command: Sequence[str], *, folder: Path, log: Path, env: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """When the block is left none of the server's processes is left, nor any of one that was started around it.

    Args:
        folder: where it works. log: what it says goes here. env: beside this process's environment.
    """
    _adopt_orphans()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _stop(process)


def cpu_seconds() -> float:
    """That the server's processes have spent so far, with those that they have waited for."""
    return sum(sum(map(int, fields[11:15])) for _, fields in _processes()) / TICKS


def memory_mib() -> float:
    """PSS of the server's processes: shared pages count once."""
    return sum(_pss_kib(pid) for pid, _ in _processes()) / 1024


def _processes() -> list[tuple[int, list[str]]]:
    """(pid, the fields of /proc/<pid>/stat from the third, `state`, on)."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # ended meanwhile
                found[int(folder.name)] = (folder / "stat").read_text().rpartition(") ")[2].split()
    below, own_session = {os.getpid()}, str(os.getsid(0))
    while more := {pid for pid, fields in found.items() if int(fields[1]) in below} - below:
        below |= more
    return [(pid, fields) for pid, fields in found.items() if pid in below and fields[3] != own_session]


def _pss_kib(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def _adopt_orphans() -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    while left := _processes():
        for pid, _ in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
        process.poll()
        for pid, _ in left:
            with suppress(ChildProcessError):  # a child of another one of them, which comes to us in turn
                if pid != process.pid:
                    os.waitpid(pid, os.WNOHANG)
