"""Long work that can be told to stop: between its steps it calls a check, which raises `StoppedError` when it should.

What was begun is then thrown away: there are no half results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Check: TypeAlias = Callable[[], None]


class StoppedError(Exception):
    """Raised by a check, and caught by whoever passed it; nobody else sees it."""


def go_on() -> None:
    """The check of work that has all the time it needs."""
