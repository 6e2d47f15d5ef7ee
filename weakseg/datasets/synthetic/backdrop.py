"""Places: a ground in perspective, what stands on the horizon, the sky, and the light that goes with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from weakseg.datasets.synthetic.noise import Field, blend, colour, fractal_noise
from weakseg.datasets.synthetic.solids import Light

PLACES = ("meadow", "water", "snow", "sand", "litter", "gravel")
TILE = 384  # pixels of the ground texture before perspective


@dataclass(frozen=True)
class Backdrop:
    """An empty place. rgb (H, W, 3) in [0, 1]; horizon: the image row where the ground begins, may be negative."""

    place: str
    rgb: Field
    horizon: float
    light: Light

    def near(self, y: float) -> float:
        """How near the ground is at image row y: 1 at the lower edge, towards 0 at the horizon."""
        height = self.rgb.shape[0]
        return float(np.clip((y - self.horizon) / (height - self.horizon), 0.02, 1.2))


def backdrop(rng: np.random.Generator, place: str, height: int, width: int) -> Backdrop:
    """A place under a random sun."""
    light = _light(rng, place)
    horizon = height * (rng.uniform(0.12, 0.42) if rng.random() < 0.75 else rng.uniform(-0.9, -0.3))
    fields = _ground_fields(rng, height, width, horizon, light, flat=place == "water")
    ground = _GROUNDS[place](rng, fields)
    ground = ground * (light.ambient + light.sun * np.float32(0.75))
    if horizon > 0:
        haze = np.clip(1 - fields.near / 0.35, 0, 1) ** 2 * 0.45
        sky = _sky(rng, place, height, width)
        ground = blend(ground, sky[int(horizon)].mean(axis=0), haze)
        far = _far(rng, place, sky, horizon, light)
        edge = np.clip((np.arange(height, dtype=np.float32)[:, None] - horizon) / 1.5, 0, 1)
        ground = blend(far, ground, np.broadcast_to(edge, (height, width)))
    return Backdrop(place, np.clip(ground, 0, 1).astype(np.float32), horizon, light)


def _light(rng: np.random.Generator, place: str) -> Light:
    direction = np.array([rng.uniform(-0.75, 0.75), -rng.uniform(0.55, 0.9), rng.uniform(0.3, 0.6)], dtype=np.float32)
    sunny = rng.uniform(0.25, 1.0)
    warmth = rng.uniform(-0.06, 0.10) * sunny
    sun = np.float32(0.35 + 0.6 * sunny) * np.array([1 + warmth, 1, 1 - warmth], dtype=np.float32)
    ambient = np.float32(0.66 - 0.28 * sunny) * np.array([0.96, 1.0, 1.07], dtype=np.float32)
    if place == "snow":
        ambient = ambient * np.float32(1.12)  # light comes back from the ground
    return Light(direction / np.linalg.norm(direction), sun.astype(np.float32), ambient)


@dataclass(frozen=True)
class _Fields:
    """The ground seen in perspective, each (H, W): nearness in (0, 1], noise, and cells (pebbles, leaves).

    cell: one random value in [-1, 1] a cell; rim: 0 inside a cell to 1 at its border; relief: a slope in the sun.
    """

    near: Field
    coarse: Field
    fine: Field
    cell: Field
    rim: Field
    relief: Field


def _ground_fields(
    rng: np.random.Generator, height: int, width: int, horizon: float, light: Light, flat: bool
) -> _Fields:
    """Tiles of texture laid on the ground plane; details fade where they would flicker."""
    rows = np.arange(height, dtype=np.float32)
    near = np.clip((rows - horizon) / (height - horizon), 0.03, None)
    depth = 1 / near
    u = _mirrored((np.arange(width, dtype=np.float32)[None] - width / 2) * depth[:, None] * 0.55 + TILE / 2)
    v = np.broadcast_to(depth[:, None] * height * (0.9 if flat else 0.7), (height, width))
    v = _mirrored(v + np.float32(rng.uniform(0, TILE)))
    coarse = fractal_noise(rng, (TILE, TILE), (48, 48), 4, 0.6)
    fine = fractal_noise(rng, (TILE, TILE), (4, 12) if flat else (5, 5), 3, 0.7)
    cell, rim = _cells(rng)
    relief = fine - np.roll(fine, (1, 1 if light.direction[0] < 0 else -1), axis=(0, 1))
    full = np.broadcast_to(near[:, None], (height, width))
    fade = np.clip(full * 3.0, 0, 1)
    seen = [cv2.remap(tile, u, v, cv2.INTER_LINEAR) for tile in (coarse, fine, cell, rim, relief)]
    return _Fields(full, seen[0] * np.sqrt(fade), *(field * fade for field in seen[1:]))


def _cells(rng: np.random.Generator) -> tuple[Field, Field]:
    """(value, rim) of the cells around random points (Worley noise) on one tile."""
    n_points = TILE * TILE // 22
    blank = np.ones((TILE, TILE), dtype=np.uint8)
    blank[rng.integers(TILE, size=n_points), rng.integers(TILE, size=n_points)] = 0
    distance, label = cv2.distanceTransformWithLabels(blank, cv2.DIST_L2, 3, labelType=cv2.DIST_LABEL_PIXEL)
    values = rng.uniform(-1, 1, int(label.max()) + 1).astype(np.float32)
    return values[label], np.clip(distance / 4.0, 0, 1) ** 2


def _mirrored(position: Field) -> Field:
    """Any coordinate to one inside the tile, back and forth."""
    inside: Field = np.abs((position % (2 * TILE - 2)) - (TILE - 1)).astype(np.float32)
    return inside


def _meadow(rng: np.random.Generator, f: _Fields) -> Field:
    blades = fractal_noise(rng, f.near.shape, (7, 1.6), 2, 0.8) * np.clip(f.near * 1.4, 0.1, 1)
    fresh, dry = colour(rng, (104, 128, 62), 0.1), colour(rng, (168, 156, 98), 0.1)
    green = blend(fresh, dry, np.clip(0.35 + 0.6 * f.coarse, 0, 1))
    return green * (1 + 0.32 * blades[..., None] + 0.12 * f.fine[..., None])


def _water(rng: np.random.Generator, f: _Fields) -> Field:
    deep, pale = colour(rng, (58, 96, 110), 0.12), colour(rng, (142, 174, 182), 0.08)
    ripples = np.clip(0.30 + 0.26 * f.fine + 0.20 * f.coarse + 0.25 * (1 - f.near), 0, 1)
    glints = np.clip((f.fine - 0.9) * 2.0, 0, 0.35)
    return blend(deep, pale, ripples) + glints[..., None]


def _snow(rng: np.random.Generator, f: _Fields) -> Field:
    white, blue = colour(rng, (206, 211, 219), 0.02), colour(rng, (140, 156, 186), 0.04)
    return blend(white, blue, np.clip(0.25 + 0.6 * f.coarse, 0, 1)) * (1 + 0.10 * f.relief[..., None])


def _sand(rng: np.random.Generator, f: _Fields) -> Field:
    light, dark = colour(rng, (216, 190, 148), 0.06), colour(rng, (170, 138, 100), 0.06)
    ripples = np.sin(18 / np.clip(f.near, 0.08, None) + 5 * f.coarse) * np.clip(f.near * 2 - 0.1, 0, 1)
    share = np.clip(0.4 + 0.35 * f.coarse + 0.16 * ripples, 0, 1)
    return blend(light, dark, share) * (1 + 0.22 * f.relief[..., None] + 0.05 * f.fine[..., None])


def _litter(rng: np.random.Generator, f: _Fields) -> Field:
    earth, leaf, gold = (colour(rng, c, 0.1) for c in ((84, 66, 52), (132, 100, 74), (176, 148, 108)))
    leaves = blend(blend(earth, leaf, 0.5 + 0.9 * f.cell), gold, np.clip((f.cell - 0.45) * 2, 0, 0.8))
    return leaves * (1.06 - 0.4 * f.rim + 0.22 * f.relief + 0.2 * f.coarse)[..., None]


def _gravel(rng: np.random.Generator, f: _Fields) -> Field:
    dark, light = colour(rng, (118, 112, 108), 0.08), colour(rng, (168, 162, 154), 0.06)
    stones = blend(dark, light, 0.5 + 0.5 * f.cell)
    return stones * (1.1 - 0.5 * f.rim + 0.18 * f.relief + 0.16 * f.coarse)[..., None]


_GROUNDS: dict[str, Callable[[np.random.Generator, _Fields], Field]] = {
    "meadow": _meadow,
    "water": _water,
    "snow": _snow,
    "sand": _sand,
    "litter": _litter,
    "gravel": _gravel,
}


def _sky(rng: np.random.Generator, place: str, height: int, width: int) -> Field:
    clouds = fractal_noise(rng, (height, width), (height / 5, width / 2.2), 5, 0.55)
    top, low = colour(rng, (104, 156, 214), 0.1), colour(rng, (206, 222, 236), 0.04)
    if place in ("snow", "gravel"):
        top = blend(top, low, np.array(0.55))
    fall = np.linspace(0, 1.6, height, dtype=np.float32)[:, None]
    clear = blend(top, low, np.broadcast_to(fall, (height, width)))
    cover = rng.uniform(-0.3, 0.4)
    return blend(clear, colour(rng, (240, 242, 246), 0.03), np.clip((clouds + cover) * 1.3, 0, 0.9))


def _far(rng: np.random.Generator, place: str, sky: Field, horizon: float, light: Light) -> Field:
    """The sky with one or two rows of hills or trees in front, out of focus."""
    height, width = sky.shape[:2]
    out = sky
    rows = np.arange(height, dtype=np.float32)[:, None]
    shades = {"snow": (150, 168, 186), "sand": (168, 150, 124), "gravel": (128, 132, 138)}
    base = shades.get(place, (70, 98, 62))
    for layer in range(int(rng.integers(1, 3))):
        wooded = layer > 0 or rng.random() < 0.4
        rough = fractal_noise(rng, (2, width), (2, 14 if wooded else 70), 4, 0.6)[0]
        rise = horizon * (rng.uniform(0.15, 0.4) if wooded else rng.uniform(0.3, 0.7))
        ridge = horizon - rise * (0.65 + 0.45 * rough)
        texture = fractal_noise(rng, (height, width), (6, 4), 3, 0.7)
        tone = colour(rng, base, 0.15) * np.float32(1.15 - 0.35 * layer)
        hazy = blend(tone, sky.mean(axis=(0, 1)), np.array(0.5 - 0.28 * layer))
        body = hazy * (light.ambient + 0.6 * light.sun) * (1 + (0.3 if wooded else 0.1) * texture[..., None])
        out = blend(out, body, np.clip((rows - ridge[None]) / 1.5, 0, 1))
    return cv2.GaussianBlur(out, (0, 0), rng.uniform(0.5, 1.8)).astype(np.float32)
