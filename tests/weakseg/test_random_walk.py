"""The random walk against its dense form, closed forms and properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from weakseg.errors import ConfigError, DataError
from weakseg.random_walk import pair_offsets, random_walk, refine, transition
from weakseg.stopping import StoppedError


def dense(
    scores: NDArray[np.float64], affinities: NDArray[np.float64], radius: int, beta: float, log_steps: int
) -> NDArray[np.float64]:
    """Cell by cell, then T squared again and again, as the authors do."""
    n_classes, height, width = scores.shape
    matrix = np.eye(height * width)
    for s, (dy, dx) in enumerate(pair_offsets(radius)):
        for y in range(height):
            for x in range(width):
                if 0 <= y + dy < height and 0 <= x + dx < width:
                    one, other = y * width + x, (y + dy) * width + x + dx
                    matrix[one, other] = matrix[other, one] = affinities[s, y, x]
    matrix = matrix**beta
    matrix /= matrix.sum(axis=0, keepdims=True)
    for _ in range(log_steps):
        matrix = matrix @ matrix
    return (scores.reshape(n_classes, -1) @ matrix).reshape(scores.shape)


@pytest.mark.parametrize(("radius", "expected"), [(3, 12), (5, 34), (10, 152)])
def test_numbers_of_pairs_of_the_paper(radius: int, expected: int) -> None:
    offsets = pair_offsets(radius)
    assert len(offsets) == expected
    both = {tuple(o) for o in offsets} | {tuple(-o) for o in offsets}
    assert len(both) == 2 * expected
    assert (0, 0) not in both
    assert max(y * y + x * x for y, x in both) < radius * radius


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    radius=st.integers(2, 6),
    beta=st.sampled_from([0.5, 1.0, 2.5, 8.0]),
    log_steps=st.integers(0, 6),
)
def test_it_is_the_dense_form(seed: int, size: tuple[int, int], radius: int, beta: float, log_steps: int) -> None:
    rng = np.random.default_rng(seed)
    scores, affinities = rng.random((3, *size)), rng.random((len(pair_offsets(radius)), *size))
    walked = random_walk(scores, affinities, radius=radius, beta=beta, steps=2**log_steps)
    np.testing.assert_allclose(walked, dense(scores, affinities, radius, beta, log_steps), atol=1e-4)
    assert walked.dtype == np.float32


def test_without_affinity_nothing_moves() -> None:
    scores = np.random.default_rng(0).random((2, 6, 7)).astype(np.float32)
    np.testing.assert_array_equal(random_walk(scores, np.zeros((34, 6, 7)), radius=5, beta=8, steps=50), scores)


def test_no_step_is_no_change() -> None:
    scores = np.random.default_rng(0).random((2, 6, 7)).astype(np.float32)
    np.testing.assert_array_equal(random_walk(scores, np.ones((34, 6, 7)), radius=5, beta=8, steps=0), scores)


def test_scores_stay_on_their_side_of_a_wall() -> None:
    """Two regions without affinity between them: each ends at its own mean, weighted by the cells' degrees."""
    offsets = pair_offsets(5)
    side = np.zeros((12, 16), dtype=int)
    side[:, 9:] = 1
    affinities = np.zeros((len(offsets), 12, 16), dtype=np.float32)
    for s, (dy, dx) in enumerate(offsets):
        for y in range(12 - dy):
            for x in range(max(0, -dx), 16 - max(0, dx)):
                affinities[s, y, x] = side[y, x] == side[y + dy, x + dx]
    scores = np.zeros((1, 12, 16), dtype=np.float32)
    scores[0, 3:6, 2:5] = 1
    walked = random_walk(scores, affinities, radius=5, beta=8, steps=2000)[0]
    assert walked[side == 1].max() == 0
    assert np.ptp(walked[side == 0]) < 1e-3
    assert walked[side == 0].min() > 0.02


def test_a_last_row_is_how_much_sets_out() -> None:
    rng = np.random.default_rng(0)
    scores, affinities, share = rng.random((2, 6, 7)), rng.random((34, 6, 7)), rng.random((1, 6, 7))
    walked = random_walk(scores, np.concatenate([affinities, share]), radius=5, beta=2, steps=7)
    np.testing.assert_array_equal(walked, random_walk(scores * share, affinities, radius=5, beta=2, steps=7))
    nothing = np.concatenate([affinities, 0 * share])
    assert (random_walk(scores, nothing, radius=5, beta=2, steps=7) == 0).all()


