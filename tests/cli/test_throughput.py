"""`bench throughput` through the command line, on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.store import Store
from tests.cli.conftest import Bench

SMALL = ["throughput", "--device=cpu", "--heads=2", "--batch=2", "--no-peers"]


def test_from_command_to_report(bench: Bench) -> None:
    outcome = bench(
        *SMALL, "--kernel=linear,window", "--mixer=gla", "--width=16", "--length=16,32", "--mode=train,decode", "--json"
    )
    assert outcome.code == 0, outcome.err
    rows = outcome.lines("speed")
    assert {(row["name"], row["mode"]) for row in rows} == {
        (name, mode) for name in ("linear", "window", "gla:n_heads=2") for mode in ("forward", "train", "decode")
    }
    assert len(rows) == 2 * 3 * 3
    for row in rows:
        assert row["status"] == "done" and row["gate"]["passed"], row
        assert row["graph"] is None and row["peak_memory_bytes"] is None
        assert row["eager"]["median_us"] > 0 and row["eager"]["n"] >= 1
        tokens = 2 * (1 if row["mode"] == "decode" else row["shape"]["length"])
        assert row["tokens_per_second"] == pytest.approx(tokens / row["eager"]["median_us"] * 1e6)
        assert row["bound_ratio"] == pytest.approx(row["eager"]["median_us"] / row["bound"]["microseconds"])
        assert row["path"] in (("chunked", "torch") if row["name"] == "window" else ("chunked",))
    assert "no graph time" in outcome.err and "x bound" in outcome.err

    records, warnings = Store(Path("results/runs")).load_speed()
    assert (len(records), warnings) == (len(rows), [])
    gla = next(record for record in records if record.subject == "mixer")
    assert gla.provenance.code.keys() == {"mixer:gla", "shared:kernels", "shared:mixers"}
    again = bench(*SMALL, "--kernel=linear", "--width=16", "--length=16", "--mode=decode")
    assert again.code == 0
    assert len(Store(Path("results/runs")).load_speed()[0]) == len(rows)  # measured again, not added

    report = bench("report", "--out=speeds.html", "--paper=figures")
    assert report.code == 0, report.err
    assert f"Report over {len(rows)} measured speeds (the store holds no trained runs): speeds.html" in report.out
    assert "No figures in figures" in report.out
    assert "Speed against length" in Path("speeds.html").read_text()


def test_a_wrong_kernel_gets_no_speed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.throughput import kernels

    right = kernels.linear_recurrence

    def wrong(q, k, v, **named):
        o, state = right(q, k, v, **named)
        return o * 1.01, state

    monkeypatch.setattr(kernels, "linear_recurrence", wrong)
    outcome = bench(*SMALL, "--kernel=delta", "--width=16", "--length=32", "--mode=train", "--json")
    assert outcome.code == 1
    for row in outcome.lines("speed"):
        assert (row["status"], row["gate"]["passed"], row["gate"]["worst"]) == ("wrong", False, "o")
        assert row["eager"] is row["graph"] is row["tokens_per_second"] is row["bound_ratio"] is None
    assert "gate red" in outcome.err and "tokens/s" in outcome.err
    records, _ = Store(Path("results/runs")).load_speed()
    assert [record.timing() for record in records] == [None, None]


def test_a_loose_file_is_timed(bench: Bench) -> None:
    from mixers import retention

    source = Path(retention.__file__).read_text().replace('@mixer("retention")', '@mixer("mine")')
    Path("mine.py").write_text(source)
    outcome = bench(*SMALL[:2], "--mixer=./mine.py@Retention", "--length=16", "--mode=prefill", "--json")
    assert outcome.code == 0, outcome.err
    assert [(row["name"], row["state_bytes"] > 0) for row in outcome.lines("speed")] == [("./mine.py@Retention", True)]


def test_a_dry_run_prints_rows_and_writes_nothing(bench: Bench) -> None:
    outcome = bench("throughput", "--preset=kernels", "--kernel=delta", "--device=cpu", "--dry-run", "--json")
    assert outcome.code == 0
    assert len(outcome.lines("plan")) == 24
    assert bench.files() == set()


def test_a_form_that_there_is_not(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXER_BENCH_BACKEND", "tritn")
    outcome = bench("throughput", "--kernel=linear")
    assert outcome.code == 2
    assert "MIXER_BENCH_BACKEND 'tritn'" in outcome.err and "Did you mean 'triton'?" in outcome.err


def test_kernels_are_listed(bench: Bench) -> None:
    outcome = bench("list", "kernels", "--json")
    assert {"gated_delta", "selective_scan"} <= {line["name"] for line in outcome.lines("kernel")}
