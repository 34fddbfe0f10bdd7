"""Synthetic against converted: what a mixer's MQAR accuracy says of the recall of the models converted with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.judged import comparisons
from bench.points import Point
from bench.records import EvalRecord
from bench.report.frames import human_bytes
from bench.report.judged import GREY, p_text
from bench.report.styles import Style
from bench.store import Store


def bridge(points: Sequence[Point], records: Sequence[EvalRecord], store: Store, styles: dict[str, Style]) -> dict[str, Any] | None:
    """MQAR accuracy of a mixer at equal state bytes against the recall of the models converted with it; None without both.

    Args:
        points: of the synthetic half.
        records: evaluations.
        store: where their items lie.
        styles: of the mixers.
    """
    students = [
        (row, cell.value)
        for found in comparisons(records, store)
        for row in found.rows
        if row.info.kind == "converted"
        and found.recall
        and (cell := row.cell(found.recall[0])) is not None
        and cell.value is not None
    ]
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if point.spec.task.name == "mqar" and point.accuracy.mean is not None and point.state.true_bytes:
            curves.setdefault(point.mixer, []).append((point.state.true_bytes, point.accuracy.mean))
    mixers = {row.info.mixer for row, _ in students if row.info.mixer} & set(curves)
    if not mixers:
        return None
    budget = _common_budget({mixer: curves[mixer] for mixer in mixers})
    values, left_out = [], []
    for row, recall in students:
        mixer = row.info.mixer or ""
        at = interpolated(curves.get(mixer, []), budget)
        if at is None:
            left_out.append(f"{row.name} ({mixer or 'no mixer'})")
            continue
        style = styles.get(mixer, GREY)
        state = "–" if row.state_bytes is None else human_bytes(row.state_bytes)
        values.append(
            {
                **{"name": row.name, "mixer": mixer, "kind": "student", "state_text": state, "shape": style.shape},
                **{"light": style.light, "dark": style.dark, "x": at, "y": recall, "low": recall, "high": recall},
            }
        )
    charts = [{"id": "bridge", "spec": "bridge", "title": "Synthetic against converted", "values": values}]
    return {
        "budget": human_bytes(budget),
        "values": sorted(values, key=lambda value: -value["y"]),
        "left_out": left_out,
        "rank": _rank_correlation([(value["x"], value["y"]) for value in values]),
        "charts": charts,
    }


def _common_budget(curves: dict[str, list[tuple[float, float]]]) -> float:
    """The state size that most mixers' points reach from both sides; of several, the middle one."""
    sizes = sorted({size for curve in curves.values() for size, _ in curve})
    reached = [sum(min(curve)[0] <= size <= max(curve)[0] for curve in curves.values()) for size in sizes]
    best = [size for size, count in zip(sizes, reached, strict=True) if count == max(reached)]
    return best[len(best) // 2]


def interpolated(curve: list[tuple[float, float]], size: float) -> float | None:
    """Accuracy at a state size, linear in the logarithm of the bytes between neighbours; None outside the points.

    Args:
        curve: pairs of bytes and accuracy.
        size: bytes.
    """
    import numpy as np

    best: dict[float, float] = {}
    for at, accuracy in curve:
        best[at] = max(accuracy, best.get(at, 0.0))
    if not best or not min(best) <= size <= max(best):
        return None
    known = sorted(best)
    return float(np.interp(np.log(size), np.log(known), [best[at] for at in known]))


def _rank_correlation(pairs: list[tuple[float, float]]) -> str:
    """Spearman's rank correlation in words, from four points on."""
    if len(pairs) < 4:
        return f"{len(pairs)} model{'s' if len(pairs) != 1 else ''}: too few for a rank correlation (4 needed)."
    from scipy.stats import spearmanr

    found: Any = spearmanr([x for x, _ in pairs], [y for _, y in pairs])
    return f"Spearman’s rank correlation {found.statistic:.2f} over {len(pairs)} models (p {p_text(float(found.pvalue))})."
