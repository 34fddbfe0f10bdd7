"""Charts of language models and of speeds in a browser."""

from __future__ import annotations

from pathlib import Path

import fake_evals
import fake_store
import pytest
from browsing import clipped, ready
from playwright.sync_api import Page

from bench.report.build import build_report
from bench.store import Store

OUTSIDE_AXES = """(chart) => {
    const plot = document.querySelector(chart + " .background").getBoundingClientRect();
    const names = [...document.querySelectorAll(chart + " .mark-text.role-mark text")].filter((item) => item.textContent);
    return Object.fromEntries(names.map((item) => [item.textContent, item.getBoundingClientRect().right > plot.right + 1]));
}"""
"""The names in a chart, and whether its plot, which clips them, ends before they do."""
COVERED = """(chart) => {
    const texts = [...document.querySelectorAll(chart + " .mark-text.role-mark text")].filter((item) => item.textContent);
    const boxes = texts.map((item) => item.getBoundingClientRect());
    const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
    return texts.flatMap((item, i) => texts.slice(i + 1).filter((_, j) => meet(boxes[i], boxes[i + 1 + j]))
        .map((other) => item.textContent + " | " + other.textContent));
}"""
"""Pairs of texts in a chart that are written over each other."""


def test_language_models_are_drawn_with_and_without_runs(page: Page, tmp_path: Path):
    marks = {"j0-state": 12, "j0-length": 24, "j0-answers": 96}
    alone = fake_evals.build(Store(tmp_path / "alone"))
    both = fake_evals.build(fake_store.measure(fake_store.build(tmp_path / "both")))
    for store, expected in ((alone, marks), (both, marks | {"bridge": 3})):
        path = build_report(store, tmp_path / "r.html").path
        page.set_viewport_size({"width": 400, "height": 800})
        ready(page, path.as_uri())
        for name, least in expected.items():
            drawn = page.locator(f"#vis-{name} [aria-roledescription=point], #vis-{name} [aria-roledescription=bar]")
            assert drawn.count() >= least, name
            assert len(page.locator(f"#vis-{name} [role=graphics-document]").get_attribute("aria-label") or "") > 40
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        assert not any(clipped(page).values()), clipped(page)
        page.get_by_role("button", name="Dark").click()
        page.wait_for_function("() => document.documentElement.dataset.theme === 'dark'")
    page.get_by_role("checkbox", name="delta_net", exact=True).uncheck()
    page.wait_for_function("() => document.querySelectorAll('#vis-j0-state [aria-roledescription=point]').length === 10")


def test_speeds_follow_their_choice_and_the_filter(page: Page, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("speeds")
    store = fake_store.measure(fake_store.build(folder / "runs"))
    ready(page, build_report(store, folder / "report.html").path.as_uri())
    marks = '#recall-t0 [aria-roledescription="point"]'
    assert page.locator(marks).count() == 13
    first = page.locator(marks).first.get_attribute("aria-label")
    page.select_option("[name=speed]", "decode")
    page.wait_for_function(
        "([marks, first]) => document.querySelector(marks)?.getAttribute('aria-label') !== first", arg=[marks, first]
    )
    assert "speed=decode" in page.url
    page.locator("input[name=mixer][value=attention]").uncheck()
    page.wait_for_function("marks => document.querySelectorAll(marks).length === 11", arg=marks)
    assert page.locator("tr[data-speed][data-mixer=attention]:visible").count() == 0


def test_a_page_of_speeds_alone_works(page: Page, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("alone")
    ready(page, build_report(fake_store.measure(Store(folder / "runs")), folder / "report.html").path.as_uri())
    assert page.locator('#lengths-speed-mixer [aria-roledescription="point"]').count() > 0
    assert page.locator("#theme").is_visible()


def test_names_behind_the_longest_sequences_have_room(page: Page, tmp_path: Path) -> None:
    """Kernels have the longest names: those of the record of docs/throughput.md."""
    record = Path(__file__).parents[2] / "results/measured/throughput_h200"
    ready(page, build_report(Store(record), tmp_path / "report.html").path.as_uri())
    names = page.evaluate(OUTSIDE_AXES, "#lengths-speed-kernel")
    assert len(names) > 5 and not any(names.values()), names


def test_names_and_notes_do_not_cover_each_other(page: Page, tmp_path: Path) -> None:
    """Of 26 tasks with four points each, some of which lie on a ceiling or in the corner of the bits needed."""
    store = Store(Path(__file__).parents[2] / "results/measured/suite_quick")
    page.set_viewport_size({"width": 1300, "height": 900})
    ready(page, build_report(store, tmp_path / "suite.html").path.as_uri())
    charts = page.locator("[id^=pareto-]").evaluate_all("charts => charts.map(chart => chart.id)")
    assert len(charts) == 26
    assert {chart: found for chart in charts if (found := page.evaluate(COVERED, f"#{chart}"))} == {}
