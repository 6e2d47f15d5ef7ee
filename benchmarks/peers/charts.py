"""Charts of servers as a standalone SVG: x are steps with a name each, every curve has its name at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from weakseg.report.charts import nice_ticks, number

WIDTH, HEIGHT = 380, 260
LEFT, RIGHT, TOP, BOTTOM = 48, 82, 40, 40
LINE = 12  # height of a name
OURS, COLOURS = "#d6336c", ("#1c7ed6", "#2b8a3e", "#e67700", "#6741d9", "#0b7285", "#868e96", "#a61e4d", "#5c940d")


@dataclass(frozen=True)
class Curve:
    """y: one for each step; None where there is none."""

    name: str
    y: Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """log: the y axis goes by powers of ten, else from 0. The first curve is ours."""

    title: str
    x: str
    y: str
    steps: Sequence[str]
    curves: Sequence[Curve]
    log: bool = False


def svg(charts: Sequence[Chart]) -> str:
    """Side by side."""
    body = "".join(f'<g transform="translate({i * WIDTH} 0)">{_chart(chart)}</g>' for i, chart in enumerate(charts))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(charts)} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="11" fill="#333">'
        f'<rect width="100%" height="100%" fill="#fff"/>{body}</svg>\n'
    )


def _chart(chart: Chart) -> str:
    values = [y for curve in chart.curves for y in curve.y if y is not None and (y > 0 or not chart.log)]
    ticks, place = _logarithmic(values) if chart.log else _linear(values)
    wide = (WIDTH - LEFT - RIGHT) / max(1, len(chart.steps) - 1)
    xs = [round(LEFT + i * wide, 1) for i in range(len(chart.steps))]
    parts = [f'<text x="{LEFT}" y="15" font-size="13" font-weight="600">{escape(chart.title)}</text>']
    parts.append(f'<text x="{LEFT}" y="31" fill="#666">{escape(chart.y)}</text>')
    parts += [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place(tick)}" y2="{place(tick)}" stroke="#e3e7ec"/>'
        f'<text x="{LEFT - 6}" y="{place(tick) + 4}" text-anchor="end">{number(tick)}</text>'
        for tick in ticks
    ]
    parts += [
        f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(step)}</text>'
        for x, step in zip(xs, chart.steps, strict=True)
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle" fill="#666">{escape(chart.x)}</text>')
    ends = []
    for i, curve in enumerate(chart.curves):
        points = [(x, place(y)) for x, y in zip(xs, curve.y, strict=True) if y is not None and (y > 0 or not chart.log)]
        if points:
            colour, width = (OURS, 2.6) if i == 0 else (COLOURS[(i - 1) % len(COLOURS)], 1.4)
            line = " ".join(f"{x},{y}" for x, y in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
            parts += [f'<circle cx="{x}" cy="{y}" r="{width}" fill="{colour}"/>' for x, y in points]
            ends.append((points[-1][1], curve.name, colour))
    for y, name, colour in _apart(ends):
        parts.append(f'<text x="{WIDTH - RIGHT + 7}" y="{y + 4}" fill="{colour}">{escape(name)}</text>')
    return "".join(parts)


def _linear(values: Sequence[float]) -> tuple[list[float], Callable[[float], float]]:
    ticks = nice_ticks(0.0, max(values))
    return ticks, lambda y: round(HEIGHT - BOTTOM - y / ticks[-1] * (HEIGHT - TOP - BOTTOM), 1)


def _logarithmic(values: Sequence[float]) -> tuple[list[float], Callable[[float], float]]:
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    height = (HEIGHT - TOP - BOTTOM) / (high - low)
    return [10.0**e for e in range(low, high + 1)], lambda y: round(HEIGHT - BOTTOM - (math.log10(y) - low) * height, 1)


def _apart(ends: Sequence[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """From top to bottom, none over another and none below the axis while there is room above."""
    order = sorted(ends)
    ys: list[float] = []
    for y, *_ in order:
        ys.append(max(y, ys[-1] + LINE) if ys else y)
    lowest = HEIGHT - BOTTOM - LINE * (len(ys) - 1)
    ys = [min(y, max(lowest, TOP) + LINE * i) for i, y in enumerate(ys)]
    return [(y, name, colour) for y, (_, name, colour) in zip(ys, order, strict=True)]
