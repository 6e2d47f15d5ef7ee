"""AUC and F of histograms, and a benchmark over the squares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.saliency import BINS, auc, centre, f_measures, scores
from tests.training.conftest import write_squares
from weakseg.recipe import DataConfig


def histogram(*levels: int) -> np.ndarray:
    return np.bincount(np.array(levels), minlength=BINS)


def test_auc_of_few_pixels() -> None:
    assert auc(histogram(200, 255), histogram(0, 10, 100)) == 1
    assert auc(histogram(0, 3), histogram(5)) == 0
    assert auc(histogram(7), histogram(7, 7)) == 0.5
    assert auc(histogram(5, 9), histogram(3, 7)) == 0.75


@given(st.lists(st.integers(0, 255), min_size=1, max_size=20), st.lists(st.integers(0, 255), min_size=1, max_size=20))
def test_auc_counts_pairs(things: list[int], rest: list[int]) -> None:
    pairs = np.mean([(a > b) + (a == b) / 2 for a in things for b in rest])
    assert auc(histogram(*things), histogram(*rest)) == pytest.approx(pairs)
    assert auc(histogram(*rest), histogram(*things)) == pytest.approx(1 - pairs)


def test_f_at_each_level() -> None:
    f = f_measures(histogram(200, 100), histogram(150, 0))
    assert f[200] == pytest.approx(1.3 * 1 * 0.5 / (0.3 * 1 + 0.5))
    assert f[150] == f[101] == pytest.approx(1.3 * 0.5 * 0.5 / (0.3 * 0.5 + 0.5))
    assert f[0] == pytest.approx(1.3 * 0.5 * 1 / (0.3 * 0.5 + 1))
    assert f[201] == 0


def test_scores_of_the_tune_list(tmp_path: Path) -> None:
    """The squares are told from the noise by their colour alone."""
    write_squares(tmp_path)
    data = DataConfig(root=str(tmp_path), tags="imagesets", tune="tune")
    area, f = scores(data, lambda image: np.float32(np.ptp(image, axis=2) > 90), "colour")
    assert area > 0.99 and f[128] > 0.98
    assert scores(data, lambda image: np.zeros(image.shape[:2], np.float32), "nothing")[0] == 0.5
    assert 0 < scores(data, centre, "centre")[0] < 1
