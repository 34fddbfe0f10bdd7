"""Sweeps: experiments, their learning rates and seeds, and the runs that are still missing.

An experiment is trained in two stages. Selection runs, on seeds of their own, cover every learning rate; the rate with the
best validation accuracy is then trained on the reported seeds, and only their test scores become the point's accuracy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import Field, PositiveFloat, field_validator

from bench import provenance
from bench.launch import Fleet
from bench.points import choose_lr
from bench.records import RunRecord
from bench.spec import SELECTION_SEED, Frozen, ModelSpec, RunSpec, TaskSpec, TrainSpec, run_id
from bench.store import Store


class Experiment(Frozen):
    """What becomes one point of a plot: a task, a model, its training, and the learning rates to choose from."""

    task: TaskSpec
    model: ModelSpec
    train: TrainSpec = TrainSpec()
    lrs: tuple[PositiveFloat, ...] = Field(min_length=1)

    @field_validator("lrs")
    @classmethod
    def _each_once(cls, lrs: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(dict.fromkeys(lrs))

    def run(self, lr: float, seed: int) -> RunSpec:
        """The run of this experiment at a learning rate and a seed."""
        train = self.train.model_copy(update={"lr": lr})
        return RunSpec(task=self.task, model=self.model, train=train, seed=seed)

    def point_id(self) -> str:
        """Identity of the point that its runs become."""
        return self.run(self.lrs[0], 0).point_id()

    def selection_runs(self, select_seeds: int) -> list[RunSpec]:
        """Runs that choose the learning rate; none where there is no choice."""
        if len(self.lrs) == 1:
            return []
        return [self.run(lr, SELECTION_SEED + index) for lr in self.lrs for index in range(select_seeds)]

    def report_runs(self, lr: float, seeds: int) -> list[RunSpec]:
        """Runs that are reported."""
        return [self.run(lr, seed) for seed in range(seeds)]


class Sweep(Frozen):
    """What a recipe returns and `bench synthetic` runs."""

    experiments: tuple[Experiment, ...] = Field(min_length=1)
    select_seeds: int = Field(default=1, gt=0)
    """Seeds per learning rate in selection."""
    seeds: int = Field(default=3, gt=0, le=SELECTION_SEED)
    """Reported seeds per experiment."""

    @field_validator("experiments")
    @classmethod
    def _each_once(cls, experiments: tuple[Experiment, ...]) -> tuple[Experiment, ...]:
        return distinct(experiments)


def distinct(experiments: Iterable[Experiment]) -> tuple[Experiment, ...]:
    """Every experiment once, under its first name: `attention` and `base_conv+attention` are the same runs."""
    found: dict[tuple[str, tuple[float, ...]], Experiment] = {}
    for experiment in experiments:
        found.setdefault((experiment.point_id(), experiment.lrs), experiment)
    return tuple(found.values())


@dataclass
class ExperimentPlan:
    """What an experiment still needs, given what the store holds."""

    experiment: Experiment
    ready: list[RunSpec]
    """Runs that can start now."""
    waiting: int
    """Reported runs that wait for the learning rate to be chosen."""
    done: list[RunRecord]
    lr: float | None
    """The chosen learning rate, or None while selection is unfinished."""


class Planner:
    """Tells which runs of a sweep are missing from a store.

    Args:
        store: where records are looked up.
        rerun: "failed" counts records that are not done as missing, "all" counts every record as missing.
    """

    def __init__(self, store: Store, *, rerun: str | None = None) -> None:
        self.store, self.rerun = store, rerun
        self._seen: dict[str, RunRecord | None] = {}
        self._fresh: set[str] = set()

    def add(self, record: RunRecord) -> None:
        """Takes note of a run that has just finished."""
        self._seen[record.run_id] = record
        self._fresh.add(record.run_id)

    @staticmethod
    def identity(spec: RunSpec) -> str:
        """The identity of a run with the code as it is now."""
        return run_id(spec, provenance.identity_code(spec))

    def look_again(self, spec: RunSpec) -> RunRecord | None:
        """The record that another process has stored of a run since it was looked up, or None."""
        record = self.store.read(self.identity(spec))
        return None if record is None or record.digest() == self.outdated([spec]).get(record.run_id) else record

    def outdated(self, specs: Iterable[RunSpec]) -> dict[str, str]:
        """Digests of the stored records of missing runs, which are to be replaced, by run."""
        stored = (self._seen.get(self.identity(spec)) for spec in specs if self.lookup(spec) is None)
        return {record.run_id: record.digest() for record in stored if record is not None}

    def lookup(self, spec: RunSpec) -> RunRecord | None:
        """The record of a run if it counts as present."""
        identity = self.identity(spec)
        if identity not in self._seen:
            self._seen[identity] = self.store.read(identity)
        record = self._seen[identity]
        if record is None or identity in self._fresh:
            return record
        redo = self.rerun == "all" or (self.rerun == "failed" and record.status != "done")
        return None if redo else record

    def plan(self, experiment: Experiment, sweep: Sweep) -> ExperimentPlan:
        """What an experiment still needs."""
        done: list[RunRecord] = []

        def missing(runs: list[RunSpec]) -> list[RunSpec]:
            found = [(run, self.lookup(run)) for run in runs]
            done.extend(record for _, record in found if record is not None)
            return [run for run, record in found if record is None]

        selection = missing(experiment.selection_runs(sweep.select_seeds))
        if selection:
            return ExperimentPlan(experiment, selection, sweep.seeds, done, None)
        lr = choose_lr(done).lr if done else experiment.lrs[0]
        if lr is None:  # every selection run failed: there is nothing to report
            return ExperimentPlan(experiment, [], 0, done, None)
        return ExperimentPlan(experiment, missing(experiment.report_runs(lr, sweep.seeds)), 0, done, lr)


def fleets(runs: Iterable[RunSpec], largest: int) -> list[Fleet]:
    """Groups runs that differ in seed and learning rate only, at most `largest` together; order is kept."""
    groups: dict[str, list[RunSpec]] = {}
    for run in runs:
        groups.setdefault(run.point_id(), []).append(run)
    return [tuple(group[start : start + largest]) for group in groups.values() for start in range(0, len(group), largest)]
