"""Writes `results/README.md` from the record schema. Command: `python -m bench.schema_page`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from bench.records import AnswerCount, CellInfo, EvalMetric, EvalRecord, JudgedModel, Metric, Provenance, RunRecord, StateInfo
from bench.spec import LayerSpec, ModelSpec, RunSpec, TaskSpec, TrainSpec
from bench.speed_records import Bound, GateResult, Peer, SpeedRecord, Timing

PAGE = Path("results/README.md")
MODELS: tuple[type[BaseModel], ...] = (
    RunRecord,
    RunSpec,
    TaskSpec,
    ModelSpec,
    LayerSpec,
    TrainSpec,
    StateInfo,
    CellInfo,
    Metric,
    Provenance,
    EvalRecord,
    JudgedModel,
    EvalMetric,
    AnswerCount,
    SpeedRecord,
    Timing,
    Bound,
    GateResult,
    Peer,
)
HEAD = """# Results

This file is generated: `python -m bench.schema_page`.

    runs/<run_id>/record.json      one run, schema below; its presence makes the run complete
    runs/<run_id>/curve.parquet    learning curve, a row an epoch
    runs/<run_id>/influence.npz    influence map of the trained model on one test example (seed 0)
    runs/<eval_id>/eval.json       one language model on one task, schema `EvalRecord`
    runs/<eval_id>/items.parquet   its items, a row an item and metric
    runs/speed/<speed_id>.json     one row of `bench throughput`, schema below
    reports/                       HTML reports
    measured/                      committed records behind every figure in README and docs
    published/                     published values that recipes compare with

`runs/` and `reports/` are not committed. Stores merge by copying folders. A folder of `measured/` that holds runs is a
store: `bench report --store results/measured/mqar_laptop`.
"""


def page() -> str:
    """The page as text."""
    parts = [HEAD]
    for model in MODELS:
        summary = (model.__doc__ or "").splitlines()[0]
        parts.append(f"\n## {model.__name__}\n\n{summary}\n\n| field | type | meaning |\n| --- | --- | --- |\n")
        for name, field in model.model_fields.items():
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            parts.append(f"| `{name}` | {_type_text(field.annotation)} | {meaning} |\n")
    return "".join(parts)


def _type_text(annotation: object) -> str:
    """A field's type as a reader wants it."""
    text = str(annotation) if "[" in str(annotation) or not isinstance(annotation, type) else annotation.__name__
    for prefix in ("typing.", "bench.records.", "bench.speed_records.", "bench.spec."):
        text = text.replace(prefix, "")
    return text.replace("|", "or").replace("NoneType", "None")


if __name__ == "__main__":
    PAGE.write_text(page())
