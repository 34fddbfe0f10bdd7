"""The charts of measured speeds; see `bench.report.charts` for how a specification gets its data and colours."""

from __future__ import annotations

from typing import Any

import altair as alt

from bench.report.chart_parts import FIT, TOOLTIP, LayeredChart, accuracy, ceilings, finish, in_lines, literal

_RECALL_TOOLTIP = {
    "name": "point",
    "task_title": "task",
    "accuracy_text": "accuracy",
    "interval_text": "interval",
    "speed_text": "tokens/s",
    "measured": "measured at",
}
_SPEED_TOOLTIP = {
    "series": "subject",
    "mode": "mode",
    "batch": "batch",
    "length": "length",
    "tokens_text": "tokens/s",
    "bound_text": "× bound",
    "peer_text": "× peer",
    "path": "path",
    "dtype": "precision",
    "chip": "hardware",
    "commit": "commit",
}


def specs() -> dict[str, Any]:
    """Accuracy against speed, and speed against length."""
    return {"recall": finish(_recall()), "lengths": finish(_lengths())}


def _tokens(channel: type[alt.X] | type[alt.Y], title: str | list[str]) -> Any:
    """A logarithmic axis of tokens a second."""
    return channel(
        "tokens_per_second:Q",
        title=title,
        scale=alt.Scale(type="log", base=10, nice=False, padding=24),
        axis=alt.Axis(format="~s", tickCount=6, labelOverlap=True),
    )


def _recall() -> LayeredChart:
    """Accuracy against measured tokens a second; the area of a mark grows with the state."""
    x = _tokens(alt.X, in_lines("Tokens a second of the mixers alone (log scale)"))
    base = alt.Chart(alt.NamedData(name="points")).encode(x=x)
    title = "Mean test accuracy"
    bars = base.mark_rule(strokeWidth=2, opacity=0.7, clip=True).encode(
        y=accuracy("low", title), y2="high:Q", stroke=alt.Stroke(**literal("color"))
    )
    marks = base.mark_point(strokeWidth=2, opacity=1, clip=True).encode(
        y=accuracy("accuracy", title),
        stroke=alt.Stroke(**literal("color")),
        fill=alt.Fill(**literal("fill")),
        shape=alt.Shape(**literal("shape")),
        size=alt.Size("state_bytes:Q", scale=alt.Scale(type="log", base=2, range=[40, 420]), legend=None),
        tooltip=[
            alt.Tooltip(f"{field}:N", title=text)
            for field, text in (_RECALL_TOOLTIP | {key: TOOLTIP[key] for key in ("n", "state_text", "parameters_text")}).items()
        ],
    )
    y = accuracy("accuracy", title)
    right = base.mark_text(align="left", dx=12, dy=-9, clip=True, style="name").encode(y=y, text="right_name:N")
    left = base.mark_text(align="right", dx=-12, dy=-9, clip=True, style="name").encode(y=y, text="left_name:N")
    return alt.layer(ceilings(), bars, marks.properties(name="points"), right, left).properties(
        width="container",
        height=400,
        autosize=FIT,
        description="Mean test accuracy against measured tokens a second, one mark for each point; see the table below.",
    )


def _lengths() -> LayeredChart:
    """Measured tokens a second against length, a line for each subject and size."""
    x = alt.X(
        "length:Q",
        title="Tokens of a sequence (log scale)",
        scale=alt.Scale(type="log", base=2, nice=False),
        axis=alt.Axis(format="d", values=[2**n for n in range(4, 21)], labelOverlap=True),
    )
    span = alt.Chart(alt.NamedData(name="span")).mark_point(opacity=0).encode(x=x)  # room for marks and, on the right, for names
    base = alt.Chart(alt.NamedData(name="speeds")).encode(
        x=x,
        y=_tokens(alt.Y, "Tokens a second (log scale)"),
        stroke=alt.Stroke(**literal("color")),
        detail="series:N",
    )
    dash = alt.Scale(domain=[0, 1, 2, 3], range=[[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]])
    line = base.mark_line(strokeWidth=1.5, opacity=0.6, clip=True).encode(
        strokeDash=alt.StrokeDash("variant:O", scale=dash, legend=None)
    )
    marks = base.mark_point(size=70, strokeWidth=2, opacity=1, clip=True).encode(
        fill=alt.Fill(**literal("color")),
        shape=alt.Shape(**literal("shape")),
        tooltip=[alt.Tooltip(f"{field}:N", title=title) for field, title in _SPEED_TOOLTIP.items()],
    )
    names = base.transform_filter("datum.last").mark_text(align="left", dx=8, clip=True, style="name", fontSize=11, strokeWidth=0)
    return alt.layer(span, line, marks.properties(name="speeds"), names.encode(text="right_name:N")).properties(
        width="container",
        height=400,
        autosize=FIT,
        description="Measured tokens a second against sequence length, one line for each subject; see the table below.",
    )
