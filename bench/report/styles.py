"""Colour and shape of a mixer: derived from its name, so that it looks the same in every report."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

COLOURS = (
    ("#0072b2", "#5aaeea"),  # blue
    ("#d55e00", "#f58b4c"),  # vermilion
    ("#00875f", "#35c79b"),  # green
    ("#b2508a", "#e59ac6"),  # pink
    ("#6a3d9a", "#b698ea"),  # purple
    ("#a86f00", "#edb13a"),  # amber
    ("#14879e", "#62cfe2"),  # cyan
    ("#5c6166", "#b9bec4"),  # grey
)
"""Okabe and Ito's colour-blind-safe hues, darkened for white and lightened for dark pages to a contrast of 3:1 or more."""

SHAPES = {
    "circle": "M8 2.5a5.5 5.5 0 1 0 .01 0z",
    "square": "M3 3h10v10H3z",
    "triangle-up": "M8 2l6 11H2z",
    "diamond": "M8 1l6 7-6 7-6-7z",
    "cross": "M6 2h4v4h4v4h-4v4H6v-4H2V6h4z",
    "triangle-down": "M8 14L2 3h12z",
    "triangle-right": "M14 8L3 14V2z",
    "triangle-left": "M2 8l11-6v12z",
}
"""Vega's symbol names, and the same symbols as SVG paths in a box of 16 by 16."""


@dataclass(frozen=True)
class Style:
    """How a mixer is drawn."""

    light: str
    dark: str
    shape: str

    @property
    def path(self) -> str:
        """The symbol as an SVG path in a box of 16 by 16."""
        return SHAPES[self.shape]


def assign(names: Iterable[str]) -> dict[str, Style]:
    """A style for each mixer; no two of the first eight share a colour or a shape, no two of the first 64 share both.

    The name's hash picks the slots. Where two names want the same one, the later name in alphabetical order takes the next
    free slot, so adding a mixer leaves every style but those it collides with.
    """
    shapes = list(SHAPES)
    found: dict[str, Style] = {}
    pairs: set[tuple[int, int]] = set()
    free_colours: list[int] = []
    free_shapes: list[int] = []
    for name in sorted(set(names)):
        if not free_colours:
            free_colours, free_shapes = list(range(len(COLOURS))), list(range(len(shapes)))
        code = zlib.crc32(name.encode())
        colour = _nearest(free_colours, code % len(COLOURS), len(COLOURS))
        free_colours.remove(colour)
        choices = [shape for shape in free_shapes if (colour, shape) not in pairs] or free_shapes
        shape = _nearest(choices, code // len(COLOURS) % len(shapes), len(shapes))
        free_shapes.remove(shape)
        pairs.add((colour, shape))
        found[name] = Style(*COLOURS[colour], shapes[shape])
    return found


def _nearest(free: list[int], wanted: int, n: int) -> int:
    """The first free slot at or after the wanted one, around the circle."""
    return min(free, key=lambda slot: (slot - wanted) % n)
