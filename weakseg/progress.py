"""How far a stage is: a bar on a terminal, one line every ten seconds elsewhere, silence with --json."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from tqdm import tqdm

LINE_EVERY_S = 10.0
Item = TypeVar("Item")


class Progress:
    """Hands out one `Bar` a task. mode "auto" looks at stderr: a terminal gets bars, anything else gets lines."""

    def __init__(self, mode: Literal["auto", "bar", "lines", "silent"] = "auto") -> None:
        self.mode = ("bar" if sys.stderr.isatty() else "lines") if mode == "auto" else mode

    @contextmanager
    def task(self, name: str, total: int, unit: str = "images", initial: int = 0) -> Iterator[Bar]:
        bar = Bar(name, total, unit, initial, self.mode)
        try:
            yield bar
        finally:
            bar.close()

    def each(self, items: Iterable[Item], name: str, total: int, unit: str = "images") -> Iterator[Item]:
        """The items, counted as they are consumed."""
        with self.task(name, total, unit) as bar:
            for item in items:
                yield item
                bar.update(1)

    def say(self, text: str) -> None:
        """One line about what happens next."""
        if self.mode != "silent":
            tqdm.write(text, file=sys.stderr)


class Bar:
    """One task. `update(n, loss=…)` counts n items and shows the figures beside the rate and the time left."""

    def __init__(self, name: str, total: int, unit: str, initial: int, mode: str) -> None:
        self.name, self.total, self.unit, self.mode = name, total, unit, mode
        self.n = self.first = initial
        self.began = self.said = time.monotonic()
        self.bar = (
            tqdm(total=total, initial=initial, desc=name, unit=unit.rstrip("s"), dynamic_ncols=True, leave=False)
            if mode == "bar"
            else None
        )

    def update(self, n: int = 1, **figures: float) -> None:
        self.n += n
        if self.bar is not None:
            if figures:
                self.bar.set_postfix({key: f"{value:.4g}" for key, value in figures.items()}, refresh=False)
            self.bar.update(n)
        elif self.mode == "lines" and time.monotonic() - self.said >= LINE_EVERY_S:
            self.said = time.monotonic()
            rate = (self.n - self.first) / (self.said - self.began)
            left = (self.total - self.n) / rate if rate > 0 else float("inf")
            shown = "".join(f", {key} {value:.4g}" for key, value in figures.items())
            print(
                f"{self.name}: {self.n}/{self.total} {self.unit}, {rate:.1f}/s, {left:.0f} s left{shown}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
