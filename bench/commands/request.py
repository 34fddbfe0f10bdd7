"""What `bench synthetic` was asked for: its options, the sweep they mean, and what can be said before any training."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench import catalog
from bench.commands.suite import suite_sweep
from bench.commands.trial import Trials, is_outside
from bench.device import Device
from bench.errors import UserError, unknown
from bench.grammar import apply_settings, parse_mixers
from bench.records import StateInfo
from bench.spec import SELECTION_SEED, LayerSpec, ModelSpec, TaskSpec, TrainSpec
from bench.sweep import Experiment, Sweep, distinct

DEFAULT_RECIPE = "laptop"


@dataclass(frozen=True)
class Request:
    """The options of `bench synthetic`.

    Raises:
        UserError: `rerun` is neither failed nor all, or there are more seeds than are kept for reporting.
    """

    task: str | None
    mixers: list[str]
    recipe: str | None
    settings: list[str]
    seeds: int | None
    select_seeds: int | None
    device: str
    store: Path
    jobs: int | None
    fleet: int
    """Most runs that are trained together as one batched model."""
    rerun: str | None
    dry_run: bool
    report: Path | None
    """Where the report goes, or None for no report."""
    suite: str | None = None
    preset: str | None = None
    launch: str = "local"
    """Where fleets train."""
    check: bool = False
    """Whether to compare with the recipe's published values."""

    def __post_init__(self) -> None:
        if self.rerun not in (None, "failed", "all"):
            raise unknown("value of --rerun", self.rerun, ["failed", "all"])
        if self.seeds is not None and self.seeds > SELECTION_SEED:
            raise UserError(f"--seeds {self.seeds} is too many: seeds from {SELECTION_SEED} on only choose learning rates.")


@dataclass(frozen=True)
class ModelInfo:
    """What is known of an experiment before any training."""

    label: str
    parameters: int
    state: StateInfo
    tokens_per_run: int


def build_sweep(request: Request) -> Sweep:
    """The sweep that a request asks for.

    Raises:
        UserError: unknown names, paths or options, or values that do not fit.
    """
    if request.suite is not None or request.preset is not None:
        sweep = suite_sweep(request.suite, request.preset, others=(request.task, request.recipe))
    else:
        sweep = named_sweep(request)
    if request.mixers:
        sweep = _with_mixers(sweep, request.mixers)
    sweep = apply_settings(sweep, request.settings)
    counts = {"seeds": request.seeds, "select_seeds": request.select_seeds}
    return sweep.model_copy(update={key: count for key, count in counts.items() if count is not None})


def named_sweep(request: Request) -> Sweep:
    """The sweep of a task or a recipe."""
    if request.task is None and request.recipe is None:
        raise UserError("Nothing to run: give --task (see `bench list tasks`), --recipe (see `bench list recipes`) or --suite.")
    if request.task is not None:
        catalog.load("task", request.task)
    name = request.recipe or (request.task if request.task in catalog.names("recipe") else DEFAULT_RECIPE)
    make = catalog.load("recipe", name or DEFAULT_RECIPE)
    if request.task is None:
        return _call(make, name)
    if "task" in catalog.options_of(make):
        return _call(make, name, task=request.task)
    return _with_task(_call(make, name), request.task, named=request.recipe)


def _call(make: Callable[..., Any], name: str, **options: str) -> Sweep:
    """What a recipe returns.

    Raises:
        UserError: not a sweep, or one with a field that does not exist or does not fit.
    """
    try:
        sweep = make(**options)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        fault = "is unknown" if first["type"] == "extra_forbidden" else f"does not fit: {first['msg'].lower()}"
        near = _fields_like(str(first["loc"][-1])) if fault == "is unknown" else ""
        raise UserError(f"Recipe {name!r} is not a valid sweep: field {field!r} of {error.title} {fault}.{near}") from None
    except UserError:
        raise
    except Exception as error:  # of anybody's file
        raise UserError(f"Recipe {name!r} failed: {type(error).__name__}: {' '.join(str(error).split())}.") from error
    if not isinstance(sweep, Sweep):
        raise UserError(f"Recipe {name!r} returned {type(sweep).__name__}; a recipe returns a bench.sweep.Sweep.")
    return sweep


