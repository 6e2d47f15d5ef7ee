"""Charts as inline SVG and HTML: lines with marks, shares of a whole, bars. Colours come from the style sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 32, 44  # margins of the plot inside the picture


@dataclass(frozen=True)
class Series:
    """One line. style: a class of the style sheet, s1 to s6."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "s1"


@dataclass(frozen=True)
class Mark:
    """A point that matters: a dot with a word. style: `chosen` or `oracle`."""

    name: str
    x: float
    y: float
    style: str


def line_chart(
    series: Sequence[Series], *, x: str, y: str, title: str, marks: Sequence[Mark] = (), percent: bool = False
) -> str:
    """Lines over a common x. percent: y values are fractions, shown times 100.

    The values travel in `data-series`, for the pointer; without scripts the chart is complete all the same.
    """
    series = [one for one in series if len(one.x)]
    if not series:
        return ""
    x_ticks = nice_ticks(min(min(s.x) for s in series), max(max(s.x) for s in series))
    values = [v for s in series for v in s.y] + [mark.y for mark in marks]
    y_ticks = nice_ticks(min(0.0, *values), max(values))
    frame = _Frame((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]))
    factor = 100 if percent else 1
    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{frame.y(v)}" y2="{frame.y(v)}"/>' for v in y_ticks
    ]
    parts += [
        f'<text class="tick end" x="{LEFT - 8}" y="{frame.y(v)}" dy=".32em">{number(v * factor)}</text>'
        for v in y_ticks
    ]
    parts += [
        f'<text class="tick middle" x="{frame.x(v)}" y="{HEIGHT - BOTTOM + 18}">{number(v)}</text>' for v in x_ticks
    ]
    parts.append(f'<text class="axis middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">{escape(x)}</text>')
    parts.append(f'<text class="axis" x="4" y="13">{escape(y)}</text>')
    for one in series:
        points = " ".join(f"{frame.x(a)},{frame.y(b)}" for a, b in zip(one.x, one.y, strict=True))
        parts.append(f'<polyline class="line {one.style}" points="{points}"/>')
    parts += [_mark(mark, frame, factor) for mark in marks]
    data = [
        {
            "name": s.name,
            "style": s.style,
            "points": [[frame.x(a), frame.y(b), a, b * factor] for a, b in zip(s.x, s.y, strict=True)],
        }
        for s in series
    ]
    legend = "".join(f'<li><i class="swatch {s.style}"></i>{escape(s.name)}</li>' for s in series)
    unique = {mark.name: mark for mark in marks}.values()
    legend += "".join(f'<li><i class="dot {m.style}"></i>{escape(m.name)}</li>' for m in unique)
    return (
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-x="{escape(x)}" data-series="{escape(json.dumps(data))}">{"".join(parts)}</svg>'
        f'<ul class="key">{legend}</ul></figure>'
    )


def shares(rows: Sequence[tuple[str, str, Sequence[tuple[str, float, str]]]]) -> str:
    """Rows of a whole split into parts.

    Args:
        rows: (name, CSS colour of its swatch, parts); a part is (name, fraction, style class). Empty parts = no value.
    """
    return f'<div class="shares">{"".join(_share(*row) for row in rows)}</div>'


def _share(name: str, colour: str, parts: Sequence[tuple[str, float, str]]) -> str:
    said = ", ".join(f"{part} {100 * share:.1f} %" for part, share, _ in parts) or "not scored"
    spans = "".join(
        f'<span class="{style}" style="flex-basis:{100 * share:.2f}%" title="{escape(part)} {100 * share:.1f} %">'
        "</span>"
        for part, share, style in parts
    )
    value = f"{100 * parts[0][1]:.1f}" if parts else "–"
    return (
        f'<div class="share"><span class="name"><i class="swatch" style="background:{colour}"></i>{escape(name)}</span>'
        f'<span class="track" role="img" aria-label="{escape(f"{name}: {said}")}">{spans}</span><b>{value}</b></div>'
    )


def bars(rows: Sequence[tuple[str, float, str, str]]) -> str:
    """(name, value, what it says, what it says beside) as bars relative to the largest value."""
    largest = max((value for _, value, _, _ in rows), default=0) or 1
    return (
        '<div class="bars">'
        + "".join(
            f'<div class="bar"><span class="name">{escape(name)}</span>'
            f'<span class="track"><span style="width:{100 * value / largest:.2f}%"></span></span>'
            f"<b>{escape(said)}</b><small>{escape(beside)}</small></div>"
            for name, value, said, beside in rows
        )
        + "</div>"
    )


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, evenly spaced by 1, 2 or 5 times a power of ten, that reach from below `low` to above `high`."""
    if not high > low:
        high = low + 1
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """Short: 1,200 · 0.35 · 2e-05."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.3g}"


@dataclass(frozen=True)
class _Frame:
    """From values to places in the picture."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)


def _mark(mark: Mark, frame: _Frame, factor: float) -> str:
    x, y = frame.x(mark.x), frame.y(mark.y)
    said = f"{mark.name}: {number(mark.x)}, {mark.y * factor:.1f}"
    return (
        f'<line class="drop {mark.style}" x1="{x}" x2="{x}" y1="{y}" y2="{HEIGHT - BOTTOM}"/>'
        f'<circle class="mark {mark.style}" cx="{x}" cy="{y}" r="5"><title>{escape(said)}</title></circle>'
    )
