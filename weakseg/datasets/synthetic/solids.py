"""Bodies made of round cones, drawn with a height map: light, fur, bands and soft outlines from a few equations.

A round cone is the union of all discs between two discs in the image plane, each taken as the equator of a sphere. At
a pixel with distance d from the axis, where the radius is r, its surface stands at z + sqrt(r^2 - d^2); the highest of
all cones is seen. Units are those of the body (about 1 long), x to the right, y down, the ground at y = 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from weakseg.datasets.synthetic.noise import Field, blend, fractal_noise

SUPERSAMPLING = 2


@dataclass(frozen=True)
class Cone:
    """From (x0, y0) with radius r0 to (x1, y1) with r1; z lifts the whole towards the viewer."""

    x0: float
    y0: float
    r0: float
    x1: float
    y1: float
    r1: float
    material: str
    z: float = 0.0


@dataclass(frozen=True)
class Material:
    """How a surface looks.

    base, second: (3,) RGB in [0, 1]; `second` is the colour of the pattern.
    pattern: plain, fleece (curls), bands (across the axis), speckle, leaf.
    bump: strength of the surface's roughness in the light.
    fuzz: how far the outline strays, in body units.
    """

    base: Field
    second: Field
    pattern: str = "plain"
    bump: float = 0.15
    fuzz: float = 0.004
    gloss: float = 0.0


@dataclass(frozen=True)
class Light:
    """direction: (3,) unit vector towards the light (x right, y down, z to the viewer); colours (3,)."""

    direction: Field
    sun: Field
    ambient: Field


@dataclass(frozen=True)
class Sprite:
    """A drawn body: rgb (h, w, 3) and alpha (h, w) in [0, 1]; its pixel (0, 0) is the image's (left, top)."""

    rgb: Field
    alpha: Field
    left: int
    top: int


def placed(cones: Sequence[Cone], scale: float, x: float, y: float, flip: bool, tilt: float) -> list[Cone]:
    """Body units to pixels: turn by `tilt` rad about the origin, mirror, scale, then move the origin to (x, y)."""
    cos, sin, side = np.cos(tilt) * scale, np.sin(tilt) * scale, -1.0 if flip else 1.0
    return [
        replace(
            c,
            x0=x + side * (c.x0 * cos - c.y0 * sin),
            y0=y + c.x0 * sin + c.y0 * cos,
            r0=c.r0 * scale,
            x1=x + side * (c.x1 * cos - c.y1 * sin),
            y1=y + c.x1 * sin + c.y1 * cos,
            r1=c.r1 * scale,
            z=c.z * scale,
        )
        for c in cones
    ]


def draw(
    rng: np.random.Generator, cones: Sequence[Cone], materials: Mapping[str, Material], scale: float, light: Light
) -> Sprite:
    """A body from cones in pixels.

    Args:
        scale: pixels per body unit; sets the size of the texture.
    """
    reach = max(material.fuzz for material in materials.values()) * scale * 2 + 2
    left, top, right, bottom = _bounds(cones, reach)
    cell = 1 / SUPERSAMPLING
    shape = ((bottom - top) * SUPERSAMPLING, (right - left) * SUPERSAMPLING)
    xs = (np.arange(shape[1], dtype=np.float32) + 0.5) * cell + left
    ys = (np.arange(shape[0], dtype=np.float32) + 0.5) * cell + top
    unit = scale * SUPERSAMPLING
    stray = fractal_noise(rng, (2 * shape[0], shape[1]), (0.05 * unit, 0.05 * unit), 3, 0.8).reshape(2, *shape)
    surface = _Surface(shape)
    names = list(materials)
    for cone in cones:
        surface.add(cone, names.index(cone.material), xs, ys, stray * (materials[cone.material].fuzz * scale))
    rgb = _shade(rng, surface, [materials[name] for name in names], unit, light)
    alpha = (surface.part >= 0).astype(np.float32)
    size = (right - left, bottom - top)
    small_alpha = cv2.resize(alpha, size, interpolation=cv2.INTER_AREA)
    small_rgb = cv2.resize(rgb * alpha[..., None], size, interpolation=cv2.INTER_AREA)
    return Sprite(small_rgb / np.maximum(small_alpha, 1e-3)[..., None], small_alpha, left, top)


