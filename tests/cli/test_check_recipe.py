"""`bench synthetic --recipe R --check`, trained once for a second: output, verdicts and exit codes."""

from __future__ import annotations

import shutil

import pytest

from tests.cli.conftest import TINY, Bench, Outcome

README = [*TINY, "--recipe=readme_plot", "--set=model.d_model=64", "--set=train.lr=1e-2", "--seeds=1", "--no-report", "--check"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Outcome]:
    """A store with a hard and a soft point, both far from published, and what training it printed."""
    bench = Bench(tmp_path_factory.mktemp("check"))
    return bench, bench("synthetic", *README, "--mixer=attention,hyena:train_features=true*2", f"--store={bench.folder / 'runs'}")


def dry(bench: Bench, mixer: str, store: str = "runs") -> tuple[int, dict[str, dict]]:
    found = bench("synthetic", *README, "--json", "--dry-run", f"--mixer={mixer}", f"--store={bench.folder / store}")
    return found.code, {line["point"]: line for line in found.lines("published")}


def test_training_ends_with_the_verdicts_and_the_caveats(trained: tuple[Bench, Outcome]) -> None:
    found = trained[1]
    assert found.code == 1
    assert "hard targets missed: Attention d=64." in found.out
    assert "model.d_model=64" in found.out and "does not reproduce" in found.out
    assert "Order (hard) not run | Gated DeltaNet d=64 > RWKV-7 d=64" in found.out


def test_a_missed_hard_value_fails_and_a_soft_one_does_not(trained: tuple[Bench, Outcome]) -> None:
    code, rows = dry(trained[0], "attention")
    assert code == 1
    row = rows["Attention d=64"]
    assert (row["verdict"], row["published"], row["seeds"]) == ("differs", 1.0, 1)
    assert row["accuracy"] < 0.9 and row["published_selection"] is None
    assert {row["verdict"] for name, row in rows.items() if name != "Attention d=64"} == {"not run"}
    code, rows = dry(trained[0], "hyena:train_features=true*2")
    assert (code, rows["Hyena d=64"]["target"], rows["Hyena d=64"]["verdict"]) == (0, "soft", "differs")
    assert rows["Attention d=64"]["verdict"] == "not run"  # this sweep does not hold it


def test_runs_of_older_code_count_and_are_named(trained: tuple[Bench, Outcome]) -> None:
    bench = trained[0]
    shutil.copytree(bench.folder / "runs", bench.folder / "older")
    for record in list((bench.folder / "older").glob("*/record.json")):
        record.write_text(record.read_text().replace(record.parent.name, "0" + record.parent.name[1:]))
        record.parent.rename(record.parent.with_name("0" + record.parent.name[1:]))
    for store, named in (("runs", False), ("older", True)):
        found = bench("synthetic", *README, "--dry-run", "--mixer=attention", f"--store={bench.folder / store}")
        assert ("all of its runs are of older mixer or task code" in found.out) == named
        assert "1 differs" in found.out


def test_the_dry_run_trains_nothing(trained: tuple[Bench, Outcome]) -> None:
    before = trained[0].files()
    code, rows = dry(trained[0], "attention", store="empty")
    assert (code, rows["Attention d=64"]["verdict"]) == (0, "not run")
    assert trained[0].files() == before


def test_a_mixer_of_other_settings_is_named(bench: Bench) -> None:
    asked = ["--recipe=readme_plot", "--mixer=attention", "--check", "--dry-run", "--device=cpu"]
    found = bench("synthetic", *asked, f"--store={bench.folder / 'runs'}")
    assert "Not the recipe's own settings (attention): this compares" in found.out, found.err


def test_a_part_of_the_recipe_reproduces(bench: Bench) -> None:
    part = ["--recipe=readme_plot", "--mixer=gla:n_heads=2", "--set=model.d_model=64", "--set=train.lr=1e-2"]
    for more, caveat in ([], False), (["--set=train.epochs=1"], True):
        found = bench("synthetic", *part, *more, "--check", "--dry-run", "--device=cpu", f"--store={bench.folder / 'runs'}")
        assert found.code == 0, found.err
        assert ("does not reproduce" in found.out) == caveat
        assert "63 not run; no hard target is missed among those that have run." in found.out
