"""One picture: a place, one to three animals, clutter, shadows and a camera. All of it follows from `rng`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from weakseg.classes import BACKGROUND
from weakseg.datasets.synthetic.backdrop import PLACES, Backdrop, backdrop
from weakseg.datasets.synthetic.clutter import Thing, distractor, thing
from weakseg.datasets.synthetic.creatures import CLASS_NAMES, HABITAT, creature
from weakseg.datasets.synthetic.noise import Field, fractal_noise
from weakseg.datasets.synthetic.solids import Cone, Light, Sprite, draw, placed

IN_HABITAT = 0.8  # share of the images of a habitat class that are taken there
ASTRAY = 0.08  # share of the other images that are taken in a habitat
SCALES = (0.3, 1.2)  # body length over the image's short side: 1 to 4


@dataclass(frozen=True)
class Scene:
    """image (H, W, 3) uint8 RGB; labels (H, W) uint8 label map; names: the classes that were put in, sorted."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Item:
    """Something that stands at image row `feet`; name None = no class. head: circle (x, y, r) in pixels."""

    feet: float
    centre: float
    scale: float
    sprite: Sprite
    name: str | None
    head: tuple[float, float, float] | None = None


def make_scene(rng: np.random.Generator, size_px: int) -> Scene:
    """A random scene; the long side is 1 to 1.2 times `size_px`."""
    height, width = _image_size(rng, size_px)
    names = [CLASS_NAMES[i] for i in rng.integers(len(CLASS_NAMES), size=rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))]
    ground = backdrop(rng, _place(rng, names), height, width)
    animals = _animals(rng, names, ground)
    items = sorted([*animals, *_clutter(rng, ground, animals)], key=lambda item: item.feet)
    canvas, labels = ground.rgb.copy(), np.full((height, width), BACKGROUND, dtype=np.uint8)
    for item in items:
        _cast_shadow(canvas, item, ground.light)
        value = BACKGROUND if item.name is None else CLASS_NAMES.index(item.name) + 1
        _paste(canvas, labels, item.sprite, value)
        if ground.place in ("meadow", "water", "snow"):
            _sink(rng, canvas, item, ground)
    found = sorted({item.name for item in animals if item.name})
    return Scene(_camera(rng, canvas), labels, tuple(found))


def _image_size(rng: np.random.Generator, size_px: int) -> tuple[int, int]:
    long = round(size_px * rng.uniform(1.0, 1.2))
    short = round(long * rng.uniform(0.7, 0.95))
    return (short, long) if rng.random() < 0.75 else (long, short)


def _place(rng: np.random.Generator, names: Sequence[str]) -> str:
    homes = [HABITAT[name] for name in names if name in HABITAT]
    if homes and rng.random() < IN_HABITAT:
        return homes[0]
    habitats = sorted(set(HABITAT.values()))
    elsewhere = [place for place in PLACES if place not in habitats]
    choices = habitats if rng.random() < ASTRAY else elsewhere
    return choices[rng.integers(len(choices))]


def _animals(rng: np.random.Generator, names: Sequence[str], ground: Backdrop) -> list[_Item]:
    """Each name once, if a place is found where every head stays in the picture and in view; the first always."""
    height, width = ground.rgb.shape[:2]
    low, high = np.log(SCALES[0]), np.log(SCALES[1] if len(names) == 1 else 0.65 * SCALES[1])
    done: list[_Item] = []
    for name in names:
        animal = creature(rng, name)
        for attempt in range(20):
            scale = float(np.exp(low + (high - low) * rng.beta(1.8, 1.0))) * min(height, width)
            flip, tilt = bool(rng.random() < 0.5), float(rng.normal(0, 0.05))
            x, feet = float(rng.uniform(0.2, 0.8) * width), _feet(rng, ground, scale)
            cones = placed(animal.cones, scale, x, feet, flip, tilt)
            (circle,) = placed([_circle(animal.head)], scale, x, feet, flip, tilt)
            head = (circle.x0, circle.y0, circle.r0)
            if _inside(head, height, width) and (_all_seen(head, feet, x, scale, done) or (attempt == 19 and not done)):
                sprite = draw(rng, cones, animal.materials, scale, ground.light)
                done.append(_Item(feet, x, scale, sprite, name, head))
                break
    return done or _animals(rng, names, ground)


