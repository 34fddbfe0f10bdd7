"""Cells written as text: "64x4:100000+128x8:20000" is two cells, axis values joined by x, then the number of examples."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from synthetic_tasks._base import Cell

Length = Callable[[Mapping[str, int]], int]
"""The sequence length that follows from a cell's axes."""

_CELL = re.compile(r"(\d+(?:x\d+)*):(\d+)")


def parse_cells(text: str, axes: tuple[str, ...], length: Length | None = None) -> tuple[Cell, ...]:
    """Cells of the given axes.

    Args:
        text: e.g. "64x4:100000+128x8:20000".
        axes: names of the axes in the order written, e.g. ("length", "pairs").
        length: sequence length from the axes; left out where one axis is "length".

    Raises:
        ValueError: the text does not follow the pattern or names a cell twice.
    """
    pattern = "x".join(axes) + ":examples"
    cells = []
    for part in text.replace(" ", "").split("+"):
        match = _CELL.fullmatch(part)
        numbers = [int(number) for number in match[1].split("x")] if match else []
        if match is None or len(numbers) != len(axes):
            raise ValueError(f"cell {part!r} in {text!r} is not of the form {pattern}; write cells like {_example(axes)}")
        values: dict[str, int] = dict(zip(axes, numbers, strict=True))
        if min(int(match[2]), *numbers) < 1:
            raise ValueError(
                f"cell {part!r} in {text!r} holds a zero; every axis and the examples start at 1, e.g. {_example(axes)}"
            )
        cells.append(Cell(match[1], length(values) if length else values["length"], int(match[2]), values))
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        raise ValueError(f"cells {text!r} name a cell twice; every combination of {' and '.join(axes)} may stand once")
    return tuple(cells)


def parse_splits(
    axes: tuple[str, ...], *, train: str, valid: str, test: str, length: Length | None = None
) -> dict[str, tuple[Cell, ...]]:
    """The cells of the three splits; an empty `valid` means the test cells."""
    texts = {"train": train, "valid": valid or test, "test": test}
    return {split: parse_cells(text, axes, length) for split, text in texts.items()}


def _example(axes: tuple[str, ...]) -> str:
    """A cell text of the right form, for error messages."""
    return "x".join("64" if axis == "length" else "4" for axis in axes) + ":1000"
