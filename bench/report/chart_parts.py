"""What the page's charts have in common: axes, marks, zoom, and the way from Altair to a bare specification.

Colours and shapes stand in the data as literal values (a scale of None), so one specification serves both themes and any
set of mixers.
"""

from __future__ import annotations

import textwrap
from typing import Any

import altair as alt

BYTES = (
    "datum.value < 1024 ? datum.value + ' B' : datum.value < 1048576 ? format(datum.value / 1024, '.3~r') + ' KiB' : "
    "format(datum.value / 1048576, '.3~r') + ' MiB'"
)
"""How an axis writes bytes."""
ZOOM = {
    "name": "zoom",
    "bind": "scales",
    "select": {"type": "interval", "zoom": "wheel![event.shiftKey]", "clear": "dblclick"},
}
"""Drag to move, Shift and wheel to zoom (so that the page still scrolls), double-click to reset. It is set on one layer by
hand, because Altair would set it on the whole chart, some of whose layers have no field on one axis."""
ZOOMED = ("points", "curves", "speeds")
LayeredChart = alt.LayerChart | alt.FacetChart
FIT = alt.AutoSizeParams(type="fit-x", contains="padding")
ROOM = {"left": 5, "top": 5, "right": 18, "bottom": 5}
"""Around charts whose last label is centred near the right edge, which fitting does not count."""
TOOLTIP = {
    "name": "point",
    "mixer": "mixer",
    "task_title": "task",
    "accuracy_text": "accuracy",
    "interval_text": "interval",
    "n": "seeds",
    "state_text": "state",
    "published_text": "as published",
    "read_text": "read a token",
    "parameters_text": "parameters",
    "lr_text": "learning rate",
    "speed_text": "examples/s",
    "hardware": "hardware",
    "commit": "commit",
}


def finish(chart: LayeredChart) -> dict[str, Any]:
    """The specification without Altair's default configuration, which the page's themes replace."""
    spec = chart.to_dict()
    spec.pop("config", None)
    for layer in spec.get("layer", ()):  # facets have none
        if layer.get("name") in ZOOMED:
            layer["params"] = [ZOOM]
    return spec


def literal(field: str) -> dict[str, Any]:
    """Encoding options of a field whose values are colours or shapes themselves."""
    return {"shorthand": f"{field}:N", "scale": None, "legend": None}


def in_lines(title: str) -> list[str]:
    """The title of a horizontal axis in lines that fit under the chart of a page 400 pixels wide, which would cut them off."""
    return textwrap.wrap(title, 36)


def accuracy(field: str, title: str, *, least: float = -0.08) -> alt.Y:
    """The vertical axis of accuracies, from `least` on, so that marks at 0 are whole."""
    return alt.Y(
        f"{field}:Q",
        title=title,
        scale=alt.Scale(domain=[least, 1.06], nice=False),
        axis=alt.Axis(format=".0%", values=[0, 0.2, 0.4, 0.6, 0.8, 1]),
    )


def ceilings() -> LayeredChart:
    """Horizontal lines: accuracy of solvers that do not solve the task."""
    base = alt.Chart(alt.NamedData(name="ceilings")).encode(y=accuracy("y", "Mean test accuracy"))
    rule = base.mark_rule(strokeDash=[2, 3], style="rule", clip=True)
    right = base.mark_text(align="right", baseline="bottom", dy=-3, style="note", x="width").encode(text="right_label:N")
    left = base.mark_text(align="left", baseline="bottom", dx=4, dy=-3, style="note", x=0).encode(text="left_label:N")
    return alt.layer(rule, right, left)
