"""A sweep while it trains: hands out fleets, takes note of what comes back, and shares runs with other drivers on the store."""

from __future__ import annotations

import time
from collections import Counter

from bench.announce import SweepFile
from bench.claims import holder
from bench.commands.progress import SweepProgress, fleet_name
from bench.launch import Event, Workers
from bench.records import RunRecord
from bench.spec import RunSpec
from bench.sweep import Planner, Sweep, fleets

MAX_DEATHS = 2
"""Workers that one run may take down without getting on in between."""
RETRY_SECONDS = 2.0
"""How often to look again after a run that another process trains."""


class Training:
    """A sweep in progress.

    Args:
        sweep: what is to be trained.
        planner: what is missing.
        workers: who trains.
        fleet_size: most runs in a fleet.
        progress: where to show it.
        sweep_file: where other hosts see it.
    """

    def __init__(
        self,
        sweep: Sweep,
        planner: Planner,
        workers: Workers,
        fleet_size: int,
        progress: SweepProgress,
        sweep_file: SweepFile,
    ) -> None:
        self.sweep, self.planner, self.workers, self.fleet_size = sweep, planner, workers, fleet_size
        self.progress, self.sweep_file = progress, sweep_file
        self.deaths: Counter[RunSpec] = Counter()
        self.reasons: dict[RunSpec, str] = {}
        self.saved: dict[RunSpec, int] = {}
        self.held: dict[RunSpec, float] = {}
        self.met: set[str] = set()
        self.several = len({experiment.task.name for experiment in sweep.experiments}) > 1

    def run(self) -> None:
        """Trains until nothing is missing.

        Raises:
            Fault: the store or the engine failed; what is stored is kept.
        """
        while True:
            known = self.progress.finished
            self._hand_out()
            if self.progress.finished > known:
                continue  # a record that others stored, or of a run that was given up, may have made more runs ready
            if not self.workers.busy() and not self.held:
                return
            for event in self.workers.events(timeout=1.0):
                self._take_in(event)
            self.sweep_file.beat(self.progress.finished)

    def _hand_out(self) -> None:
        """Gives out fleets that can start now, as long as there are workers for them."""
        # a record may come from elsewhere than `_free`: from a fleet of ours that has the run under another name
        self.held = {spec: until for spec, until in self.held.items() if self.planner.lookup(spec) is None}
        for experiment in self.sweep.experiments:
            if not self.workers.idle():
                return
            busy = self.workers.busy()
            ready = [spec for spec in self.planner.plan(experiment, self.sweep).ready if spec not in busy and self._free(spec)]
            # a run that took a worker down is tried once more, by itself
            alone = [(spec,) for spec in ready if self.deaths[spec]]
            for fleet in [*fleets((spec for spec in ready if not self.deaths[spec]), self.fleet_size), *alone]:
                if not self.workers.idle():
                    return
                self.progress.start(fleet, fleet_name(fleet, [self._name(spec) for spec in fleet]))
                self.workers.submit(fleet, self.planner.outdated(fleet))

    def _free(self, spec: RunSpec) -> bool:
        """Whether a missing run can be handed out: not while another process trains it, nor after it killed its workers."""
        if spec in self.held:
            if time.monotonic() < self.held[spec]:
                return False
            del self.held[spec]
            record = self.planner.look_again(spec)
            if record is not None:
                self._record(record)
                return False
            if holder(self.planner.store, self.planner.identity(spec)) is not None:
                self._hold(spec)
                return False
        if self.deaths[spec] >= MAX_DEATHS:
            self._give_up(spec)
            return False
        return True

    def _take_in(self, event: Event) -> None:
        """Acts upon an event."""
        if event.kind == "progress":
            self.progress.update(event.fleet, event.content)
        elif event.kind == "record":
            self._record(event.content)
        elif event.kind == "held":
            self._hold(event.content)
        elif event.kind == "note":
            self.progress.note(event.content)
        elif event.kind == "broken":
            raise event.content
        else:
            self._over(event)

    def _record(self, record: RunRecord) -> None:
        self.planner.add(record)
        self.progress.finish(record, self._name(record.spec))

    def _hold(self, spec: RunSpec) -> None:
        """Another process trains a run: it is left to that, and looked after again."""
        self.held[spec] = time.monotonic() + RETRY_SECONDS
        owner = holder(self.planner.store, self.planner.identity(spec))
        if owner is not None and f"{owner.host} {owner.pid}" not in self.met:
            self.met.add(f"{owner.host} {owner.pid}")
            self.progress.note(f"Process {owner.pid} on {owner.host} trains some of these runs, whose records are awaited.")

    def _over(self, event: Event) -> None:
        """A fleet is over. Runs that are neither stored nor held by others took their worker down, or lost it."""
        self.progress.end(event.fleet)
        for spec in event.fleet:
            if self.planner.lookup(spec) is not None or spec in self.held:
                continue
            reason = event.content or "it ended without a record"
            if event.kind != "lost":
                self._count_death(spec, reason)
            if self.deaths[spec] < MAX_DEATHS:
                self.progress.note(f"A worker ended ({reason}) on {self._name(spec)}; the run goes on from its last checkpoint.")

    def _count_death(self, spec: RunSpec, reason: str) -> None:
        """Deaths count until a run has saved a new checkpoint: then it is the cluster that kills, and not the run."""
        path = self.planner.store.path(self.planner.identity(spec)) / "checkpoint.pt"
        saved = path.stat().st_mtime_ns if path.exists() else 0
        if self.saved.get(spec, 0) != saved:
            self.deaths[spec] = 0
        self.saved[spec] = saved
        self.deaths[spec] += 1
        self.reasons[spec] = reason

    def _give_up(self, spec: RunSpec) -> None:
        """Records a run that took down too many workers, unless another process is at it."""
        import torch

        from bench.runner import record_death

        outdated = self.planner.outdated([spec]).get(self.planner.identity(spec))
        record = record_death(spec, torch.device(self.workers.device), self.planner.store, self.reasons[spec], outdated)
        if record is None:
            self._hold(spec)
        else:
            self._record(record)

    def _name(self, spec: RunSpec) -> str:
        return f"{spec.task.name} {spec.name()}" if self.several else spec.name()
