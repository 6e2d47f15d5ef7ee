"""What a run was made with, for `environment.json`: versions, machine, git commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from weakseg.cpu import usable_cpus
from weakseg.version import __version__

PACKAGES = (
    "numpy",
    "opencv-python-headless",
    "simplejpeg",
    "pillow",
    "torch",
    "onnx",
    "onnxruntime",
    "grpcio",
    "numba",
    "pydensecrf2",
)


def describe(seed: int | None = None) -> dict[str, Any]:
    """The record that is written beside every result. Imports none of the packages that it names."""
    return {
        "weakseg": __version__,
        "commit": git_commit(),
        "seed": seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := package_version(name)) is not None},
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, accelerators."""
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": usable_cpus(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus(),
    }


def git_commit() -> str | None:
    """The checkout's commit, `-dirty` when tracked files differ; None when weakseg does not run from its checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package may lie inside someone else's repository
        return None
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    if not commit:
        return None
    return commit + ("-dirty" if _output(["git", "-C", str(root), "status", "--porcelain", "-uno"]) else "")


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpus() -> list[str]:
    """Names of NVIDIA's, by its own command."""
    if shutil.which("nvidia-smi") is None:
        return []
    return _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).splitlines()


def _output(command: list[str]) -> str:
    """What a command prints, empty when it cannot be run or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
