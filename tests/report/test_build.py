"""Structure of the page, without a browser."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fake_store
import numpy as np
import pandas as pd
import pytest

from bench.errors import UserError
from bench.points import points
from bench.records import Metric
from bench.report import styles
from bench.report.build import ReportSummary, build_report
from bench.report.frames import human_bytes
from bench.report.influence import past_shares, picture
from bench.report.paper import paper_figures
from bench.store import Store

SECTIONS = ["pareto", "table", "heat", "curves", "influence", "rates", "failures", "provenance"]


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, ReportSummary, str]:
    folder = tmp_path_factory.mktemp("report")
    store = fake_store.build(folder / "runs")
    summary = build_report(store, folder / "report.html")
    return store, summary, summary.path.read_text("utf-8")


def page_data(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert match
    return json.loads(match.group(1))


def test_summary(built):
    _, summary, page = built
    assert (summary.points, summary.runs) == (14, 66)
    assert summary.bytes == summary.path.stat().st_size == len(page.encode())
    assert summary.bytes < 3_000_000
    assert any("gla d_model=128" in text and "1 oom" in text for text in summary.warnings)
    assert not list(summary.path.parent.glob("*.tmp"))


def test_every_section_is_there(built):
    page = built[2]
    for section in SECTIONS:
        assert f'id="h-{section}"' in page, section
    assert "How to read this page" in page
    assert "bench synthetic --task mqar --rerun failed" in page
    assert "The validation loss became NaN after epoch 3" in page


def test_nothing_is_loaded_from_elsewhere(built):
    elements = Elements(built[2]).found
    for tag, attributes in elements:
        assert not (tag in ("script", "img", "iframe", "source", "video", "audio") and "src" in attributes), attributes
        assert tag not in ("link", "base", "object", "embed", "iframe"), tag
        for name in ("href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    policy = next(a["content"] for t, a in elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy
    styles_and_ours = re.findall(r"<style>(.*?)</style>", built[2], re.S) + re.findall(
        r'"use strict";(.*?)</script>', built[2], re.S
    )
    assert len(styles_and_ours) == 4
    for text in styles_and_ours:
        assert not re.search(r"@import|url\(|https?://|\bfetch\(|XMLHttpRequest|\bimport\(|WebSocket|sendBeacon", text)


def test_pictures_have_words(built):
    pictures = [a for t, a in Elements(built[2]).found if t == "svg" and a.get("role") == "img"]
    assert len(pictures) == 14
    for attributes in pictures:
        label = attributes["aria-label"]
        assert label is not None and "lies on its own key and value" in label


def test_csv_equals_the_points(built):
    store, _, page = built
    expected = points(store.load()[0])
    frame = pd.read_csv(io.StringIO(page_data(page)["csv"]))
    assert list(frame["name"]) == [point.name for point in expected]
    np.testing.assert_allclose(frame["accuracy"], [point.accuracy.mean for point in expected])
    np.testing.assert_allclose(frame["low"], [np.nan if point.accuracy.low is None else point.accuracy.low for point in expected])
    assert list(frame["state_bytes"]) == [point.state.true_bytes for point in expected]
    assert list(frame["n"]) == [point.accuracy.n for point in expected]
    np.testing.assert_allclose(frame["accuracy:64x16"], [point.slices["64x16"] for point in expected], atol=1e-5)
    assert frame["front_state"].any() and not frame["front_state"].all()


def test_hostile_labels_stay_text(tmp_path: Path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    store = Store(tmp_path / "runs")
    run = fake_store.spec("gla")
    record = fake_store.record(run, label=evil)
    store.write(record.model_copy(update={"mixer": evil}))
    page = build_report(store, tmp_path / "r.html", title=evil).path.read_text("utf-8")
    assert evil not in page
    assert "<img src=x" not in page
    assert page_data(page)["points"][0]["label"] == evil
    assert sum(tag == "script" for tag, _ in Elements(page).found) == 5


def test_unreadable_files_are_skipped_and_said(tmp_path: Path):
    store = fake_store.build(tmp_path / "runs", report_seeds=1)
    first = next(r for r in store.load()[0] if r.role == "report" and r.spec.model.d_model == 64)
    (store.path(first.run_id) / "curve.parquet").write_bytes(b"no parquet")
    (store.path(first.run_id) / "influence.npz").write_bytes(b"no zip")
    (store.root / "broken").mkdir()
    (store.root / "broken" / "record.json").write_text("{")
    summary = build_report(store, tmp_path / "deep" / "folder" / "r.html")
    text = "\n".join(summary.warnings)
    assert "not readable as JSON" in text
    assert "not a readable learning curve" in text
    assert "not a readable influence map" in text
    assert "not readable as JSON" in summary.path.read_text("utf-8")


def test_nothing_to_report_is_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="holds no runs to report"):
        build_report(Store(tmp_path / "none"), tmp_path / "r.html")
    store = fake_store.build(tmp_path / "runs", report_seeds=1)
    with pytest.raises(UserError, match="no runs of the task 'foo'; it holds runs of: mqar"):
        build_report(store, tmp_path / "r.html", task="foo")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        build_report(store, tmp_path / "file" / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_runs_that_never_finished_still_make_a_page(tmp_path: Path):
    store = Store(tmp_path / "runs")
    store.write(fake_store.record(fake_store.spec("gla"), test=None, status="failed", reason="It broke."))
    store.write(fake_store.record(fake_store.spec("gla", seed=1000), test=None, status="oom"))
    page = build_report(store, tmp_path / "r.html").path.read_text("utf-8")
    assert "It broke." in page and "no reason recorded" in page


def test_two_tasks_are_kept_apart(tmp_path: Path):
    store = fake_store.build(tmp_path / "runs", report_seeds=1)
    fake_store.build(store.root, report_seeds=1, task="other")
    data = page_data(build_report(store, tmp_path / "r.html").path.read_text("utf-8"))
    assert [task["title"] for task in data["tasks"]] == ["mqar", "other"]
    for task in data["tasks"]:
        assert sum(p["front_state"] for p in data["points"] if p["task"] == task["id"]) > 1
    only = page_data(build_report(store, tmp_path / "r.html", task="other").path.read_text("utf-8"))
    assert [task["title"] for task in only["tasks"]] == ["other"]


def test_styles_are_stable_and_distinct():
    names = [f"mixer_{i}" for i in range(40)]
    found = styles.assign(names)
    assert len({(s.light, s.shape) for s in found.values()}) == 40
    eight = styles.assign(names[:8])
    assert len({s.light for s in eight.values()}) == len({s.shape for s in eight.values()}) == 8
    assert styles.assign(reversed(names)) == found
    assert styles.assign(["gla"])["gla"] == styles.assign(["gla", "zzz"])["gla"]


def test_influence_shares():
    # Row 2: 3 of 4 of the past's influence comes from position 1; its own 9 needs no memory.
    rows = past_shares(np.array([[5.0, 0, 0], [2.0, 1, 0], [1.0, 3, 9]]))
    np.testing.assert_allclose(rows, [[0, 0, 0], [1, 0, 0], [0.25, 0.75, 0]])
    arrays = {
        "map": np.array([[5.0, 0, 0], [2.0, 1, 0], [1.0, 3, 9]]),
        "query_positions": np.array([2, 1]),
        "key_positions": np.array([0, -1]),
        "value_positions": np.array([1, -1]),
    }
    (link,) = picture(arrays, "x").links
    assert (link.query, link.source, link.share, link.uniform) == (2, 1, 1.0, 1.0)
    with pytest.raises(ValueError, match="square"):
        past_shares(np.zeros((2, 3)))


def test_bytes_are_readable():
    assert [human_bytes(n) for n in (0, 22.1, 1023, 1024, 16985, 131072, 5 * 2**20)] == [
        "0 B",
        "22.1 B",
        "1023 B",
        "1 KiB",
        "16.6 KiB",
        "128 KiB",
        "5 MiB",
    ]


def test_paper_figures_are_vector_text_and_repeatable(built, tmp_path: Path):
    store = built[0]
    found = points(store.load()[0])
    first = paper_figures(found, tmp_path / "a", store=store)
    second = paper_figures(found, tmp_path / "b", store=store)
    assert {path.name for path in first} == {
        f"mqar_{figure}.{kind}" for figure in ("pareto", "difficulty", "curves") for kind in ("pdf", "svg")
    }
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        paper_figures(found, tmp_path / "file")
    svg = (tmp_path / "a" / "mqar_pareto.svg").read_text("utf-8")
    assert ">Mean test accuracy</text>" in svg and "<image" not in svg


def test_several_tasks_get_a_map_of_scores_by_family(tmp_path: Path):
    store = Store(tmp_path / "runs")
    for task, family, metrics in (("mqar", "recall", {}), ("parity", "state_tracking", {"stale": 0.25})):
        made = fake_store.record(fake_store.spec("gla", task=task), test=0.5)
        cells = [cell.model_copy(update={"trained": cell.name != "64x16"}) for cell in made.cells]
        extra = [Metric(split="test", name=name, slice="mean", value=value, n=9) for name, value in metrics.items()]
        store.write(made.model_copy(update={"family": family, "cells": cells, "metrics": [*made.metrics, *extra]}))
    page = build_report(store, tmp_path / "r.html").path.read_text("utf-8")
    data = page_data(page)
    assert 'id="h-families"' in page and "64x16 <span" in page and ">stale<" in page
    labels = [column["label"] for column in data["families"]["columns"]]
    assert labels == ["mqar", "mean of recall", "parity", "mean of state_tracking", "mean of all families"]
    assert [task["beyond"] for task in data["tasks"]] == [["64x16"], ["64x16"]]
    assert set(data["tasks"][0]["lines"]) == {"chance", "in-context guess"}
    frame = pd.read_csv(io.StringIO(data["csv"]))
    columns = frame[["chance", "shortcut", "possible"]].iloc[0].to_dict()
    mean = [data["tasks"][0]["ceilings"][name] for name in ("chance", "in-context guess")]
    assert columns == pytest.approx({"chance": mean[0], "shortcut": mean[1], "possible": 1.0})
    assert set(frame["shortcut_name"]) == {"in-context guess"} and 'data-sort="shortcut"' in page
    assert frame["stale"].dropna().tolist() == [0.25]
    only = build_report(store, tmp_path / "one.html", specs=[fake_store.spec("gla").task])
    assert only.points == 1 and 'id="h-families"' not in only.path.read_text("utf-8")
