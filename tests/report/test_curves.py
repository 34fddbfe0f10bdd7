"""Learning curves on the page."""

from __future__ import annotations

from pathlib import Path

from bench.points import points
from bench.report import frames
from bench.store import Store

LAPTOP = Path(__file__).parents[2] / "results" / "measured" / "mqar_laptop"


def test_dashes_rank_the_sizes_of_a_mixer() -> None:
    """By their labels alone the larger of two states comes first for three of these mixers."""
    store = Store(LAPTOP)
    found = points(store.load()[0])
    rows = [{"id": point.id, "task": point.task} for point in found]
    curves, _ = frames.curve_rows(found, rows, store)
    states = {point.id: (point.mixer, point.state.true_bytes) for point in found}
    ranked = sorted((*states[curve["point"]], curve["variant"]) for curve in curves)
    sizes: dict[str, list[int]] = {}
    for mixer, _, variant in ranked:
        sizes.setdefault(mixer, []).append(variant)
    assert len(sizes["gla"]) == 2
    assert all(variants == list(range(len(variants))) for variants in sizes.values())
