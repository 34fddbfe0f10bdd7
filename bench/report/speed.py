"""Measured speeds on the page: accuracy against tokens a second, and tokens a second against length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.points import Point
from bench.records import Provenance
from bench.speed_records import SpeedRecord, Timing

STEM = "base_conv+"
"""The short convolution that a lone mixer follows in a model, and does not in a measurement of its speed."""


def speed_section(points: Sequence[Point], rows: Sequence[dict[str, Any]], records: Sequence[SpeedRecord]) -> dict[str, Any] | None:
    """Everything that the section shows, or None if nothing was measured.

    Args:
        points: all points of the page.
        rows: their rows, of `bench.report.frames.point_rows`.
        records: rows of `bench throughput`, oldest first.

    Returns:
        `rows`, one a record; `recall`, one a point and mode of training, prefill and decode that has a speed;
        `groups`, the kinds of subjects with a plot against length; `unmeasured`, names of points without a speed.
    """
    if not records:
        return None
    found = [_row(record) for record in records]
    recall = _recall(points, rows, records)
    measured = {row["point"] for row in recall}
    return {
        "rows": found,
        "recall": recall,
        "groups": [
            {"id": f"speed-{kind}", "kind": kind, "title": f"{kind.capitalize()}s"}
            for kind in ("mixer", "kernel")
            if any(row["kind"] == kind for row in found)
        ],
        "unmeasured": sorted({f"{row['label']} at d_model={row['d_model']}" for row in rows if row["id"] not in measured}),
    }


def _recall(points: Sequence[Point], rows: Sequence[dict[str, Any]], records: Sequence[SpeedRecord]) -> list[dict[str, Any]]:
    """Points with the speed of their mixers, measured alone at the point's own width."""
    best: dict[tuple[str, int, str], SpeedRecord] = {}
    for record in records:
        if record.subject == "mixer" and record.tokens_per_second is not None:
            key = (bare(record.name), record.shape["d_model"], record.mode)
            if key not in best or record.shape["length"] >= best[key].shape["length"]:
                best[key] = record
    found = []
    for point, row in zip(points, rows, strict=True):
        for mode in ("train", "prefill", "decode"):
            record = best.get((bare(point.label), point.spec.model.d_model, mode))
            if record is not None:
                speed = record.tokens_per_second
                found.append({"point": row["id"], "mode": mode, "tokens_per_second": speed, "measured": _measured(record)})
    return found


def bare(label: str) -> str:
    """A lone mixer without the short convolution in front of it; other expressions as they are."""
    rest = label.removeprefix(STEM)
    return label if "+" in rest or "*" in rest else rest


def _measured(record: SpeedRecord) -> str:
    shape = f"B={record.shape['batch']} T={record.shape['length']}"
    return f"{shape}, {record.dtype}, {record.path}, {_chip(record.provenance, record.device)}"


def _row(record: SpeedRecord) -> dict[str, Any]:
    """A record as plain values."""
    peer, ratio, over = record.best_peer(), record.bound_ratio(), record.peer_ratio()
    widths = _widths(record.shape)
    return {
        "kind": record.subject,
        "name": record.name,
        "series": f"{record.name}, {widths}",
        "mixer": bare(record.name).partition(":")[0],
        "mode": record.mode,
        "length": record.shape["length"],
        "batch": record.shape["batch"],
        "widths": widths,
        "dtype": record.dtype,
        "path": record.path,
        "status": record.status,
        "reason": record.reason,
        "tokens_per_second": record.tokens_per_second,
        "graph_us": _median(record.graph),
        "eager_us": _median(record.eager),
        "spread": _spread(record.timing()),
        "bound_ratio": None if ratio is None else round(ratio, 3),
        "bound_by": record.bound.by,
        "peer": "" if peer is None else peer.name,
        "peer_ratio": None if over is None else round(over, 3),
        "memory": record.peak_memory_bytes,
        "first_call": record.first_call_seconds,
        "state_bytes": record.state_bytes,
        "chip": _chip(record.provenance, record.device),
        "commit": (record.provenance.commit or "unknown")[:10] + (" + changes" if record.provenance.dirty else ""),
        "speed_id": record.speed_id,
    }


def _widths(shape: dict[str, int]) -> str:
    """Sizes beside batch and length in a few words: H=16 D=128 where keys and values are alike."""
    if "d_model" in shape:
        return f"d_model={shape['d_model']}"
    heads, key, value = shape["heads"], shape["key"], shape["value"]
    if value == 1:
        return f"{heads} channels" + (f" of {key} states" if key > 1 else "")
    return f"H={heads} D={key}" if key == value else f"H={heads} K={key} V={value}"


def _median(timing: Timing | None) -> float | None:
    return None if timing is None else round(timing.median_us, 2)


def _spread(timing: Timing | None) -> str:
    return "" if timing is None else f"{timing.low_us:,.1f} to {timing.high_us:,.1f}, n={timing.n}"


def _chip(provenance: Provenance, device: str) -> str:
    return provenance.hardware.get("gpu") or provenance.hardware.get("cpu") or device
