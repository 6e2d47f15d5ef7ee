"""What a check says: how it is, what was found, what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """status: a server starts and serves with a warning, badly perhaps; with what has failed it does not, or not long.

    found, todo: a line each; there is nothing to do about what is ok.
    """

    check: str
    status: Status
    found: str
    todo: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warning(check: str, found: str, todo: str) -> Finding:
    return Finding(check, "warning", found, todo)


def failed(check: str, found: str, todo: str) -> Finding:
    return Finding(check, "failed", found, todo)
