"""Curves as SVG: drawn by the page's own style, so that they follow dark and light, and change in place as points come."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 10, 26
_NUM_TICKS = 5
_MOST_DOTS = 60
"""Points of a curve that get a dot of their own, which tells its value to a mouse."""


@dataclass(frozen=True)
class Curve:
    """One line of a picture; `look` is its class in style.css: c0 to c7, or `faint`."""

    name: str
    points: Sequence[tuple[float, float]]
    look: str


def picture(title: str, curves: Sequence[Curve], nothing: str) -> str:
    """A figure with a legend; `nothing` is said where there is no point yet. Points that are not finite are left out."""
    drawn = [
        Curve(one.name, kept, one.look) for one in curves if (kept := [point for point in one.points if all(map(math.isfinite, point))])
    ]
    head = f"<figcaption>{html.escape(title)}</figcaption>"
    if not drawn:
        return f'<figure class="curves">{head}<p class="none">{html.escape(nothing)}</p></figure>'
    (left, right), (low, high) = (_range([point[axis] for one in drawn for point in one.points]) for axis in (0, 1))
    xs, ys = ticks(left, right), ticks(low, high)
    left, right, low, high = min(left, xs[0]), max(right, xs[-1]), min(low, ys[0]), max(high, ys[-1])

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x = _LEFT + (point[0] - left) / (right - left) * (WIDTH - _LEFT - _RIGHT)
        y = HEIGHT - _BOTTOM - (point[1] - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    grid = [_across(at((left, y))[1], y) for y in ys] + [_down(at((x, low))[0], x) for x in xs]
    lines = [_line(one, [at(point) for point in one.points]) for one in drawn]
    legend = "".join(f'<li class="{one.look}">{html.escape(one.name)}: {one.points[-1][1]:.4g}</li>' for one in drawn)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(grid + lines)}</svg>'
    return f'<figure class="curves">{head}{svg}<ul class="legend">{legend}</ul></figure>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) or abs(high) or 1.0
    return (low, high) if high > low else (low - room / 2, high + room / 2)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers that cover a range: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [number * step for number in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _across(y: float, value: float) -> str:
    return f'<path class="grid" d="M{_LEFT} {y}H{WIDTH - _RIGHT}"/><text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.4g}</text>'


def _down(x: float, value: float) -> str:
    return f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{value:.5g}</text>'


def _line(curve: Curve, places: Sequence[tuple[float, float]]) -> str:
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    every = -(-len(places) // _MOST_DOTS)
    told = zip(places[::every], curve.points[::every], strict=True)
    dots = "".join(
        f'<circle cx="{x}" cy="{y}" r="3"><title>{html.escape(curve.name)}, {step:g}: {value:.5g}</title></circle>'
        for (x, y), (step, value) in told
    )
    alone = " alone" if len(places) == 1 else ""  # which no line shows
    return f'<g class="{curve.look}{alone}"><path d="{path}"/>{dots}</g>'
