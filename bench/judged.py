"""Evaluations of language models, put side by side: a teacher, its students, their referees, and paired differences. No torch.

Two records are compared only if they hold the same items (`items_hash`) in the same precision.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean

from bench.judge.suites import MEMORY_AND_SPEED, RECALL
from bench.records import EvalMetric, EvalRecord, JudgedModel
from bench.stats import Difference, paired_items
from bench.store import Store


@dataclass(frozen=True)
class Column:
    """What is compared: one task, the tasks of a group, or all recall tasks (at one length).

    Args:
        name: as shown.
        tasks: behind it.
        length: only items of this length, or None.
    """

    name: str
    tasks: tuple[str, ...]
    length: int | None = None


@dataclass(frozen=True)
class Cell:
    """A value with what is known of its error.

    Args:
        value: mean over the items, or None.
        stderr: standard error over the items, or None.
        n: items.
        metric: its name.
        higher_is_better: which way is good.
        chance: what a guess scores, or None.
    """

    value: float | None
    stderr: float | None
    n: int
    metric: str
    higher_is_better: bool
    chance: float | None


@dataclass(frozen=True)
class JudgedRow:
    """One model of a comparison.

    Args:
        info: the model.
        records: by task.
        name: unique in the comparison.
    """

    info: JudgedModel
    records: dict[str, EvalRecord]
    name: str

    def cell(self, column: Column) -> Cell | None:
        """The value of a column, None if a task of it was not evaluated."""
        records = [self.records[task] for task in column.tasks if task in self.records]
        if len(records) < len(column.tasks) or not records:
            return None
        at = "" if column.length is None else str(column.length)
        found = [(record, record.metric(record.primary, at)) for record in records]
        known = [(record, item) for record, item in found if item is not None and item.value is not None]
        if len(known) < len(found):
            return None
        total = sum(item.n for _, item in known)
        value = sum(item.n * (item.value or 0.0) for _, item in known) / total
        errors = [item.stderr for _, item in known]
        stderr = None
        if all(error is not None for error in errors):
            stderr = math.sqrt(sum((item.n * (item.stderr or 0.0)) ** 2 for _, item in known)) / total
        chances = [record.chance for record, _ in known]
        chance = None if None in chances else fmean(chance for chance in chances if chance is not None)
        first = known[0]
        better = first[1].higher_is_better is not False
        return Cell(value, stderr, total, first[0].primary, better, chance)

    def measured(self, task: str, metric: str) -> list[EvalMetric]:
        """Every slice of a measurement."""
        record = self.records.get(task)
        return [] if record is None else [item for item in record.metrics if item.name == metric]

    @property
    def state_bytes(self) -> float | None:
        """Bytes of the cache of one sequence at the longest length that was measured."""
        found = self.measured(MEMORY_AND_SPEED, "state_bytes")
        return found[-1].value if found else None


@dataclass(frozen=True)
class Pair:
    """Row minus referee, column by column; `Difference.verdict` speaks of a (the row) and b (the referee)."""

    row: JudgedRow
    against: JudgedRow
    role: str
    differences: dict[str, Difference]


@dataclass
class Comparison:
    """A teacher with everything made of it, or a model alone.

    Args:
        title: name of the teacher or model.
        rows: teacher first, then students with their referees.
        columns: tasks and groups.
        recall: the mean of all recall items, if there are any, then by length.
        warnings: what was left out.
        store: where the items lie.
    """

    title: str
    rows: list[JudgedRow]
    columns: list[Column]
    recall: list[Column]
    store: Store
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every student against its referees."""
        by_print = {row.info.fingerprint: row for row in self.rows}
        found = []
        for row in self.rows:
            if row.info.kind != "converted":
                continue
            controls = [("control", other.info.fingerprint) for other in self.rows if other.info.kind == "control"]
            for role, fingerprint in (*row.info.referees.items(), *controls):
                against = by_print.get(fingerprint)
                if against is not None:
                    found.append(Pair(row, against, role.replace("_", " "), self._differences(row, against)))
        return found

    def _differences(self, row: JudgedRow, against: JudgedRow) -> dict[str, Difference]:
        return {column.name: difference(self.store, row, against, column) for column in (*self.columns, *self.recall)}


def difference(store: Store, row: JudgedRow, against: JudgedRow, column: Column) -> Difference:
    """Paired difference of a column over the items that both rows answered."""
    mine, other = (_items(store, found, column) for found in (row, against))
    return paired_items(mine, other)