class _Surface:
    """The height map: for each pixel the material seen, its normal, and where along its cone it lies."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.height = np.full(shape, -1e9, dtype=np.float32)
        self.part = np.full(shape, -1, dtype=np.int8)
        self.normal = np.zeros((*shape, 3), dtype=np.float32)
        self.along = np.zeros(shape, dtype=np.float32)

    def add(self, cone: Cone, part: int, xs: Field, ys: Field, stray: Field) -> None:
        pad = max(cone.r0, cone.r1) + float(np.abs(stray).max())
        columns = _span(xs, min(cone.x0, cone.x1) - pad, max(cone.x0, cone.x1) + pad)
        rows = _span(ys, min(cone.y0, cone.y1) - pad, max(cone.y0, cone.y1) + pad)
        window = (rows, columns)
        x = xs[None, columns] + stray[0][window]
        y = ys[rows, None] + stray[1][window]
        dx, dy = cone.x1 - cone.x0, cone.y1 - cone.y0
        t = np.clip(((x - cone.x0) * dx + (y - cone.y0) * dy) / max(dx * dx + dy * dy, 1e-6), 0, 1)
        off_x, off_y = x - cone.x0 - t * dx, y - cone.y0 - t * dy
        radius = cone.r0 + t * (cone.r1 - cone.r0)
        bulge = radius * radius - off_x * off_x - off_y * off_y
        top = np.sqrt(np.maximum(bulge, 0))
        height = cone.z + top
        seen = (bulge > 0) & (height > self.height[window])
        self.height[window][seen] = height[seen]
        self.part[window][seen] = part
        self.along[window][seen] = (t * np.hypot(dx, dy))[seen]
        normal = np.stack([off_x, off_y, top], axis=2) / radius[..., None]
        self.normal[window][seen] = normal[seen]


def _shade(
    rng: np.random.Generator, surface: _Surface, materials: Sequence[Material], unit: float, light: Light
) -> Field:
    shape = surface.part.shape
    coarse = fractal_noise(rng, shape, (0.16 * unit, 0.16 * unit), 3)
    fine = fractal_noise(rng, shape, (0.045 * unit, 0.03 * unit), 3, 0.7)
    rgb = np.zeros((*shape, 3), dtype=np.float32)
    bump = np.zeros(shape, dtype=np.float32)
    gloss = np.zeros(shape, dtype=np.float32)
    for part, material in enumerate(materials):
        seen = surface.part == part
        if seen.any():
            painted = _paint(material, coarse[seen], fine[seen], surface.along[seen] / unit * SUPERSAMPLING)
            rgb[seen], bump[seen], gloss[seen] = painted, material.bump, material.gloss
    normal = surface.normal.copy()
    normal[..., 0] += bump * cv2.Sobel(fine, cv2.CV_32F, 1, 0, ksize=3)
    normal[..., 1] += bump * cv2.Sobel(fine, cv2.CV_32F, 0, 1, ksize=3)
    normal /= np.linalg.norm(normal, axis=2, keepdims=True) + 1e-6
    facing = normal @ light.direction
    wrapped = np.clip((facing + 0.3) / 1.3, 0, 1)
    crevice = _crevices(surface, unit)
    sky = 0.75 - 0.25 * normal[..., 1]  # more light from above than from the ground
    lit = rgb * (light.sun * wrapped[..., None] + light.ambient * sky[..., None]) * crevice[..., None]
    shine = gloss * np.clip(facing, 0, 1) ** 24
    seen_rgb: Field = np.clip(lit + shine[..., None], 0, 1)
    return seen_rgb


def _crevices(surface: _Surface, unit: float) -> Field:
    """[0.5, 1]: darker where the surroundings stand higher (a leg before the belly, the root of an ear)."""
    seen = surface.part >= 0
    height = np.where(seen, surface.height, 0) / (unit / SUPERSAMPLING)
    weight = cv2.GaussianBlur(seen.astype(np.float32), (0, 0), max(0.035 * unit, 0.5))
    around = cv2.GaussianBlur(height, (0, 0), max(0.035 * unit, 0.5)) / np.maximum(weight, 1e-3)
    return np.clip(1 - 5.0 * np.maximum(around - height, 0), 0.5, 1).astype(np.float32)


def _paint(material: Material, coarse: Field, fine: Field, along: Field) -> Field:
    """(n, 3) colours of n pixels from two noise fields and the position along the cone (body units)."""
    if material.pattern == "fleece":
        share = 0.75 * np.abs(fine) + 0.35 * np.clip(coarse, 0, 1)
    elif material.pattern == "bands":
        share = np.clip(3.0 * np.sin(along * 52 + 2.6 * coarse) - 0.2, 0, 1)
    elif material.pattern == "speckle":
        share = np.clip((fine - 0.35) * 5, 0, 1)
    elif material.pattern == "leaf":
        share = np.clip(0.5 + 0.9 * fine, 0, 1)
    else:
        share = np.clip(0.15 + 0.5 * coarse, 0, 0.5)
    painted = blend(material.base, material.second, share)
    rough: Field = painted * (1 + 0.10 * fine[..., None])
    return rough


def _bounds(cones: Sequence[Cone], reach: float) -> tuple[int, int, int, int]:
    left = min(min(c.x0 - c.r0, c.x1 - c.r1) for c in cones) - reach
    top = min(min(c.y0 - c.r0, c.y1 - c.r1) for c in cones) - reach
    right = max(max(c.x0 + c.r0, c.x1 + c.r1) for c in cones) + reach
    bottom = max(max(c.y0 + c.r0, c.y1 + c.r1) for c in cones) + reach
    return int(np.floor(left)), int(np.floor(top)), int(np.ceil(right)), int(np.ceil(bottom))


def _span(positions: NDArray[np.float32], low: float, high: float) -> slice:
    return slice(int(np.searchsorted(positions, low)), int(np.searchsorted(positions, high)))
