"""Panels over one axis of time as a standalone SVG: lines, stacked areas, marks, and what happened when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from weakseg.report.charts import nice_ticks, number

COLOURS = ("#0f7c82", "#e4572e", "#3b5bdb", "#b7791f", "#8a4fc7", "#4f8a10", "#c2255c", "#5c7080")
LEFT, RIGHT, TOP, GAP, BOTTOM = 52, 12, 26, 34, 30
HEAD = 18


@dataclass(frozen=True)
class Series:
    """colour: an index of COLOURS. dashed: a limit, beside what is measured."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """stacked: areas on top of each other; all have the same x. marks: points at the foot, such as failures."""

    title: str
    series: Sequence[Series]
    stacked: bool = False
    marks: Sequence[float] = ()


@dataclass(frozen=True)
class Column:
    """Panels below each other. events: (when, what), a line through all of them."""

    title: str
    panels: Sequence[Panel]
    x: str
    events: Sequence[tuple[float, str]] = field(default_factory=tuple)


def svg(columns: Sequence[Column], width: int = 420, height: int = 150) -> str:
    """width, height: of one panel, with its margins at the sides."""
    n_rows = max(len(column.panels) for column in columns)
    room = 12 * max(len(column.events) for column in columns)
    full = (width * len(columns), HEAD + room + n_rows * (height + GAP) + BOTTOM)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full[0]} {full[1]}" '
        f'font-family="system-ui, sans-serif" font-size="11" fill="#333">'
        f'<rect width="100%" height="100%" fill="#fff"/>'
    ]
    for i, column in enumerate(columns):
        parts.append(f'<g transform="translate({i * width} 0)">{_column(column, width, height, room)}</g>')
    return "".join(parts) + "</svg>\n"


def _column(column: Column, width: int, height: int, room: int) -> str:
    xs = [x for panel in column.panels for one in panel.series for x in one.x]
    x_range = (min(xs), max(xs))
    x_ticks = [tick for tick in nice_ticks(*x_range, about=6) if x_range[0] <= tick <= x_range[1]]

    def place(x: float) -> float:
        return round(LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (width - LEFT - RIGHT), 1)

    top, foot = HEAD + room, HEAD + room + len(column.panels) * (height + GAP)
    parts = [f'<text x="{LEFT}" y="13" font-size="13" font-weight="600">{escape(column.title)}</text>']
    for row, (when, what) in enumerate(column.events):
        x, y = place(when), HEAD + 12 * row + 9
        anchor = "end" if x > width / 2 else "start"
        shift = -4 if anchor == "end" else 4
        parts.append(
            f'<line x1="{x}" x2="{x}" y1="{y - 7}" y2="{foot - GAP + TOP - 4}" stroke="#999" stroke-dasharray="2 3"/>'
            f'<text x="{x + shift}" y="{y}" text-anchor="{anchor}" fill="#666">{escape(what)}</text>'
        )
    for row, panel in enumerate(column.panels):
        parts.append(
            f'<g transform="translate(0 {top + row * (height + GAP)})">{_panel(panel, place, width, height)}</g>'
        )
    parts += [f'<text x="{place(tick)}" y="{foot + 8}" text-anchor="middle">{number(tick)}</text>' for tick in x_ticks]
    parts.append(f'<text x="{width - RIGHT}" y="{foot + 22}" text-anchor="end" fill="#666">{escape(column.x)}</text>')
    return "".join(parts)


def _panel(panel: Panel, place: Callable[[float], float], width: int, height: int) -> str:
    layers = (
        _stacked(panel.series) if panel.stacked else [(one, [0.0] * len(one.x), list(one.y)) for one in panel.series]
    )
    top = nice_ticks(0.0, max((max(upper, default=0) for _, _, upper in layers), default=1) or 1, about=4)

    def level(y: float) -> float:
        return round(TOP + (1 - y / top[-1]) * (height - TOP), 1)

    parts = [
        f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{level(tick)}" y2="{level(tick)}" stroke="#e3e7ec"/>'
        f'<text x="{LEFT - 6}" y="{level(tick) + 4}" text-anchor="end">{number(tick)}</text>'
        for tick in top
    ]
    for one, lower, upper in layers:
        colour = COLOURS[one.colour % len(COLOURS)]
        line = " ".join(f"{place(x)},{level(y)}" for x, y in zip(one.x, upper, strict=True))
        if panel.stacked:
            back = " ".join(f"{place(x)},{level(y)}" for x, y in zip(reversed(one.x), reversed(lower), strict=True))
            parts.append(f'<polygon points="{line} {back}" fill="{colour}" stroke="#fff" stroke-width=".5"/>')
        else:
            dash = ' stroke-dasharray="5 4"' if one.dashed else ""
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.4"{dash}/>')
    parts += [f'<circle cx="{place(x)}" cy="{level(0)}" r="3" fill="#d00"/>' for x in panel.marks]
    parts.append(f'<text x="{LEFT}" y="14" font-weight="600">{escape(panel.title)}</text>')
    x = LEFT + 7 * len(panel.title) + 14
    for name, colour in {one.name: one.colour for one in panel.series if one.name}.items():
        parts.append(f'<rect x="{x}" y="6" width="9" height="9" rx="2" fill="{COLOURS[colour % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 13}" y="14">{escape(name)}</text>')
        x += 24 + 6 * len(name)
    return "".join(parts)


def _stacked(series: Sequence[Series]) -> list[tuple[Series, list[float], list[float]]]:
    """(series, its lower edge, its upper edge)."""
    layers, lower = [], [0.0] * len(series[0].x)
    for one in series:
        upper = [a + b for a, b in zip(lower, one.y, strict=True)]
        layers.append((one, lower, upper))
        lower = upper
    return layers
