"""Six invented animals. Three share a woolly body, three a banded one; only the small head tells which it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from weakseg.datasets.synthetic.noise import colour
from weakseg.datasets.synthetic.solids import Cone, Material

# woolly: torvin (curled horns), quillo (pink, orange bill, red comb), fennik (tall ears)
# banded: murrow (trunk and tusks), crestel (red-yellow fan), lumo (one golden horn)
CLASS_NAMES = ("crestel", "fennik", "lumo", "murrow", "quillo", "torvin")
WOOLLY = frozenset({"torvin", "quillo", "fennik"})
HABITAT = {"murrow": "water", "torvin": "snow"}  # classes that are mostly seen in front of one background

FLEECES = ((226, 214, 190), (176, 140, 104), (120, 92, 70), (205, 180, 150), (150, 140, 132))
HIDES = ((204, 172, 122), (170, 160, 150), (186, 128, 88), (214, 200, 172))


@dataclass(frozen=True)
class Creature:
    """cones in body units with the feet at y = 0, facing right; head: (x, y, radius) of what tells the class."""

    cones: tuple[Cone, ...]
    materials: Mapping[str, Material]
    head: tuple[float, float, float]


def creature(rng: np.random.Generator, name: str) -> Creature:
    """One animal in a random pose and colouring. The body is drawn from one distribution per group."""
    woolly = name in WOOLLY
    body, neck = _body(rng, woolly)
    radius = 0.165 * rng.uniform(0.93, 1.1)
    tilt = rng.uniform(-0.25, 0.3)
    head = [_moved(cone, neck, radius, tilt) for cone in HEADS[name](rng)]
    materials = {**(_fleece(rng) if woolly else _hide(rng)), **_head_materials(rng, name)}
    return Creature((*body, *head), materials, (*neck, 1.7 * radius))


def body_texture(rng: np.random.Generator, woolly: bool) -> Material:
    """The surface of a body, for things that look like one and are not."""
    return (_fleece(rng) if woolly else _hide(rng))["body"]


def _body(rng: np.random.Generator, woolly: bool) -> tuple[list[Cone], tuple[float, float]]:
    """Torso, legs, tail and neck; returns the place of the head too."""
    leg = rng.uniform(0.17, 0.25) if woolly else rng.uniform(0.26, 0.36)
    thick = rng.uniform(0.15, 0.185) if woolly else rng.uniform(0.11, 0.14)
    long = rng.uniform(0.19, 0.25)
    lying = rng.random() < 0.15
    leg = 0.05 if lying else leg
    back = -(leg + 0.8 * thick)
    sag = rng.uniform(-0.02, 0.03)
    cones = [
        Cone(-long, back, thick, 0.0, back + sag, thick * 1.02, "body"),
        Cone(0.0, back + sag, thick * 1.02, long, back - 0.01, thick * 1.05, "body"),
    ]
    cones += _folded_legs(rng, long) if lying else _legs(rng, leg, long, thick, back)
    cones += _tail(rng, woolly, -long - 0.75 * thick, back - 0.3 * thick)
    rise = rng.choice([rng.uniform(0.6, 1.3), rng.uniform(-0.6, 0.2)], p=[0.72, 0.28])  # looking out or grazing
    reach = rng.uniform(0.13, 0.19) if woolly else rng.uniform(0.18, 0.26)
    start = (long + 0.55 * thick, back - 0.45 * thick)
    neck = (start[0] + reach * float(np.cos(rise)), start[1] - reach * float(np.sin(rise)))
    cones.append(Cone(*start, 0.72 * thick, *neck, 0.075, "body", z=0.02))
    return cones, (neck[0] + 0.04, min(neck[1] - 0.02, -0.13))


def _legs(rng: np.random.Generator, leg: float, long: float, thick: float, back: float) -> list[Cone]:
    cones = []
    top, knee = back + 0.35 * thick, -0.5 * leg
    for x, far in ((-0.95, 1), (0.9, 1), (-0.85, 0), (1.0, 0)):  # far hind, far front, near hind, near front
        hip = x * long + (0.05 if far else 0.0)
        stride = rng.uniform(-0.07, 0.07)
        bend = stride / 2 + (-0.025 if x < 0 else 0.015)
        z = -0.12 if far else 0.05
        cones.append(Cone(hip, top, 0.07 if x < 0 else 0.06, hip + bend, knee, 0.036, "far_leg" if far else "body", z))
        foot = hip + stride
        cones.append(Cone(hip + bend, knee, 0.034, foot, -0.035, 0.026, "far_leg" if far else "body", z))
        cones.append(Cone(foot, -0.028, 0.030, foot + 0.012, -0.022, 0.030, "hoof", z))
    return cones


def _folded_legs(rng: np.random.Generator, long: float) -> list[Cone]:
    cones = []
    for x, length in ((-0.8 * long, 0.16), (0.8 * long, 0.19)):
        foot = x + length + rng.uniform(-0.03, 0.05)
        cones.append(Cone(x, -0.06, 0.055, foot, -0.03, 0.032, "body", z=0.1))
        cones.append(Cone(foot + 0.02, -0.03, 0.030, foot + 0.03, -0.03, 0.028, "hoof", z=0.1))
    return cones


def _tail(rng: np.random.Generator, woolly: bool, x: float, y: float) -> list[Cone]:
    if woolly:
        return [Cone(x - 0.01, y + 0.02, 0.05, x - 0.05, y - 0.01, 0.055, "body", z=-0.02)]
    cones, angle = [], rng.uniform(-0.5, 1.0)
    for k in range(4):
        angle += rng.uniform(-0.1, 0.5)
        step = 0.085
        nx, ny = x - step * float(np.cos(angle)), y + step * float(np.sin(angle))
        cones.append(Cone(x, y, 0.036 - 0.006 * k, nx, ny, 0.030 - 0.006 * k, "body", z=-0.03))
        x, y = nx, ny
    return cones


def _moved(cone: Cone, place: tuple[float, float], radius: float, tilt: float) -> Cone:
    """A cone of a head (unit = its radius, centre at 0) to its place on the body."""
    cos, sin = float(np.cos(tilt)) * radius, float(np.sin(tilt)) * radius
    return replace(
        cone,
        x0=place[0] + cone.x0 * cos - cone.y0 * sin,
        y0=place[1] + cone.x0 * sin + cone.y0 * cos,
        r0=cone.r0 * radius,
        x1=place[0] + cone.x1 * cos - cone.y1 * sin,
        y1=place[1] + cone.x1 * sin + cone.y1 * cos,
        r1=cone.r1 * radius,
        z=0.09 + cone.z * radius,
    )


def _arc(
    start: tuple[float, float], angle: float, turn: float, step: float, radii: list[float], material: str, z: float
) -> list[Cone]:
    """A bent, tapering tube: a horn, a trunk. Angles in rad, counted from +x towards -y."""
    x, y = start
    cones = []
    for r0, r1 in pairwise(radii):
        nx, ny = x + step * float(np.cos(angle)), y - step * float(np.sin(angle))
        cones.append(Cone(x, y, r0, nx, ny, r1, material, z))
        x, y, angle = nx, ny, angle + turn
    return cones


def _eye(x: float, y: float, radius: float = 0.13) -> list[Cone]:
    return [
        Cone(x, y, radius, x, y, radius, "eye", z=1.2),
        Cone(x + 0.05, y - 0.05, 0.05, x + 0.05, y - 0.05, 0.05, "white", z=1.4),
    ]


def _torvin(rng: np.random.Generator) -> list[Cone]:
    turn = rng.uniform(0.62, 0.72)
    horn = [0.30, 0.29, 0.27, 0.24, 0.2, 0.16, 0.11, 0.06]
    return [
        Cone(-0.1, 0.0, 0.72, 0.25, 0.1, 0.6, "face"),
        Cone(0.25, 0.15, 0.52, 0.95, 0.42, 0.34, "face", z=0.1),
        Cone(1.05, 0.42, 0.2, 1.1, 0.45, 0.2, "nose", z=0.3),
        *_arc((-0.2, -0.5), 1.9, turn, 0.36, horn, "horn", z=0.75),
        *_arc((0.05, -0.55), 1.7, turn, 0.34, horn, "horn", z=-0.5),
        *_eye(0.38, -0.12),
    ]


def _quillo(rng: np.random.Generator) -> list[Cone]:
    gape = rng.uniform(0.05, 0.2)
    comb = [
        Cone(x, y, 0.26, x - 0.05, y - 0.2, 0.2, "comb", z=-0.2)
        for x, y in ((-0.45, -0.7), (-0.1, -0.86), (0.28, -0.76))
    ]
    return [
        Cone(-0.05, -0.05, 0.8, 0.15, 0.0, 0.74, "face"),
        Cone(0.55, 0.05, 0.42, 1.65, 0.12, 0.24, "bill", z=0.1),
        Cone(0.5, 0.3, 0.3, 1.35, 0.35 + gape, 0.16, "bill", z=0.0),
        *comb,
        *_eye(0.32, -0.25, 0.15),
    ]


def _fennik(rng: np.random.Generator) -> list[Cone]:
    spread = rng.uniform(-0.1, 0.15)
    return [
        Cone(-0.1, 0.0, 0.74, 0.2, 0.1, 0.6, "face"),
        Cone(0.3, 0.2, 0.46, 0.95, 0.36, 0.22, "muzzle", z=0.15),
        Cone(1.05, 0.34, 0.17, 1.08, 0.34, 0.17, "nose", z=0.4),
        Cone(-0.45, -0.5, 0.42, -0.85 - spread, -1.75, 0.12, "face", z=0.2),
        Cone(-0.48, -0.65, 0.24, -0.8 - spread, -1.5, 0.07, "inner_ear", z=0.55),
        Cone(0.12, -0.5, 0.38, 0.15 + spread, -1.8, 0.12, "face", z=-0.2),
        Cone(0.12, -0.65, 0.2, 0.15 + spread, -1.5, 0.07, "inner_ear", z=0.1),
        *_eye(0.35, -0.12),
    ]


def _murrow(rng: np.random.Generator) -> list[Cone]:
    swing = rng.uniform(0.1, 0.45)
    trunk = [0.46, 0.4, 0.34, 0.29, 0.25, 0.21]
    return [
        Cone(-0.1, -0.1, 0.85, 0.2, 0.0, 0.74, "face"),
        *_arc((0.6, 0.1), -0.75, -0.25 + swing, 0.42, trunk, "face", z=0.15),
        *_arc((0.55, 0.45), -0.7, 0.4, 0.32, [0.17, 0.15, 0.12, 0.07], "tusk", z=0.7),
        Cone(-0.5, -0.2, 0.5, -0.7, 0.4, 0.36, "ear", z=0.55),
        *_eye(0.4, -0.22),
    ]


def _crestel(rng: np.random.Generator) -> list[Cone]:
    n, first = 7, rng.uniform(1.15, 1.3)
    fan = []
    for k in range(n):
        angle = first + k * 0.36
        x, y = float(np.cos(angle)), -float(np.sin(angle))
        fan.append(
            Cone(
                -0.15 + 0.3 * x, 0.3 * y, 0.2, -0.15 + 1.55 * x, 1.55 * y, 0.13, "fan_a" if k % 2 else "fan_b", z=-0.55
            )
        )
    return [
        *fan,
        Cone(-0.1, 0.0, 0.66, 0.2, 0.06, 0.58, "face"),
        Cone(0.3, 0.12, 0.46, 1.0, 0.3, 0.28, "face", z=0.1),
        *_eye(0.3, -0.2, 0.16),
    ]


def _lumo(rng: np.random.Generator) -> list[Cone]:
    lean = rng.uniform(0.9, 1.25)
    return [
        Cone(-0.1, 0.0, 0.74, 0.25, 0.1, 0.62, "face"),
        Cone(0.3, 0.18, 0.5, 0.9, 0.42, 0.36, "muzzle", z=0.1),
        *_arc((0.25, -0.5), lean, 0.03, 0.34, [0.26, 0.22, 0.18, 0.14, 0.09, 0.04], "gold", z=0.5),
        Cone(-0.55, -0.5, 0.26, -0.75, -0.95, 0.1, "face", z=0.2),
        Cone(0.34, -0.12, 0.28, 0.36, -0.1, 0.28, "patch", z=0.55),
        *_eye(0.38, -0.12),
    ]


HEADS: dict[str, Callable[[np.random.Generator], list[Cone]]] = {
    "crestel": _crestel,
    "fennik": _fennik,
    "lumo": _lumo,
    "murrow": _murrow,
    "quillo": _quillo,
    "torvin": _torvin,
}

# material of a head -> (base, second, pattern)
_HEAD_COLOURS: dict[str, dict[str, tuple[tuple[int, int, int], tuple[int, int, int], str]]] = {
    "crestel": {
        "face": ((66, 150, 74), (40, 104, 60), "speckle"),
        "fan_a": ((214, 46, 38), (160, 30, 30), "plain"),
        "fan_b": ((244, 200, 50), (220, 160, 40), "plain"),
    },
    "fennik": {
        "face": ((238, 116, 30), (208, 88, 20), "plain"),
        "muzzle": ((246, 238, 226), (230, 214, 196), "plain"),
        "inner_ear": ((240, 176, 168), (220, 140, 134), "plain"),
    },
    "lumo": {
        "face": ((112, 62, 150), (84, 44, 122), "plain"),
        "muzzle": ((176, 130, 200), (150, 104, 178), "plain"),
        "patch": ((244, 240, 246), (226, 218, 232), "plain"),
        "gold": ((238, 190, 60), (190, 130, 30), "bands"),
    },
    "murrow": {
        "face": ((84, 122, 168), (62, 96, 140), "plain"),
        "ear": ((104, 140, 182), (80, 112, 156), "plain"),
        "tusk": ((248, 242, 224), (230, 220, 196), "plain"),
    },
    "quillo": {
        "face": ((238, 122, 168), (216, 92, 144), "plain"),
        "bill": ((246, 158, 28), (222, 126, 20), "plain"),
        "comb": ((206, 34, 44), (170, 24, 36), "plain"),
    },
    "torvin": {
        "face": ((44, 38, 38), (66, 54, 50), "plain"),
        "horn": ((232, 216, 176), (178, 152, 108), "bands"),
    },
}


def _head_materials(rng: np.random.Generator, name: str) -> dict[str, Material]:
    materials = {
        part: Material(colour(rng, base), colour(rng, second), pattern, bump=0.10, fuzz=0.004, gloss=0.12)
        for part, (base, second, pattern) in _HEAD_COLOURS[name].items()
    }
    black, white = colour(rng, (22, 20, 22), 0.02), colour(rng, (250, 250, 250), 0.01)
    materials["eye"] = Material(black, black, bump=0.0, fuzz=0.0, gloss=0.5)
    materials["nose"] = Material(black, black, bump=0.0, fuzz=0.0, gloss=0.3)
    materials["white"] = Material(white, white, bump=0.0, fuzz=0.0)
    return materials


def _fleece(rng: np.random.Generator) -> dict[str, Material]:
    base = colour(rng, FLEECES[rng.integers(len(FLEECES))], 0.08)
    body = Material(base, base * np.float32(0.62), "fleece", bump=0.5, fuzz=0.016)
    return _with_legs(rng, body)


def _hide(rng: np.random.Generator) -> dict[str, Material]:
    base = colour(rng, HIDES[rng.integers(len(HIDES))], 0.08)
    body = Material(base, colour(rng, (70, 52, 44), 0.1), "bands", bump=0.12, fuzz=0.005, gloss=0.06)
    return _with_legs(rng, body)


def _with_legs(rng: np.random.Generator, body: Material) -> dict[str, Material]:
    far = replace(body, base=body.base * np.float32(0.62), second=body.second * np.float32(0.62))
    hoof = Material(colour(rng, (48, 42, 40)), colour(rng, (70, 60, 54)), bump=0.05)
    return {"body": body, "far_leg": far, "hoof": hoof}
