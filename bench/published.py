"""Published values in `results/published`, and how ours compare with them; that folder's README gives the rules. No torch.

A recipe's figure is a file of targets, each a published value of one of our models, and a file of orders between them.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from bench import catalog
from bench.errors import UserError, unknown
from bench.points import Point, points
from bench.records import RunRecord
from bench.spec import Frozen, TaskSpec
from bench.stats import paired_difference
from bench.sweep import Experiment, Sweep

FOLDER = catalog.package_dir("bench").parent / "results" / "published"
ORDERS = "_orders"
"""What the name of a file of orders ends with."""
INTERVAL_SEEDS = 3
"""Seeds from which a point has a 95 % interval."""

Verdict = Literal["agree", "differs", "not run"]
Kind = Literal["hard", "soft"]


def _parse_task(text: str) -> TaskSpec:
    name, *options = text.split(":")
    return TaskSpec(name=name, options=dict(option.split("=", 1) for option in options))


def _parse_models(text: str) -> tuple[tuple[str, int], ...]:
    pairs = (part.strip().rpartition(" d=") for part in text.split("|"))
    return tuple((label, int(width)) for label, _, width in pairs)


def _parse_order(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(name.strip() for name in group.split(",")) for group in text.split(">"))


class Target(Frozen):
    """One published value."""

    point: str
    """Its name, unique in the figure."""
    task: Annotated[TaskSpec, BeforeValidator(_parse_task)]
    """A run fits if its task has these options, whatever its others."""
    mixers: Annotated[tuple[tuple[str, int], ...], BeforeValidator(_parse_models)] = Field(min_length=1)
    """Label and width of our model, or of several of which the publication shows the best."""
    state_bytes: Annotated[int | None, BeforeValidator(lambda text: text or None)]
    """State as published; None where the figure has another axis."""
    value: float = Field(ge=0, le=1)
    """Accuracy."""
    tolerance: float = Field(gt=0)
    """Distance that still agrees."""
    target: Kind
    """Whether missing it fails a check."""
    source: str
    """Publication, and how the value was read."""

    def on(self, task: TaskSpec) -> bool:
        """Whether a task is the target's."""
        return task.name == self.task.name and all(task.options.get(key) == value for key, value in self.task.options.items())

    def fits(self, experiment: Experiment) -> bool:
        """Whether an experiment trains one of the target's models on its task."""
        return self.on(experiment.task) and (experiment.model.label(), experiment.model.d_model) in self.mixers


class Order(Frozen):
    """Groups of points, best first: every point of a group stands above every point of the next."""

    order: Annotated[tuple[tuple[str, ...], ...], BeforeValidator(_parse_order)] = Field(min_length=2)
    target: Kind
    source: str

    @property
    def text(self) -> str:
        """The order as it is written in the file."""
        return " > ".join(", ".join(group) for group in self.order)


@dataclass(frozen=True)
class Figure:
    """What was published of a recipe's figure."""

    recipe: str
    targets: tuple[Target, ...]
    orders: tuple[Order, ...]


@dataclass(frozen=True)
class Compared:
    """A published value beside ours; `point` is the best of the target's models, None until all of them have run."""

    target: Target
    point: Point | None
    verdict: Verdict

    @property
    def difference(self) -> float | None:
        """Ours minus the published value."""
        mean = None if self.point is None else self.point.accuracy.mean
        return None if mean is None else mean - self.target.value


@dataclass(frozen=True)
class ComparedOrder:
    """A published order beside ours; `reversed` names the pairs that stand the other way round."""

    order: Order
    verdict: Verdict
    reversed: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """A whole figure beside ours."""

    figure: Figure
    values: tuple[Compared, ...]
    orders: tuple[ComparedOrder, ...]

    @property
    def share_run(self) -> float:
        """Share of the published values that ours can be set beside."""
        return sum(item.point is not None for item in self.values) / len(self.values)

    @property
    def missed(self) -> list[str]:
        """Hard targets that differ, by name."""
        values = [item.target.point for item in self.values if (item.target.target, item.verdict) == ("hard", "differs")]
        return values + [item.order.text for item in self.orders if (item.order.target, item.verdict) == ("hard", "differs")]


def recipes() -> list[str]:
    """Recipes with a published figure."""
    return sorted(path.stem for path in FOLDER.glob("*.csv") if not path.stem.endswith(ORDERS))


def load(recipe: str) -> Figure:
    """The published figure of a recipe.

    Raises:
        UserError: there is none, or its file is damaged.
    """
    if recipe not in recipes():
        raise unknown("recipe with published values", recipe, recipes(), fix="Leave out --check for any other recipe.")
    targets = _rows(FOLDER / f"{recipe}.csv", Target)
    orders = FOLDER / f"{recipe}{ORDERS}.csv"
    return Figure(recipe, targets, _rows(orders, Order) if orders.exists() else ())


