"""The loss curve: every step is in it, the axes say what they mean, the page stands alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambacompress.eval.curve import POINTS, loss_svg, page, rate_svg, smoothed, thinned


def run(losses: list[float], start: int = 0) -> list[dict[str, Any]]:
    return [{"step": start + i, "loss": loss, "rate": 1e-3 / (i + 1), "tokens": 16 * (start + i + 1)}
            for i, loss in enumerate(losses)]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.integers(0, 10**6))
def test_any_run_is_drawn_inside_its_frame(losses: list[float], start: int) -> None:
    for drawing in (loss_svg(run(losses, start)), rate_svg(run(losses, start))):
        root = ElementTree.fromstring(drawing)
        width, height = map(float, root.get("viewBox", "").split()[2:])
        paths = [node.get("d", "") for node in root.iter("path")]
        assert paths
        for path in paths:
            corners = re.findall(r"([-\d.]+) ([-\d.]+)", path)
            assert len(corners) == len(losses)
            assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in corners)


def test_the_axes_are_nats_and_perplexity() -> None:
    drawing = loss_svg(run([8.0, 5.0, 2.0]))
    words = [node.text for node in ElementTree.fromstring(drawing).iter("text")]
    assert {"loss, nats a token", "perplexity", "3", "20.1"} <= set(words)  # e^3 = 20.1
    x, y = zip(*((float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", drawing.split('class="raw"')[1])),
               strict=True)
    assert list(x[:3]) == sorted(x[:3])
    assert list(y[:3]) == sorted(y[:3])  # lower is drawn lower


def test_a_long_run_is_thinned_to_means() -> None:
    steps = list(map(float, range(3 * POINTS)))
    x, y = thinned(steps, [2 * step for step in steps])
    assert len(x) == POINTS
    assert (x[0], y[0]) == (1.0, 2.0)
    assert (x[-1], y[-1]) == (steps[-2], 2 * steps[-2])
    assert thinned([5.0], [1.0]) == ([5.0], [1.0])


def test_the_strong_line_is_a_moving_average() -> None:
    assert smoothed([3.0]) == [3.0]
    assert smoothed([2.0] * 500) == [2.0] * 500
    jump = smoothed([1.0] * 500 + [2.0] * 500)
    assert jump[499] == 1.0
    assert 1.0 < jump[500] < 1.3
    assert jump[-1] == pytest.approx(2.0, abs=1e-6)


def test_the_page_stands_alone_and_escapes(tmp_path: Path) -> None:
    text = page("a <run>", run([3.0, 2.0]), {"text": "x & <y>", "seed": "0"})
    assert "a &lt;run&gt;" in text
    assert "x &amp; &lt;y&gt;" in text
    assert "2 steps, 32 tokens" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    with pytest.raises(ValueError, match="needs steps"):
        page("empty", [], {})
