"""Fewer points for rings along pixel edges."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def simplified(
    corners: NDArray[np.float64], starts: NDArray[np.int64], keep: NDArray[np.bool_], tolerance: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Douglas-Peucker over all rings at once: where a section of a ring departs too far from the line between its ends,
    it is split at its farthest point.

    An edge between pixels says of the true outline only that it passes between their centres. So the points to choose
    from are the middles of straight runs, which lie on a slanted line where corners lie to either side of it, and the
    corners between two runs of 2 pixels and more, which no straight line has. Other corners are taken where a section
    has nothing else.

    Args:
        corners: (N, 2) of all rings, one after the other, turning at each.
        starts: (R,) where each ring starts.
        keep: (N,) corners that must stay.
        tolerance: > 0; every point of the given rings is closer than that to the returned one, and the reverse.
    Returns:
        The same of fewer points, without points on the straight line between their neighbours.
    """
    following, preceding = _neighbours(len(corners), starts)
    to_next = np.abs(corners[following] - corners).sum(axis=1)
    is_angle = (to_next >= 2) & (to_next[preceding] >= 2)
    # Rings start at the middle of their first run; each middle is followed by the corner after it.
    points = np.stack([(corners + corners[following]) / 2, corners[following]], axis=1).reshape(-1, 2)
    starts = 2 * starts
    chosen = np.stack([np.zeros_like(keep), keep[following]], axis=1).reshape(-1)
    good = np.stack([np.ones_like(keep), is_angle[following]], axis=1).reshape(-1)
    chosen[starts] = True
    chosen = _douglas_peucker(points, starts, chosen, good, tolerance)
    points, starts = points[chosen], _starts_among(chosen, starts)
    straight = _cross(points, starts) == 0
    return points[~straight], _starts_among(~straight, starts)


def _douglas_peucker(
    points: NDArray[np.float64],
    starts: NDArray[np.int64],
    chosen: NDArray[np.bool_],
    good: NDArray[np.bool_],
    tolerance: float,
) -> NDArray[np.bool_]:
    """`chosen`, every ring's first among them, and the points at which sections are split; good ones first.

    All sections are looked at together, once per depth of the recursion; those that are near enough drop out.
    """
    chosen = chosen.copy()
    begins = np.flatnonzero(chosen)
    ends = begins[_neighbours(len(begins), np.searchsorted(begins, starts))[0]]
    section = np.cumsum(chosen) - 1
    inner = np.flatnonzero(~chosen)  # points in sections, each with both ends of its own
    begin, end = begins[section[inner]], ends[section[inner]]
    while inner.size:
        heads = np.flatnonzero(np.diff(begin, prepend=-1))
        section = np.repeat(np.arange(len(heads)), np.diff(np.append(heads, len(inner))))
        squared = _squared_distances(points[inner], points[begin], points[end])
        too_far = np.maximum.reduceat(squared, heads) >= tolerance**2
        may = good[inner] | ~np.logical_or.reduceat(good[inner], heads)[section]
        score = np.where(may, squared, -1)
        best = np.flatnonzero(score == np.maximum.reduceat(score, heads)[section])
        split = inner[best[np.unique(section[best], return_index=True)[1]]]  # the first of equals
        chosen[split[too_far]] = True
        split = split[section]
        rest = too_far[section] & (inner != split)
        inner, begin, end, split = inner[rest], begin[rest], end[rest], split[rest]
        begin, end = np.where(inner > split, split, begin), np.where(inner < split, split, end)
    return chosen


def _squared_distances(
    points: NDArray[np.float64], begin: NDArray[np.float64], end: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Of each point to its own line segment, all (N, 2); exact to rounding, for coordinates are multiples of 0.5."""
    along, offset = end - begin, points - begin
    length2 = _dot(along, along)
    place = np.clip(_dot(offset, along) / np.where(length2 > 0, length2, 1), 0, 1)
    away = offset - place[:, None] * along
    return _dot(away, away)


def _dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1]


def _cross(points: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of the ways to a point and on from it; 0 where they go straight on."""
    following, preceding = _neighbours(len(points), starts)
    to, on = points - points[preceding], points[following] - points
    return to[:, 0] * on[:, 1] - to[:, 1] * on[:, 0]


def _neighbours(n: int, starts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the next and of the previous point in each ring."""
    following, preceding = np.arange(1, n + 1), np.arange(-1, n - 1)
    lasts = np.append(starts[1:], n) - 1
    following[lasts], preceding[starts] = starts, lasts
    return following, preceding


def _starts_among(kept: NDArray[np.bool_], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where rings start when only `kept` points are left."""
    return np.cumsum(kept)[starts] - kept[starts]
