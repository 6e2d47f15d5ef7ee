"""A model that only fails is not asked for a while: its requests are refused at once, and one now and then tries.

closed ── FAILURES executions fail in a row, or one hangs ──▶ open: refused for a pause
  ▲                                                            │ the pause is over
  └── an execution succeeds ── one request goes through ◀──────┘
                               └── it fails: open again, for twice as long
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from weakref import WeakKeyDictionary

from serve.batcher import ExecutionTimeoutError
from weakseg.errors import ConfigError, DataError, ModelUnhealthyError
from weakseg.memory import lacks_memory
from weakseg.model import Model

FAILURES = 5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0

log = logging.getLogger("serve.breaker")


class Breaker:
    """Of one model. Times are those of one clock, in seconds."""

    def __init__(self) -> None:
        self._failures = 0  # in a row
        self._pause_s = 0.0  # 0 = closed
        self._until = 0.0
        self._trying = False

    def answers(self, now: float) -> bool:
        """Whether a request may go through, be it to try."""
        return not self._pause_s or now >= self._until

    @contextmanager
    def request(self, now: float) -> Iterator[None]:
        """Around a request. One that comes to no execution, as its image cannot be read, leaves the next to try.

        Raises:
            ModelUnhealthyError
        """
        if not self._pause_s:
            yield
            return
        if self._trying or now < self._until:
            retry_s = max(self._until - now, FIRST_PAUSE_S)
            raise ModelUnhealthyError(
                f"the model failed {self._failures} times in a row: ask another server, or again in {retry_s:.0f} s",
                retry_s,
            )
        self._trying = True
        try:
            yield
        finally:
            self._trying = False

    def succeeded(self) -> bool:
        """An execution succeeded; whether that closed the breaker."""
        was_open = self._pause_s > 0
        self._failures, self._pause_s = 0, 0.0
        return was_open

    def failed(self, now: float, *, at_once: bool = False) -> float:
        """An execution failed. at_once: open whatever came before. Returns the pause that begins now; 0 = none does."""
        self._failures += 1
        if now < self._until and self._pause_s:  # of a request that was inside when it opened
            return 0.0
        if not (self._pause_s or at_once or self._failures >= FAILURES):
            return 0.0
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S) or FIRST_PAUSE_S
        self._until = now + self._pause_s
        return self._pause_s


class Breakers:
    """One for each model; it goes with the model. Belongs to an event loop; `answers` may be asked in any thread.

    on_change: called when a model may have begun or ceased to answer.
    """

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self.on_change = on_change
        self._breakers: WeakKeyDictionary[Model, Breaker] = WeakKeyDictionary()

    def of(self, model: Model) -> Breaker:
        return self._breakers.setdefault(model, Breaker())

    def answers(self, model: Model) -> bool:
        breaker = self._breakers.get(model)
        return breaker is None or breaker.answers(monotonic())

    def ended(self, model: Model, error: Exception | None) -> None:
        """What came of an execution; an image that is refused, or too little memory, says nothing about the model."""
        breaker, now = self.of(model), monotonic()
        if error is None:
            if breaker.succeeded():
                log.info("model answers again", extra={"fields": {"model": model.manifest.id}})
                self.on_change()
        elif not isinstance(error, DataError | ConfigError) and not lacks_memory(error):
            pause_s = breaker.failed(now, at_once=isinstance(error, ExecutionTimeoutError))
            if pause_s:
                fields = {"model": model.manifest.id, "pause_s": pause_s, "failure": type(error).__name__}
                log.error("model paused", extra={"fields": fields})
                self.on_change()
                asyncio.get_running_loop().call_later(pause_s, self.on_change)
