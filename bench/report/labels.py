"""Names beside points of a chart: those that would be written over another are left out, the tooltip has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

WIDTH, HEIGHT = 700.0, 340.0
"""Pixels of a chart's plane, roughly: its width follows the page's."""
LETTER, LINE = 6.5, 15.0
"""Pixels of a letter and of a line of text."""


def apart(
    values: list[dict[str, Any]],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    first: Callable[[dict[str, Any]], Any],
) -> None:
    """Empties the `label` of values where it would meet one that was placed before.

    Args:
        values: of a chart, each with a `label`; changed in place.
        x: field of the horizontal place.
        y: field of the vertical place.
        log_x: whether the axis is logarithmic.
        log_y: the same of the other axis.
        first: sort key; what comes first keeps its name.
    """
    across, up = (_places([value[name] for value in values], log) for name, log in ((x, log_x), (y, log_y)))
    boxes: list[tuple[float, float, float]] = []
    for index in sorted(range(len(values)), key=lambda i: first(values[i])):
        left, height, long = WIDTH * across[index], HEIGHT * up[index], LETTER * len(values[index]["label"])
        if any(abs(height - h) < LINE and left < b and a < left + long for a, b, h in boxes):
            values[index]["label"] = ""
        elif values[index]["label"]:
            boxes.append((left, left + long, height))


def ends(values: list[dict[str, Any]], *, log_y: bool = False) -> None:
    """Leaves a name at the last point of every line, and of lines that end close together at the first one alone."""
    last = {value["name"]: max(v["x"] for v in values if v["name"] == value["name"]) for value in values}
    for value in values:
        if value["x"] < last[value["name"]]:
            value["label"] = ""
    apart(values, x="x", y="y", log_y=log_y, first=lambda value: (value["kind"] != "model", -value["y"]))


def _places(numbers: list[float], log: bool) -> list[float]:
    """Numbers as shares of an axis."""
    placed = [math.log(max(number, 1e-9)) for number in numbers] if log else numbers
    low, high = min(placed), max(placed)
    return [(number - low) / (high - low or 1.0) for number in placed]
