"""`bench synthetic --recipe R --check`, trained for a second: output, verdicts and exit codes."""

from __future__ import annotations

from tests.cli.conftest import TINY, Bench

README = [*TINY, "--recipe=readme_plot", "--set=model.d_model=64", "--set=train.lr=1e-2", "--seeds=1", "--no-report", "--check"]


def published(bench: Bench, *arguments: str) -> tuple[int, dict[str, dict]]:
    found = bench("synthetic", *README, "--json", *arguments)
    return found.code, {line["point"]: line for line in found.lines("published")}


def test_a_missed_hard_value_fails_and_a_soft_one_does_not(bench: Bench) -> None:
    code, rows = published(bench, "--mixer=attention")
    assert code == 1
    row = rows["Attention d=64"]
    assert (row["verdict"], row["published"], row["seeds"]) == ("differs", 1.0, 1)
    assert row["accuracy"] < 0.9 and row["published_selection"] is None
    assert {row["verdict"] for name, row in rows.items() if name != "Attention d=64"} == {"not run"}
    code, rows = published(bench, "--mixer=hyena*2")
    assert (code, rows["Hyena d=64"]["target"]) == (0, "soft")
    assert rows["Attention d=64"]["verdict"] == "not run"  # this sweep does not hold it


def test_the_dry_run_compares_what_is_there(bench: Bench) -> None:
    code, rows = published(bench, "--mixer=attention", "--dry-run")
    assert (code, rows["Attention d=64"]["verdict"]) == (0, "not run")
    assert bench.files() == set()
    published(bench, "--mixer=attention")
    before = bench.files()
    code, rows = published(bench, "--mixer=attention", "--dry-run")
    assert (code, rows["Attention d=64"]["verdict"]) == (1, "differs")
    assert bench.files() == before


def test_people_read_a_table_and_the_caveats(bench: Bench) -> None:
    found = bench("synthetic", *README, "--mixer=attention")
    assert found.code == 1
    assert "hard targets missed: Attention d=64." in found.out
    assert "model.d_model=64" in found.out and "does not reproduce" in found.out
    assert "Order (hard) not run | Gated DeltaNet d=64 > RWKV-7 d=64" in found.out