def _fields_like(name: str) -> str:
    """The known field that a misspelt one is nearest to."""
    known = {field for kind in (Sweep, Experiment, TaskSpec, ModelSpec, TrainSpec, LayerSpec) for field in kind.model_fields}
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def _with_task(sweep: Sweep, task: str, *, named: str | None) -> Sweep:
    given = {experiment.task.name for experiment in sweep.experiments}
    if named is not None and given != {task}:
        raise UserError(f"Recipe {named!r} is for the task {', '.join(sorted(given))}, not {task!r}; leave out --task or --recipe.")
    if given == {task}:
        return sweep
    changed = (experiment.model_copy(update={"task": TaskSpec(name=task)}) for experiment in sweep.experiments)
    return sweep.model_copy(update={"experiments": distinct(changed)})


def _with_mixers(sweep: Sweep, mixers: list[str]) -> Sweep:
    """The recipe's settings with the given mixers in place of its own."""
    named = [found for text in mixers for found in parse_mixers(text)]

    def with_layers(experiment: Experiment, fields: dict[str, Any]) -> Experiment:
        return experiment.model_copy(update={"model": experiment.model.model_copy(update=fields)})

    templates = dict.fromkeys(with_layers(experiment, named[0]) for experiment in sweep.experiments)
    changed = [with_layers(template, fields) for template in templates for fields in named]
    return sweep.model_copy(update={"experiments": distinct(changed)})


def inspect(sweep: Sweep, device: Device) -> dict[Experiment, ModelInfo]:
    """Builds every task and model of a sweep without memory, and tries what it is made of.

    Raises:
        UserError: anything that a run would stumble over: options, head counts, a loose file that breaks the contract.
    """
    import torch

    from bench.build import build_model, build_task, resolve_precision
    from bench.outcome import state_info

    found: dict[Experiment, ModelInfo] = {}
    trials = Trials()
    for experiment in sweep.experiments:
        spec = experiment.run(experiment.lrs[0], 0)
        _require_room(spec.model)
        task = build_task(spec.task)
        trials.task(spec.task, task)
        with warnings.catch_warnings():
            # what it means is said by the trial, or nothing, where a mixer works without
            warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
            model = build_model(spec, task, torch.device("meta"))
            trials.zoo(spec.model, model, task.max_length())
        precision = resolve_precision(spec.train, torch.device(device.kind))
        tokens = spec.train.epochs * sum(cell.length * cell.examples for cell in task.cells("train"))
        parameters = sum(p.numel() for p in model.parameters())
        found[experiment] = ModelInfo(spec.model.label(), parameters, state_info(model, task, precision), tokens)
    _check_outside_mixers(sweep)
    return found


def _require_room(model: ModelSpec) -> None:
    """Refuses a written pattern of layers that does not fit, of which a model would have only the first ones.

    An architecture with a name of its own, such as BASED, has its published layers in turn and is cut at any depth.
    """
    count = len(model.layers)
    if count > model.n_layers and not {"+", "*"}.isdisjoint(model.alias):
        raise UserError(
            f"{model.label()} names {count} layers where the model has {model.n_layers}; add --set model.n_layers={count}."
        )


def _check_outside_mixers(sweep: Sweep) -> None:
    """A mixer from outside the zoo meets the contract before it costs training time."""
    outside = {
        (layer.mixer, layer.label()): layer
        for experiment in sweep.experiments
        for layer in experiment.model.layers
        if is_outside(layer.mixer)
    }
    if not outside:
        return
    from bench.commands.check import run_checks

    _require_names({layer.mixer: catalog.load("mixer", layer.mixer) for layer in outside.values()})
    for layer in outside.values():
        failed = [result for result in run_checks(layer) if not result.passed]
        if failed:
            names = ", ".join(result.name for result in failed)
            raise UserError(
                f"Mixer {layer.mixer!r} breaks the contract ({names}: {failed[0].detail}); see `bench check {layer.mixer}`."
            )


def _require_names(classes: dict[str, Any]) -> None:
    """Refuses two classes under one registered name, of which only the later one would be known."""
    first: dict[str, str] = {}
    for mixer, cls in classes.items():
        if "name" not in vars(cls):
            continue  # not registered, which the contract says
        other = first.setdefault(cls.name, mixer)
        if cls is not classes[other]:
            raise UserError(f"{other} and {mixer} both register the mixer name {cls.name!r}; change it in one of them.")
