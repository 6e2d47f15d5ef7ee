import numpy as np

from benchmarks.calibration import reliability


def test_scores_between_edges():
    scores = np.array([0.0, 0.2, 0.5, 0.6, 1.0])
    present = np.array([False, True, True, False, True])
    found = reliability(scores, present, (0.0, 0.5, 0.75, 0.9, 1.0))
    assert [n for n, _, _ in found] == [2, 2, 0, 1]
    np.testing.assert_allclose([score for _, score, _ in found], [0.1, 0.55, 0.0, 1.0])
    np.testing.assert_allclose([share for _, _, share in found], [0.5, 0.5, 0.0, 1.0])
