"""Published figures on the page: what is drawn and listed, and how it looks in a browser."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import fake_store
import numpy as np
import pandas as pd
import pytest
from browsing import clipped
from playwright.sync_api import Page
from test_build import page_data

from bench.points import points
from bench.report.build import build_report
from bench.report.frames import metric_text
from bench.selection import published_selection
from bench.store import Store

OFF = {"GLA d=128": -0.12, "H3 d=64 N=16": 0.2}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str, str]:
    folder = tmp_path_factory.mktemp("reproductions")
    store = fake_store.reproduce(folder / "runs", "readme_plot", off=OFF)
    path = build_report(store, folder / "report.html").path
    return store, path.read_text("utf-8"), path.as_uri()


def panel(page_text: str) -> dict[str, Any]:
    return page_data(page_text)["panels"][0]


def test_the_whole_figure_is_drawn_beside_ours(built) -> None:
    shown = panel(built[1])
    assert (shown["axis"], len(shown["values"])) == ("state", 61)
    by_name = {value["name"]: value for value in shown["values"]}
    attention = by_name["Attention d=64"]
    assert (attention["x"], attention["published"], attention["n"], attention["verdict"]) == (525056, 1.0, 3, "agree")
    assert attention["low"] <= attention["ours"] <= attention["high"]
    assert by_name["Hyena d=64"]["ours"] is None and "mixer" not in by_name["Hyena d=64"]


def test_disagreements_are_listed_with_what_they_are_worth(built) -> None:
    text = built[1]
    assert "<b>GLA d=128</b> (hard): 65." in text and "published 77.1 %, -12." in text
    assert "<b>H3 d=64 N=16</b> (soft)" in text
    assert "<b>Order</b> (hard): Mamba 16 KiB above GLA d=128; Mamba-2 16 KiB above GLA d=128" in text
    assert "2 of them hard targets" in text
    assert "Not run: Hyena d=64, Hyena d=128, Hyena d=256." in text


def test_the_table_has_the_published_selection_and_the_efficiency_of_the_state(built) -> None:
    store, text, _ = built
    frame = pd.read_csv(io.StringIO(page_data(text)["csv"]))
    expected = points(store.load()[0])
    np.testing.assert_allclose(frame["published_selection"], [published_selection(p).accuracy.mean for p in expected], atol=1e-5)
    np.testing.assert_allclose(frame["best_of_k_bias"], [published_selection(p).bias for p in expected], atol=1e-5)
    assert set(frame["best_of_k"]) == {2}
    value = next(value for value in panel(text)["values"] if value["name"] == "GLA d=128")
    row = next(line for line in text.split("<tr") if "GLA d=128</th>" in line)
    assert value["efficiency"] > 0 and f">{metric_text(100 * value['efficiency'])} %</td>" in row
    np.testing.assert_allclose(frame["state_efficiency"], frame["bits_needed"] / (8 * frame["state_bytes"]), rtol=1e-3)


def test_a_store_without_published_figures_has_no_such_section(tmp_path: Path) -> None:
    store = fake_store.build(tmp_path / "runs", report_seeds=1)
    text = build_report(store, tmp_path / "r.html").path.read_text("utf-8")
    assert "h-reproductions" not in text and page_data(text)["panels"] == []


def test_a_figure_over_widths_has_a_panel_for_each_task(tmp_path: Path) -> None:
    store = fake_store.reproduce(tmp_path / "runs", "zoology_figure2")
    data = page_data(build_report(store, tmp_path / "r.html").path.read_text("utf-8"))
    assert [item["title"] for item in data["panels"]] == [f"setting {cell}" for cell in ("64x4", "128x8", "256x16", "512x64")]
    assert [value["x"] for value in data["panels"][3]["values"][:4]] == [64, 128, 256, 512]
    assert {item["axis"] for item in data["panels"]} == {"width"}


def test_marks_in_a_browser(built, page: Page) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    page.goto(built[2])
    page.wait_for_selector("html[data-ready='1']")
    marks = page.locator('#published-r0-0 [aria-roledescription="point"]')
    assert marks.count() == 61 + 58
    fills = marks.evaluate_all("marks => marks.map(mark => mark.getAttribute('fill'))")
    assert fills.count("transparent") == 61
    assert not any(clipped(page).values()), clipped(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    page.locator("label", has_text="attention").first.click()
    page.wait_for_function("""document.querySelectorAll('#published-r0-0 [aria-roledescription="point"]').length === 61 + 58 - 4""")
    assert page.locator("tr", has_text="Attention d=128").first.is_hidden()