def _items(store: Store, row: JudgedRow, column: Column) -> dict[tuple[str, str], float]:
    values: dict[tuple[str, str], float] = {}
    for task in column.tasks:
        record = row.records.get(task)
        frame = None if record is None else store.eval_items(record.eval_id)
        if record is None or frame is None:
            continue
        chosen = frame[frame["metric"] == ("nll" if record.primary == "ppl" else record.primary)]
        chosen = chosen[chosen["filter"] == chosen["filter"].iloc[0]] if len(chosen) else chosen
        if column.length is not None:
            chosen = chosen[chosen["length"] == column.length]
        values |= {(task, item): float(value) for item, value in zip(chosen["item"], chosen["value"], strict=True)}
    return values


def comparisons(records: Iterable[EvalRecord], store: Store) -> list[Comparison]:
    """Groups evaluations by teacher; models without students or teacher stand alone.

    Args:
        records: of a store.
        store: where their items lie.
    """
    records = list(records)
    teachers = {r.model.fingerprint: r.model.teacher for r in records if r.model.teacher is not None}
    groups: dict[str, list[EvalRecord]] = {}
    for record in records:
        fingerprint = record.model.fingerprint
        groups.setdefault(teachers.get(fingerprint, fingerprint), []).append(record)
    return [_comparison(group, store) for group in groups.values()]


def _comparison(records: list[EvalRecord], store: Store) -> Comparison:
    kept, warnings = _same_items(records)
    models: dict[str, JudgedModel] = {}
    for record in kept:
        known = models.get(record.model.fingerprint)
        # The newest description that knows its referees: a model may have been judged alone before.
        if known is None or len(record.model.referees) >= len(known.referees):
            models[record.model.fingerprint] = record.model
    names = Counter(model.name for model in models.values())
    rows = [
        JudgedRow(
            info=model,
            records={record.task: record for record in kept if record.model.fingerprint == fingerprint},
            name=model.name if names[model.name] == 1 else f"{model.name} ({fingerprint[:6]})",
        )
        for fingerprint, model in models.items()
    ]
    rows = _ordered(rows)
    recall = tuple(dict.fromkeys(record.task for record in kept if record.task in RECALL))
    lengths = sorted({length for record in kept if record.task in RECALL for length in record.lengths})
    columns = [Column("recall, all items", recall)] if recall else []
    columns += [Column(f"recall at {length:,}", recall, length) for length in lengths]
    return Comparison(rows[0].name, rows, _columns(kept), columns, store, warnings)


def _ordered(rows: list[JudgedRow]) -> list[JudgedRow]:
    """Teacher and control, then each student, by name, followed by its own referees."""
    students = sorted((row for row in rows if row.info.kind == "converted"), key=lambda row: row.name)
    found = [row for row in rows if row.info.kind in ("plain", "control")]
    for student in students:
        mine = [row for row in rows if row.info.fingerprint in student.info.referees.values()]
        found += [row for row in (student, *mine) if row not in found]
    return found + [row for row in rows if row not in found]


def _same_items(records: Sequence[EvalRecord]) -> tuple[list[EvalRecord], list[str]]:
    """The newest record of each model and task among those that hold the items that most models were asked."""
    found: list[EvalRecord] = []
    warnings: list[str] = []
    for task in dict.fromkeys(record.task for record in records):
        mine = [record for record in records if record.task == task]
        asked = Counter({(record.items_hash, record.precision): 0 for record in mine})
        for key, _ in {((r.items_hash, r.precision), r.model.fingerprint) for r in mine}:
            asked[key] += 1
        best = max(asked, key=lambda key: (asked[key], max(r.started for r in mine if (r.items_hash, r.precision) == key)))
        newest = {r.model.fingerprint: r for r in mine if (r.items_hash, r.precision) == best}
        found += newest.values()
        lost = {r.model.name for r in mine if r.model.fingerprint not in newest}
        if lost:
            warnings.append(f"{task}: {', '.join(sorted(lost))} left out, asked other items or in another precision")
    return found, warnings


def _columns(records: Sequence[EvalRecord]) -> list[Column]:
    """One column a task or group; measurements of memory and speed have a table of their own."""
    groups: dict[str, list[str]] = {}
    for record in records:
        if record.task != MEMORY_AND_SPEED:
            groups.setdefault(record.group or record.task, []).append(record.task)
    return [Column(name, tuple(dict.fromkeys(tasks))) for name, tasks in groups.items()]
