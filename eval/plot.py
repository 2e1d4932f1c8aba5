"""Accuracy against size as an SVG drawing: points, error bars, the Pareto front. No library, no script, no outside
file.

Bytes run along a logarithmic axis. The quality axis is linear, logarithmic (KL divergence) or, where changes spread
over decades and cross zero, symmetric-logarithmic: linear within the smallest change worth telling apart and
logarithmic beyond. Colours are CSS classes of the page, so that the drawing follows light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

WIDTH, HEIGHT = 960, 460
LEFT, RIGHT, TOP, BOTTOM = 84, 28, 26, 58
Scale = Literal["linear", "log", "symlog"]


@dataclass(frozen=True)
class Point:
    """One model: bytes, value ± se, its name, lines for the tooltip, and whether it is the baseline."""

    name: str
    size: float
    value: float
    se: float | None
    lines: tuple[str, ...] = ()
    baseline: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing to make. label: of the quality axis; show: how its ticks read; higher: whether more is better; against:
    what a point's ``size`` is.
    """

    key: str
    title: str
    label: str
    points: tuple[Point, ...]
    show: Callable[[float], str]
    higher: bool
    scale: Scale = "linear"
    reference: float | None = None
    against: str = "file size"


def pareto(points: Sequence[Point], higher: bool) -> list[Point]:
    """The points no other beats in both size and quality, by size."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.size, -p.value if higher else p.value)):
        if not front or (point.value > front[-1].value if higher else point.value < front[-1].value):
            front.append(point)
    return front


def scale_for(values: Sequence[float]) -> Scale:
    """symlog where the largest change dwarfs the typical one, else linear."""
    sizes = sorted(abs(value) for value in values if value)
    return "symlog" if len(sizes) >= 3 and sizes[-1] > 12 * sizes[len(sizes) // 2] else "linear"


class _Axis:
    """Maps values to 0..1 with ticks that are round numbers."""

    def __init__(self, low: float, high: float, scale: Scale, threshold: float = 1.0) -> None:
        self.scale, self.threshold = scale, threshold
        a, b = self._forward(low), self._forward(high)
        margin = 0.09 * (b - a) or (abs(a) * 0.1 or 1.0)
        self.low, self.high = a - margin, b + margin

    def _forward(self, value: float) -> float:
        if self.scale == "log":
            return math.log10(value)
        return math.asinh(value / self.threshold) if self.scale == "symlog" else value

    def at(self, value: float) -> float:
        return (self._forward(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if self.scale == "linear":
            return round_ticks(self.low, self.high)
        if self.scale == "log":
            steps = [d * 10.0**e for e in range(math.floor(self.low), math.ceil(self.high) + 1) for d in (1, 2, 5)]
            inside = [step for step in steps if self.low <= math.log10(step) <= self.high]
            decades = [step for step in inside if math.isclose(math.log10(step), round(math.log10(step)))]
            return inside if len(inside) <= 8 else decades or inside[:: len(inside) // 6]
        small = math.ceil(math.log10(self.threshold))
        decades = [10.0**e for e in range(small, small + 9)]
        steps = sorted([0.0, *decades, *(-step for step in decades), *(3 * step for step in decades)])
        inside = [step for step in steps if self.low <= self._forward(step) <= self.high]
        apart: list[float] = []
        for step in sorted(inside, key=lambda v: (v != 0, f"{v:e}"[0] == "3", -abs(v))):
            if all(abs(self.at(step) - self.at(other)) > 0.055 for other in apart):
                apart.append(step)
        return sorted(apart)


def round_ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """About ``wanted`` round numbers from ``low`` to ``high``, which must be larger."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step)
    return [step * k for k in range(first, math.floor(high / step) + 1)]


