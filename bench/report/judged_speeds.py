"""Memory and speed of language models on the page: a table with a column for each quantity and place, and decoding by context."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from bench.judge.suites import MEMORY_AND_SPEED
from bench.judged import JudgedRow
from bench.records import EvalMetric
from bench.report.frames import human_bytes

DECODING = re.compile(r"batch (\d+), context (\d+)")
HEADINGS = {
    "state_bytes": "State",
    "prefill_tokens_per_second": "Prefill, tokens/s",
    "decode_tokens_per_second": "Decode, tokens/s",
    "peak_memory_bytes": "Peak memory",
}


def speed_table(rows: Sequence[JudgedRow]) -> dict[str, Any]:
    """The table: `groups` of columns with a common heading, and a row for every model that was measured."""
    measured = [(row, _metrics(row)) for row in rows if MEMORY_AND_SPEED in row.records]
    places = sorted({place for _, found in measured for place in found}, key=_order)
    names = list(dict.fromkeys(_heading(name, batch) for name, batch, _ in places))
    return {
        "groups": [
            {"name": name, "columns": [length_text(length) for n, batch, length in places if _heading(n, batch) == name]}
            for name in names
        ],
        "rows": [{"name": row.name, "cells": [_cell(found.get(place)) for place in places]} for row, found in measured],
    }


def decoding(row: JudgedRow) -> dict[int, dict[int, EvalMetric]]:
    """Decoding speeds of a model by batch size and context."""
    found: dict[int, dict[int, EvalMetric]] = {}
    for item in row.measured(MEMORY_AND_SPEED, "decode_tokens_per_second"):
        if (at := DECODING.match(item.slice)) and item.value is not None:
            found.setdefault(int(at[1]), {})[int(at[2])] = item
    return found


def fullest(row: JudgedRow) -> tuple[str, float] | None:
    """Where decoding was measured with the largest batch and longest context, and its tokens/s."""
    by_batch = decoding(row)
    if not by_batch:
        return None
    batch = max(by_batch)
    context = max(by_batch[batch])
    return f"batch {batch}, context {length_text(context)}", by_batch[batch][context].value or 0.0


def length_text(length: int) -> str:
    """16384 as 16k; a number that no 1,024 divides as it is; nothing where a quantity has no length."""
    return f"{length // 1024}k" if length and length % 1024 == 0 else f"{length:,}" if length else ""


def _metrics(row: JudgedRow) -> dict[tuple[str, int, int], EvalMetric]:
    """What was measured of a model by quantity, batch size and length, 0 where there is none."""
    found = {}
    for item in row.records[MEMORY_AND_SPEED].metrics:
        at = DECODING.match(item.slice)
        batch, length = (int(at[1]), int(at[2])) if at else (0, int(item.slice or 0))
        found[item.name, batch, length] = item
    return found


def _order(place: tuple[str, int, int]) -> tuple[int, int, int]:
    return [*HEADINGS].index(place[0]), place[1], place[2]


def _heading(name: str, batch: int) -> str:
    return f"{HEADINGS[name]}, batch {batch}" if batch else HEADINGS[name]


def _cell(item: EvalMetric | None) -> dict[str, Any]:
    if item is None or item.value is None:
        return {"value": None, "text": "–", "title": "not measured"}
    text = human_bytes(item.value) if item.name.endswith("_bytes") else f"{item.value:,.0f}"
    return {"value": item.value, "text": text, "title": item.slice}