def test_what_a_cell_receives_sums_to_one() -> None:
    matrix = transition(np.random.default_rng(0).random((34, 13, 8)), 5, 8.0)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-5)
    assert matrix.nnz <= (1 + 2 * 34) * 13 * 8


def test_inputs_are_left_alone() -> None:
    scores, affinities = np.ones((1, 3, 3)), np.full((35, 3, 3), 0.5)
    random_walk(scores, affinities, radius=5, beta=2, steps=3)
    assert (scores == 1).all()
    assert (affinities == 0.5).all()


@pytest.mark.parametrize(
    ("scores", "affinities", "settings_of", "error", "message"),
    [
        (np.ones((1, 3, 3)), np.ones((12, 3, 3)), {}, DataError, r"\(34 or 35, h, w\), got \(1, 3, 3\) and \(12,"),
        (np.ones((1, 3, 3)), np.ones((36, 3, 3)), {}, DataError, r"\(34 or 35, h, w\), got \(1, 3, 3\) and \(36,"),
        (np.ones((1, 3, 3)), np.ones((34, 3, 4)), {}, DataError, "takes scores"),
        (np.ones((3, 3)), np.ones((34, 3, 3)), {}, DataError, "takes scores"),
        (np.ones((1, 0, 3)), np.ones((34, 0, 3)), {}, DataError, "takes scores"),
        (-np.ones((1, 3, 3)), np.ones((34, 3, 3)), {}, DataError, "not negative"),
        (np.full((1, 3, 3), np.nan), np.ones((34, 3, 3)), {}, DataError, "finite"),
        (np.ones((1, 3, 3)), np.full((34, 3, 3), 1.5), {}, DataError, r"\[0, 1\]"),
        (np.ones((1, 3, 3)), np.full((34, 3, 3), np.nan), {}, DataError, r"\[0, 1\]"),
        (np.ones((1, 3, 3)), np.ones((34, 3, 3)), {"beta": 0}, ConfigError, "must be positive"),
        (np.ones((1, 3, 3)), np.ones((34, 3, 3)), {"steps": -1}, ConfigError, "steps not negative"),
        (np.ones((1, 3, 3)), np.ones((34, 3, 3)), {"radius": 1}, ConfigError, "at least 2"),
    ],
)
def test_bad_input(
    scores: NDArray[np.float64],
    affinities: NDArray[np.float64],
    settings_of: dict[str, int],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        random_walk(scores, affinities, **({"radius": 5, "beta": 8, "steps": 4} | settings_of))  # type: ignore[arg-type]


def test_pixels_walk_in_cells() -> None:
    """Without affinity a cell keeps its mean; the pixels at a cell's centre show it, those between are between."""
    scores = np.zeros((2, 1, 10, 12), dtype=np.float32)
    scores[0, 0, :4, :4] = np.arange(16).reshape(4, 4)
    found = refine(scores, np.zeros((34, 3, 3)), stride=4, radius=5, beta=8, steps=9)
    assert found.shape == scores.shape
    assert found[0, 0, :2, :2] == pytest.approx(7.5)
    assert 0 < found[0, 0, 0, 4] < 7.5
    assert (found[0, 0, 6:] == 0).all()
    assert (found[1] == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (8, 8), (9, 7)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    cells = (-(-size[0] // 8), -(-size[1] // 8))
    found = refine(np.ones((2, *size)), np.ones((34, *cells)), stride=8, radius=5, beta=8, steps=64)
    assert found.shape == (2, *size)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], found[1])


def test_affinities_of_another_image_are_refused() -> None:
    with pytest.raises(DataError, match=r"9 x 7 has 2 x 1 cells of 8 pixels, got affinities \(34, 1, 2\)"):
        refine(np.ones((1, 9, 7)), np.ones((34, 1, 2)), stride=8, radius=5, beta=8, steps=1)


def test_a_check_is_asked_before_each_step_and_may_end_the_walk() -> None:
    scores, affinities, asked = np.ones((1, 4, 4)), np.ones((12, 4, 4)), []

    def check() -> None:
        asked.append(len(asked))
        if len(asked) > 5:
            raise StoppedError

    random_walk(scores, affinities, radius=3, beta=1.0, steps=5, check=check)
    assert len(asked) == 5
    with pytest.raises(StoppedError):
        random_walk(scores, affinities, radius=3, beta=1.0, steps=10**12, check=check)
