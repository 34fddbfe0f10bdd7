"""The little languages of the command line: mixer expressions and `--set` paths.

gla                             a mixer; alone, it follows one short-convolution layer (Zoology's MQAR frame)
sliding_window:window=32        with options
gla*3+attention                 an explicit layer pattern, cycled over the depth
based:feature_dim=8             a named layer pattern
./mine.py@Mine                  a class in a file of your own
package/name                    a third-party entry point

train.lr=1e-3,3e-4              candidates for the learning rate
model.d_model=64,128            a grid
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
from typing import Any

from pydantic import ValidationError

from bench import catalog
from bench.errors import UserError, nearest_literal, unknown
from bench.spec import MAX_LAYERS, Frozen, LayerSpec, ModelSpec, TrainSpec
from bench.sweep import Experiment, Sweep, distinct

STEM = LayerSpec(mixer="base_conv")
"""The short-convolution layer that a lone mixer follows."""


def parse_value(text: str) -> Any:
    """`1`, `0.5`, `true`, `none` and `[1, 2]` as values, anything else as text."""
    if text.lower() in {"none", "null"}:
        return None
    try:
        return json.loads(text.lower() if text.lower() in {"true", "false"} else text)
    except ValueError:
        return text


def parse_mixers(text: str) -> list[dict[str, Any]]:
    """Each comma-separated mixer expression as the fields of a `ModelSpec` (see `named_layers`).

    Raises:
        UserError: a malformed expression, an unknown mixer, or options that do not exist or do not fit.
    """
    expressions = [part.strip() for part in text.split(",")]
    if not all(expressions):
        raise UserError(f"--mixer {text!r} has an empty name; separate mixers by single commas, as in gla,attention.")
    return [named_layers(expression) for expression in expressions]


def named_layers(expression: str) -> dict[str, Any]:
    """One mixer expression as the fields `layers` and `alias` of a `ModelSpec`."""
    return {"layers": parse_layers(expression), "alias": expression}


def parse_layers(expression: str) -> tuple[LayerSpec, ...]:
    """One mixer expression as layers."""
    parts = [_parse_part(part.strip(), expression) for part in expression.split("+")]
    layers = tuple(itertools.chain.from_iterable(parts))
    explicit = "+" in expression or "*" in expression or len(layers) != 1
    return layers if explicit or layers == (STEM,) else (STEM, *layers)


def _parse_part(part: str, expression: str) -> tuple[LayerSpec, ...]:
    repeated = re.fullmatch(r"(.+?)\*(\d+)", part)
    count = int(repeated[2]) if repeated else 1
    name, *settings = (repeated[1] if repeated else part).split(":")
    if not name or count < 1:
        raise UserError(f"Mixer expression {expression!r} is malformed; write it like gla*3+attention or gla:n_heads=2.")
    if count > MAX_LAYERS:
        raise UserError(f"Mixer expression {expression!r} repeats layers {count} times; a model has {MAX_LAYERS} layers at most.")
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"Option {setting!r} in {expression!r} has no value; write it like {name}:{setting or 'option'}=8.")
        options[key] = parse_value(value)
    target = catalog.load("mixer", name)
    options = catalog.check_options("mixer", name, target, options)
    if inspect.isclass(target):
        return (LayerSpec(mixer=name, options=options),) * count
    return tuple(LayerSpec(mixer=layer.mixer, options=layer.options) for layer in target(**options)) * count


def apply_settings(sweep: Sweep, settings: list[str]) -> Sweep:
    """A sweep with every `--set` applied; several values make a grid, except for `train.lr`, where they are candidates.

    Raises:
        UserError: an unknown path or a value of a wrong type.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not text:
            raise UserError(f"--set {setting!r} has no value; write it like --set train.epochs=8.")
        values = [parse_value(part) for part in _split_values(text)]
        if path == "train.lr":
            sweep = _replace(sweep, [_validated(item, {"lrs": values}, setting) for item in sweep.experiments])
        else:
            sweep = _replace(sweep, [_with_setting(item, path, value, setting) for value in values for item in sweep.experiments])
    return sweep


def _split_values(text: str) -> list[str]:
    return [text] if text.startswith(("[", "{", '"')) else text.split(",")


def _replace(sweep: Sweep, experiments: list[Experiment]) -> Sweep:
    return sweep.model_copy(update={"experiments": distinct(experiments)})


def _with_setting(experiment: Experiment, path: str, value: Any, setting: str) -> Experiment:
    section, _, key = path.partition(".")
    fields: dict[str, type[Frozen]] = {"model": ModelSpec, "train": TrainSpec}
    if section == "task" and key:
        options = {**experiment.task.options, key: value}
        checked = catalog.check_options("task", experiment.task.name, catalog.load("task", experiment.task.name), options)
        return experiment.model_copy(update={"task": experiment.task.model_copy(update={"options": checked})})
    if section not in fields or not key:
        raise unknown("--set path", path, _all_paths(experiment))
    if key not in fields[section].model_fields or (section, key) == ("model", "layers"):
        raise unknown("--set path", path, _all_paths(experiment))
    return _validated(experiment, {section: {**getattr(experiment, section).model_dump(), key: value}}, setting)


def _all_paths(experiment: Experiment) -> list[str]:
    paths = [f"task.{key}" for key in catalog.options_of(catalog.load("task", experiment.task.name))]
    paths += [f"model.{key}" for key in ModelSpec.model_fields if key != "layers"]
    return paths + [f"train.{key}" for key in TrainSpec.model_fields]


def _validated(experiment: Experiment, update: dict[str, Any], setting: str) -> Experiment:
    try:
        return Experiment.model_validate({**experiment.model_dump(), **update})
    except ValidationError as error:
        first = error.errors()[0]
        got = f"got {first['input']!r}.{nearest_literal(first)}"
        raise UserError(f"--set {setting} is not valid: {first['msg'].lower()}, {got}") from None
