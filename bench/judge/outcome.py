"""From what lm-eval returns to what is recorded: metrics without packed names, items, answer letters, chance."""

from __future__ import annotations

import math
import re
from collections import Counter
from statistics import fmean, stdev
from typing import Any

from bench.judge.harness import LENGTH_FIELD, Outcome
from bench.records import AnswerCount, EvalMetric

PRIMARY = ("acc", "exact_match", "contains", "em", "f1", "bits_per_byte", "word_perplexity")
"""The metric that stands for a task, the first that it has."""
NORMALISED = ("arc_challenge", "hellaswag")
"""Tasks that are commonly reported by `acc_norm`."""
ANSWERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER = re.compile(r"\b\(?([A-J])\b\)?")
MAX_TEXT = 200
"""Characters kept of a generated answer."""


def primary_metric(task: str, results: dict[str, Any]) -> str:
    """The metric that stands for a task.

    Args:
        task: name.
        results: lm-eval's, by "metric,filter".
    """
    names = [name for name, _ in _named(results) if not name.isdigit()] or ["acc"]
    if "acc_norm" in names and task.removeprefix("bench_") in NORMALISED:
        return "acc_norm"
    return next((name for name in PRIMARY if name in names), names[0])


def _named(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Metric and filter of every value."""
    return [(name, kind) for name, comma, kind in (key.partition(",") for key in results) if comma and not name.endswith("_stderr")]


def eval_metrics(found: Outcome, items: list[dict[str, Any]]) -> list[EvalMetric]:
    """lm-eval's metrics as a long table; lengths that RULER and our tasks use as names become slices of "acc".

    Args:
        found: of one task.
        items: its `item_rows`.
    """
    named = _named(found.results)
    made = [_metric(found, items, name, kind) for name, kind in named if not name.isdigit()]
    if not made:  # RULER gives one value a length; the mean over all items stands for the task
        made = [_mean("acc", "", named[0][1], items)]
    lengths = sorted({item["length"] for item in items if item["length"]})
    return made + [
        _mean("acc", str(length), named[0][1], [item for item in items if item["length"] == length]) for length in lengths
    ]


def _metric(found: Outcome, items: list[dict[str, Any]], name: str, kind: str) -> EvalMetric:
    value, error = found.results[f"{name},{kind}"], found.results.get(f"{name}_stderr,{kind}")
    n = sum((item["metric"], item["filter"]) == (name, kind) for item in items)
    better = found.higher_is_better.get(name)
    return EvalMetric(name=name, filter=kind, value=_finite(value), stderr=_finite(error), n=n, higher_is_better=better)


def _mean(name: str, slice_: str, kind: str, items: list[dict[str, Any]]) -> EvalMetric:
    values = [item["value"] for item in items if (item["metric"], item["filter"]) == (name, kind)]
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return EvalMetric(name=name, slice=slice_, filter=kind, value=fmean(values), stderr=error, n=len(values), higher_is_better=True)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def item_rows(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an item and metric; `item` is the same for every model that was asked the same."""
    rows = []
    for sample in samples:
        given, wanted = _texts(sample)
        common = {
            "item": f"{sample['doc_id']}:{sample['prompt_hash'][:16]}",
            "filter": sample["filter"],
            "length": int(sample["doc"].get(LENGTH_FIELD, 0)),
            "given": given,
            "wanted": wanted,
        }
        values = {name: _number(sample[name]) for name in sample["metrics"] if not name.isdigit()}
        scored = [sample[name] for name in sample["metrics"] if name.isdigit() and sample[name] != -1]
        rows += [{**common, "metric": name, "value": value} for name, value in (values or {"acc": scored[0]}).items()]
    return rows


def _number(value: Any) -> float:
    """A metric of one item; the pair (log-likelihood, count) of a perplexity becomes nats per unit."""
    if isinstance(value, tuple | list):
        return -float(value[0]) / max(1, value[1])
    return float(value)


def _texts(sample: dict[str, Any]) -> tuple[str, str]:
    """What the model said and what was right, as short texts; places of a multiple choice as letters."""
    answers = sample["filtered_resps"]
    wanted = sample["target"]
    if len(answers) > 1 and isinstance(answers[0], tuple | list):
        chosen = max(range(len(answers)), key=lambda index: answers[index][0])
        return _place(chosen), _place(wanted) if isinstance(wanted, int) else str(wanted)[:MAX_TEXT]
    first = answers[0]
    given = first[0] if isinstance(first, tuple | list) else first
    return str(given)[:MAX_TEXT], str(wanted)[:MAX_TEXT]


def _place(index: int) -> str:
    return ANSWERS[index] if index < len(ANSWERS) else str(index)


def chance_of(kind: str, samples: list[dict[str, Any]]) -> float | None:
    """How often a guess is right: among the choices, or among the answers that stand in the context; 0 for open answers.

    Args:
        kind: lm-eval's output type.
        samples: of the task.
    """
    if kind == "loglikelihood_rolling":
        return None
    if kind == "multiple_choice":
        return fmean(1 / len(sample["filtered_resps"]) for sample in samples)
    return fmean(float(sample["doc"].get("chance", 0.0)) for sample in samples)


def answer_counts(kind: str, samples: list[dict[str, Any]]) -> list[AnswerCount]:
    """How often each answer was given and was right, by place or letter; empty where answers have none.

    Args:
        kind: lm-eval's output type.
        samples: of the task.
    """
    pairs = [_answer_pair(kind, sample) for sample in samples]
    known = [pair for pair in pairs if pair is not None]
    if len(known) < len(pairs) or not known:
        return []
    chosen, correct = (Counter(pair[side] for pair in known) for side in (0, 1))
    return [AnswerCount(answer=a, chosen=chosen[a], correct=correct[a]) for a in sorted({*chosen, *correct})]


def _answer_pair(kind: str, sample: dict[str, Any]) -> tuple[str, str] | None:
    """The answer given and the right one, or None if they are no places or letters."""
    given, wanted = _texts(sample)
    if kind == "multiple_choice":
        return (given, wanted) if len(wanted) == 1 and wanted in ANSWERS else None
    target = re.fullmatch(r"\s*\(?([A-J])\)?\s*", wanted)
    if kind != "generate_until" or target is None:
        return None
    said = _LETTER.search(given)
    return said.group(1) if said else "none", target.group(1)
