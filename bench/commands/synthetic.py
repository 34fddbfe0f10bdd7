"""`bench synthetic`: plan a sweep, train what is missing, print the table, write the report."""

from __future__ import annotations

import os

from rich.table import Table

from bench.announce import SweepFile
from bench.commands.agreement import check, published_figure
from bench.commands.console import Output, bytes_text, seconds_text
from bench.commands.progress import SweepProgress
from bench.commands.request import ModelInfo, Request, build_sweep, inspect
from bench.commands.suite import print_families
from bench.commands.training import Training
from bench.families import mean_ceilings
from bench.launch.place import parse_place
from bench.points import Point, points
from bench.report.place import require_place
from bench.store import Store
from bench.sweep import Experiment, Planner, Sweep


def run(request: Request, output: Output) -> int:
    """The whole command.

    Returns:
        The exit code: 0 all runs done, 1 some run failed or a hard published target is missed, 130 interrupted.
    """
    sweep = build_sweep(request)
    figure = published_figure(request, sweep) if request.check else None
    place = parse_place(request.launch)
    device = place.device(request.device)
    store = Store(request.store)
    info = inspect(sweep, device)
    planner = Planner(store, rerun=request.rerun)
    plans = [planner.plan(experiment, sweep) for experiment in sweep.experiments]
    missing = sum(len(plan.ready) + plan.waiting for plan in plans)
    present = sum(len(plan.done) for plan in plans)
    output.say(device.sentence)
    if request.dry_run:
        _print_plan(sweep, planner, info, output)
        output.say(f"{missing} runs to do, {present} already in {store.root}; nothing was started.")
        return 0 if figure is None or check(figure, sweep, request, output) else 1
    if request.report is not None:
        require_place(request.report, "--report")
    store.check_writable()
    if missing == 0:
        output.say(f"Nothing to train: all {present} runs are already in {store.root}.")
    else:
        already = f" ({present} are already in {store.root})" if present else ""
        output.say(f"{len(sweep.experiments)} points, {missing} runs to do{already}; Ctrl-C stops and keeps what is done.")
        try:
            with (
                output.ours_alone(),
                SweepFile(store, os.environ.get("BENCH_COMMAND", "bench synthetic"), place.text, missing) as sweep_file,
                SweepProgress(output, missing) as progress,
                place.workers(device.kind, request.jobs, missing, store.root, sweep_file.path) as workers,
            ):
                Training(sweep, planner, workers, request.fleet, progress, sweep_file).run()
        except KeyboardInterrupt:
            output.say("Interrupted; finished runs are stored and runs in flight left a checkpoint. The same command goes on.")
            return 130
    plans = [planner.plan(experiment, sweep) for experiment in sweep.experiments]
    records = [record for plan in plans for record in plan.done]
    if left := sum(len(plan.ready) + plan.waiting for plan in plans):
        output.say(f"{left} runs are still missing; the same command goes on.")
    for record in records:
        output.emit("run", record.model_dump(mode="json"))
    shown = points(records)
    (print_table if request.suite is None else print_families)(shown, output)
    _report(store, request, sweep, output)
    agreed = figure is None or check(figure, sweep, request, output)
    return 0 if agreed and not left and all(record.status == "done" for record in records) else 1


def _print_plan(sweep: Sweep, planner: Planner, info: dict[Experiment, ModelInfo], output: Output) -> None:
    table = Table(title="Plan")
    several = len({experiment.task.name for experiment in sweep.experiments}) > 1
    for column in (
        *(["task"] if several else []),
        "mixer",
        "d",
        "parameters",
        f"state at T={_longest(info)}",
        "lr candidates",
        "to do",
        "done",
        "tokens a run",
    ):
        words = column in ("task", "mixer")
        table.add_column(column, justify="left" if words else "right", no_wrap=words)
    for experiment in sweep.experiments:
        plan, about = planner.plan(experiment, sweep), info[experiment]
        waiting = f" + {plan.waiting}" if plan.waiting else ""
        rates = " ".join(f"{lr:g}" for lr in experiment.lrs)
        output.emit(
            "plan",
            {
                "label": about.label,
                "experiment": experiment.model_dump(mode="json"),
                "parameters": about.parameters,
                "state_bytes": about.state.true_bytes,
                "to_do": len(plan.ready) + plan.waiting,
                "done": len(plan.done),
                "tokens_per_run": about.tokens_per_run,
            },
        )
        table.add_row(
            *([experiment.task.name] if several else []),
            about.label,
            str(experiment.model.d_model),
            f"{about.parameters:,}",
            bytes_text(about.state.true_bytes),
            rates,
            f"{len(plan.ready)}{waiting}",
            str(len(plan.done)),
            f"{about.tokens_per_run:,}",
        )
    output.console.print(table)
    output.say("To do: runs that choose the learning rate + runs at the chosen rate.")


def _longest(info: dict[Experiment, ModelInfo]) -> int:
    return max(about.state.seq_len for about in info.values())


def print_table(shown: list[Point], output: Output) -> None:
    """Points as a table, smallest state first."""
    table = Table(title="Test accuracy (equal mean over the difficulty cells) against decoding state")
    for column in ("mixer", "d", "state", "accuracy", "low to high", "seeds", "lr", "time a run"):
        table.add_column(column, justify="left" if column == "mixer" else "right", no_wrap=True)
    for point in sorted(shown, key=lambda point: point.state.true_bytes):
        mean, seconds = point.accuracy, point.train_seconds
        ends = f"{mean.low:.3f} to {mean.high:.3f}" if mean.low is not None and mean.high is not None else "-"
        table.add_row(
            point.label,
            str(point.spec.model.d_model),
            bytes_text(point.state.true_bytes),
            "failed" if mean.mean is None else f"{mean.mean:.3f}",
            ends,
            str(mean.n),
            "-" if point.lr is None else f"{point.lr:g}",
            "-" if seconds is None else seconds_text(seconds),
        )
    output.console.print(table)
    output.say("Low to high: " + "; ".join(sorted({point.accuracy.kind for point in shown})) + ".")
    for task, cells in {point.spec.task.name: point.cells for point in shown}.items():
        found = ", ".join(f"{name} {value:.3f}" for name, value in mean_ceilings(cells).items())
        output.say(f"Ceilings of {task}, mean over its cells: {found}.")
    failures = [record for point in shown for record in point.failures]
    for record in failures:
        output.say(f"{record.status}: {record.spec.name()}: {record.reason}")


def _report(store: Store, request: Request, sweep: Sweep, output: Output) -> None:
    if request.report is None:
        return
    from bench.report.build import build_report

    specs = None if request.suite is None else [experiment.task for experiment in sweep.experiments]
    build_report(store, request.report, task=request.task, specs=specs, option="--report")
    output.say(f"Report: {request.report}")
    output.emit("report", {"path": str(request.report)})
