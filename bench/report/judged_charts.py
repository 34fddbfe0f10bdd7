"""Vega-Lite specifications of the charts on language models; their data come with the page's other data."""

from __future__ import annotations

from functools import partial
from typing import Any

import altair as alt

from bench.report.chart_parts import BYTES, FIT, LayeredChart, accuracy, finish, in_lines, literal

DASHES = [[1, 0], [1, 0], [6, 3], [2, 2]]
"""Solid for models and students, dashed for the untrained window, dotted for ablations."""
_BEFORE_NAMES = alt.Scale(type="point", padding=0, range=[40, alt.ExprRef("max(width - 210, 0.6 * width)")])
"""Points of an axis that leaves room on the right for names at the ends of lines, of a narrow page two fifths."""
_NAMES = alt.ExprRef("min(195, 0.4 * width - 15)")
"""Pixels of such a name; a longer one ends with an ellipsis, the tooltip has it whole."""
_share = partial(accuracy, least=-0.04)


def specs() -> dict[str, Any]:
    """Every specification, by the name that a chart's data give."""
    made = {
        "judged_pareto": _pareto(),
        "judged_lengths": _lengths(),
        "judged_speed": _speed(),
        "judged_answers": _answers(),
        "bridge": _bridge(),
    }
    return {name: finish(chart) for name, chart in made.items()}


def _tooltips(**fields: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{field}:N", title=title) for field, title in {"name": "model", "kind": "kind", **fields}.items()]


def _pareto() -> LayeredChart:
    x = alt.X(
        "x:Q",
        title=in_lines("State, bytes a sequence at the longest measured length (log scale)"),
        scale=alt.Scale(type="log", base=2, nice=False, padding=36),
        axis=alt.Axis(labelExpr=BYTES, tickCount=4, labelOverlap=True),
    )
    base = alt.Chart(alt.NamedData(name="values")).encode(x=x)
    stroke = alt.Stroke(**literal("color"))
    tooltip = [*_tooltips(state_text="state", front="on the front"), alt.Tooltip("y:Q", title="recall", format=".1%")]
    bars = base.mark_rule(strokeWidth=2, opacity=0.7).encode(y=_share("low", "Recall"), y2="high:Q", stroke=stroke)
    marks = base.mark_point(size=110, strokeWidth=2, opacity=1).encode(
        y=_share("y", "Recall"),
        stroke=stroke,
        fill=alt.Fill(**literal("color")),
        shape=alt.Shape(**literal("shape")),
        tooltip=tooltip,
    )
    names = base.mark_text(align="left", dx=9, dy=-9, style="name").encode(y=_share("y", "Recall"), text="label:N")
    return alt.layer(bars, marks, names).properties(
        width="container",
        height=340,
        autosize=FIT,
        description="Mean accuracy over all recall items against bytes of state, one point a model; see the table.",
    )


def _lengths() -> LayeredChart:
    x = alt.X("x:O", title="Length of the item, tokens", scale=_BEFORE_NAMES, axis=alt.Axis(labelAngle=0, grid=True))
    tooltip = [*_tooltips(x="length", n="items"), alt.Tooltip("y:Q", title="recall", format=".1%")]
    bars = (
        alt.Chart(alt.NamedData(name="values"))
        .mark_rule(strokeWidth=1.5, opacity=0.5)
        .encode(x=x, y=_share("low", "Recall"), y2="high:Q", stroke=alt.Stroke(**literal("color")))
    )
    said = "Mean accuracy over the recall items of each length, one line a model; see the table."
    return _lines(x, _share("y", "Recall"), tooltip, said, bars)


def _speed() -> LayeredChart:
    x = alt.X("x:O", title="Context, tokens", scale=_BEFORE_NAMES, axis=alt.Axis(labelAngle=0, grid=True))
    y = alt.Y("y:Q", title="Decoded tokens/s, all rows (log scale)", scale=alt.Scale(type="log", nice=False, padding=12))
    tooltip = [*_tooltips(x="context", batch="batch", how="run as"), alt.Tooltip("y:Q", title="tokens/s", format=",.0f")]
    return _lines(x, y, tooltip, "Speed of decoding at the largest batch by context, one line a model; see the table.")


def _lines(x: alt.X, y: alt.Y, tooltip: list[alt.Tooltip], said: str, *below: alt.Chart) -> LayeredChart:
    """A line with points for every model, named at its end where there is room."""
    base = alt.Chart(alt.NamedData(name="values")).encode(x=x, y=y)
    stroke = alt.Stroke(**literal("color"))
    dash = alt.StrokeDash(
        "kind:N", scale=alt.Scale(domain=["model", "student", "untrained", "ablation"], range=DASHES), legend=None
    )
    line = base.mark_line(strokeWidth=2).encode(stroke=stroke, strokeDash=dash, detail="name:N")
    marks = base.mark_point(size=60, strokeWidth=2, opacity=1).encode(
        stroke=stroke, fill=alt.Fill(**literal("color")), shape=alt.Shape(**literal("shape")), tooltip=tooltip
    )
    names = base.mark_text(align="left", dx=9, limit=_NAMES, style="name").encode(text="label:N")
    return alt.layer(*below, line, marks, names).properties(width="container", height=340, autosize=FIT, description=said)


def _answers() -> alt.FacetChart:
    bars = (
        alt.Chart(alt.NamedData(name="values"))
        .mark_bar()
        .encode(
            x=alt.X("answer:N", title=None, axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("what:N"),
            y=alt.Y("share:Q", title="Share of answers", axis=alt.Axis(format=".0%")),
            color=alt.Color("what:N", title=None, scale=alt.Scale(range=["#1e6bb0", "#8a949e"]), legend=alt.Legend(orient="top")),
            tooltip=[
                *(alt.Tooltip(f"{field}:N") for field in ("name", "task", "answer", "what", "n")),
                alt.Tooltip("share:Q", format=".1%"),
            ],
        )
        .properties(width=130, height=90)
    )
    return bars.facet(
        row=alt.Row("name:N", title=None, header=alt.Header(labelLimit=200, labelAngle=0, labelAlign="left")),
        column=alt.Column("task:N", title=None),
    ).properties(description="How often each letter was given and was right, by model and task; see the table.")


def _bridge() -> LayeredChart:
    x = alt.X(
        "x:Q",
        title=in_lines("MQAR accuracy of the mixer at equal state bytes"),
        scale=alt.Scale(domain=[-0.04, 1.06], nice=False),
        axis=alt.Axis(format=".0%"),
    )
    base = alt.Chart(alt.NamedData(name="values")).encode(x=x, y=_share("y", "Recall of the converted model"))
    tooltip = [
        *_tooltips(mixer="mixer", state_text="state"),
        alt.Tooltip("x:Q", title="MQAR", format=".1%"),
        alt.Tooltip("y:Q", title="recall", format=".1%"),
    ]
    marks = base.mark_point(size=110, strokeWidth=2, opacity=1).encode(
        stroke=alt.Stroke(**literal("color")),
        fill=alt.Fill(**literal("color")),
        shape=alt.Shape(**literal("shape")),
        tooltip=tooltip,
    )
    side = "datum.x > 0.4 ? {} : {}"  # names have more room on the left of these points, and would be cut off on their right
    align, dx = alt.ExprRef(side.format("'right'", "'left'")), alt.ExprRef(side.format(-9, 9))
    names = base.mark_text(align=align, dx=dx, dy=-9, style="name").encode(text="name:N")
    return alt.layer(marks, names).properties(
        width="container",
        height=340,
        autosize=FIT,
        description="MQAR accuracy of each mixer against recall of the models converted with it; see the table.",
    )
