"""A driver's bookkeeping, with workers that only pretend: it comes to an end however a record arrives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.announce import SweepFile
from bench.commands.console import Output
from bench.commands.progress import SweepProgress
from bench.commands.request import Request, build_sweep
from bench.commands.training import Training
from bench.errors import UserError
from bench.launch import Event, Fleet, Workers
from bench.outcome import Clock, Outcome, make_record
from bench.records import Metric
from bench.spec import RunSpec
from bench.store import Store
from bench.sweep import Experiment, Planner, Sweep
from tests.cli.conftest import Bench
from tests.unit.small_runs import CPU, spec


class Pretending(Workers):
    """One worker, that says a run is held before it says that it is done, as for a run that another process holds."""

    device = "cpu"

    def __init__(self) -> None:
        self.fleet: Fleet = ()
        self.patience = 20

    def idle(self) -> int:
        return int(not self.fleet)

    def busy(self) -> set[RunSpec]:
        return set(self.fleet)

    def submit(self, fleet: Fleet, outdated: Mapping[str, str]) -> None:
        self.fleet = fleet

    def events(self, timeout: float) -> Iterator[Event]:
        self.patience -= 1
        assert self.patience, "the driver goes on for ever"
        fleet, self.fleet = self.fleet, ()
        for run in fleet:
            yield from self.end(fleet, run)
        yield from [Event("finished", fleet)] if fleet else []

    def end(self, fleet: Fleet, run: RunSpec) -> Iterator[Event]:
        yield Event("held", fleet, run)
        yield Event("record", fleet, make_record(run, CPU, Outcome(), Clock(CPU, 1), 1))

    def stop(self) -> None:
        pass


def test_a_held_run_whose_record_comes_another_way(tmp_path: Path) -> None:
    run, store = spec(), Store(tmp_path)
    sweep = Sweep(experiments=(Experiment(task=run.task, model=run.model, train=run.train, lrs=(1e-2,)),), seeds=1)
    output = Output()
    progress, sweep_file = SweepProgress(output, 1), SweepFile(store, "bench synthetic", "local", 1)
    training = Training(sweep, Planner(store), Pretending(), 16, progress, sweep_file)
    training.run()
    assert progress.finished == 1 and not training.held


class Elsewhere(Pretending):
    """Runs that another process trains: its records are found in the store alone."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store

    def end(self, fleet: Fleet, run: RunSpec) -> Iterator[Event]:
        outcome = Outcome()
        outcome.metrics = [Metric(split=split, name="accuracy", slice="mean", value=0.5, n=1) for split in ("valid", "test")]
        self.store.write(make_record(run, CPU, outcome, Clock(CPU, 1), 1))
        yield Event("held", fleet, run)


def test_reported_runs_follow_a_selection_that_was_found_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last record of a selection arrives as no event; the driver ended there, and called the point failed."""
    monkeypatch.setattr("bench.commands.training.RETRY_SECONDS", 0.0)
    run, store = spec(), Store(tmp_path)
    sweep = Sweep(experiments=(Experiment(task=run.task, model=run.model, train=run.train, lrs=(1e-3, 1e-2)),), seeds=2)
    progress, sweep_file = SweepProgress(Output(), 1), SweepFile(store, "bench synthetic", "local", 1)
    planner = Planner(store)
    Training(sweep, planner, Elsewhere(store), 16, progress, sweep_file).run()
    plan = planner.plan(sweep.experiments[0], sweep)
    assert (len(plan.done), plan.ready, plan.waiting) == (2 * sweep.select_seeds + 2, [], 0)


def request(**changes: Any) -> Request:
    given: dict[str, Any] = {
        **dict.fromkeys(("recipe", "seeds", "select_seeds", "jobs", "rerun", "report")),
        **{"task": "mqar", "mixers": ["attention"], "settings": [], "device": "cpu", "store": Path(), "fleet": 16, "dry_run": True},
    }
    return Request(**given | changes)


def test_nothing_is_asked_for_twice() -> None:
    once = build_sweep(request(settings=["train.lr=1e-3"]))
    assert build_sweep(request(settings=["train.lr=1e-3,0.001"])) == once
    assert build_sweep(request(mixers=["attention,base_conv+attention"], settings=["train.lr=1e-3"])) == once
    two = build_sweep(request(settings=["train.lr=3e-3,1e-3,3e-3"]))
    assert {experiment.lrs for experiment in two.experiments} == {(3e-3, 1e-3)}
    twice = Sweep(experiments=once.experiments * 2)
    assert twice.experiments == once.experiments


def test_reported_seeds_end_where_those_of_selection_begin(bench: Bench) -> None:
    assert build_sweep(request(seeds=1000)).seeds == 1000
    with pytest.raises(UserError, match="--seeds 1001 is too many"):
        request(seeds=1001)
    outcome = bench.tiny("--mixer=attention", "--seeds=1001", "--dry-run")
    assert outcome.code == 2 and outcome.err.startswith("bench: --seeds 1001 is too many")
    assert len(outcome.err.strip().splitlines()) == 1
