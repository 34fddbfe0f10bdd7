"""The section of measured speeds, without a browser."""

from __future__ import annotations

from pathlib import Path

import fake_store
import pytest
from test_build import page_data

from bench.report.build import build_report
from bench.report.speed import bare
from bench.store import Store


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("speed")
    store = fake_store.measure(fake_store.build(folder / "runs"))
    return build_report(store, folder / "report.html").path.read_text("utf-8")


def test_points_meet_the_speed_of_their_own_width(page: str):
    data = page_data(page)
    points = {point["id"]: point for point in data["points"]}
    recall = [item for item in data["speed"]["recall"] if item["mode"] == "train"]
    assert {(points[item["point"]]["mixer"], points[item["point"]]["d_model"]) for item in recall} == {
        (mixer, width) for mixer in fake_store.MIXERS for width in fake_store.SIZES if (mixer, width) != ("hyena", 128)
    }
    gla = next(item for item in recall if points[item["point"]]["mixer"] == "gla" and points[item["point"]]["d_model"] == 64)
    slowest = 500 * 3.0 * 4**0.1 * (1 + list(fake_store.MIXERS).index("gla") / 3)
    assert gla["tokens_per_second"] == pytest.approx(512 / slowest * 1e6)  # the longest length measured
    assert gla["measured"] == "B=1 T=512, fp32, chunked, An invented CPU"
    assert "Without a measured speed: hyena at d_model=128" in page


def test_every_row_is_in_the_table(page: str):
    assert page.count("<tr data-speed=") == 13 * 3 * 4 + 4
    table = page[page.index('aria-label="Every measured speed"') :]
    red = next(row for row in table.split("<tr ") if "kda, H=2 D=32" in row)
    assert "gate red" in red and "is allowed" in red and "640,000" not in red
    ours = next(row for row in table.split("<tr ") if "delta, H=2 D=32" in row)
    assert ">6.11<" in ours and ">2.50<" in ours and 'title="a public one"' in ours and ">0.50<" in ours
    assert 'title="720.0 to 960.0, n=7"' in ours


def test_no_section_without_speeds(tmp_path: Path):
    store = fake_store.build(tmp_path / "runs")
    page = build_report(store, tmp_path / "report.html").path.read_text("utf-8")
    assert "h-speed" not in page
    assert page_data(page)["speed"] is None


def test_speeds_need_no_runs(tmp_path: Path):
    summary = build_report(fake_store.measure(Store(tmp_path / "runs")), tmp_path / "report.html")
    page = summary.path.read_text("utf-8")
    assert (summary.points, summary.runs) == (0, 0)
    assert "Speed against length" in page and '<section aria-labelledby="h-table" hidden>' in page
    assert "An invented CPU" in page
    assert "<dt>Hardware</dt>" in page and "<dt>Backends</dt>" not in page  # a name without a value moves those after it


def test_a_spoilt_record_is_a_warning(tmp_path: Path):
    store = fake_store.measure(fake_store.build(tmp_path / "runs"))
    next(store.root.glob("speed/*.json")).write_text('{"schema_version": 1}')
    summary = build_report(store, tmp_path / "report.html")
    assert any("speed" in text and "is not valid" in text for text in summary.warnings)


@pytest.mark.parametrize(
    ("label", "wanted"),
    [
        ("gla", "gla"),
        ("base_conv+gla:n_heads=2", "gla:n_heads=2"),
        ("base_conv+gla*3", "base_conv+gla*3"),
        ("base_conv", "base_conv"),
    ],
)
def test_a_lone_mixer_is_known_with_and_without_its_convolution(label: str, wanted: str):
    assert bare(label) == wanted
