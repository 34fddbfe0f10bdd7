"""`bench report`: one HTML file over a store, and figures for papers."""

from __future__ import annotations

from pathlib import Path

from bench.commands.console import Output
from bench.store import Store


def run(root: Path, out: Path, task: str | None, paper: Path | None, output: Output) -> int:
    """Writes the report.

    Raises:
        UserError: the store is empty, or holds nothing of the task, or something else lies where a folder or file is to go.
    """
    from bench.points import points
    from bench.report.build import build_report
    from bench.report.paper import check_folder, paper_figures

    if paper is not None:
        check_folder(paper)
    store = Store(root)
    summary = build_report(store, out, task=task)
    for warning in summary.warnings:
        output.say(warning)
        output.emit("warning", {"text": warning})
    parts = [f"{summary.runs} runs and {summary.points} points"] if summary.runs else []
    parts += [f"{summary.evaluations} evaluations"] if summary.evaluations else []
    parts += [f"{summary.speeds} measured speeds"] if summary.speeds else []
    without = "" if summary.runs or summary.evaluations else " (the store holds no trained runs)"
    output.say(f"Report over {', '.join(parts)}{without}: {out}")
    counts = {"runs": summary.runs, "points": summary.points, "evaluations": summary.evaluations, "speeds": summary.speeds}
    output.emit("report", {"path": str(out), **counts})
    if paper is not None:
        records, _ = store.load()
        chosen = [record for record in records if task in (None, record.spec.task.name)]
        if not chosen:
            output.say(f"No figures in {paper}: they show trained runs, and the store holds none.")
        for path in paper_figures(points(chosen), paper, store=store):
            output.say(f"Figure: {path}")
            output.emit("figure", {"path": str(path)})
    return 0
