"""The page's charts of synthetic tasks as Vega-Lite specifications without data; `page.js` fills in the named data sets."""

from __future__ import annotations

from typing import Any

import altair as alt

from bench.report.chart_parts import BYTES, FIT, ROOM, TOOLTIP, LayeredChart, accuracy, ceilings, finish, in_lines, literal

AXES = {
    "state": ("state_bytes", "State, bytes a sequence (log scale)"),
    "published": ("published_bytes", "State as published, bytes a sequence (log scale)"),
    "read": ("read_bytes", "State read to decode one token, bytes (log scale)"),
    "parameters": ("parameters", "Parameters (log scale)"),
}
"""Choices of the Pareto plot's horizontal axis: the field and the axis title."""

SECONDS_AXES = {"step": "Training step (log scale)", "examples": "Training examples seen (log scale)"}

PANEL_AXES = {"state": "State as published, bytes a sequence (log scale)", "width": "Model width (log scale)"}
"""Horizontal axis of a published figure: its state bytes, or the width where it gives none."""
_PUBLISHED_TOOLTIP = {
    "name": "point",
    "published_text": "published",
    "ours_text": "ours",
    "interval_text": "interval",
    "n": "seeds",
    "selection_text": "published selection",
    "verdict": "verdict",
    "target": "target",
    "source": "source",
}


def specs() -> dict[str, Any]:
    """Every specification but those of speeds; where the horizontal axis can be chosen, by axis."""
    return {
        "published": {axis: finish(_published(axis)) for axis in PANEL_AXES},
        "pareto": {axis: finish(_pareto(axis)) for axis in AXES},
        "heat": finish(_heat_map()),
        "families": finish(_family_map()),
        "curves": {axis: finish(_curves(axis)) for axis in SECONDS_AXES},
    }


def _pareto(axis: str) -> LayeredChart:
    """Accuracy against one kind of cost, with intervals, the front, the bits-needed line and the ceilings."""
    label = alt.Undefined if axis == "parameters" else BYTES
    form = "~s" if axis == "parameters" else alt.Undefined
    x = alt.X(
        "x:Q",
        title=in_lines(AXES[axis][1]),
        scale=alt.Scale(type="log", base=2, nice=False, padding=36),
        axis=alt.Axis(labelExpr=label, format=form, tickCount=4, grid=True, labelOverlap=True),
    )
    points = alt.Chart(alt.NamedData(name="points")).encode(x=x)
    series = points.mark_line(strokeWidth=1, opacity=0.35, clip=True).encode(
        y=accuracy("accuracy", "Mean test accuracy"),
        detail="label:N",
        stroke=alt.Stroke(**literal("color")),
        order="x:Q",
    )
    bars = points.mark_rule(strokeWidth=2, opacity=0.7, clip=True).encode(
        y=accuracy("low", "Mean test accuracy"), y2="high:Q", stroke=alt.Stroke(**literal("color"))
    )
    marks = points.mark_point(size=110, strokeWidth=2, opacity=1, clip=True).encode(
        y=accuracy("accuracy", "Mean test accuracy"),
        stroke=alt.Stroke(**literal("color")),
        fill=alt.Fill(**literal("fill")),
        shape=alt.Shape(**literal("shape")),
        tooltip=[alt.Tooltip(f"{field}:N", title=title) for field, title in TOOLTIP.items()],
    )
    front = alt.Chart(alt.NamedData(name="front")).encode(x=x, y=accuracy("accuracy", "Mean test accuracy"))
    line = front.mark_line(interpolate="step-after", strokeDash=[6, 4], strokeWidth=1.5, clip=True, style="front")
    # Free space lies up and left of a front; only names at the left edge must go right.
    right = front.mark_text(align="right", dx=-8, dy=-10, clip=True, style="name").encode(text="right_name:N")
    left = front.mark_text(align="left", dx=8, dy=14, clip=True, style="name").encode(text="left_name:N")
    layers = [
        ceilings(),
        *([_bits(x)] if axis in ("state", "published") else []),
        line,
        series,
        bars,
        marks.properties(name="points"),
        right,
        left,
    ]
    return alt.layer(*layers).properties(
        width="container",
        height=400,
        autosize=FIT,
        description="Scatter plot of mean test accuracy against cost, one point for each mixer and size; see the table.",
    )


def _published(axis: str) -> LayeredChart:
    """Published values as hollow marks and ours as filled ones with their intervals, joined by a line."""
    x = alt.X(
        "x:Q",
        title=in_lines(PANEL_AXES[axis]),
        scale=alt.Scale(type="log", base=2, nice=False, padding=24),
        axis=alt.Axis(labelExpr=BYTES if axis == "state" else alt.Undefined, tickCount=4, labelOverlap=True),
    )
    base = alt.Chart(alt.NamedData(name="values")).encode(x=x)
    stroke = alt.Stroke(**literal("color"))
    title = "Mean test accuracy"
    link = base.mark_rule(strokeWidth=1, strokeDash=[2, 2], clip=True).encode(
        y=accuracy("published", title), y2="ours:Q", stroke=stroke
    )
    bars = base.mark_rule(strokeWidth=2, opacity=0.7, clip=True).encode(y=accuracy("low", title), y2="high:Q", stroke=stroke)
    # The hollow mark is larger and drawn last, so that it stays visible around a filled one of the same value.
    marks, rings = (base.mark_point(size=size, strokeWidth=1.5, opacity=1, clip=True) for size in (50, 170))
    encoding: dict[str, Any] = {
        "shape": alt.Shape(**literal("shape")),
        "stroke": stroke,
        "tooltip": [alt.Tooltip(f"{field}:N", title=text) for field, text in _PUBLISHED_TOOLTIP.items()],
    }
    ours = marks.encode(y=accuracy("ours", title), fill=alt.Fill(**literal("color")), **encoding)
    published = rings.encode(y=accuracy("published", title), fill=alt.value("transparent"), **encoding)
    return alt.layer(link, bars, ours, published).properties(
        width="container",
        height=400,
        autosize=FIT,
        padding=ROOM,
        description="Published accuracies as hollow marks, ours filled with intervals; the numbers are in the table below.",
    )


