"""One run of a comparison, in processes of its own: the training alone, then what follows it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from weakseg.comparison.jobs import LAST, Job, key_of, prepare
from weakseg.errors import InUseError, WeaksegError
from weakseg.files import write_json_atomic
from weakseg.locks import locked
from weakseg.progress import Progress
from weakseg.run import LOCK
from weakseg.run_folder import read_json

COST = "cost.json"  # in the stage train: a training that begins anew leaves none
LOG = "log.txt"
CLAIM = ".comparison.lock"  # of the process that makes a run; `weakseg run`, its child, has another
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_C = ctypes.CDLL(None)


def make(job: Job, progress: Progress) -> str | None:
    """Run what is not done of a job; returns the first line of what went wrong, None = it is done.

    Raises:
        InUseError: another process is at it, or at the run that it takes over from.
    """
    with locked(job.folder / CLAIM):
        with locked(job.folder / LOCK):  # else the child would say so, after seconds
            pass
        try:
            with nullcontext() if job.source is None else locked(job.source / CLAIM):
                keys = prepare(job)
        except InUseError:
            raise
        except WeaksegError as refusal:
            return str(refusal).partition("\n")[0]
        return _run_stages(job, keys, progress)


def _run_stages(job: Job, keys: dict[str, str], progress: Progress) -> str | None:
    if all(key_of(job.folder, stage) == key for stage, key in until_last(keys).items()):
        progress.say(f"{job.title}: up to date")
        return None
    if key_of(job.folder, "train") != keys["train"]:
        resumed = key_of(job.folder, "train", "started") == keys["train"] and _has_begun(job.folder / "train")
        error, peak_mib = _run(job, "train", progress)
        if error is not None:
            return error
        _write_cost(job.folder, peak_mib, resumed)
    return _run(job, LAST, progress)[0]


def until_last(keys: dict[str, str]) -> dict[str, str]:
    names = list(keys)
    return {name: keys[name] for name in names[: names.index(LAST) + 1]}


def _has_begun(stage: Path) -> bool:
    """Whether an earlier attempt has left anything; one that was refused at the start has not."""
    return any(path.is_file() and path.name != "started.json" for path in stage.rglob("*"))


def _write_cost(folder: Path, peak_mib: float, resumed: bool) -> None:
    """What a training took. Of one that was killed and went on only the last part is known: no time is written."""
    done = read_json(folder / "train" / "done.json")
    cost: dict[str, Any] = {"cpu_seconds": None if resumed else done["cpu_seconds"], "peak_mib": round(peak_mib, 1)}
    write_json_atomic(folder / "train" / COST, cost)


def _run(job: Job, last: str, progress: Progress) -> tuple[str | None, float]:
    """`weakseg run` up to a stage; (what went wrong or None, peak memory in MiB of its largest process).

    Raises:
        InUseError: somebody's own `weakseg run` is in the folder.
    """
    command = [sys.executable, "-m", "weakseg", "run", str(job.folder / "recipe.py")]
    command += ["--folder", str(job.folder), "--to", last]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509  one call, looked up before
    )
    said: list[str] = []
    try:
        assert child.stderr is not None
        with child.stderr, (job.folder / LOG).open("a") as log:
            for line in child.stderr:
                log.write(line)
                log.flush()
                said.append(line.rstrip())
                progress.say(f"{job.title}: {line.rstrip()}")
        _, status, usage = os.wait4(child.pid, 0)  # of this child alone, unlike RUSAGE_CHILDREN
        child.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if child.returncode is None:
            child.kill()
            child.wait()
    # Linux counts from the moment that a process is forked, so that this is at least what this process has: little.
    peak_mib = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    error = _what_went_wrong(child.returncode, said)
    if error is not None and InUseError.SAYS in error:
        raise InUseError(error)
    return error, peak_mib


def _what_went_wrong(code: int, said: list[str]) -> str | None:
    """First line of the child's error message; of a trace, its last line."""
    if code == 0:
        return None
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    return next(iter(errors or [line for line in reversed(said) if line]), f"exit code {code}")


def _end_with_parent() -> None:
    """A comparison that is killed leaves no training behind that takes the cores of the next."""
    _C.prctl(_DEATH_SIGNAL, signal.SIGKILL)
