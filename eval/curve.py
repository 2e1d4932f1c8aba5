"""How a training run went, as one page that needs nothing but itself: loss and perplexity by step, the learning rate
below, and what was run.

The strong line is an exponential moving average over a hundredth of the steps (ten, where they are few), the faint one
the losses themselves, in a long run the means of neighbouring steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mambacompress.eval.figures import significant
from mambacompress.eval.plot import line, round_ticks, text

TEMPLATES = Path(__file__).parent / "templates"
WIDTH, LEFT, RIGHT, TOP = 960, 74, 74, 14
LOSS, RATE = 360, 110  # heights of the drawings
POINTS = 1200  # of a line, at most


def page(title: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> str:
    """The page. rows: of training.jsonl (step, loss, rate, tokens), in order; raises ValueError where there are none.

    facts: what stands in the table below, in order.
    """
    from jinja2 import Environment, FileSystemLoader

    if not rows:
        raise ValueError("a curve needs steps")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("training.html").render(
        title=title, steps=len(rows), tokens=rows[-1]["tokens"], loss=loss_svg(rows), rate=rate_svg(rows), facts=facts
    )


def loss_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """Loss by step, in nats on the left and as perplexity on the right."""
    steps, losses = _column(rows, "step"), _column(rows, "loss")
    out, px, py = _frame("Training loss by step", steps, losses, LOSS, 10, lambda v: f"{v:g}")
    for tick in _ticks(losses, 10):
        out.append(text("tick", WIDTH - RIGHT + 10, py(tick) + 4, "start", _perplexity(tick)))
    middle = (TOP + LOSS - 30) / 2
    turned = f' transform="translate({{}} {middle:.1f}) rotate(-90)"'
    out.append(text("label", 0, 0, "middle", "loss, nats a token", turned.format(16)))
    out.append(text("label", 0, 0, "middle", "perplexity", turned.format(WIDTH - 8)))
    for kind, values in (("raw", losses), ("smooth", smoothed(losses))):
        out.append(_path(kind, *thinned(steps, values), px, py))
    return "".join([*out, "</svg>"])


def rate_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """Learning rate by step."""
    steps, rates = _column(rows, "step"), _column(rows, "rate")
    out, px, py = _frame("Learning rate by step", steps, [0.0, *rates], RATE, 2, lambda v: f"{v:.3g}")
    out.append(_path("smooth", *thinned(steps, rates), px, py))
    return "".join([*out, "</svg>"])


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential moving average over about a hundredth of the values, at least ten, started at the first."""
    share = 2 / (max(10.0, len(values) / 100) + 1)
    out = [values[0]]
    for value in values[1:]:
        out.append(out[-1] + share * (value - out[-1]))
    return out


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most POINTS points: the means of equally many neighbours, the last group perhaps smaller."""
    size = math.ceil(len(x) / POINTS)
    groups = range(0, len(x), size)
    means = [[sum(row[i : i + size]) / len(row[i : i + size]) for i in groups] for row in (x, y)]
    return means[0], means[1]


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700))
    return f"{value:,.0f}" if value >= 100 else significant(value)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _ticks(values: Sequence[float], wanted: int) -> list[float]:
    return round_ticks(*_range(values), wanted)


def _frame(
    alt: str,
    steps: Sequence[float],
    values: Sequence[float],
    height: int,
    wanted: int,
    show: Callable[[float], str],
) -> tuple[list[str], Callable[[float], float], Callable[[float], float]]:
    """The opened drawing with its grid and ticks, and where a step and a value stand in it."""
    low, high = _range(values)
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    bottom = height - 30

    def px(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def py(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - TOP)

    out = [f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{alt}">']
    for tick in _ticks(values, wanted):
        out.append(line("grid", LEFT, py(tick), WIDTH - RIGHT, py(tick)))
        out.append(text("tick", LEFT - 10, py(tick) + 4, "end", show(tick)))
    for tick in round_ticks(first, last, 8):
        if tick == int(tick):
            out.append(line("notch", px(tick), bottom, px(tick), bottom + 5))
            out.append(text("tick", px(tick), bottom + 20, "middle", f"{int(tick):,}"))
    out.append(line("axis", LEFT, bottom, WIDTH - RIGHT, bottom))
    return out, px, py


def _path(
    kind: str, x: Sequence[float], y: Sequence[float], px: Callable[[float], float], py: Callable[[float], float]
) -> str:
    corners = "L".join(f"{px(a):.1f} {py(b):.1f}" for a, b in zip(x, y, strict=True))
    return f'<path class="{kind}" d="M{corners}h0"/>'  # h0: a single point is a dot
