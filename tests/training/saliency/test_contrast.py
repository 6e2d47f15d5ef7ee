"""Barriers and contrasts in closed form, what they are invariant to, then drawn scenes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from training.saliency.contrast import barrier_distances, border_contrast, saliency, smoothed

GREEN, RED, WHITE = (60, 120, 60), (200, 40, 40), (250, 250, 250)


def canvas(
    height: int = 60, width: int = 80, colour: tuple[int, int, int] = GREEN, noise: int = 0
) -> NDArray[np.uint8]:
    shade = np.random.default_rng(0).integers(-noise, noise + 1, (height, width, 1))
    return np.clip(np.array(colour) + shade, 0, 255).astype(np.uint8)


def field(rows: list[list[float]]) -> NDArray[np.float32]:
    return np.array([rows], dtype=np.float32)


# Barriers -------------------------------------------------------------------------------------------------------------


def test_a_thing_is_as_far_away_as_it_differs() -> None:
    values = np.zeros((1, 9, 11), np.float32)
    values[0, 3:6, 4:8] = 7
    assert np.array_equal(barrier_distances(values), values)


def test_a_barrier_is_what_a_path_rises_and_falls_in_all() -> None:
    rows = [[0.0, 0, 0, 0, 0], [0, 5, 5, 5, 0], [0, 5, 2, 5, 0], [0, 5, 5, 5, 0], [0, 0, 0, 0, 0]]
    assert barrier_distances(field(rows))[0, 2].tolist() == [0, 5, 5, 5, 0]  # over the rim of 5 to the 2 inside


def test_a_slope_is_as_far_as_the_nearer_end() -> None:
    slope = np.tile(np.arange(9, dtype=np.float32), (9, 1))
    slope[0], slope[-1] = 100, 100  # no way out along the slope's own level
    assert barrier_distances(slope[None])[0, 4].tolist() == [0, 1, 2, 3, 4, 3, 2, 1, 0]


def test_a_way_out_around_corners_is_found() -> None:
    """A corridor of 0 in a wall of 9, with two turns, from the middle to the border."""
    rows = np.full((1, 7, 9), 9, np.float32)
    rows[0, 3, 2:5] = rows[0, 1:4, 2] = rows[0, 1, 2:9] = 0
    assert barrier_distances(rows)[0, 3].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0]
    rows[0, 1, 7:] = 9
    assert barrier_distances(rows)[0, 3].tolist() == [0, 0, 9, 9, 9, 0, 0, 0, 0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_distances_are_those_of_paths_and_seldom_far_from_the_least(seed: int, scale: float, shift: float) -> None:
    values = np.random.default_rng(seed).random((2, 7, 9), np.float32)
    before, out = values.copy(), barrier_distances(values)
    least = np.stack([least_barriers(channel) for channel in values])
    assert np.array_equal(values, before)
    assert (out >= least - 1e-6).all() and (out - least).mean() < 0.1 * least[:, 1:-1, 1:-1].mean()
    again = barrier_distances(values * np.float32(scale) + np.float32(shift))
    np.testing.assert_allclose(again, out * scale, atol=1e-4)
    assert (barrier_distances(values, passes=1) >= out).all()


def least_barriers(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """By all pairs of a lowest and a highest value: what is joined to the border between them is no further away."""
    least = np.full(values.shape, np.inf, np.float32)
    levels = np.sort(values, axis=None)
    for low in levels:
        for high in levels[levels >= low]:
            regions, _ = ndimage.label((values >= low) & (values <= high))
            edge = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
            joined = np.isin(regions, edge[edge > 0])
            least[joined] = np.minimum(least[joined], high - low)
    return least


# Colours of the border ------------------------------------------------------------------------------------------------


def test_what_no_edge_has_stands_out_and_what_one_edge_has_does_not() -> None:
    lab = np.zeros((20, 20, 3), np.float32)
    lab[8:12, 8:12, 1] = 50
    out = border_contrast(lab)
    assert (out[8:12, 8:12] == 1).all() and (out[:8] == 0).all()
    lab[8:, 4:16, 1] = 50  # now it stands on the lower edge
    out = border_contrast(lab)
    assert out[10, 10] == out.max() and out[10, 10] > 2 * out[2, 2]


# Smoothing ------------------------------------------------------------------------------------------------------------


def test_spots_and_holes_go_and_edges_stay() -> None:
    values = np.zeros((20, 20), np.float32)
    values[4:16, 4:16] = 0.75
    clean = values.copy()
    values[8, 8], values[1:3, 1:3] = 0, 1
    assert np.array_equal(smoothed(values, 5), clean)
    assert np.array_equal(smoothed(clean, 5), clean)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), side=st.sampled_from([1, 3, 5]))
def test_smoothing_stays_in_range_moves_with_mirrors_and_is_done_once(seed: int, side: int) -> None:
    values = np.random.default_rng(seed).random((9, 12), np.float32)
    out = smoothed(values, side)
    assert values.min() - 1e-6 <= out.min() and out.max() <= values.max() + 1e-6
    np.testing.assert_allclose(smoothed(values[:, ::-1].copy(), side), out[:, ::-1], atol=1e-6)
    if side == 1:
        np.testing.assert_allclose(out, values, atol=1e-6)


# Images ---------------------------------------------------------------------------------------------------------------


def test_a_thing_on_a_noisy_ground_is_salient() -> None:
    image = canvas(noise=12)
    image[20:44, 30:56] = RED
    out = saliency(image)
    assert out.shape == (60, 80) and out.dtype == np.float32
    assert (out[22:42, 32:54] > 0.5).all() and (out[:18] < 0.5).all() and (out[:, :28] < 0.5).all()


def test_a_thing_cut_off_by_the_lower_edge_is_salient() -> None:
    image = canvas(noise=5)
    image[24:, 24:56] = RED
    out = saliency(image)
    assert out[26:50, 28:52].mean() > 3 * np.concatenate([out[:20].ravel(), out[:, :20].ravel()]).mean()


def test_two_halves_of_a_landscape_are_not() -> None:
    """Sky over a meadow: each of them reaches the border, whatever their contrast."""
    image = canvas()
    image[:30] = WHITE
    image[38:52, 30:50] = RED
    out = saliency(image)
    assert out[40:50, 32:48].min() > 0.5 > max(out[:28].max(), out[54:].max())


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 1), (2, 3), (5, 700), (300, 200)])
def test_sizes(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    out = saliency(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    assert out.shape == size and np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("colour", [(0, 0, 0), GREEN, WHITE])
def test_in_one_colour_there_is_nothing(colour: tuple[int, int, int]) -> None:
    assert saliency(canvas(colour=colour)).max() < 0.01


def test_a_mirrored_image_has_the_mirrored_map_and_is_left_alone() -> None:
    image = canvas(noise=10)
    image[15:30, 8:30] = RED
    before = image.copy()
    out = saliency(image)
    assert np.array_equal(image, before)
    np.testing.assert_allclose(saliency(image[:, ::-1].copy())[:, ::-1], out, atol=0.05)
