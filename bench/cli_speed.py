"""The command line of `bench throughput`; parsing only, as in `bench.cli`."""

from __future__ import annotations

from typing import Annotated

from bench.options import (
    DEFAULT_STORE,
    DebugOption,
    DeviceOption,
    JsonOption,
    StoreOption,
    complete,
    guard,
    how,
    shape,
    sizes,
    what,
)


def throughput(
    mixer: Annotated[
        list[str] | None,
        what(help="Mixers, comma-separated: gla,attention | based | ./mine.py@Mine | all.", autocompletion=complete("mixer")),
    ] = None,
    kernel: Annotated[list[str] | None, what(help="Kernels, comma-separated (`bench list kernels`), or all.")] = None,
    preset: Annotated[str | None, what(help="kernels: every kernel at the shapes of the published figures.")] = None,
    mode: Annotated[str | None, what(help="train (forward, and forward with backward), prefill, decode; default all.")] = None,
    length: Annotated[str | None, shape(help="Tokens of a sequence: 2048, or 512,2048,8192.")] = None,
    batch: Annotated[int | None, shape(min=1, help="Sequences; default: equal tokens at every length.")] = None,
    heads: Annotated[int | None, shape(min=1, help="Heads of kernels, and of mixers that have the option.")] = None,
    width: Annotated[str | None, shape(help="Head widths of kernels, model widths of mixers: 64,128.")] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[str | None, how(help="fp32, bf16 or fp16; default bf16 on a GPU, fp32 on a CPU.")] = None,
    no_peers: Annotated[bool, how("--no-peers", help="Time no public implementations.")] = False,
    dry_run: Annotated[bool, how("--dry-run", help="Print the rows and stop.")] = False,
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
            lengths=sizes("--length", length),
            batch=batch,
            heads=heads,
            widths=sizes("--width", width),
            dtype=dtype,
        )
        options = module.Options(device=device, store=store, with_peers=not no_peers, dry_run=dry_run)
        return module.run(request, options, Output(as_json=as_json))

    guard(debug, command)
