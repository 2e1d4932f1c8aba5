"""The drawing: the front is the front, marks stand where their values are, axes carry round numbers."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mambacompress.eval.charts import charts
from mambacompress.eval.plot import Chart, Point, Scale, pareto, scale_for, svg
from tests.eval.factory import made_up_report

points = st.lists(st.tuples(st.integers(1_000, 10**9), st.floats(-100, 100)), min_size=1, max_size=12)


def chart(
    rows: list[tuple[float, float]], scale: Scale = "linear", se: float | None = None, higher: bool = False
) -> Chart:
    marks = tuple(Point(f"m<{i}&", size, value, se) for i, (size, value) in enumerate(rows))
    return Chart("k", "Title", "label", marks, lambda v: f"{v:g}", higher, scale)


@given(points, st.booleans())
def test_the_front_beats_everything(rows: list[tuple[int, float]], higher: bool) -> None:
    marks = [Point(str(i), size, value, None) for i, (size, value) in enumerate(rows)]
    front = pareto(marks, higher)

    def beats(a: Point, b: Point) -> bool:
        better = a.value >= b.value if higher else a.value <= b.value
        return a.size <= b.size and better and (a.size, a.value) != (b.size, b.value)

    assert not [p for p in front if any(beats(other, p) for other in marks)]
    for mark in marks:
        assert mark in front or any(beats(p, mark) or (p.size, p.value) == (mark.size, mark.value) for p in front)


@given(points, st.sampled_from(["linear", "symlog"]), st.sampled_from([None, 0.5]), st.booleans())
@example([(1000, 4.0), (1000, 2.2250738585072014e-308)], "symlog", None, False)
def test_any_chart_is_valid_xml_with_every_mark_inside(
    rows: list[tuple[int, float]], scale: Scale, se: float | None, higher: bool
) -> None:
    drawing = svg(chart(rows, scale, se, higher), lambda v: f"{v:g}")
    root = ElementTree.fromstring(drawing)
    dots = [node for node in root.iter() if node.get("class") == "dot"]
    assert len(dots) == len(rows)
    for dot in dots:
        assert 0 <= float(dot.get("cx", "nan")) <= 960
        assert 0 <= float(dot.get("cy", "nan")) <= 460
    assert len([node for node in root.iter() if node.get("class") == "bar"]) == (len(rows) if se else 0)
    assert "NaN" not in drawing
    assert "nan" not in drawing


def test_lower_is_drawn_lower_and_bigger_further_right() -> None:
    root = ElementTree.fromstring(svg(chart([(1e6, 3.0), (4e6, 1.0), (2e6, 2.0)], "log"), lambda v: f"{v:g}"))
    dots = [(float(n.get("cx", "")), float(n.get("cy", ""))) for n in root.iter() if n.get("class") == "dot"]
    assert dots[0][0] < dots[2][0] < dots[1][0]
    assert dots[0][1] < dots[2][1] < dots[1][1]
    assert dots[2][0] - dots[0][0] == pytest.approx(dots[1][0] - dots[2][0], abs=0.2)  # a logarithmic axis


def test_labels_do_not_cover_each_other() -> None:
    for drawn in charts(made_up_report()):
        drawing = svg(drawn, lambda v: f"{v:g}")
        boxes = []
        for x, y, anchor, name in re.findall(
            r'class="name" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)<', drawing
        ):
            width = 6.9 * len(name)
            left = float(x) - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
            boxes.append((left, float(y) - 10, left + width, float(y) + 2))
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_the_scale_follows_the_spread() -> None:
    assert scale_for([0, 0.1, 0.2, 0.3]) == "linear"
    assert scale_for([0, 0.02, 0.1, 0.2, 16]) == "symlog"
    assert scale_for([0.0, 5.0]) == "linear"


def test_charts_need_two_sized_models_and_never_average_tasks() -> None:
    report = made_up_report()
    keys = [drawn.key for drawn in charts(report)]
    assert keys == [
        "change-test_novels",
        "change-wikitext2",
        "kl-test_novels",
        "kl-wikitext2",
        "task-blimp-acc",
        "task-copa-acc",
        "task-lambada_openai-perplexity",
    ]
    for row in report.models[1:]:
        row.size = None
    assert charts(report) == []


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs points"):
        svg(chart([]), str)
