"""The page in a real browser, from disk and without a network."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mambacompress.eval.report import Report
from tests.eval.factory import ROWS, made_up_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_report().save(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium: apt install chromium")
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, saved: Path) -> Iterator[Any]:
    """The opened page; every request but the file itself, every console line and every exception is a failure."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda request: wrong.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
    )
    page.goto(saved.as_uri())
    yield page
    context.close()
    assert wrong == []


def test_the_plot_renders(page: Any) -> None:
    chart = page.locator(".drawing:not([hidden]) svg")
    assert chart.count() == 1
    box = chart.bounding_box()
    assert box["width"] > 700
    assert box["height"] > 300
    assert chart.locator(".dot").count() == len(ROWS)
    assert chart.locator(".bar").count() == len(ROWS) - 1  # the baseline's change has no error
    for index in range(len(ROWS)):
        dot = chart.locator(".dot").nth(index).bounding_box()
        assert box["x"] < dot["x"] < box["x"] + box["width"]
        assert box["y"] < dot["y"] < box["y"] + box["height"]
    assert chart.locator(".front").evaluate("path => path.getTotalLength()") > 100
    colour = chart.locator(".front-point .dot").first.evaluate("dot => getComputedStyle(dot).fill")
    assert colour != "rgb(0, 0, 0)"  # the style sheet reached it


def test_choosing_another_plot(page: Any) -> None:
    page.get_by_role("button", name="KL divergence · wikitext2").click()
    assert (
        page.locator(".drawing:not([hidden]) svg").get_attribute("aria-label")
        == "KL divergence · wikitext2 against file size"
    )
    assert page.locator(".choices [aria-pressed=true]").count() == 1
    assert page.locator(".drawing:not([hidden]) .dot").count() == len(ROWS) - 1  # the baseline diverges from nothing


def test_the_tooltip_names_the_point(page: Any) -> None:
    page.locator(".drawing:not([hidden]) .point").nth(2).hover()
    page.wait_for_function("document.getElementById('tip').style.opacity == 1")
    assert page.locator("#tip").inner_text().splitlines()[0] == "w8a8"
    page.locator("h1").hover()
    page.wait_for_function("document.getElementById('tip').style.opacity == 0")


def test_rows_sort_both_ways(page: Any) -> None:
    header = page.locator("#overview thead button", has_text="File")
    column = page.locator("#overview tbody tr td:nth-child(2)")
    by_size = sorted(float(row[1]) for row in ROWS)

    def shown() -> list[float]:
        return [float(value) for value in column.evaluate_all("cells => cells.map(cell => cell.dataset.v)")]

    assert shown() != by_size
    header.click()
    assert shown() == by_size
    assert page.locator("#overview th[aria-sort]").get_attribute("aria-sort") == "ascending"
    header.click()
    assert shown() == by_size[::-1]


def test_names_sort_as_text_and_missing_figures_last(page: Any) -> None:
    page.locator("#overview thead button", has_text="Model").click()
    names = page.locator("#overview tbody tr td:first-child").evaluate_all(
        "cells => cells.map(cell => cell.dataset.v)"
    )
    assert names == [
        "original",
        "quarot-w8a8",
        "rtn-w8a8",
        "w4a4",
        "w4a8",
        "w4a16",
        "w8a8",
        "w8a8-static",
    ]  # 8 before 16
    header = page.locator("#overview thead button", has_text="KL")
    for _ in range(2):
        header.click()
        assert page.locator("#overview tbody tr").last.locator("td").first.get_attribute("data-v") == "original"


def test_sorting_works_from_the_keyboard(page: Any) -> None:
    page.locator("#speed thead button", has_text="Prefill").focus()
    page.keyboard.press("Enter")
    assert page.locator("#speed tbody tr").first.locator("td").first.get_attribute("data-v") == "original"


def test_light_and_dark_both_have_contrast(browser: Any, saved: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        opened = context.new_page()
        opened.goto(saved.as_uri())
        style = opened.evaluate(
            "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
        )
        ink, ground = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in style)
        assert abs(ink - ground) > 450
        grounds.append(ground)
        context.close()
    assert grounds[0] > grounds[1]


def test_a_narrow_screen_does_not_scroll_sideways(browser: Any, saved: Path) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800})
    opened = context.new_page()
    opened.goto(saved.as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


def test_the_page_is_one_small_file(saved: Path) -> None:
    text = saved.read_text(encoding="utf-8")
    assert len(text) < 500_000
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", text)
    assert "@import" not in text
    assert "url(" not in text


def test_names_cannot_inject(tmp_path: Path) -> None:
    report = made_up_report()
    evil = "<script>alert(1)</script>\"'|"
    report.models[1].name = report.models[1].description = report.title = evil
    page = report.html()
    assert "<script>alert" not in page
    assert html.escape(evil, quote=False)[:20] in page
    line = next(line for line in report.markdown().splitlines() if "alert" in line and line.startswith("|"))
    assert "<script" not in line


def test_a_report_of_almost_nothing_renders() -> None:
    report = made_up_report()
    empty = Report(
        created="2026-01-01T00:00:00+00:00",
        models=[
            report.models[0].model_copy(
                update={
                    "size": None,
                    "texts": [],
                    "agreement": [],
                    "tasks": [],
                    "speed": None,
                    "not_measured": ["speed: not asked for"],
                }
            )
        ],
    )
    assert "speed: not asked for" in empty.html()
    assert "speed: not asked for" in empty.markdown()
    assert "<svg" not in empty.html()


def test_markdown_tables_are_regular() -> None:
    text = made_up_report().markdown()
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    assert "not measured" not in text.split("## How it was measured")[0]