def _circle(head: tuple[float, float, float]) -> Cone:
    x, y, r = head
    return Cone(x, y, r, x, y, r, "head")


def _feet(rng: np.random.Generator, ground: Backdrop, scale: float) -> float:
    """The row to stand on: the bigger, the nearer, with some freedom."""
    height = ground.rgb.shape[0]
    nearness = np.clip(scale / (SCALES[1] * min(ground.rgb.shape[:2])) + rng.normal(0, 0.12), 0.12, 0.97)
    top = max(ground.horizon, 0.25 * height)
    return float(top + (height - top) * nearness)


def _inside(head: tuple[float, float, float], height: int, width: int) -> bool:
    x, y, r = head
    return r <= x <= width - r and r <= y <= height - 0.6 * r


def _all_seen(head: tuple[float, float, float], feet: float, x: float, scale: float, others: Sequence[_Item]) -> bool:
    """Whether no head is behind a nearer body, taking a body as the box above its feet, and no two share one place."""
    for other in others:
        assert other.head is not None
        mine = (feet, x, scale)
        theirs = (other.feet, other.centre, other.scale)
        front, behind = (mine, other.head) if feet > other.feet else (theirs, head)
        near_x = abs(behind[0] - front[1]) < 0.5 * front[2] + behind[2]
        near_y = front[0] - 0.62 * front[2] - behind[2] < behind[1] < front[0] + behind[2]
        heads = np.hypot(head[0] - other.head[0], head[1] - other.head[1]) < head[2] + other.head[2]
        if (near_x and near_y) or heads or abs(x - other.centre) < 0.3 * max(scale, other.scale):
            return False
    return True


def _clutter(rng: np.random.Generator, ground: Backdrop, animals: Sequence[_Item]) -> list[_Item]:
    """Plants, stones and distractors behind, beside and a few before the animals, never before a head."""
    items = []
    for _ in range(int(rng.integers(2, 6))):
        items += _put(rng, thing(rng, ground.place), ground, animals, rng.uniform(0.12, 0.5))
    if rng.random() < 0.6:
        items += _put(rng, distractor(rng), ground, animals, rng.uniform(0.25, 0.7))
    return items


def _put(rng: np.random.Generator, what: Thing, ground: Backdrop, animals: Sequence[_Item], size: float) -> list[_Item]:
    height, width = ground.rgb.shape[:2]
    cones, materials = what
    for _ in range(6):
        feet = float(rng.uniform(max(ground.horizon + 0.06 * height, 0.1 * height), height * 1.02))
        scale = size * min(height, width) * (0.3 + 0.9 * ground.near(feet))
        x = float(rng.uniform(0.0, 1.0) * width)
        before = [a for a in animals if a.feet < feet and abs(a.centre - x) < 0.5 * (a.scale + scale)]
        hides_head = any(
            a.head and abs(a.head[0] - x) < 0.5 * scale + a.head[2] and a.head[1] > feet - 0.9 * scale - a.head[2]
            for a in before
        )
        if hides_head or any(scale > 0.55 * a.scale for a in before):
            continue
        flipped = bool(rng.random() < 0.5)
        sprite = draw(rng, placed(cones, scale, x, feet, flipped, 0.0), materials, scale, ground.light)
        return [_Item(feet, x, scale, sprite, None)]
    return []


