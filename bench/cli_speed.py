"""The command line of `bench throughput`; parsing only, as in `bench.cli`."""

from __future__ import annotations

from typing import Annotated

import typer

from bench.options import DEFAULT_STORE, DebugOption, JsonOption, StoreOption, complete, guard


def throughput(
    mixer: Annotated[
        list[str] | None,
        typer.Option(
            help="Mixers, comma-separated: gla,attention | based | ./mine.py@Mine | all.",
            autocompletion=complete("mixer"),
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

    guard(debug, command)
