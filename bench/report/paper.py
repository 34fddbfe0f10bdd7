"""The page's figures for papers: PDF and SVG by matplotlib, vector text, the same bytes for the same points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import UserError
from bench.points import Point
from bench.report import frames, styles
from bench.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {
    "circle": "o",
    "square": "s",
    "triangle-up": "^",
    "diamond": "D",
    "cross": "P",
    "triangle-down": "v",
    "triangle-right": ">",
    "triangle-left": "<",
}
SETTINGS: dict[Any, Any] = {
    "pdf.fonttype": 42,  # TrueType: text stays text and can be edited
    "svg.fonttype": "none",
    "svg.hashsalt": "mixer-bench",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def check_folder(folder: Path) -> None:
    """Looks, before anything else is written, whether the folder of figures is there or can be made.

    Raises:
        UserError: a file stands in its place or above it.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"The folder {folder} cannot be made ({there} is a file); choose another one with --paper.")


def paper_figures(points: Sequence[Point], folder: Path, *, store: Store | None = None) -> list[Path]:
    """Writes the Pareto plot, the heat map and, given the store, the learning curves of each task.

    Args:
        points: what `bench.points.points` returns.
        folder: where to write; made if it is missing.
        store: where the learning curves are read from.

    Returns:
        The files written, two for each figure.

    Raises:
        UserError: the folder cannot be made.
    """
    import matplotlib as mpl

    tasks = frames.task_rows(points)
    rows = frames.point_rows(points, tasks)
    curves = frames.curve_rows(points, rows, store)[0] if store is not None else []
    look = styles.assign(point.mixer for point in points)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"The folder {folder} cannot be made ({reason}); choose another one with --paper.") from None
    written: list[Path] = []
    with mpl.rc_context(SETTINGS):
        for task in tasks:
            group = [row for row in rows if row["task"] == task["id"] and row["accuracy"] is not None]
            lines = [(row, curve) for row in group for curve in curves if curve["point"] == row["id"]]
            slices = frames.slice_names([p for p, row in zip(points, rows, strict=True) if row["task"] == task["id"]])
            stem = "".join(c if c.isalnum() else "_" for c in task["title"])
            if group:
                written += _save(_pareto(task, group, look), folder / f"{stem}_pareto")
                written += _save(_heat_map(slices, group), folder / f"{stem}_difficulty")
            if lines:
                written += _save(_curves(lines, look), folder / f"{stem}_curves")
    return written


def _save(figure: Figure, stem: Path) -> list[Path]:
    """Writes a figure twice, without dates, so that the same figure is the same file."""
    pdf, svg = stem.with_suffix(".pdf"), stem.with_suffix(".svg")
    figure.savefig(pdf, metadata={"CreationDate": None, "ModDate": None, "Producer": None, "Creator": "Mixer Bench"})
    figure.savefig(svg, metadata={"Date": None, "Creator": "Mixer Bench"})
    return [pdf, svg]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure outside pyplot, so that nothing global is touched."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _pareto(task: dict[str, Any], rows: list[dict[str, Any]], look: dict[str, styles.Style]) -> Figure:
    """Mean test accuracy against true state bytes."""
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    figure, axes = _figure(5.2, 3.2)
    named: set[str] = set()
    for row in rows:
        style = look[row["mixer"]]
        if row["low"] is not None:
            axes.vlines(row["state_bytes"], row["low"], row["high"], color=style.light, linewidth=1)
        axes.plot(
            row["state_bytes"],
            row["accuracy"],
            marker=MARKERS[style.shape],
            color=style.light,
            markerfacecolor=style.light if row["n"] > 1 else "white",
            linestyle="none",
            markersize=5,
            label=None if row["mixer"] in named else row["mixer"],
        )
        named.add(row["mixer"])
    front = sorted((row for row in rows if row["front_state"]), key=lambda row: row["state_bytes"])
    xs, ys = [row["state_bytes"] for row in front], [row["accuracy"] for row in front]
    axes.step(xs, ys, where="post", color="0.4", linestyle="--", linewidth=0.8, zorder=0)
    for name, value in task["lines"].items():
        axes.axhline(value, color="0.5", linestyle=":", linewidth=0.8)
        axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.4", fontsize=7)
    need = task["bits"] / 8
    if need >= min(row["state_bytes"] for row in rows) / 8:
        axes.axvline(need, color="0.5", linestyle=":", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: frames.human_bytes(value)))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="State, bytes a sequence", ylabel="Mean test accuracy", ylim=(-0.03, 1.04))
    figure.legend(loc="outside right upper")
    return figure


def _heat_map(slices: list[str], rows: list[dict[str, Any]]) -> Figure:
    """Mean test accuracy by slice and point."""
    import numpy as np

    figure, axes = _figure(2.2 + 0.5 * len(slices), 0.5 + 0.19 * len(rows))
    values = np.array([[row["slices"].get(name, np.nan) for name in slices] for row in rows])
    # Cells are drawn as vector quads, not as an embedded image.
    axes.pcolormesh(values, vmin=0, vmax=1, cmap="viridis", edgecolors="white", linewidth=0.5)
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "black" if value > 0.55 else "white"
            axes.text(x + 0.5, y + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=colour)
    axes.set_xticks(np.arange(len(slices)) + 0.5, slices)
    axes.set_yticks(np.arange(len(rows)) + 0.5, [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _curves(lines: list[tuple[dict[str, Any], dict[str, Any]]], look: dict[str, styles.Style]) -> Figure:
    """Validation accuracy against training steps, mean and range over the reported seeds."""
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, ScalarFormatter

    figure, axes = _figure(5.8, 3.2)
    for row, curve in lines:
        colour, dash = look[row["mixer"]].light, ("-", "--", ":", "-.")[curve["variant"]]
        axes.fill_between(curve["step"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
        axes.plot(curve["step"], curve["mean"], color=colour, linestyle=dash, linewidth=1.2, label=row["name"])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="Training step", ylabel="Validation accuracy", ylim=(-0.03, 1.04))
    figure.legend(loc="outside right upper")
    return figure
