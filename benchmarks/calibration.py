"""How sure a classifier is, and how right: `python -m benchmarks.calibration runs/compare-synthetic/cam-0`.

Of one or several run folders, over all pairs of image and class of the last scored split: how many there are between
two scores, their mean score, and the share whose class is there, by the tags. Equal means are perfect calibration; a
share above the score is a classifier that is not sure enough.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weakseg.cam_file import read_cam
from weakseg.datasets import read
from weakseg.report import recipe_of
from weakseg.text import table

EDGES = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="a run folder, finished up to its maps")
    for folder in parser.parse_args(argv).folders:
        scores, present = pairs(folder)
        rows = [
            (f"{low:.2f} to {high:.2f}", str(n), f"{score:.2f}", f"{share:.2f}")
            for (low, high), (n, score, share) in zip(pairwise(EDGES), reliability(scores, present), strict=True)
            if n
        ]
        brier = float(np.mean((scores - present) ** 2))
        print(f"{folder}: Brier score {brier:.3f}\n{table(['scores', 'pairs', 'mean score', 'there'], rows)}\n")


def pairs(folder: Path) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(scores, whether the tags name the class), one each for every image and class."""
    recipe = recipe_of(folder)
    split = recipe.evaluate.splits[-1]
    dataset = read(recipe.data, split)
    scores = [read_cam(folder / "cam" / split / f"{sample.id}.npz").scores for sample in dataset.samples]
    present = [sample.tag_vector(len(dataset.classes)) for sample in dataset.samples]
    return np.concatenate(scores).astype(np.float64), np.concatenate(present)


def reliability(
    scores: NDArray[np.float64], present: NDArray[np.bool_], edges: Sequence[float] = EDGES
) -> list[tuple[int, float, float]]:
    """(number, mean score, share present) from each edge on, up to the next; the last edge itself is in the last."""
    bins = np.clip(np.searchsorted(edges, scores, side="right") - 1, 0, len(edges) - 2)
    found = []
    for one in range(len(edges) - 1):
        here = bins == one
        n = int(here.sum())
        found.append((n, float(scores[here].mean()), float(present[here].mean())) if n else (0, 0.0, 0.0))
    return found


if __name__ == "__main__":
    main()
