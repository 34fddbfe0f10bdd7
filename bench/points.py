"""Runs grouped into the points of a plot: learning rate chosen on validation, accuracy reported on test. No torch.

A point is every run whose specs differ in seed and learning rate only (`RunSpec.point_id`). The learning rate is chosen
on the selection seeds' validation split; the point's accuracy is the test accuracy of the reported seeds at that rate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from bench.records import CellInfo, Metric, RunRecord, StateInfo, Status
from bench.spec import RunSpec, digest
from bench.stats import Interval, mean_interval


@dataclass(frozen=True)
class LrScore:
    """How one learning rate did on the selection seeds; it sorts best first.

    Args:
        accuracy: mean validation accuracy; a diverged run counts as 0.
        loss: mean validation loss; a diverged run counts as infinite.
        n: runs behind the means; failed and out-of-memory runs are left out.
    """

    accuracy: float
    loss: float
    n: int


@dataclass(frozen=True)
class LrChoice:
    """Every learning rate tried, by value, and the best (None if none can be scored)."""

    scores: dict[float, LrScore]
    lr: float | None


@dataclass(frozen=True)
class Trial:
    """One run in the matrix of learning rate by seed."""

    lr: float
    seed: int
    role: str
    status: Status
    valid: float | None
    test: float | None
    run_id: str


@dataclass(frozen=True)
class Point:
    """One point of a plot.

    Args:
        id: `RunSpec.point_id`.
        name: unique among the points of its task: the label, and where needed the options that tell it apart.
        spec: the spec of one of the runs; the same for all but seed and learning rate.
        lr: the chosen learning rate, None if no run could be scored.
        lr_source: what it was chosen on, in words.
        accuracy: mean test accuracy over the reported seeds at `lr`, with its interval.
        seeds: test accuracy of each reported seed.
        slices: mean test accuracy of each cell or cell/group, over the same seeds.
        metrics: mean of every other test metric, such as "binding gain", over the same seeds.
        trials: the matrix of learning rate by seed, every run.
        reported: the records behind `accuracy`.
        records: all records of the point.
        warnings: what a reader must know before trusting the point.
    """

    id: str
    name: str
    label: str
    mixer: str
    spec: RunSpec
    parameters: int
    state: StateInfo
    cells: list[CellInfo]
    lr: float | None
    lr_source: str
    lr_scores: dict[float, LrScore]
    accuracy: Interval
    seeds: dict[int, float]
    slices: dict[str, float]
    metrics: dict[str, float]
    trials: list[Trial]
    statuses: dict[str, int]
    reported: list[RunRecord]
    records: list[RunRecord]
    warnings: list[str]

    @property
    def task(self) -> str:
        """The task as written on the command line, e.g. `mqar:vocab_size=256`."""
        options = self.spec.task.options
        return ":".join([self.spec.task.name, *(f"{key}={value}" for key, value in sorted(options.items()))])

    @property
    def family(self) -> str:
        """The family that the task is scored with; "" in records older than families."""
        return self.records[-1].family

    @property
    def bits_needed(self) -> float:
        """Bits that the hardest test cell asks of a causal state."""
        return max((cell.bits_needed for cell in self.cells), default=0.0)

    @property
    def train_seconds(self) -> float | None:
        """Mean training time of a reported run."""
        return fmean(record.train_seconds for record in self.reported) if self.reported else None

    @property
    def examples_per_second(self) -> float | None:
        """Mean training speed of the reported runs."""
        speeds = [r.examples_per_second for r in self.reported if r.examples_per_second is not None]
        return fmean(speeds) if speeds else None

    @property
    def failures(self) -> list[RunRecord]:
        """The runs that are not done."""
        return [record for record in self.records if record.status != "done"]


def choose_lr(records: Iterable[RunRecord]) -> LrChoice:
    """Picks the learning rate with the best mean validation accuracy; ties: lower validation loss, then smaller rate.

    A rate that lost runs (failed, out of memory) is passed over while another has more scores, however good its survivors are:
    one lucky seed of three says less than three. Seeds that were only not run yet do not count against a rate.

    Args:
        records: the selection runs of one point.

    Returns:
        The score of every learning rate that has at least one usable run, and the winner.
    """
    by_lr: dict[float, list[tuple[float, float]]] = {}
    lossy: set[float] = set()
    for record in records:
        score = _selection_score(record)
        if score is None:
            lossy.add(record.spec.train.lr)
        else:
            by_lr.setdefault(record.spec.train.lr, []).append(score)
    scores = {
        lr: LrScore(fmean(accuracy for accuracy, _ in runs), fmean(loss for _, loss in runs), len(runs))
        for lr, runs in sorted(by_lr.items())
    }
    most = max((score.n for score in scores.values()), default=0)
    sound = [lr for lr, score in scores.items() if score.n == most or lr not in lossy]
    best = min(sound, key=lambda lr: (-scores[lr].accuracy, scores[lr].loss, lr), default=None)
    return LrChoice(scores, best)


def points(records: Iterable[RunRecord]) -> list[Point]:
    """Groups records into points, in order of task, mixer, label and state size."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(record.spec.point_id(), []).append(record)
    found = [_point(identity, group) for identity, group in groups.items()]
    found.sort(key=lambda p: (p.task, p.mixer, p.label, p.state.true_bytes, p.id))
    return _named(found)


