"""How many requests to admit where clients have no deadlines: so few that most of their time is work, not waiting.

The gradient rule of github.com/Netflix/concurrency-limits ("Performance Under Load", 2018):

    limit ← limit · base / seen + √limit        smoothed

Their `base` is the least latency of late, which must be probed for again and again. Here the stages say how long a
request is worked on, so `base / seen` is the share of work in the time inside. With work W (s) and capacity C (1/s) a
busy server has L = C · seen requests inside, so the limit settles where L = C · W + √L: those that are worked on, and
√L that wait. If everything becomes slower, W grows as C falls, and the limit stays.
"""

from __future__ import annotations

import math

WINDOW = 16  # requests between two changes
SMOOTHING = 0.3
STEEPEST = 0.5  # share of the limit that one window can take, before smoothing


class AdaptiveLimit:
    """`limit` follows what `worked` and `left` tell. `worked` may be called in any thread, the rest in one.

    Args:
        floor, ceiling: between which the limit stays; it starts at the ceiling.
    """

    def __init__(self, floor: int, ceiling: int) -> None:
        self.limit = ceiling
        self._floor, self._ceiling = floor, ceiling
        self._exact = float(ceiling)
        self._work_s = self._inside_s = 0.0
        self._n = self._most = 0

    def worked(self, seconds: float) -> None:
        """A step of a request took so long; waiting is none. Adding may lose one in a race, which does not matter."""
        self._work_s += seconds

    def left(self, seconds: float, inside: int, n: int = 1) -> bool:
        """`n` requests were answered, or given up, after so long each, of `inside` that were there.

        Returns: whether the limit has changed.
        """
        self._inside_s += n * seconds
        self._n += n
        self._most = max(self._most, inside)
        if self._n < WINDOW:
            return False
        before = self.limit
        if 2 * self._most >= self.limit:  # of a limit that is not needed, times say nothing
            share = min(1.0, max(STEEPEST, self._work_s / self._inside_s)) if self._inside_s else 1.0
            goal = self._exact * share + math.sqrt(self._exact)
            self._exact += SMOOTHING * (min(self._ceiling, max(self._floor, goal)) - self._exact)
            self.limit = max(self._floor, round(self._exact))
        self._work_s = self._inside_s = 0.0
        self._n = self._most = 0
        return self.limit != before
