"""Colours of classes in a report: bright on photographs, apart from each other. Files keep the VOC colours."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

IGNORE_COLOUR = (235, 235, 235)
_FIRST = ("ff5a5f", "2ec4b6", "ffbf3c", "6c8cff", "c77dff", "7bd148", "f77f00", "00b4d8", "ff8fab", "b08968")
_GOLDEN = 0.618033988749895  # successive multiples spread evenly over the circle of hues


def class_colours(indices: Sequence[int]) -> dict[int, tuple[int, int, int]]:
    """{class index: RGB}: ten chosen colours, then hues of the golden angle."""
    return {c: _colour(position) for position, c in enumerate(indices)}


def css(colour: tuple[int, int, int]) -> str:
    return f"#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"


def _colour(position: int) -> tuple[int, int, int]:
    if position < len(_FIRST):
        red, green, blue = bytes.fromhex(_FIRST[position])
        return red, green, blue
    hue = (position * _GOLDEN) % 1
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.6, 0.95))
    return red, green, blue