def _bits(x: alt.X) -> LayeredChart:
    """Vertical line: the least state that can answer every query of the hardest cell."""
    base = alt.Chart(alt.NamedData(name="bits")).encode(x=x)
    rule = base.mark_rule(strokeDash=[2, 3], style="rule", clip=True).encode(
        strokeOpacity=alt.condition("datum.off", alt.value(0), alt.value(1))
    )
    text = base.mark_text(align="left", baseline="bottom", dx=5, dy=-4, style="note", y="height").encode(text="label:N")
    above = base.mark_text(align="left", baseline="top", dx=5, dy=4, style="note", y=0).encode(text="top_label:N")
    return alt.layer(rule, text, above)


def _heat_map() -> LayeredChart:
    """Accuracy by difficulty slice and point, with the numbers written in."""
    base = alt.Chart(alt.NamedData(name="slices")).encode(
        x=alt.X("slice:N", sort=None, title=None, axis=alt.Axis(orient="top", labelAngle=0, labelLimit=120)),
        y=alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=260)),
    )
    cells = base.mark_rect().encode(
        color=alt.Color("accuracy:Q", scale=alt.Scale(scheme="viridis", domain=[0, 1]), legend=None),
        tooltip=[
            alt.Tooltip("name:N", title="point"),
            alt.Tooltip("slice:N", title="slice"),
            alt.Tooltip("range:N", title="trained range"),
            alt.Tooltip("accuracy:Q", format=".1%"),
            alt.Tooltip("n:Q", title="seeds"),
        ],
    )
    numbers = base.mark_text(fontSize=11).encode(
        text=alt.Text("accuracy:Q", format=".0%"),
        color=alt.condition("datum.accuracy > 0.55", alt.value("#10151a"), alt.value("#ffffff")),
    )
    return alt.layer(cells, numbers).properties(
        width="container",
        autosize=FIT,
        padding=ROOM,
        description="Heat map of mean test accuracy by difficulty slice and point; the numbers are in the table below.",
    )


def _family_map() -> LayeredChart:
    """Scores by task and mixer, families side by side; means are framed."""
    order = {field: alt.EncodingSortField(field=field, op="min") for field in ("place", "rank")}
    base = alt.Chart(alt.NamedData(name="scores")).encode(
        x=alt.X("label:N", sort=order["place"], title=None, axis=alt.Axis(orient="top", labelAngle=-45, labelLimit=150)),
        y=alt.Y("name:N", sort=order["rank"], title=None, axis=alt.Axis(labelLimit=260)),
    )
    cells = base.mark_rect(strokeWidth=2).encode(
        color=alt.Color("score:Q", scale=alt.Scale(scheme="viridis", domain=[0, 1]), legend=None),
        stroke=alt.condition("datum.mean", alt.value("#d9480f"), alt.value("transparent")),
        tooltip=[
            alt.Tooltip("name:N", title="point"),
            alt.Tooltip("label:N", title="task"),
            alt.Tooltip("family:N"),
            alt.Tooltip("score:Q", format=".1%"),
        ],
    )
    numbers = base.mark_text(fontSize=11).encode(
        text=alt.Text("number:N"),
        color=alt.condition("datum.score > 0.55", alt.value("#10151a"), alt.value("#ffffff")),
    )
    return alt.layer(cells, numbers).properties(
        width="container",
        autosize=FIT,
        description="Heat map of scores by task and point, with the mean of each family; the numbers are in the table below.",
    )


def _curves(axis: str) -> LayeredChart:
    """Validation accuracy against training, mean over the reported seeds with their range."""
    base = alt.Chart(alt.NamedData(name="curves")).encode(
        x=alt.X(
            f"{axis}:Q",
            title=SECONDS_AXES[axis],
            scale=alt.Scale(type="log", base=10, nice=False),
            axis=alt.Axis(format="~s", tickCount=6, labelOverlap=True),
        ),
        detail="name:N",
    )
    band = base.mark_area(opacity=0.15, clip=True).encode(
        y=accuracy("low", "Validation accuracy"), y2="high:Q", fill=alt.Fill(**literal("color"))
    )
    dash = alt.Scale(domain=[0, 1, 2, 3], range=[[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]])
    line = base.mark_line(strokeWidth=2, clip=True).encode(
        y=accuracy("mean", "Validation accuracy"),
        stroke=alt.Stroke(**literal("color")),
        strokeDash=alt.StrokeDash("variant:O", scale=dash, legend=None),
        tooltip=[
            alt.Tooltip("name:N", title="point"),
            alt.Tooltip("step:Q", format=","),
            alt.Tooltip("mean:Q", title="validation accuracy", format=".1%"),
            alt.Tooltip("n:Q", title="seeds"),
        ],
    )
    return alt.layer(band, line.properties(name="curves")).properties(
        width="container",
        height=340,
        autosize=FIT,
        description="Learning curves: validation accuracy against training, one line for each point; see the table below.",
    )
