"""What every runner checks of a call before its runtime sees it, so that a mistake reads the same with all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from weakseg.cpu import usable_cpus
from weakseg.errors import ConfigError, DataError


class Opened(Protocol):
    """What a runner holds of a graph; `outputs` are their names."""

    @property
    def outputs(self) -> Iterable[str]: ...


T = TypeVar("T", bound=Opened)


def checked_call(
    graphs: Mapping[str, T], graph: str, images: NDArray[Any], outputs: Sequence[str] | None
) -> tuple[T, list[str]]:
    """What is held of the graph, and names of the outputs to return: those asked for, None = all.

    Raises:
        DataError: images are not (B, H, W, 3) uint8, or a side is 0. ConfigError: no such graph, or no such output.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or 0 in images.shape:
        raise DataError(f"images must be (B, H, W, 3) uint8, got {images.shape} {images.dtype}")
    if graph not in graphs:
        raise ConfigError(f"no graph {graph!r}: expected one of {', '.join(graphs) or 'none, it is closed'}")
    has = list(graphs[graph].outputs)
    names = has if outputs is None else list(outputs)
    if not set(names) <= set(has):
        raise ConfigError(f"graph {graph} has the outputs {', '.join(has)}, got {', '.join(names)}")
    return graphs[graph], names


def n_threads(threads: int | None) -> int:
    """Threads of a runtime; None = the cores that this process may use, which no runtime finds out by itself."""
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}: leave it out to use all cores")
    return usable_cpus() if threads is None else threads
