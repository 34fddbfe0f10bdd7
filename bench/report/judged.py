"""Language models on the page: rows, paired differences, answer letters, and the charts' data as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.judged import Cell, Column, Comparison, JudgedRow, comparisons
from bench.records import EvalRecord
from bench.report.frames import human_bytes
from bench.report.judged_speeds import decoding, fullest, speed_table
from bench.report.labels import apart, ends
from bench.report.styles import Style
from bench.stats import Difference, pareto_front
from bench.store import Store

GREY = Style("#5c6166", "#b9bec4", "circle")
"""Of models that no mixer was put into."""
SIGNIFICANT = 0.01


def judged_sections(
    records: Sequence[EvalRecord], store: Store, styles: dict[str, Style]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """The tables of the section "converted models", its charts, and warnings.

    Args:
        records: evaluations.
        store: where their items lie.
        styles: of the mixers.

    Returns:
        One entry a teacher (or model alone), the charts, and what a reader must know.
    """
    sections, charts, warnings = [], [], []
    for index, found in enumerate(comparisons(records, store)):
        made = _section(found, styles)
        made["charts"] = _charts(f"j{index}", found, made["rows"])
        charts += made["charts"]
        sections.append(made)
        warnings += found.warnings
    return sections, charts, warnings


def _section(found: Comparison, styles: dict[str, Style]) -> dict[str, Any]:
    columns = [*found.recall[:1], *found.columns]
    rows = [_row(row, found, columns, styles) for row in found.rows]
    chances = [next((c.chance for row in found.rows if (c := row.cell(column)) is not None), None) for column in columns]
    metrics = [next((c.metric for row in found.rows if (c := row.cell(column)) is not None), "") for column in columns]
    return {
        "title": found.title,
        "rows": rows,
        "columns": [
            {"name": column.name.removeprefix("bench_"), "metric": metric} for column, metric in zip(columns, metrics, strict=True)
        ],
        "chance": [_share(chance) for chance in chances],
        "pairs": _pairs(found, columns),
        "by_length": _pairs(found, found.recall[1:]),
        "lengths": _table(found, found.recall[1:]),
        "length_names": [column.name for column in found.recall[1:]],
        "speeds": speed_table(found.rows),
        "decoded": next((fast[0] for row in found.rows if (fast := fullest(row))), ""),
        "answers": _answers(found),
        "facts": _facts(found),
    }


def _row(row: JudgedRow, found: Comparison, columns: Sequence[Column], styles: dict[str, Style]) -> dict[str, Any]:
    style = styles.get(row.info.mixer or "", GREY)
    recall = row.cell(found.recall[0]) if found.recall else None
    info = row.info
    made = [f"{info.mixer or 'no mixer'}"] if info.kind == "converted" else []
    made += [f"window {info.window}"] if info.window and info.kind == "converted" else []
    fast = fullest(row)
    made += [f"recipe {info.conversion['recipe_name']}"] if info.conversion.get("recipe_name") else []
    return {
        "name": row.name,
        "kind": {"plain": "", "converted": "student", "window": "untrained"}.get(info.kind, info.kind),
        "made": ", ".join(made),
        "mixer": info.mixer or "",
        "style": style,
        "parameters": f"{info.parameters:,}",
        "state_bytes": row.state_bytes,
        "state_text": "–" if row.state_bytes is None else human_bytes(row.state_bytes),
        "decode_text": "–" if fast is None else f"{fast[1]:,.0f}",
        "recall": None if recall is None else recall.value,
        "recall_error": None if recall is None else recall.stderr,
        "cells": [_cell(row.cell(column)) for column in columns],
    }


def _cell(cell: Cell | None) -> dict[str, Any]:
    if cell is None or cell.value is None:
        return {"value": None, "text": "–", "title": "not evaluated"}
    share = cell.metric not in ("ppl", "word_perplexity", "bits_per_byte", "nll", "kl")
    scale, unit = (100, "") if share else (1, "")
    error = "" if cell.stderr is None else f" ± {scale * cell.stderr:.1f}" if share else f" ± {cell.stderr:.3g}"
    text = f"{scale * cell.value:.1f}" if share else f"{cell.value:.4g}"
    return {"value": cell.value, "text": f"{text}{unit}{error}", "title": f"{cell.metric} over {cell.n:,} items"}


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _pairs(found: Comparison, columns: Sequence[Column]) -> list[dict[str, Any]]:
    return [
        {
            "row": pair.row.name,
            "against": pair.against.name,
            "role": pair.role,
            "cells": [_difference(pair.differences[column.name], pair.row.cell(column)) for column in columns],
        }
        for pair in found.pairs
    ]


def _difference(found: Difference, cell: Cell | None) -> dict[str, Any]:
    if found.mean is None or cell is None:
        return {"value": None, "text": "–", "p": "", "title": found.verdict, "sure": False}
    share = cell.metric not in ("ppl", "word_perplexity", "bits_per_byte", "nll", "kl")
    mean = f"{100 * found.mean:+.1f}" if share else f"{found.mean:+.3g}"
    p = "" if found.p_value is None else f"p {p_text(found.p_value)}"
    low, high = (None, None) if found.low is None or found.high is None else (found.low, found.high)
    interval = "" if low is None or high is None else f"95 % {low:+.3f} to {high:+.3f}, "
    sure = found.p_value is not None and found.p_value < SIGNIFICANT
    return {"value": found.mean, "text": mean, "p": p, "title": f"{interval}{found.n:,} pairs", "sure": sure}


def p_text(value: float) -> str:
    """A p value as people read it."""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def _table(found: Comparison, columns: Sequence[Column]) -> list[dict[str, Any]]:
    return [{"name": row.name, "cells": [_cell(row.cell(column)) for column in columns]} for row in found.rows] if columns else []


def _answers(found: Comparison) -> list[dict[str, Any]]:
    """Answers by letter of every multiple choice, one row a model and task."""
    rows = []
    for row in found.rows:
        for task, record in row.records.items():
            total = sum(answer.chosen for answer in record.answers)
            if total:
                shares = {a.answer: (a.chosen / total, a.correct / total) for a in record.answers}
                rows.append({"name": row.name, "task": task.removeprefix("bench_"), "n": total, "shares": shares})
    return rows


def _facts(found: Comparison) -> list[str]:
    """Where the numbers of a comparison come from."""
    records = [record for row in found.rows for record in row.records.values()]
    devices = sorted({f"{record.device}, {record.precision}" for record in records})
    limits = sorted(
        {"all items" if record.limit is None else f"up to {record.limit} items a task and length" for record in records}
    )
    commits = sorted({(record.provenance.commit or "unknown")[:10] for record in records})
    return [*devices, *limits, f"commit {', '.join(commits)}"]


def _charts(prefix: str, found: Comparison, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Data of the charts; each names its specification."""
    charts = []
    points = [
        {**_drawn(row), "x": row["state_bytes"], "y": row["recall"], **_range(row["recall"], row["recall_error"])}
        for row in rows
        if row["state_bytes"] and row["recall"] is not None
    ]
    if points:
        flags = pareto_front([point["x"] for point in points], [point["y"] for point in points])
        values = [{**point, "front": "yes" if flag else ""} for point, flag in zip(points, flags, strict=True)]
        apart(values, x="x", y="y", log_x=True, first=lambda value: (not value["front"], value["kind"] != "model", -value["y"]))
        charts.append(
            {"id": f"{prefix}-state", "spec": "judged_pareto", "title": f"Recall against state, {found.title}", "values": values}
        )
    lines = [
        {**_drawn(made), "x": column.length, "y": cell.value, "n": cell.n, **_range(cell.value, cell.stderr)}
        for row, made in zip(found.rows, rows, strict=True)
        for column in found.recall[1:]
        if (cell := row.cell(column)) is not None
    ]
    if lines:
        ends(lines)
        charts.append(
            {"id": f"{prefix}-length", "spec": "judged_lengths", "title": f"Recall by length, {found.title}", "values": lines}
        )
    speeds = [
        {**_drawn(made), "x": context, "y": item.value, "batch": batch, "how": item.slice.rpartition(", ")[2]}
        for row, made in zip(found.rows, rows, strict=True)
        for batch, by_context in list(decoding(row).items())[-1:]
        for context, item in sorted(by_context.items())
    ]
    if speeds:
        ends(speeds, log_y=True)
        charts.append(
            {"id": f"{prefix}-speed", "spec": "judged_speed", "title": f"Decoding by context, {found.title}", "values": speeds}
        )
    bars = [
        {"name": item["name"], "task": item["task"], "answer": letter, "share": share, "what": what, "n": item["n"]}
        for item in _answers(found)
        for letter, pair in item["shares"].items()
        for what, share in zip(("given", "right"), pair, strict=True)
    ]
    if bars:
        charts.append(
            {"id": f"{prefix}-answers", "spec": "judged_answers", "title": f"Answers by letter, {found.title}", "values": bars}
        )
    return charts


def _drawn(row: dict[str, Any]) -> dict[str, Any]:
    style: Style = row["style"]
    return {
        "name": row["name"],
        "label": "" if row["kind"] == "ablation" else row["name"],
        "mixer": row["mixer"],
        "kind": row["kind"] or "model",
        "light": style.light,
        "dark": style.dark,
        "shape": style.shape,
        "state_text": row["state_text"],
    }


def _range(value: float | None, error: float | None) -> dict[str, float | None]:
    if value is None or error is None:
        return {"low": value, "high": value}
    return {"low": max(0.0, value - 1.96 * error), "high": min(1.0, value + 1.96 * error)}
