"""From the words of the command line to a resolved recipe and its data sources."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench import catalog
from bench.convert import rendered
from bench.convert.spec import LayerPlan, Recipe, Source, Stage
from bench.errors import UserError, nearest_literal, unknown
from bench.grammar import parse_value

KINDS = ("text", "dataset", "packages", "corpus", "recall")


def load_recipe(name: str) -> Recipe:
    """A recipe by the name of its file in `bench/convert/recipes/`, or by the path of a file of one's own.

    Raises:
        UserError: no such recipe, or a file that is not one.
    """
    path = Path(name) if name.endswith(".toml") else Path(__file__).parent / "recipes" / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            raise UserError(f"There is no recipe file {name}; `bench list conversions` names the recipes that need none.")
        raise unknown("recipe", name, catalog.conversions(), fix="A file of your own is named as ./file.toml.")
    try:
        return _validated({"name": path.stem, **tomllib.loads(path.read_text(encoding="utf-8"))}, name)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}.") from None


def resolve_recipe(
    name: str,
    *,
    mixer: str | None = None,
    window: int | None = None,
    sinks: int | None = None,
    layers: str | None = None,
    data: list[str] | None = None,
    settings: list[str] | None = None,
    seed: int | None = None,
) -> Recipe:
    """A recipe with everything that the user changed.

    Args:
        name: of a recipe.
        mixer: instead of the recipe's, as `gla` or `gla:gate_rank=32`; `none` for the window alone.
        window: keys seen by softmax; 0 for none.
        sinks: first tokens that stay visible.
        layers: which layers are converted.
        data: sources such as `text:corpus.txt=0.8`.
        settings: `plan.combine=gate`, `stages.lr=1e-3` (all stages), `stages.2.tokens=1000000` (the second).
        seed: of the conversion.

    Raises:
        UserError: an unknown name or path, or a value that does not fit.
    """
    recipe = load_recipe(name)
    plan = recipe.plan.model_dump()
    if mixer is not None:
        plan |= _mixer(mixer, recipe.plan)
    given = {"window": window, "sinks": sinks, "layers": layers}
    plan |= {key: value for key, value in given.items() if value is not None}
    if plan["window"] == 0 and window == 0:
        plan["sinks"] = 0
    fields: dict[str, Any] = {**recipe.model_dump(), "plan": plan}
    if data:
        fields["data"] = [parse_source(text).model_dump() for text in data]
    if seed is not None:
        fields["seed"] = seed
    for setting in settings or []:
        _apply(fields, setting)
    return _validated(fields, name)


def _validated(fields: dict[str, Any], name: str) -> Recipe:
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"The recipe {name} with these settings is not valid: {where}: {first['msg'].removeprefix('Value error, ')}."
            f"{nearest_literal(first)}"
        ) from None


def parse_source(text: str) -> Source:
    """`kind[:where][=weight]` as a source; a bare path is `text:path`.

    Raises:
        UserError: an unknown kind, or a weight that is not a positive number.
    """
    body, equals, number = text.rpartition("=")
    if not equals:
        body, number = text, "1"
    kind, _, where = body.partition(":")
    if kind not in KINDS and ("/" in body or "." in body):
        kind, where = "text", body
    if kind not in KINDS:
        raise unknown("data source", kind, KINDS, fix="Write it like text:corpus.txt=0.8 or recall=0.2.")
    if not where and kind in ("text", "dataset", "corpus"):
        raise UserError(f"--data {text!r} names no {kind}; write it like {kind}:PATH.")
    if kind == "recall" and where and where not in rendered.KINDS:
        raise unknown("kind of recall", where, rendered.KINDS, fix="Write it like recall:facts=0.2, or recall=0.2 for all.")
    try:
        return Source(kind=kind, where=where, weight=float(number))
    except ValueError:
        raise UserError(f"--data {text!r} has no valid weight; write it like {body}=0.5.") from None


def _mixer(expression: str, plan: LayerPlan) -> dict[str, Any]:
    """The plan's fields that change with the mixer; a joint normaliser or a rotation that it cannot have gives way."""
    name, *settings = expression.split(":")
    if name == "none":
        return {"mixer": None, "options": {}, "combine": "sum", "projections": "share"}
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(
                f"Option {setting!r} of --mixer {expression!r} has no value; write it like {name}:{setting or 'option'}=8."
            )
        options[key] = parse_value(value)
    if name == plan.mixer:
        options = plan.options | options
    elif name == "linear_attention":
        options = {"feature_map": "hedgehog"} | options
    joint = plan.combine == "shared_denominator" and name != "linear_attention"
    rope = "keep" if plan.rope == "after_map" and name != plan.mixer else plan.rope
    return {"mixer": name, "options": options, "combine": "gate" if joint else plan.combine, "rope": rope}


def _apply(fields: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    if not equals:
        raise UserError(f"--set {setting!r} has no value; write it like --set stages.lr=1e-3.")
    section, _, rest = path.partition(".")
    if section == "plan" and rest in LayerPlan.model_fields:
        is_text = LayerPlan.model_fields[rest].annotation is str
        fields["plan"] = {**fields["plan"], rest: text if is_text else _value(text)}
        return
    stages = [dict(stage) for stage in fields["stages"]]
    number, _, key = rest.partition(".")
    chosen = stages
    if number.isdigit():
        if not 1 <= int(number) <= len(stages):
            raise UserError(f"--set {setting!r}: the recipe has {len(stages)} stages, counted from 1.")
        chosen, rest = [stages[int(number) - 1]], key
    name, _, inner = rest.partition(".")
    if section != "stages" or name not in Stage.model_fields:
        allowed = [f"plan.{key}" for key in LayerPlan.model_fields] + [f"stages.{key}" for key in Stage.model_fields]
        raise unknown("--set path", path, allowed)
    for stage in chosen:
        if not inner:
            stage[name] = _value(text)
        elif stage.get(name) is not None:
            stage[name] = {**stage[name], inner: _value(text)}
    fields["stages"] = stages


def _value(text: str) -> Any:
    value = parse_value(text)
    return json.loads(text) if isinstance(value, str) and text.startswith(("[", "{")) else value