Row = TypeVar("Row", Target, Order)


def _rows(path: Path, kind: type[Row]) -> tuple[Row, ...]:
    """The rows of a file."""
    found: list[Row] = []
    with path.open(newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            try:
                found.append(kind.model_validate(row))
            except (ValidationError, ValueError, TypeError) as error:
                reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
                raise UserError(f"{path}, row {line} is not a published value ({reason}); restore the file.") from None
    return tuple(found)


def compare(figure: Figure, sweep: Sweep, found: Iterable[Point]) -> Comparison:
    """Sets points beside a published figure.

    Args:
        figure: the published values.
        sweep: the experiments that stand for them.
        found: points; those of the sweep are compared, whatever their labels.

    Raises:
        UserError: the sweep trains one of the published models under several settings.
    """
    by_id = {point.id: point for point in found}
    values = tuple(_compare(target, [e for e in sweep.experiments if target.fits(e)], by_id) for target in figure.targets)
    ours = {item.target.point: item.point for item in values}
    return Comparison(figure, values, tuple(_compare_order(order, ours.get) for order in figure.orders))


def _compare(target: Target, experiments: list[Experiment], by_id: Mapping[str, Point]) -> Compared:
    models = {(experiment.model.label(), experiment.model.d_model) for experiment in experiments}
    if len(models) < len(experiments):
        raise UserError(
            f"{target.point} would be trained under several settings, and a check compares one: give each --set one value."
        )
    found = [by_id.get(experiment.point_id()) for experiment in experiments]
    trained = [(point.accuracy.mean, point) for point in found if point is not None and point.accuracy.mean is not None]
    if len(trained) + sum(point is not None and _diverged(point) for point in found) < len(target.mixers):
        return Compared(target, None, "not run")
    if not trained:
        return Compared(target, None, "differs")
    mean, best = max(trained, key=lambda item: item[0])
    return Compared(target, best, "agree" if _agrees(target, mean, best) else "differs")


def _diverged(point: Point) -> bool:
    """Whether every run that was to be reported diverged, which is a result and not a missing one."""
    ends = {record.status for record in point.records if record.role == "report"}
    return point.accuracy.mean is None and ends == {"diverged"}


def _agrees(target: Target, mean: float, point: Point) -> bool:
    low, high = point.accuracy.low, point.accuracy.high
    inside = point.accuracy.n >= INTERVAL_SEEDS and low is not None and high is not None and low <= target.value <= high
    return inside or abs(mean - target.value) <= target.tolerance + 1e-9


def _compare_order(order: Order, ours: Callable[[str], Point | None]) -> ComparedOrder:
    pairs = [
        (better, worse) for above, below in zip(order.order, order.order[1:], strict=False) for better in above for worse in below
    ]
    reversed_: list[str] = []
    missing = False
    for better, worse in pairs:
        above = _stands_above(ours(better), ours(worse))
        missing |= above is None
        if above is False:
            reversed_.append(f"{worse} above {better}")
    return ComparedOrder(order, "differs" if reversed_ else "not run" if missing else "agree", tuple(reversed_))


def _stands_above(a: Point | None, b: Point | None) -> bool | None:
    """Whether a is above b or level with it, or the interval of their difference leaves that open; None without a common seed.

    Values published apart can both be 1.000 with us: a tie stands in no wrong order.
    """
    difference = paired_difference(a.seeds if a else {}, b.seeds if b else {})
    if difference.mean is None:
        return None
    return difference.mean >= 0 or (difference.high is not None and difference.high >= 0)


def reproductions(found: Sequence[Point]) -> list[Comparison]:
    """Every published figure of which some points are trained exactly as its recipe says, beside ours; most complete first.

    Args:
        found: all points of a store.
    """
    comparisons: list[Comparison] = []
    for recipe in recipes():
        figure = load(recipe)
        if not any(target.on(point.spec.task) for target in figure.targets for point in found):
            continue  # building the recipe would import torch
        sweep = catalog.load("recipe", recipe)()
        comparison = compare(figure, sweep, found)
        if comparison.share_run > 0:
            comparisons.append(comparison)
    return sorted(comparisons, key=lambda comparison: -comparison.share_run)


def sweep_points(sweep: Sweep, records: Iterable[RunRecord]) -> list[Point]:
    """The points that a sweep's experiments have among stored records."""
    planned = {experiment.point_id() for experiment in sweep.experiments}
    return points(record for record in records if record.spec.point_id() in planned)
