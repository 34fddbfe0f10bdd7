"""`bench convert`: a pretrained Transformer, linearised by a recipe, as a folder that transformers loads."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import catalog
from bench.commands.console import Output, bytes_text, seconds_text
from bench.commands.doctor import kernels_clash
from bench.convert.resolve import resolve_recipe
from bench.convert.spec import Recipe
from bench.device import resolve_device
from bench.errors import UserError, unknown
from bench.hub import go_offline_without_hub


@dataclass(frozen=True)
class ConvertRequest:
    """What the command line asked for.

    Args:
        model: hub id, folder, GGUF file or wheel.
        recipe: its name.
        out: the folder to make.
        mixer: see `resolve_recipe`, as are window, sinks, layers, data, settings and seed.
        tokens: budget of all stages, or None for the recipe's own.
        seconds: time for all stages, or None.
        device: auto, cpu, cuda or cuda:0.
        precision: auto, fp32 or bf16.
        trust_remote_code: run code that the model folder brings along.
        dry_run: say what would happen and stop.
    """

    model: str
    recipe: str
    out: Path
    mixer: str | None
    window: int | None
    sinks: int | None
    layers: str | None
    data: list[str]
    settings: list[str]
    seed: int | None
    tokens: int | None
    seconds: float | None
    device: str
    precision: str
    trust_remote_code: bool
    dry_run: bool


def run(request: ConvertRequest, output: Output) -> int:
    """Converts a model.

    Returns:
        The exit code: 1 if the checkpoint gate failed, else 0.

    Raises:
        UserError: bad input; nothing is written then.
    """
    _, result, found = kernels_clash()
    if result == "FAIL":
        raise UserError(f"{found[0].upper()}{found[1:]}.")
    if request.precision not in ("auto", "fp32", "bf16"):
        raise unknown("precision", request.precision, ["auto", "fp32", "bf16"])
    recipe = resolve_recipe(
        request.recipe,
        mixer=request.mixer,
        window=request.window,
        sinks=request.sinks,
        layers=request.layers,
        data=request.data,
        settings=request.settings,
        seed=request.seed,
    )
    device = resolve_device(request.device)
    _check_words(request, recipe)

    from bench.convert import parallel

    with parallel.group(device.kind):
        return _run(request, recipe, parallel.local_device(device.kind), output, first=parallel.rank() == 0)


def _check_words(request: ConvertRequest, recipe: Recipe) -> None:
    """What is wrong whatever the teacher is, said before it is loaded, which may take minutes."""
    if not Path(request.model).exists():
        go_offline_without_hub()
    from bench.convert.data import check_sources

    if recipe.plan.mixer is not None:
        mixer = catalog.load("mixer", recipe.plan.mixer)
        catalog.check_options("mixer", recipe.plan.mixer, mixer, recipe.plan.options)
    check_sources(recipe.data)


def _run(request: ConvertRequest, recipe: Recipe, device: str, output: Output, *, first: bool) -> int:
    from bench.convert.run import scaled
    from bench.convert.saving import check_out, partial_folder

    recipe = scaled(recipe, request.tokens)
    precision = ("bf16" if device != "cpu" else "fp32") if request.precision == "auto" else request.precision
    conversion = _prepare(request, recipe, device, precision)
    if first:
        _say_plan(conversion, output)
    if request.dry_run:
        return 0
    check_out(request.out)
    try:
        return _convert(conversion, request.out, output, first=first)
    finally:
        with contextlib.suppress(OSError):
            partial_folder(request.out).rmdir()  # if nothing was stored in it


def _convert(conversion: Any, out: Path, output: Output, *, first: bool) -> int:
    from bench.convert.saving import partial_folder

    if not first:
        conversion.run()
        return 0
    try:
        gate = conversion.run(on_progress=lambda progress: _show(progress, output), say=output.say)
    except KeyboardInterrupt:
        kept = (partial_folder(out) / "checkpoint.pt").exists()
        output.say(f"Interrupted; the same command {'continues from the checkpoint' if kept else 'starts again'}.")
        raise
    output.say(gate.sentence())
    if not gate.passed:
        output.say(f"Nothing was written to {out}; the model that failed lies in {partial_folder(out)}.")
        return 1
    _say_rows(conversion.rows, output)
    output.emit("converted", {"out": str(out), "rows": conversion.rows, "stages": conversion.log})
    output.say(f"Wrote {out}; `bench eval --model {out}` judges it.")
    return 0


def _prepare(request: ConvertRequest, recipe: Recipe, device: str, precision: str) -> Any:
    """Teacher, data and student; everything that can be wrong with them is said here, before anything is written."""
    import torch

    from bench import pretrained
    from bench.convert.run import Conversion

    if request.out.exists():
        raise UserError(f"{request.out} exists already; choose another --out or remove it first.")
    teacher: Any
    teacher, tokenizer = pretrained.load(request.model, device=device, trust_remote_code=request.trust_remote_code)
    if teacher.config.model_type == "linearized":
        raise UserError(f"{request.model} is a converted model already; give its teacher.")
    from bench.convert.data import load_data
    from bench.convert.student import check_teacher

    check_teacher(teacher)
    length = max((stage.seq_len for stage in recipe.stages), default=1024)
    data = load_data(
        recipe.data, tokenizer, teacher.config.vocab_size, recipe.seed, min_length=length, cap=max(4 * recipe.tokens(), 2_000_000)
    )
    dtype = teacher.dtype
    teacher = teacher.to(torch.float32).requires_grad_(False)
    return Conversion(
        teacher=teacher,
        tokenizer=tokenizer,
        recipe=recipe,
        data=data,
        out=request.out,
        model=request.model,
        precision=precision,
        seconds=request.seconds,
        store_dtype=dtype,
        held_rows=4 if device == "cpu" else 32,
    )


def _say_plan(conversion: Any, output: Output) -> None:
    from bench.convert.measure import cache_bytes

    recipe, student = conversion.recipe, conversion.student
    converted = sum(plan is not None for plan in student.plans)
    plan = recipe.plan
    parts = [plan.mixer or "no mixer", f"window {plan.window}" + (f" + {plan.sinks} sinks" if plan.sinks else "")]
    if plan.far_heads:
        parts.append(f"{plan.far_window} in key heads {plan.far_heads}")
    output.say(
        f"{conversion.model}: {converted} of {len(student.plans)} layers by {recipe.name} ({', '.join(parts)}, {plan.combine})."
    )
    constant, growth = cache_bytes(student)
    _, teacher_growth = cache_bytes(conversion.teacher)
    state = bytes_text(constant) + (f" + {bytes_text(growth)} a token" if growth else "")
    output.say(f"State: {state}; the teacher's cache grows by {bytes_text(teacher_growth)} a token.")
    for number, stage in enumerate(conversion.stages, 1):
        output.say(f"Stage {number}: {stage.capture}, {stage.tokens:,} tokens of {stage.seq_len}, lr {stage.lr:g}.")
    output.emit("plan", {"recipe": recipe.model_dump(mode="json"), "data_hash": conversion.data_hash, "state_bytes": constant})


def _show(progress: Any, output: Output) -> None:
    losses = ", ".join(f"{name} {value:.4g}" for name, value in progress.losses.items())
    output.say(
        f"stage {progress.stage}/{progress.stages} {progress.capture}: {progress.tokens:,}/{progress.total:,} tokens, "
        f"{progress.tokens_per_second:,.0f} tokens/s, {losses}, {seconds_text(progress.seconds_left)} left"
    )
    output.emit("progress", asdict(progress))


def _say_rows(rows: dict[str, Any], output: Output) -> None:
    from rich.table import Table

    table = Table(title="On held-out text, against the teacher")
    for column in ("model", "KL", "top-1", "perplexity"):
        table.add_column(column)
    teacher = next(row["teacher_ppl"] for row in rows.values() if "teacher_ppl" in row)
    table.add_row("teacher", "0", "100.0 %", f"{teacher:.2f}")
    for name, row in rows.items():
        if "kl" in row:
            table.add_row(name, f"{row['kl']:.4f}", f"{row['top1']:.1%}", f"{row['ppl']:.2f}")
    output.console.print(table)
