"""Invented evaluations of a teacher, five students and their referees, written through the real schema. Nothing was measured."""

from __future__ import annotations

import numpy as np
from fake_store import record as run_record
from fake_store import spec

from bench.records import AnswerCount, EvalMetric, EvalRecord, JudgedModel
from bench.store import Store

LENGTHS = (512, 2048)
ITEMS = 40
TEACHER = "teacher0"
# Mixer: share of recall items answered, bytes of state.
STUDENTS = {
    "linear_attention": (0.35, 4_500_000),
    "gla": (0.45, 4_600_000),
    "delta_net": (0.6, 4_700_000),
    "mamba2": (0.4, 4_400_000),
    "hyena": (0.3, 4_400_000),
}


def model(name: str, kind: str, mixer: str | None = None, **fields: object) -> JudgedModel:
    """A model with the fixture's defaults; its fingerprint is its name."""
    given = {"source": name, "parameters": 134_515_008, "layers": 30, "teacher": None if kind == "plain" else TEACHER}
    return JudgedModel.model_validate({"fingerprint": name, "name": name, "kind": kind, "mixer": mixer, **given, **fields})


def judge(
    store: Store, info: JudgedModel, task: str, right: float, *, generated: bool = False, items_hash: str = "i0"
) -> EvalRecord:
    """A task whose items are right with a probability that falls with the length; the draws are the same for every model."""
    luck = np.random.default_rng([*task.encode()]).random((len(LENGTHS), ITEMS))
    share = [right * (1 if info.kind == "plain" else 512 / length) for length in LENGTHS]
    scores = np.stack([luck[i] < share[i] for i in range(len(LENGTHS))]).astype(float)
    items = [
        {
            "item": f"{i}:{j}",
            "filter": "none",
            "length": length,
            "given": "1",
            "wanted": "2",
            "metric": "acc",
            "value": scores[i, j],
        }
        for i, length in enumerate(LENGTHS)
        for j in range(ITEMS)
    ]
    metrics = [_metric("acc", scores.reshape(-1)), *(_metric("acc", scores[i], str(n)) for i, n in enumerate(LENGTHS))]
    made = record(info, task, "acc", metrics, protocol="generated" if generated else "log-likelihood", items_hash=items_hash)
    store.write_eval(made, items)
    return made


def _metric(name: str, values: np.ndarray, slice_: str = "") -> EvalMetric:
    error = float(values.std(ddof=1) / len(values) ** 0.5)
    return EvalMetric(name=name, slice=slice_, value=float(values.mean()), stderr=error, n=len(values), higher_is_better=True)


def record(info: JudgedModel, task: str, primary: str, metrics: list[EvalMetric], **fields: object) -> EvalRecord:
    """A record with the fixture's defaults."""
    given = {
        "eval_id": f"eval-{info.fingerprint}-{task}".replace(" ", "_"),
        "model": info,
        "task": task,
        "protocol": "measured",
        "version": "1",
        "items": ITEMS * len(LENGTHS),
        "items_total": ITEMS * len(LENGTHS),
        "items_hash": "i0",
        "lengths": list(LENGTHS),
        "primary": primary,
        "chance": None if primary in ("state_bytes", "top1") else 0.05,
        "metrics": metrics,
        "device": "An invented GPU",
        "precision": "bf16",
        "batch_size": "auto",
        "max_length": 2048,
        "seconds": 1.0,
        "started": "2025-01-01T10:00:00Z",
        "provenance": run_record(spec("gla")).provenance,
    }
    return EvalRecord.model_validate(given | fields)


def measure(store: Store, info: JudgedModel, state: float, top1: float) -> None:
    """Memory, speed and agreement."""
    speeds = [
        EvalMetric(name="state_bytes", slice=str(n), value=state * (n / 2048 if info.kind == "plain" else 1), n=1) for n in LENGTHS
    ]
    place = "batch 32, context 2048, CUDA graph"
    speeds.append(EvalMetric(name="decode_tokens_per_second", slice=place, value=9e4, n=3, higher_is_better=True))
    store.write_eval(record(info, "memory_and_speed", "state_bytes", speeds))
    rows = [
        {"item": str(i), "filter": "none", "length": 0, "given": "", "wanted": "", "metric": "top1", "value": top1 + 0.001 * i}
        for i in range(8)
    ]
    store.write_eval(record(info, "agreement", "top1", [EvalMetric(name="top1", value=top1, n=8, higher_is_better=True)]), rows)


def build(store: Store) -> Store:
    """A teacher with five students, each beside its ablations and one untrained window that all share."""
    teacher, window = model(TEACHER, "plain"), model("window 200 + 4 sinks, untrained", "window", window=200, sinks=4)
    models = [(teacher, 0.95, 47e6, 1.0), (window, 0.1, 4.6e6, 0.8)]
    for mixer, (recall, state) in STUDENTS.items():
        name = f"student of {mixer}"
        ablation = model(f"{name}, window only", "ablation", mixer, window=64)
        referees = {"teacher": TEACHER, "window": window.fingerprint, "window_only": ablation.fingerprint}
        made = {"recipe_name": "lolcats", "tokens": 40_000_000}
        models.append(
            (
                model(name, "converted", mixer, window=64, referees=referees, layers_converted=30, conversion=made),
                recall,
                state,
                0.85,
            )
        )
        models.append((ablation, 0.12, state, 0.7))
    for info, recall, state, top1 in models:
        judge(store, info, "bench_needle", recall)
        judge(store, info, "bench_needle_generated", recall, generated=True)
        letters = judge(store, info, "bench_hellaswag_letters", 0.3)
        answers = [AnswerCount(answer=letter, chosen=20 + 20 * (letter == "A"), correct=25) for letter in "ABCD"]
        store.write_eval(letters.model_copy(update={"answers": answers, "lengths": []}))
        measure(store, info, state, top1)
    return store