def _selection_score(record: RunRecord) -> tuple[float, float] | None:
    """Validation accuracy and loss of a run, None if the run says nothing about its learning rate."""
    if record.status == "diverged":
        return 0.0, math.inf
    accuracy = record.metric("valid", "accuracy")
    if record.status != "done" or accuracy is None:
        return None
    loss = record.metric("valid", "loss")
    return accuracy, math.inf if loss is None else loss


def _point(identity: str, group: list[RunRecord]) -> Point:
    """The point of records that share a point id."""
    current, replaced = _newest(group)
    choice, source = _lr_of_point(current)
    reported = [r for r in current if r.role == "report" and r.status == "done" and r.spec.train.lr == choice.lr]
    values = {r.spec.seed: v for r in reported if (v := r.metric("test", "accuracy")) is not None}
    sample = (reported or current)[-1]
    return Point(
        id=identity,
        name=sample.label,
        label=sample.label,
        mixer=sample.mixer,
        spec=sample.spec,
        parameters=sample.parameters,
        state=sample.state,
        cells=sample.cells,
        lr=choice.lr,
        lr_source=source,
        lr_scores=choice.scores,
        accuracy=mean_interval(list(values.values()), bounds=(0.0, 1.0)),
        seeds=values,
        slices=_means(reported, lambda m: m.slice if m.name == "accuracy" and m.slice != "mean" else None),
        metrics=_means(reported, lambda m: m.name if m.name not in ("accuracy", "loss") and m.slice == "mean" else None),
        trials=[_trial(r) for r in current],
        statuses=dict(Counter(r.status for r in current)),
        reported=reported,
        records=current,
        warnings=_warnings(current, replaced, reported, choice, source),
    )


def _newest(group: list[RunRecord]) -> tuple[list[RunRecord], int]:
    """The records of the newest record's mixer and task, by learning rate and seed, and how many others were set aside.

    A changed mixer or task is another function, so older runs count neither in the mean nor in the choice of the rate, even
    those that no newer run repeats. Shared code may differ: that is said in a warning.
    """
    ordered = sorted(group, key=lambda r: (r.started, r.run_id))
    own = _own_code(ordered[-1])
    newest = {(r.spec.train.lr, r.spec.seed): r for r in ordered if _own_code(r) == own}
    return [newest[key] for key in sorted(newest)], len(group) - len(newest)


