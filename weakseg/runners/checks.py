"""What every runner checks of a call before its runtime sees it, so that a mistake reads the same with all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from weakseg.cpu import usable_cpus
from weakseg.errors import ConfigError, DataError

T = TypeVar("T")


def check_images(images: NDArray[Any]) -> None:
    """Raises DataError unless images are (B, H, W, 3) uint8, none of the sides 0."""
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or 0 in images.shape:
        raise DataError(f"images must be (B, H, W, 3) uint8, got {images.shape} {images.dtype}")


def opened(graphs: Mapping[str, T], graph: str) -> T:
    """The entry of a graph; ConfigError names those there are."""
    if graph not in graphs:
        raise ConfigError(f"no graph {graph!r}: expected one of {', '.join(graphs) or 'none, it is closed'}")
    return graphs[graph]


def wanted(graph: str, has: Sequence[str], outputs: Sequence[str] | None) -> list[str]:
    """Names of the outputs to return: those asked for, None = all. ConfigError: one that the graph does not have."""
    names = list(has) if outputs is None else list(outputs)
    if not set(names) <= set(has):
        raise ConfigError(f"graph {graph} has the outputs {', '.join(has)}, got {', '.join(names)}")
    return names


def n_threads(threads: int | None) -> int:
    """Threads of a runtime; None = the cores that this process may use, which no runtime finds out by itself."""
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}: leave it out to use all cores")
    return usable_cpus() if threads is None else threads