def svg(chart: Chart, size_label: Callable[[float], str]) -> str:
    """The drawing as one <svg> element; raises ValueError for a chart without points."""
    if not chart.points:
        raise ValueError("a chart needs points")
    spans = [v for p in chart.points for v in (p.value - (p.se or 0), p.value + (p.se or 0))]
    if chart.scale == "log":
        spans = [v for v in spans if v > 0]
    if chart.reference is not None:
        spans.append(chart.reference)
    nonzero = sorted(abs(p.value) for p in chart.points if p.value)
    # the small values are drawn linearly, but never on more decades than there are ticks for
    threshold = max(nonzero[len(nonzero) // 4], nonzero[-1] * 1e-9) if nonzero else 1.0
    y = _Axis(min(spans), max(spans), chart.scale, threshold)
    x = _Axis(min(p.size for p in chart.points) * 0.93, max(p.size for p in chart.points) * 1.07, "log")

    def px(value: float) -> float:
        return LEFT + x.at(value) * (WIDTH - LEFT - RIGHT)

    def py(value: float) -> float:
        return HEIGHT - BOTTOM - y.at(value) * (HEIGHT - TOP - BOTTOM)

    right, bottom, middle = WIDTH - RIGHT, HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    alt = escape(f"{chart.title} against {chart.against}")
    out = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{alt}">']
    for tick in y.ticks():
        out.append(line("grid", LEFT, py(tick), right, py(tick)))
        out.append(text("tick", LEFT - 10, py(tick) + 4, "end", chart.show(tick)))
    for tick in _size_ticks(x):
        out.append(line("notch", px(tick), bottom, px(tick), bottom + 5))
        out.append(text("tick", px(tick), bottom + 20, "middle", size_label(tick)))
    out.append(line("axis", LEFT, bottom, right, bottom))
    out.append(text("label", (LEFT + right) / 2, HEIGHT - 12, "middle", f"{chart.against} (log scale)"))
    turn = f' transform="translate(18 {middle:.1f}) rotate(-90)"'
    out.append(text("label", 0, 0, "middle", chart.label, turn))
    if chart.higher:
        out.append(text("hint", LEFT + 8, TOP + 6, "start", "better \u2196"))
    else:
        out.append(text("hint", LEFT + 8, bottom - 10, "start", "better \u2199"))
    if chart.reference is not None:
        out.append(line("reference", LEFT, py(chart.reference), right, py(chart.reference)))
    front = pareto(chart.points, chart.higher)
    corners = [(px(p.size), py(p.value)) for p in front]
    out.append(f'<path class="front" d="{_steps(corners)}"/>')
    boxes = [(px(p.size) - 7, py(p.value) - 7, px(p.size) + 7, py(p.value) + 7) for p in chart.points]
    for (x1, y1), (x2, y2) in pairwise(corners):  # labels keep off the front where they can
        boxes += [(x1, y1 - 1, x2, y1 + 1), (x2 - 1, min(y1, y2), x2 + 1, max(y1, y2))]
    for point in chart.points:
        out += _mark(point, px(point.size), py, point in front, chart)
    for point in sorted(chart.points, key=lambda p: p not in front):
        out.append(_label(point.name, px(point.size), py(point.value), boxes))
    return "".join([*out, "</svg>"])


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A <line> of the page's class ``kind``."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(kind: str, x: float, y: float, anchor: str, words: str, more: str = "") -> str:
    """A <text> of the page's class ``kind``; ``more``: further attributes."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def _size_ticks(x: _Axis) -> list[float]:
    ticks = x.ticks()
    if len(ticks) >= 2:
        return ticks
    low, high = 10**x.low, 10**x.high
    return round_ticks(low, high, 4)


def _steps(corners: list[tuple[float, float]]) -> str:
    path = f"M{corners[0][0]:.1f} {corners[0][1]:.1f}"
    for cx, cy in corners[1:]:
        path += f"H{cx:.1f}V{cy:.1f}"
    return path


def _mark(point: Point, cx: float, py: Callable[[float], float], on_front: bool, chart: Chart) -> list[str]:
    kind = "base" if point.baseline else "front-point" if on_front else "behind"
    tip = "\n".join([point.name, *point.lines])
    out = [f'<g class="point {kind}" tabindex="0" data-tip="{escape(tip, quote=True)}"><title>{escape(tip)}</title>']
    if point.se:
        low = point.value - point.se
        if chart.scale == "log" and low <= 0:
            low = point.value
        top, bottom = py(point.value + point.se), py(low)
        cap = f"M{cx - 5:.1f} {top:.1f}h10M{cx - 5:.1f} {bottom:.1f}h10"
        out.append(f'<path class="bar" d="M{cx:.1f} {top:.1f}V{bottom:.1f}{cap}"/>')
    out.append(f'<circle class="halo" cx="{cx:.1f}" cy="{py(point.value):.1f}" r="15"/>')
    out.append(f'<circle class="dot" cx="{cx:.1f}" cy="{py(point.value):.1f}" r="6"/></g>')
    return out


def _label(name: str, cx: float, cy: float, taken: list[tuple[float, float, float, float]]) -> str:
    """The name beside its point, at the first of ten places that covers nothing."""
    width, height = 6.9 * len(name) + 4, 16
    places = [
        ("start", 11.0, 4.0),
        ("end", -11.0, 4.0),
        ("middle", 0.0, -14.0),
        ("middle", 0.0, 24.0),
        ("start", 9.0, -10.0),
        ("end", -9.0, -10.0),
        ("start", 9.0, 20.0),
        ("end", -9.0, 20.0),
        ("middle", 0.0, -30.0),
        ("middle", 0.0, 40.0),
    ]
    best: tuple[float, str, float, float, tuple[float, float, float, float]] | None = None
    for rank, (anchor, dx, dy) in enumerate(places):
        left = cx + dx - (0 if anchor == "start" else width if anchor == "end" else width / 2)
        box = (left, cy + dy - 12, left + width, cy + dy - 12 + height)
        cost = sum(_overlap(box, other) for other in taken) + 0.01 * rank
        if box[0] < LEFT or box[2] > WIDTH - 2 or box[1] < 2 or box[3] > HEIGHT - BOTTOM:
            cost += 1000
        if best is None or cost < best[0]:
            best = (cost, anchor, cx + dx, cy + dy, box)
    assert best is not None
    taken.append(best[4])
    return text("name", best[2], best[3], best[1], name)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
