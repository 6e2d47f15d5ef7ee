"""The sparse random walk beside the dense form: `python -m benchmarks.random_walk` (`make bench-random-walk`).

The peer is the authors' way in NumPy: the whole matrix of transitions, multiplied by itself until it holds all steps,
then applied once. Both from the same affinities, 2^6 steps, three rows of scores. Peak of what each allocates, and CPU
seconds; the plain names are the worse of the two sizes.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from benchmarks.line import line
from weakseg.random_walk import pair_offsets, random_walk, transition

RADIUS, BETA, LOG_STEPS, ROWS = 5, 8.0, 6, 3
SIZES = ((63, 47), (94, 125))  # cells of 8 and 4 pixels of a photograph of VOC


def main() -> None:
    measured = {size: measure(*size) for size in SIZES}
    for what, (unit, goal) in {"memory": ("MiB", 10.0), "time": ("CPU s", 1.0)}.items():
        for (height, width), found in measured.items():
            line(f"random_walk.{what}.{height}x{width}", *found[what], unit=unit, cost=True, goal=goal)
        worst = min((found[what] for found in measured.values()), key=lambda pair: pair[1] / pair[0])
        line(f"random_walk.{what}", *worst, unit=unit, cost=True, goal=goal)


def measure(height: int, width: int) -> dict[str, tuple[float, float]]:
    """{what: (ours, peer)}."""
    rng = np.random.default_rng(0)
    scores = rng.random((ROWS, height, width), dtype=np.float32)
    affinities = rng.random((len(pair_offsets(RADIUS)), height, width), dtype=np.float32) ** np.float32(0.2)

    def ours() -> NDArray[np.float32]:
        return random_walk(scores, affinities, radius=RADIUS, beta=BETA, steps=2**LOG_STEPS)

    def peer() -> NDArray[np.float32]:
        return dense(scores, affinities)

    (one, seconds), (other, peer_seconds) = timed(ours), timed(peer)
    apart = float(np.abs(one - other).max())
    if apart > 1e-4:
        raise SystemExit(f"random_walk: the two forms differ by {apart} at {height} x {width}")
    return {"time": (seconds, peer_seconds), "memory": (peak_mib(ours), peak_mib(peer))}


def dense(scores: NDArray[np.float32], affinities: NDArray[np.float32]) -> NDArray[np.float32]:
    matrix = transition(affinities, RADIUS, BETA).toarray().T
    for _ in range(LOG_STEPS):
        matrix = matrix @ matrix
    return (scores.reshape(len(scores), -1) @ matrix).reshape(scores.shape)


def timed(way: Callable[[], NDArray[np.float32]]) -> tuple[NDArray[np.float32], float]:
    """Its result, and CPU seconds."""
    began = time.process_time()
    result = way()
    return result, time.process_time() - began


def peak_mib(way: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        way()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


if __name__ == "__main__":
    main()
