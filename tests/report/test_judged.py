"""The sections on language models: what is compared with what, and that the page says so."""

import json
import re
from pathlib import Path

import fake_evals
import fake_store
import numpy as np
import pytest
from test_build import page_data

from bench.judged import comparisons
from bench.points import points
from bench.report.bridge import bridge, interpolated
from bench.report.build import build_report
from bench.report.labels import ends
from bench.stats import paired_items
from bench.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return fake_evals.build(fake_store.build(tmp_path_factory.mktemp("judged") / "runs"))


def test_a_teacher_and_all_that_is_made_of_it_is_one_comparison(store: Store):
    (found,) = comparisons(store.load_evals()[0], store)
    assert not found.warnings
    assert found.rows[0].name == fake_evals.TEACHER and len(found.rows) == 2 + 2 * len(fake_evals.STUDENTS)
    assert [column.name for column in found.recall] == ["recall, all items", "recall at 512", "recall at 2,048"]
    assert len(found.pairs) == 3 * len(fake_evals.STUDENTS)
    roles = {pair.role for pair in found.pairs}
    assert roles == {"teacher", "window", "window only"}
    pair = next(p for p in found.pairs if p.row.info.mixer == "delta_net" and p.role == "window")
    recall = pair.differences["recall, all items"]
    mine, other = (row.cell(found.recall[0]).value for row in (pair.row, pair.against))  # type: ignore[union-attr]
    assert recall.n == 160 and recall.mean == pytest.approx(mine - other)
    assert recall.p_value is not None and recall.p_value < 0.01 and recall.verdict == "a is higher"
    assert pair.differences["agreement"].mean == pytest.approx(0.05)


def test_other_items_are_not_compared(tmp_path: Path):
    store = fake_evals.build(Store(tmp_path / "runs"))
    window = fake_evals.model("window 200 + 4 sinks, untrained", "window", window=200)
    fake_evals.judge(store, window, "bench_needle", 0.9, items_hash="other")
    (found,) = comparisons(store.load_evals()[0], store)
    assert found.warnings == ["bench_needle: window 200 + 4 sinks, untrained left out, asked other items or in another precision"]
    row = next(row for row in found.rows if row.info.kind == "window")
    assert row.cell(found.recall[0]) is None and "bench_needle" not in row.records
    assert '<td class="num" title="no matched pairs">–' in build_report(store, tmp_path / "r.html").path.read_text("utf-8")


def test_a_model_that_was_first_judged_alone_still_meets_its_referees(tmp_path: Path):
    store = fake_evals.build(Store(tmp_path / "runs"))
    record = next(
        r for r in store.load_evals()[0] if r.model.mixer == "gla" and r.model.kind == "converted" and r.task == "bench_needle"
    )
    alone = record.model.model_copy(update={"teacher": None, "referees": {}})
    store.write_eval(record.model_copy(update={"model": alone, "started": "2026-01-01T10:00:00Z"}))
    (found,) = comparisons(store.load_evals()[0], store)
    assert {pair.role for pair in found.pairs if pair.row.info.mixer == "gla"} == {"teacher", "window", "window only"}


def test_the_bridge_reads_mqar_at_equal_bytes(store: Store):
    found = bridge(points(store.load()[0]), store.load_evals()[0], store, {})
    assert found is not None
    values = {value["mixer"]: value for value in found["values"]}
    assert set(values) | {text.split("(")[1].rstrip(")") for text in found["left_out"]} == set(fake_evals.STUDENTS)
    assert len(values) >= 3 and ("Spearman" in found["rank"] or "too few" in found["rank"])
    assert interpolated([(100.0, 0.2), (400.0, 0.6)], 200.0) == pytest.approx(0.4)
    assert interpolated([(100.0, 0.2), (400.0, 0.6)], 500.0) is None
    assert bridge([], store.load_evals()[0], store, {}) is None


def test_the_page_has_both_sections_and_a_table_for_every_chart(store: Store, tmp_path: Path):
    summary = build_report(store, tmp_path / "r.html")
    page = summary.path.read_text("utf-8")
    assert summary.evaluations == 60 and summary.runs == 66
    for section in ("judged", "bridge", "pareto", "table"):
        assert f'id="h-{section}"' in page
    data = page_data(page)
    assert [chart["spec"] for chart in data["extras"]] == [
        "judged_pareto",
        "judged_lengths",
        "judged_speed",
        "judged_answers",
        "bridge",
    ]
    for chart in data["extras"]:
        assert chart["spec"] in data["specs"] and chart["values"]
        assert f'data-task="{chart["id"]}"' in page
    for table in (
        "Models made of teacher0",
        "Recall by length",
        "Answers by letter",
        "Memory and speed",
        "Synthetic against converted",
    ):
        assert f'aria-label="{table}"' in page
    table = re.search(r'aria-label="Models made of teacher0">(.*?)</table>', page, re.S)
    assert table and table.group(1).count("<tr") == 2 + 2 + 2 * len(fake_evals.STUDENTS)
    assert '<th scope="col" class="num" title="batch 32, context 2k">Decode, tokens/s</th>' in page and "90,000</td>" in page
    assert "<b>+" in page  # a difference with p below 0.01
    assert build_report(store, tmp_path / "one.html", task="mqar").evaluations == 0


def test_names_that_would_meet_are_left_to_the_tooltip():
    values = [
        {"name": n, "label": n, "kind": "student", "x": x, "y": y} for n, x, y in (("a", 1, 0.50), ("b", 1, 0.51), ("c", 9, 0.9))
    ]
    ends(values)
    assert [value["label"] for value in values] == ["", "b", "c"]
    lines = [{"name": "a", "label": "a", "kind": "model", "x": x, "y": y} for x, y in ((1024, 3.0), (4096, 1.0))]
    ends(lines, log_y=True)
    assert [value["label"] for value in lines] == ["", "a"]


def test_a_page_of_evaluations_alone(tmp_path: Path):
    store = fake_evals.build(Store(tmp_path / "runs"))
    page = build_report(store, tmp_path / "r.html").path.read_text("utf-8")
    assert "60 evaluations of 12 language models." in page
    assert 'id="h-bridge"' not in page and '<section aria-labelledby="h-pareto" hidden>' in page


def test_an_unreadable_evaluation_is_a_warning(tmp_path: Path):
    store = fake_evals.build(Store(tmp_path / "runs"))
    path = next(store.root.glob("*/eval.json"))
    content = json.loads(path.read_text()) | {"surprise": 1}
    path.write_text(json.dumps(content))
    records, warnings = store.load_evals()
    assert len(records) == 59 and len(warnings) == 1 and "surprise" in warnings[0]
    path.write_text(json.dumps({"schema_version": 99}))
    assert "newer than this program's" in store.load_evals()[1][0]


def test_mcnemar_counts_only_the_items_on_which_two_models_differ():
    a = {i: float(i < 60) for i in range(100)}
    b = {i: float(i < 50 or i >= 98) for i in range(100)}
    found = paired_items(a, b)
    # ten items only a has right, two only b: P(X <= 2) of a fair coin tossed twelve times, twice
    assert found.p_value == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert found.mean == pytest.approx(0.08) and found.n == 100
    assert paired_items(a, a).p_value == 1.0
    values = {i: float(x) for i, x in enumerate(np.random.default_rng(0).normal(1, 1, 40))}
    shifted = paired_items(values, dict.fromkeys(values, 0.0))
    assert shifted.p_value is not None and shifted.p_value < 0.001 and shifted.verdict == "a is higher"