def _window(sprite: Sprite, height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
    """Where the sprite meets the image: slices of the image and of the sprite."""
    h, w = sprite.alpha.shape
    y0, y1 = max(sprite.top, 0), min(sprite.top + h, height)
    x0, x1 = max(sprite.left, 0), min(sprite.left + w, width)
    if y0 >= y1 or x0 >= x1:
        return None
    own = (slice(y0 - sprite.top, y1 - sprite.top), slice(x0 - sprite.left, x1 - sprite.left))
    return (slice(y0, y1), slice(x0, x1)), own


def _paste(canvas: Field, labels: NDArray[np.uint8], sprite: Sprite, value: int) -> None:
    windows = _window(sprite, *labels.shape)
    if windows is None:
        return
    there, own = windows
    alpha = sprite.alpha[own]
    canvas[there] += alpha[..., None] * (sprite.rgb[own] - canvas[there])
    labels[there][alpha > 0.5] = value


def _cast_shadow(canvas: Field, item: _Item, light: Light) -> None:
    """Darken the ground: the silhouette laid down away from the sun, and the dark where things touch the ground."""
    height, width = canvas.shape[:2]
    sprite, feet = item.sprite, item.feet
    shear = float(-light.direction[0] / -light.direction[1])
    squash = 0.22
    # sprite pixel (i, j) at height h = feet - top - j lies at (x + shear h / 2, feet - squash h) on the ground
    matrix = np.array(
        [
            [1, -shear / 2, sprite.left + shear / 2 * (feet - sprite.top)],
            [0, squash, feet - squash * (feet - sprite.top)],
        ],
        dtype=np.float32,
    )
    laid = cv2.warpAffine(sprite.alpha, matrix, (width, height), flags=cv2.INTER_LINEAR)
    laid = cv2.GaussianBlur(laid, (0, 0), 0.6 + 0.02 * item.scale)
    sunny = float(light.sun.mean() / (light.sun.mean() + light.ambient.mean()))
    ys = (np.arange(height, dtype=np.float32)[:, None] - feet) / (0.07 * item.scale + 1)
    xs = (np.arange(width, dtype=np.float32)[None] - item.centre) / (0.34 * item.scale + 1)
    touch = np.exp(-(xs * xs) - ys * ys)
    canvas *= (1 - 0.75 * sunny * laid)[..., None]
    canvas *= (1 - 0.35 * touch)[..., None]


def _sink(rng: np.random.Generator, canvas: Field, item: _Item, ground: Backdrop) -> None:
    """Grass, snow or water over the feet: a thin ragged strip of the empty place; the mask keeps what is under it."""
    height, width = canvas.shape[:2]
    depth = 0.05 * item.scale
    ragged = ground.place == "meadow"
    rough = fractal_noise(rng, (1, width), (1, 3.0 if ragged else 16.0), 2, 0.9)[0]
    line = item.feet - depth * (0.35 + (0.6 if ragged else 0.25) * rough)
    half = 0.6 * item.scale
    rows = np.arange(height, dtype=np.float32)[:, None]
    columns = np.abs(np.arange(width, dtype=np.float32) - item.centre) < half
    cover = (
        np.clip(rows - line[None], 0, 1)
        * (rows < max(item.feet + depth, item.sprite.top + len(item.sprite.alpha)))
        * columns[None]
    )
    shade = ground.rgb * np.float32(0.92)
    canvas += cover[..., None] * 0.85 * (shade - canvas)


def _camera(rng: np.random.Generator, canvas: Field) -> NDArray[np.uint8]:
    """Exposure, white balance, vignette, a little blur, grain."""
    height, width = canvas.shape[:2]
    ys = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    xs = np.linspace(-1, 1, width, dtype=np.float32)[None]
    vignette = 1 - rng.uniform(0.05, 0.25) * (xs * xs + ys * ys) / 2
    balance = np.exp(rng.normal(0, 0.03, 3)).astype(np.float32)
    exposed = canvas * (vignette[..., None] * balance * np.float32(np.exp(rng.normal(0.08, 0.10))))
    curved = np.clip(exposed, 0, 1) ** np.float32(rng.uniform(0.85, 1.05))
    soft = cv2.GaussianBlur(curved, (0, 0), rng.uniform(0.35, 0.7))
    grain = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(0.006, 0.016))
    return (np.clip(soft + grain, 0, 1) * 255 + 0.5).astype(np.uint8)
