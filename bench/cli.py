"""The `bench` command line: parsing and dispatch only; torch is imported by the commands that need it.

Exit codes: 0 all good; 1 some run failed, a check failed or a comparison regressed; 2 bad input; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from bench import __version__, cli_models, cli_speed
from bench.options import (
    DEFAULT_STORE,
    DebugOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    NoReportOption,
    ReportOption,
    StoreOption,
    complete,
    guard,
    how,
    what,
)

EXIT_CODES = "Exit codes: 0 all good; 1 some run failed, a check failed or a comparison regressed; 2 bad input; 130 interrupted."

app = typer.Typer(
    name="bench",
    help="Mixer Bench: what does a sequence mixer's memory buy?\n\n" + EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mixer-bench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Options that stand before the command."""


@app.command()
def synthetic(
    task: Annotated[str | None, what(help="Task to train on, e.g. mqar.", autocompletion=complete("task"))] = None,
    mixer: Annotated[
        list[str] | None,
        what(
            help="Mixers, comma-separated: gla,attention | sliding_window:window=32 | gla*3+attention | ./mine.py@Mine.",
            autocompletion=complete("mixer"),
        ),
    ] = None,
    recipe: Annotated[str | None, what(help="Recipe to run instead of the task's own.", autocompletion=complete("recipe"))] = None,
    suite: Annotated[str | None, what(help="Whole families: recall, selectivity, mad, state_tracking or all.")] = None,
    preset: Annotated[str | None, what(help="Size of a suite: quick (two cores, 15 minutes) or laptop.")] = None,
    settings: Annotated[
        list[str] | None, what("--set", help="Change a setting: train.epochs=8, model.d_model=64,128 (a grid).")
    ] = None,
    seeds: Annotated[int | None, what(min=1, help="Reported seeds per point.")] = None,
    select_seeds: Annotated[int | None, what(min=1, help="Seeds per learning rate in its selection.")] = None,
    device: DeviceOption = "auto",
    jobs: Annotated[int | None, how(min=1, help="Worker processes; default one per CPU core, or up to 6 per GPU.")] = None,
    fleet: Annotated[int, how(min=1, help="Most seeds and learning rates trained together as one model.")] = 16,
    launch: Annotated[str, how(help="local, ray:gpus=0.5, slurm:partition=gpu,time=120, ...")] = "local",
    rerun: Annotated[str | None, how(help="Train again: failed or all.")] = None,
    dry_run: DryRunOption = False,
    check_: Annotated[bool, how("--check", help="Compare with published values; fail if a hard one is missed.")] = False,
    report: ReportOption = None,
    no_report: NoReportOption = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train mixers on a synthetic task and report what their memory buys.

    Examples:
    bench synthetic --task mqar

    bench synthetic --task mqar --mixer ./mine.py@Mine,gla,attention --seeds 5

    bench synthetic --task mqar --set train.lr=1e-3,3e-3 --set model.d_model=32,64 --dry-run

    bench synthetic --suite all --preset quick

    bench synthetic --recipe readme_plot --check

    Exit codes: 0 all runs done; 1 some run failed or a hard published value was missed; 2 bad input; 130 interrupted.
    """

    def command() -> int:
        from bench.commands import synthetic as module
        from bench.commands.console import Output
        from bench.commands.request import Request

        request = Request(
            task=task,
            mixers=mixer or [],
            recipe=recipe,
            settings=settings or [],
            seeds=seeds,
            select_seeds=select_seeds,
            device=device,
            store=store,
            jobs=jobs,
            fleet=fleet,
            rerun=rerun,
            dry_run=dry_run,
            report=None if no_report else report or store.parent / "reports" / f"{suite or task or recipe}.html",
            suite=suite,
            preset=preset,
            launch=launch,
            check=check_,
        )
        return module.run(request, Output(as_json=as_json))

    guard(debug, command)


app.command()(cli_models.convert)
app.command()(cli_models.sample)
app.command("eval")(cli_models.eval_)
app.command()(cli_speed.throughput)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="mixers, kernels, tasks, recipes, conversions, suites, or all.")] = "all",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List mixers, kernels, tasks, recipes, conversions and suites, with the first line of their documentation."""

    def command() -> int:
        from bench.commands import listing
        from bench.commands.console import Output

        return listing.run(what, Output(as_json=as_json))

    guard(debug, command)


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds until Ctrl-C.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a store holds: finished, failed, running (on which host, how far) and stopped runs."""

    def command() -> int:
        from bench.commands import status as module
        from bench.commands.console import Output

        return module.run(store, Output(as_json=as_json), watch=watch)

    guard(debug, command)


@app.command()
def report(
    out: Annotated[Path, typer.Option("-o", "--out", help="The HTML file to write.")] = Path("results/reports/report.html"),
    task: Annotated[str | None, typer.Option(help="Only this task.", autocompletion=complete("task"))] = None,
    paper: Annotated[Path | None, typer.Option(help="Also write PDF and SVG figures into this folder.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write one self-contained HTML report over the stored runs."""

    def command() -> int:
        from bench.commands import report as module
        from bench.commands.console import Output

        return module.run(store, out, task, paper, Output(as_json=as_json))

    guard(debug, command)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A mixer or language model as in the table, or the folder of a store.")],
    b: Annotated[str, typer.Argument(help="Another one; differences are B minus A.")],
    fail: Annotated[
        str | None, typer.Option(help="Exit with 1 if B falls behind A by more: accuracy:-0.01.", metavar="METRIC:LIMIT")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare two mixers or stores by paired differences over seeds, or two language models over items.

    Examples:
    bench compare gla gated_delta_net

    bench compare 'window 255 + 4 sinks, untrained' converted

    bench compare results/old results/runs --fail accuracy:-0.01
    """

    def command() -> int:
        from bench.commands import compare as module
        from bench.commands.console import Output

        return module.run(a, b, fail, store, Output(as_json=as_json))

    guard(debug, command)


@app.command()
def check(
    mixer: Annotated[
        str, typer.Argument(help="gla | gla:n_heads=4 | ./mine.py@Mine | package/name.", autocompletion=complete("mixer"))
    ],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check a mixer against the contract: causal, self-consistent, honest about its state.

    Examples:
    bench check ./mine.py@Mine

    bench check gla --json
    """

    def command() -> int:
        from bench.commands import check as module
        from bench.commands.console import Output

        return module.run(mixer, Output(as_json=as_json))

    guard(debug, command)


@app.command()
def doctor(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Check this installation: versions, devices, Triton, extras, name clashes, the store."""

    def command() -> int:
        from bench.commands import doctor as module
        from bench.commands.console import Output

        return module.run(store, Output(as_json=as_json))

    guard(debug, command)


def main() -> None:
    """Entry point of the `bench` script."""
    os.environ.setdefault("BENCH_COMMAND", _command_line())
    app()


def _command_line() -> str:
    import shlex

    return shlex.join(["bench", *sys.argv[1:]])


if __name__ == "__main__":
    main()
