"""Things that are no class: plants and stones, and distractors that wear a body's coat or a head's colour."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from weakseg.datasets.synthetic.creatures import body_texture
from weakseg.datasets.synthetic.noise import colour
from weakseg.datasets.synthetic.solids import Cone, Material

Thing = tuple[list[Cone], Mapping[str, Material]]  # body units: about 1 wide, feet at y = 0


def thing(rng: np.random.Generator, place: str) -> Thing:
    """Something that grows or lies in this place."""
    kinds = _KINDS[place]
    return kinds[rng.integers(len(kinds))](rng)


def distractor(rng: np.random.Generator) -> Thing:
    """Something that only looks like a part of an animal."""
    kinds: tuple[Callable[[np.random.Generator], Thing], ...] = (_bale, _bale, _log, _log, _ball, _blossoms)
    return kinds[rng.integers(len(kinds))](rng)


def _bush(rng: np.random.Generator) -> Thing:
    greens = ((74, 108, 48), (98, 122, 62), (60, 88, 56), (126, 128, 70))
    base = colour(rng, greens[rng.integers(len(greens))], 0.1)
    cones = []
    for _ in range(int(rng.integers(7, 12))):
        r = rng.uniform(0.12, 0.22)
        x, y = rng.uniform(-0.34, 0.34), -rng.uniform(0.6 * r, 0.5)
        cones.append(Cone(x, y, r, x, y, r, "leaves", z=rng.uniform(-0.1, 0.1)))
    return cones, {"leaves": Material(base * np.float32(0.62), base * np.float32(1.3), "leaf", bump=0.35, fuzz=0.025)}


def _rock(rng: np.random.Generator) -> Thing:
    base = colour(rng, ((136, 132, 126), (112, 104, 96), (150, 140, 124))[rng.integers(3)], 0.1)
    cones = []
    for _ in range(int(rng.integers(1, 4))):
        r, x = rng.uniform(0.18, 0.34), rng.uniform(-0.25, 0.25)
        cones.append(Cone(x - 0.12, -0.45 * r, r, x + 0.12, -0.5 * r, r * 0.9, "stone", z=rng.uniform(-0.1, 0.1)))
    return cones, {"stone": Material(base, base * np.float32(0.75), "plain", bump=0.07, fuzz=0.02)}


def _stump(rng: np.random.Generator) -> Thing:
    base, ring = colour(rng, (96, 72, 52), 0.1), colour(rng, (190, 156, 112), 0.08)
    tall = rng.uniform(0.25, 0.55)
    cones = [
        Cone(0.0, 0.0, 0.24, 0.0, -tall, 0.19, "bark"),
        *(Cone(0.15 * s, -0.06, 0.12, 0.34 * s, 0.0, 0.06, "bark", z=0.03) for s in (-1, 1)),
        Cone(-0.1, -tall - 0.14, 0.06, 0.1, -tall - 0.14, 0.06, "wood", z=0.2),
    ]
    bark = Material(base, base * np.float32(0.55), "leaf", bump=0.5, fuzz=0.012)
    return cones, {"bark": bark, "wood": Material(ring, ring * np.float32(0.8), bump=0.05, fuzz=0.004)}


def _mushrooms(rng: np.random.Generator) -> Thing:
    caps = ((178, 120, 76), (196, 60, 48), (220, 196, 150))
    cap, stem = colour(rng, caps[rng.integers(3)], 0.08), colour(rng, (232, 222, 200), 0.05)
    cones = []
    for _ in range(int(rng.integers(2, 4))):
        x, tall, wide = rng.uniform(-0.35, 0.35), rng.uniform(0.25, 0.6), rng.uniform(0.10, 0.2)
        z = rng.uniform(-0.2, 0.2)
        cones.append(Cone(x, -0.03, 0.07, x, -tall, 0.05, "stem", z=z))
        cones.append(Cone(x - wide, -tall, 0.09, x, -tall - 0.08, 0.13, "cap", z=z + 0.05))
        cones.append(Cone(x, -tall - 0.08, 0.13, x + wide, -tall, 0.09, "cap", z=z + 0.05))
    speckled = Material(cap, colour(rng, (240, 234, 224), 0.03), "speckle", bump=0.05)
    return cones, {"stem": Material(stem, stem * np.float32(0.8), bump=0.05), "cap": speckled}


def _reeds(rng: np.random.Generator) -> Thing:
    base = colour(rng, (128, 132, 66), 0.12)
    cones = []
    for _ in range(int(rng.integers(9, 16))):
        x, tall, lean = rng.uniform(-0.3, 0.3), rng.uniform(0.5, 1.2), rng.uniform(-0.2, 0.2)
        cones.append(Cone(x, 0.0, 0.018, x + lean, -tall, 0.008, "blade", z=rng.uniform(-0.1, 0.1)))
        if rng.random() < 0.3:
            cones.append(Cone(x + lean, -tall, 0.03, x + 1.1 * lean, -tall - 0.14, 0.026, "seed"))
    seed = colour(rng, (98, 66, 44), 0.1)
    return cones, {"blade": Material(base, base * np.float32(0.7), bump=0.05), "seed": Material(seed, seed, bump=0.3)}


def _post(rng: np.random.Generator) -> Thing:
    base = colour(rng, (146, 130, 112), 0.12)
    cones = [
        Cone(x, 0.0, 0.055, x + rng.uniform(-0.03, 0.03), -rng.uniform(0.7, 0.95), 0.05, "wood") for x in (-0.4, 0.4)
    ]
    cones += [Cone(-0.5, y, 0.035, 0.5, y + rng.uniform(-0.05, 0.05), 0.03, "wood", z=0.06) for y in (-0.3, -0.62)]
    return cones, {"wood": Material(base, base * np.float32(0.6), "leaf", bump=0.2, fuzz=0.005)}


def _bale(rng: np.random.Generator) -> Thing:
    """A woolly heap without a head."""
    cones = []
    for _ in range(int(rng.integers(1, 4))):
        x, r = rng.uniform(-0.2, 0.2), rng.uniform(0.16, 0.24)
        cones.append(Cone(x - 0.1, -0.85 * r, r, x + 0.12, -0.9 * r, r, "body", z=rng.uniform(-0.05, 0.05)))
    return cones, {"body": body_texture(rng, woolly=True)}


def _log(rng: np.random.Generator) -> Thing:
    """A banded log without legs."""
    r, lean = rng.uniform(0.09, 0.14), rng.uniform(-0.25, 0.25)
    y = -r + min(0.0, lean)
    return [Cone(-0.42, y, r, 0.42, y - lean * 0.5, r * 0.9, "body")], {"body": body_texture(rng, woolly=False)}


def _ball(rng: np.random.Generator) -> Thing:
    """A ball in the colour of some head."""
    colours = ((226, 122, 46), (112, 62, 150), (84, 122, 168), (206, 34, 44), (66, 150, 74), (238, 122, 168))
    i, j = rng.choice(len(colours), 2, replace=False)
    r = rng.uniform(0.11, 0.19)
    skin = Material(
        colour(rng, colours[i]), colour(rng, colours[j]), ("plain", "bands")[rng.integers(2)], 0.03, 0.002, 0.3
    )
    return [Cone(-0.01, -r, r, 0.01, -r, r, "skin")], {"skin": skin}


def _blossoms(rng: np.random.Generator) -> Thing:
    """Flowers in the colours of heads."""
    colours = ((214, 46, 38), (244, 200, 50), (150, 90, 190), (246, 158, 28), (240, 236, 240))
    petal, stem = colour(rng, colours[rng.integers(len(colours))]), colour(rng, (84, 118, 52), 0.1)
    cones = []
    for _ in range(int(rng.integers(4, 8))):
        x, tall, z = rng.uniform(-0.3, 0.3), rng.uniform(0.25, 0.6), rng.uniform(-0.2, 0.2)
        top = x + rng.uniform(-0.08, 0.08)
        cones.append(Cone(x, 0.0, 0.014, top, -tall, 0.012, "stem", z=z))
        cones.append(Cone(top - 0.03, -tall, 0.05, top + 0.03, -tall - 0.01, 0.05, "petal", z=z + 0.03))
    return cones, {
        "stem": Material(stem, stem),
        "petal": Material(petal, petal * np.float32(0.8), bump=0.2, fuzz=0.012),
    }


_KINDS: dict[str, tuple[Callable[[np.random.Generator], Thing], ...]] = {
    "meadow": (_bush, _bush, _rock, _post, _blossoms),
    "water": (_reeds, _reeds, _reeds, _rock),
    "snow": (_bush, _rock, _stump, _post),
    "sand": (_rock, _reeds, _stump),
    "litter": (_mushrooms, _stump, _bush, _rock),
    "gravel": (_rock, _rock, _bush, _post),
}
