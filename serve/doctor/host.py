"""Cores, memory, folders and the clock."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from serve.doctor.finding import Finding, failed, ok, warning
from serve.server import UNREAD_SHARE
from serve.settings import ServeConfig
from weakseg.cpu import affinity, cpu_quota, usable_cpus
from weakseg.crf import warm_up
from weakseg.engines import CACHE_VARIABLE, cache_folder
from weakseg.memory import limit_bytes

NUMBA_VARIABLE = "NUMBA_CACHE_DIR"
LEAST_FREE_MIB = 64
SKEW_S, MOST_SKEW_S = 5.0, 60.0
CLOCK_TIMEOUT_S = 10.0


def cores(config: ServeConfig, root: Path = Path("/")) -> Finding:
    """root: where /proc and /sys/fs/cgroup are found; tests put a tree of their own there."""
    quota, usable = cpu_quota(root), usable_cpus(root)
    said = "no quota" if quota is None else f"a quota of {quota:g}"
    found = f"{affinity()} to run on, {said}: {usable} usable"
    if quota is not None and quota < affinity() and quota != int(quota):
        still = f"{usable} threads stand still for {100 * (1 - quota / usable):.0f} % of the time"
        return warning("cores", f"{found}; {still}", "give a whole number of cores as the limit, or a request alone")
    if (config.threads or 0) > usable:
        return warning("cores", f"{found}; threads is {config.threads}", "leave threads out: it is what is usable")
    return ok("cores", found)


def memory(config: ServeConfig, root: Path = Path("/")) -> Finding:
    """To be asked when the models are loaded: what this process takes by then is what a server would."""
    limit, resident_mib = limit_bytes(root), _resident_mib()
    if limit is None or resident_mib is None:
        return ok("memory", "neither its limit nor what is taken can be read on this system")
    limit_mib, images_mib = limit // 2**20, config.image_memory_mib
    least, most = resident_mib + images_mib, resident_mib + (1 + UNREAD_SHARE) * images_mib
    found = (
        f"a limit of {limit_mib} MiB; the server with its models takes {resident_mib}, with images up to {least}, with "
        f"answers that clients do not read up to {most}"
    )
    fits = max(1, (limit_mib - resident_mib) // (1 + UNREAD_SHARE))
    todo = f"give {most} MiB, or set image_memory_mib to {fits}"
    if limit_mib < least:
        return failed("memory", found, todo if limit_mib > resident_mib else f"give {most} MiB, or serve fewer models")
    return warning("memory", found, todo) if limit_mib < most else ok("memory", found)


def refinement() -> Finding:
    """Loads what refines masks, which takes memory, and on the first time where it is kept some seconds."""
    found = "dense CRF and random walk" if warm_up() else "none: pseudo-masks are not refined (extra `refine`)"
    return ok("refinement", found)


def folders(config: ServeConfig) -> Iterator[Finding]:
    """Those that a server may write to; a read-only root is as it should be where these are others."""
    try:
        yield _writable("temporary files", Path(tempfile.gettempdir()), "mount an emptyDir or tmpfs at /tmp")
    except FileNotFoundError:
        yield failed(
            "temporary files", "no folder can be written to", "mount an emptyDir or tmpfs at /tmp, or set TMPDIR"
        )
    kernels = os.environ.get(NUMBA_VARIABLE)
    if kernels:
        yield _writable("kernels of the CRF", Path(kernels), f"set {NUMBA_VARIABLE} to a folder that can be written to")
    if config.runtime.startswith("tensorrt"):
        engines = cache_folder()
        if engines.is_dir():  # a server reads it
            yield ok("engines", f"{engines}: {len(list(engines.glob('*/*.plan')))} engines")
        else:
            todo = f"`weakseg export --target {config.runtime} BUNDLE` on this machine, or {CACHE_VARIABLE}"
            yield failed("engines", f"{engines} is not there", todo)


def clock(url: str) -> Finding:
    """Against the Date that a web server, or the metrics port of another weakseg server, answers with."""
    try:
        with urlopen(Request(url, method="GET"), timeout=CLOCK_TIMEOUT_S) as answer:
            date = answer.headers["Date"]
    except (OSError, HTTPException, ValueError) as error:
        return warning("clock", f"{url} does not answer: {error}", "name a URL that answers from here")
    if date is None:
        return warning("clock", f"{url} answers without a Date", "name another URL")
    ahead_s = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()
    found = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} {url}"
    if abs(ahead_s) > MOST_SKEW_S:
        return failed("clock", found, "set the clock, and keep it by NTP: certificates are judged by it")
    if abs(ahead_s) > SKEW_S:
        return warning("clock", found, "keep the clock by NTP")
    return ok("clock", found)


def _writable(check: str, folder: Path, todo: str) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 2**20)  # a full disk shows itself only when something is written
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return failed(check, f"{folder}: {error.strerror}", todo)
    free_mib = shutil.disk_usage(folder).free // 2**20
    if free_mib < LEAST_FREE_MIB:
        return warning(check, f"{folder}: {free_mib} MiB free", f"free some space: {LEAST_FREE_MIB} MiB at the least")
    return ok(check, f"{folder} can be written to, {free_mib} MiB free")


def _resident_mib() -> int | None:
    """Most that this process has taken so far; loading takes more than what is loaded."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:")), None)
