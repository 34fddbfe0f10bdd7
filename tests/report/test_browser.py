"""The page in a real headless Chromium, opened from disk. Without a browser these tests fail: they are the page's proof."""

from __future__ import annotations

import re
from pathlib import Path

import fake_store
import pandas as pd
import pytest
from browsing import MARKS, clipped, ready, redrawn
from playwright.sync_api import Page

from bench.report.build import build_report
from bench.report.chart_parts import in_lines
from bench.report.charts import AXES

ROWS = "#points tbody tr:visible"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("browser")
    store = fake_store.build(folder / "runs")
    return build_report(store, folder / "report.html").path.as_uri()


def names(page: Page) -> list[str]:
    return [text.replace("!", "").strip() for text in page.locator(f"{ROWS} th").all_inner_texts()]


def test_all_points_are_drawn_and_listed(page: Page, url: str):
    ready(page, url)
    redrawn(page, 14)
    assert page.locator(ROWS).count() == 14
    assert page.locator("#shown").inner_text() == "14 of 14 points shown"
    for chart in ("pareto", "heat", "curves"):
        drawing = page.locator(f"#{chart}-t0 [role=graphics-document]")
        assert drawing.locator("svg.marks").count() == 1
        assert len(drawing.get_attribute("aria-label") or "") > 40
    assert "#" not in page.url


def test_a_filter_changes_charts_and_tables(page: Page, url: str):
    ready(page, url)
    page.get_by_role("checkbox", name="gla", exact=True).uncheck()
    redrawn(page, 12)
    assert page.locator("#shown").inner_text() == "12 of 14 points shown"
    assert not [name for name in names(page) if name.startswith("gla")]
    assert "gla" not in page.locator("#heat-t0").inner_html()
    assert page.locator(".maps figure:visible").count() == 12
    assert page.locator(".matrix:visible").count() == 12
    page.get_by_role("button", name="Show all").click()
    redrawn(page, 14)


def test_front_only_and_cost(page: Page, url: str):
    ready(page, url)
    page.get_by_role("checkbox", name="Front only").check()
    shown = int(page.locator("#shown").inner_text().split()[0])
    assert 1 < shown < 14
    redrawn(page, shown)
    assert set(page.locator(f"{ROWS} td.front").all_inner_texts()) == {"yes"}
    page.get_by_role("checkbox", name="Front only").uncheck()
    page.locator("select[name=axis]").select_option("parameters")
    page.wait_for_selector("#pareto-t0 svg >> text=Parameters (log scale)")
    assert "41,216" in page.locator(".front-text").inner_text()


def test_the_address_restores_the_view(page: Page, url: str):
    ready(page, url)
    page.get_by_role("checkbox", name="hyena").uncheck()
    page.locator("select[name=axis]").select_option("read")
    page.get_by_role("button", name="Accuracy").click()
    redrawn(page, 12)
    address, order = page.url, names(page)
    assert "hide=hyena" in address and "cost=read" in address and "sort=accuracy.descending" in address
    page.goto("about:blank")
    ready(page, address)
    redrawn(page, 12)
    assert names(page) == order
    assert not page.get_by_role("checkbox", name="hyena").is_checked()
    assert page.locator("select[name=axis]").input_value() == "read"


def test_hover_shows_the_details(page: Page, url: str):
    ready(page, url)
    redrawn(page, 14)
    page.locator("#pareto-t0").scroll_into_view_if_needed()
    # Attention at width 128 stands alone at the right.
    page.locator(MARKS).nth(1).hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    text = page.locator("#vg-tooltip-element").inner_text()
    for wanted in ("attention d_model=128", "95 % t interval over 3 seeds", "128 KiB", "An invented CPU", "0123456789", "0.001"):
        assert wanted in text, text


def test_single_seed_points_are_hollow(page: Page, url: str):
    ready(page, url)
    redrawn(page, 14)
    fills = page.locator(MARKS).evaluate_all("marks => marks.map(mark => mark.getAttribute('fill'))")
    assert fills.count("transparent") == 2