def _own_code(record: RunRecord) -> dict[str, str]:
    """Source hashes of a run's mixers and task, without those of the code that all runs share."""
    return {key: value for key, value in record.provenance.code.items() if key.startswith(("mixer:", "task:"))}


def _lr_of_point(records: Sequence[RunRecord]) -> tuple[LrChoice, str]:
    """The learning rate of a point and what it rests on."""
    choice = choose_lr(r for r in records if r.role == "select")
    if choice.lr is not None:
        n = choice.scores[choice.lr].n
        return choice, f"validation accuracy of {n} selection seed{'s' if n > 1 else ''}"
    choice = choose_lr(r for r in records if r.role == "report")
    if len({r.spec.train.lr for r in records}) == 1:
        return replace(choice, lr=records[0].spec.train.lr), "the only rate tried"
    return choice, "validation accuracy of the reported seeds"


def _means(records: Sequence[RunRecord], name_of: Callable[[Metric], str | None]) -> dict[str, float]:
    """Means of test metrics over the records that have them, by the name that `name_of` gives; None leaves a metric out."""
    values: dict[str, list[float]] = {}
    for record in records:
        for metric in record.metrics:
            name = name_of(metric)
            if metric.split == "test" and name is not None and metric.value is not None:
                values.setdefault(name, []).append(metric.value)
    return {name: fmean(found) for name, found in values.items()}


def _trial(record: RunRecord) -> Trial:
    """One entry of the matrix of learning rate by seed."""
    valid, test = record.metric("valid", "accuracy"), record.metric("test", "accuracy")
    return Trial(record.spec.train.lr, record.spec.seed, record.role, record.status, valid, test, record.run_id)


def _warnings(current: list[RunRecord], replaced: int, reported: list[RunRecord], choice: LrChoice, source: str) -> list[str]:
    """What a reader must know before trusting a point."""
    found: list[str] = []
    if replaced:
        found.append(f"{replaced} run(s) of older mixer or task code were set aside for newer ones")
    if len({digest(r.provenance.code) for r in current}) > 1:
        found.append("its runs were made by different versions of the code")
    if len({(r.device, r.provenance.hardware.get("gpu", "")) for r in reported}) > 1:
        found.append("its reported runs come from different devices: " + ", ".join(sorted({r.device for r in reported})))
    lost = Counter(r.status for r in current if r.role == "report" and r.spec.train.lr == choice.lr and r.status != "done")
    if lost:
        counts = ", ".join(f"{n} {status}" for status, n in sorted(lost.items()))
        found.append(f"the mean leaves out reported seeds that did not finish ({counts})")
    if source.endswith("reported seeds"):
        found.append("its learning rate was chosen on the reported seeds themselves (their validation split)")
    if not reported:
        found.append("no reported run at the chosen learning rate yet")
    return found


def _named(found: list[Point]) -> list[Point]:
    """Gives points of one task that share a label the options that tell them apart."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in found:
        groups.setdefault((point.task, point.label), []).append(point)
    names: dict[str, str] = {}
    for group in groups.values():
        flat = {point.id: _flat(point.spec) for point in group}
        keys = sorted({key for options in flat.values() for key in options})
        telling = [key for key in keys if len({repr(options.get(key)) for options in flat.values()}) > 1]
        for point in group:
            suffix = " ".join(f"{key.rsplit('.', 1)[-1]}={flat[point.id].get(key)}" for key in telling)
            names[point.id] = f"{point.label} {suffix}".strip()
    return [replace(point, name=names[point.id]) for point in found]


def _flat(spec: RunSpec) -> dict[str, Any]:
    """Model and training settings by dotted path, without seed and learning rate; the layers as one string."""
    model = spec.model.model_dump(exclude={"layers"})
    model["layers"] = "+".join(layer.label() for layer in spec.model.layers)
    train = spec.train.model_dump(exclude={"lr"})
    return {**{f"model.{k}": v for k, v in model.items()}, **{f"train.{k}": v for k, v in train.items()}}
