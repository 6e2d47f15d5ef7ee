"""How long executions take of late: an image that has less time left than that is not worth one."""

from __future__ import annotations

from collections import OrderedDict, deque
from statistics import median
from weakref import WeakKeyDictionary

from weakseg.model import Model

LATEST = 15  # executions that count
LEAST = 5  # fewer say nothing
RECENT_S = 10.0  # older ones say nothing: what was slow may be quick again, which only an execution shows
MOST_KINDS = 64  # of a model: graphs and sizes of images

Kind = tuple[str, tuple[int, ...]]  # graph and shape of an image


class Pace:
    """Belongs to one event loop; times are those of one clock, in seconds."""

    def __init__(self) -> None:
        self._ran: WeakKeyDictionary[Model, OrderedDict[Kind, deque[tuple[float, float]]]] = WeakKeyDictionary()

    def ran(self, model: Model, kind: Kind, seconds: float, now: float) -> None:
        kinds = self._ran.setdefault(model, OrderedDict())
        kinds.setdefault(kind, deque(maxlen=LATEST)).append((now, seconds))
        kinds.move_to_end(kind)
        if len(kinds) > MOST_KINDS:
            kinds.popitem(last=False)

    def expected_s(self, model: Model, kind: Kind, now: float) -> float:
        """Median of the latest executions; 0 = not known."""
        kinds = self._ran.get(model)
        ran = None if kinds is None else kinds.get(kind)
        recent = [seconds for at, seconds in ran or () if now - at <= RECENT_S]
        return median(recent) if len(recent) >= LEAST else 0.0