def test_the_table_sorts(page: Page, url: str):
    ready(page, url)
    header = page.locator("#points th", has=page.locator("[data-sort=accuracy]"))
    button = header.get_by_role("button")

    def accuracies() -> list[float]:
        return [float(text.split()[0]) for text in page.locator(f"{ROWS} td:nth-child(2)").all_inner_texts()]

    button.click()
    assert header.get_attribute("aria-sort") == "descending"
    assert accuracies() == sorted(accuracies(), reverse=True)
    button.click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert accuracies() == sorted(accuracies())
    page.locator("[data-sort=name]").click()
    assert page.locator("#points th[aria-sort]").count() == 1
    assert names(page) == sorted(names(page), key=lambda name: (name.split()[0], int(name.split("=")[1])))
    # Points without an interval stay at the end in both directions.
    for _ in range(2):
        page.locator("[data-sort=low]").click()
        assert [name.split()[0] for name in names(page)[-2:]] == ["hyena", "hyena"]


def test_dark_toggle_repaints_page_and_charts(page: Page, url: str):
    ready(page, url)
    redrawn(page, 14)
    fill = "() => document.querySelector('#pareto-t0 .role-axis-title text').getAttribute('fill')"
    before = page.evaluate("getComputedStyle(document.body).backgroundColor"), page.evaluate(fill)
    toggle = page.get_by_role("button", name="Dark")
    assert toggle.get_attribute("aria-pressed") == "false"
    toggle.click()
    page.wait_for_function(f"before => ({fill})() !== before", arg=before[1])
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before[0]
    assert toggle.get_attribute("aria-pressed") == "true"
    assert "theme=dark" in page.url


def test_dark_preference_is_followed(page: Page, url: str):
    page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    ready(page, url)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.get_by_role("button", name="Dark").get_attribute("aria-pressed") == "true"


def test_the_keyboard_is_enough(page: Page, url: str):
    ready(page, url)
    focused = "() => document.activeElement.textContent.trim() || document.activeElement.value"
    order = []
    for _ in range(6):
        page.keyboard.press("Tab")
        order.append(page.evaluate(focused))
    assert order[:2] == ["Skip to the results", "Dark"]
    assert order[2].startswith("1 warning")
    assert order[3:] == ["How to read this page", "attention", "delta_net"]
    page.keyboard.press("Space")
    redrawn(page, 12)
    page.locator("[data-sort=state]").focus()
    page.keyboard.press("Enter")
    assert page.locator("#points th[aria-sort=descending]").inner_text() == "State"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.sort") == "published"


def test_downloads_are_the_points(page: Page, url: str, tmp_path: Path):
    ready(page, url)
    for name, read in (("CSV", pd.read_csv), ("JSON", lambda path: pd.DataFrame(pd.read_json(path, typ="series")["points"]))):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Download {name}").click()
        target = tmp_path / download.value.suggested_filename
        download.value.save_as(target)
        frame = read(target)
        assert len(frame) == 14
        assert set(frame["mixer"]) == set(fake_store.MIXERS)


def test_a_narrow_page_does_not_overflow(page: Page, url: str):
    page.set_viewport_size({"width": 400, "height": 800})
    ready(page, url)
    redrawn(page, 14)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    box = page.locator("#pareto-t0 svg.marks").bounding_box()
    assert box is not None and box["width"] <= 400
    for axis, (_, title) in AXES.items():
        page.locator("select[name=axis]").select_option(axis)
        page.wait_for_selector(f"#pareto-t0 svg >> text={in_lines(title)[0]}")
        assert clipped(page) == {"pareto-t0": [], "heat-t0": [], "curves-t0": []}


def test_hiding_everything_says_so(page: Page, url: str):
    ready(page, url)
    for mixer in fake_store.MIXERS:
        page.get_by_role("checkbox", name=mixer, exact=True).uncheck()
    page.wait_for_function("() => /Nothing to draw/.test(document.getElementById('pareto-t0').textContent)")
    assert re.match("0 of 14", page.locator("#shown").inner_text())
    page.get_by_role("button", name="Show all").click()
    redrawn(page, 14)
