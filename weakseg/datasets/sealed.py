"""Sealed files: a process-wide audit hook refuses to open them for reading, whoever asks.

In any way that goes through Python's `open` (Pillow, numpy, pathlib, torch.load, ...), whatever relative path or
symbolic link leads there. Forked workers inherit the hook, spawned ones find the paths in WEAKSEG_SEALED. `open_sealed`
is the only door; a test says which modules have it.
"""

from __future__ import annotations

import os
import sys
from contextvars import ContextVar
from io import BufferedReader
from pathlib import Path
from typing import Any

from weakseg.errors import DatasetError, SealedTruthError

_ENVIRONMENT = "WEAKSEG_SEALED"  # sealed paths, one a line, for spawned workers

_sealed: set[str] = set()  # real paths; those of folders have a separator at their end
_unlocked: ContextVar[bool] = ContextVar("weakseg_truth_unlocked", default=False)
_hooked = False


def seal(path: Path) -> None:
    """Reading this file, or any in this folder, now raises SealedTruthError. A path to nothing is passed over."""
    real_path = os.path.realpath(path)
    if os.path.isdir(real_path):
        _seal(os.path.join(real_path, ""))
    elif os.path.isfile(real_path):
        _seal(real_path)


def open_sealed(path: Path) -> BufferedReader:
    """A file, sealed or not, for reading by those who may. Raises DatasetError where there is none."""
    token = _unlocked.set(True)
    try:
        return path.open("rb")
    except OSError as error:
        raise DatasetError(f"{path}: expected a mask, got: {error.strerror or error}") from error
    finally:
        _unlocked.reset(token)


def _seal(entry: str) -> None:
    global _hooked
    _sealed.add(entry)
    os.environ[_ENVIRONMENT] = "\n".join(sorted(_sealed))
    if not _hooked:
        sys.addaudithook(_watch)
        _hooked = True


def _watch(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: refuse to open a sealed file for reading. Runs at every audit event, so the common case is first."""
    if event != "open" or not _sealed or _unlocked.get() or not isinstance(args[0], (str, bytes, os.PathLike)):
        return
    if args[2] & os.O_WRONLY or args[2] & os.O_TRUNC:  # writes a mask, or a new one over it: sees nothing of it
        return
    path = os.fsdecode(args[0])
    if _is_sealed(path):
        raise SealedTruthError(
            f"{path} is a true mask, or holds some: training from image-level labels must not see it. "
            "Only weakseg.datasets.truth.open_truth reads masks"
        )


def _is_sealed(path: str) -> bool:
    real = os.path.realpath(path)
    # What is in a sealed folder may itself be a link to a file elsewhere.
    link = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    folders = [entry for entry in _sealed if entry.endswith(os.sep)]
    return real in _sealed or any(name.startswith(folder) for folder in folders for name in (real, link))


for _entry in filter(None, os.environ.get(_ENVIRONMENT, "").split("\n")):
    _seal(_entry)
