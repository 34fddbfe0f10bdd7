"""An evaluation: rows by tasks, each pair a record in the store the moment it is done; what is there is not done again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from bench import catalog, provenance
from bench.errors import UserError
from bench.judge import harness
from bench.judge.outcome import answer_counts, chance_of, eval_metrics, item_rows, primary_metric
from bench.judge.rows import Loader, Row
from bench.judge.speed import memory_and_speed, peak_memory, reset_peak_memory
from bench.judge.suites import AGREEMENT, MEASUREMENTS, MEMORY_AND_SPEED, Size
from bench.judge.text import held_out_tokens, teacher_agreement
from bench.records import EvalMetric, EvalRecord, JudgedModel
from bench.spec import digest
from bench.store import Store

PACKAGES = (*provenance.PACKAGES, "lm-eval", "transformers", "datasets", "tokenizers")
RETRIES = 4
"""Times that a batch is halved before memory counts as too small."""


@dataclass(frozen=True)
class Settings:
    """How everything is evaluated.

    Args:
        size: limits and lengths.
        precision: "fp32" or "bf16", of weights and states.
        batch_size: rows, or "auto".
        chat: put prompts into the model's chat template.
        text: source of the held-out text.
        max_length: longest sequence of a prompt.
    """

    size: Size
    precision: str
    batch_size: int | str
    chat: bool
    text: str
    max_length: int


@dataclass(frozen=True)
class Job:
    """One row on one task.

    Args:
        row: the model.
        task: name.
        eval_id: identity of the record.
        items_hash: hash of the items.
    """

    row: Row
    task: str
    eval_id: str
    items_hash: str


class Evaluation:
    """Rows by tasks, planned.

    Args:
        loader: of the models.
        rows: what `Loader.plan` returned.
        tasks: loaded lm-eval tasks.
        measurements: names out of `MEASUREMENTS`.
        settings: how.
        store: where records go.
    """

    def __init__(
        self, loader: Loader, rows: list[Row], tasks: harness.TaskSet, measurements: list[str], settings: Settings, store: Store
    ) -> None:
        self.loader, self.rows, self.tasks, self.settings, self.store = loader, rows, tasks, settings, store
        _, self.tokenizer = loader.get(loader.model)
        self.device = torch.device(loader.device)
        size = settings.size
        self.text = None
        if AGREEMENT in measurements:
            self.text = held_out_tokens(settings.text, self.tokenizer, size.windows, size.window_tokens)
        hashes = {name: _hash([task.eval_docs[i] for i in tasks.chosen[name]]) for name, task in tasks.tasks.items()}
        hashes |= {name: self._measurement_hash(name) for name in measurements}
        self.jobs = [Job(row, name, self._identity(row.info, name, items), items) for row in rows for name, items in hashes.items()]

    def missing(self) -> list[Job]:
        """The jobs that the store does not have."""
        return [job for job in self.jobs if self.store.read_eval(job.eval_id) is None]

    def run(self, jobs: list[Job], on_done: Callable[[EvalRecord], None]) -> None:
        """Runs jobs, a row at a time.

        Args:
            jobs: out of `missing`.
            on_done: told of every record after it is stored.

        Raises:
            UserError: out of memory, or a task that fails; what is done is stored.
        """
        for row in self.rows:
            mine = [job for job in jobs if job.row is row]
            if not mine:
                continue
            with row.load() as model:
                lm = harness.language_model(
                    model, self.tokenizer, batch_size=self.settings.batch_size, max_length=self.settings.max_length
                )
                for job in mine:
                    on_done(self._one(job, model, lm))

    def _one(self, job: Job, model: Any, lm: Any) -> EvalRecord:
        began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
        reset_peak_memory(self.device)
        with _MemoryErrors(job, lm, self.settings):
            made, items = self._measured(job, model) if job.task in MEASUREMENTS else self._judged(job, lm)
        peak = EvalMetric(name="peak_memory_bytes", value=float(peak_memory(self.device)), n=1, higher_is_better=False)
        metrics = [*made.pop("metrics"), *([] if job.task == MEMORY_AND_SPEED else [peak])]
        hardware = provenance.cpu_name() if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        record = EvalRecord(
            eval_id=job.eval_id,
            model=job.row.info,
            task=job.task,
            metrics=metrics,
            items_hash=job.items_hash,
            limit=self.settings.size.limit,
            device=hardware,
            precision=self.settings.precision,
            batch_size=str(self.settings.batch_size),
            max_length=self.settings.max_length,
            seconds=time.monotonic() - began,
            started=started,
            provenance=provenance.now(
                _code(job), provenance.versions(PACKAGES), {"cpu" if self.device.type == "cpu" else "gpu": hardware}
            ),
            **made,
        )
        self.store.write_eval(record, items)
        return record

    def _judged(self, job: Job, lm: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A task of lm-eval; where batches are found automatically, smaller ones if memory runs out."""
        found = self._with_retries(job, lm)
        task = self.tasks.tasks[job.task]
        kind = task.OUTPUT_TYPE
        items = item_rows(found.samples)
        made: dict[str, Any] = {
            "protocol": "generated" if kind == "generate_until" else "log-likelihood",
            "group": next((name for name, group in self.tasks.groups.items() if task in group.get_all_tasks()), ""),
            "version": found.version,
            "fewshot": found.fewshot,
            "chat": self.settings.chat,
            "lengths": sorted({item["length"] for item in items if item["length"]}),
            "items": len(self.tasks.chosen[job.task]),
            "items_total": len(task.eval_docs),
            "primary": primary_metric(job.task, found.results),
            "chance": chance_of(kind, found.samples),
            "metrics": eval_metrics(found, items),
            "answers": answer_counts(kind, found.samples),
        }
        return made, items

    def _with_retries(self, job: Job, lm: Any) -> harness.Outcome:
        for _ in range(RETRIES):
            try:
                return harness.evaluate(lm, job.task, self.tasks, chat=self.settings.chat)
            except torch.OutOfMemoryError:
                if self.settings.batch_size != "auto":
                    raise
                lm.share /= 2
            torch.cuda.empty_cache()
        return harness.evaluate(lm, job.task, self.tasks, chat=self.settings.chat)

    def _measured(self, job: Job, model: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        size = self.settings.size
        common = {"protocol": "measured", "version": "1", "items_total": 0}
        if job.task == MEMORY_AND_SPEED:
            metrics = memory_and_speed(model, size)
            return {**common, "primary": "state_bytes", "metrics": metrics, "items": 0, "lengths": list(size.measured)}, []
        assert self.text is not None
        taught = self.loader.teacher_model() if job.row.info.teacher is not None else model
        metrics, items = teacher_agreement(model, taught, self.text)
        made = {**common, "primary": "top1", "metrics": metrics, "lengths": [self.text.shape[1]]}
        return {**made, "items": len(self.text), "items_total": len(self.text)}, items

    def _measurement_hash(self, name: str) -> str:
        size = self.settings.size
        if name == MEMORY_AND_SPEED:
            return digest([size.measured, size.batches])
        assert self.text is not None
        return hashlib.sha256(self.text.numpy().tobytes()).hexdigest()[:16]

    def _identity(self, info: JudgedModel, task: str, items: str) -> str:
        examples = self.tasks.tasks[task].get_config("num_fewshot") if task in self.tasks.tasks else 0
        given = [info.fingerprint, task, items, self.settings.precision, examples, self.settings.chat]
        if task == AGREEMENT:
            given.append(info.teacher)
        if task == MEMORY_AND_SPEED and self.device.type == "cuda":
            given.append(torch.cuda.get_device_name(self.device))
        return "eval-" + digest([*given, self.device.type, self.settings.max_length, _mixer_code(info)])


def _code(job: Job) -> dict[str, str]:
    """Hashes of the source that decides a result."""
    root = catalog.package_dir("bench").parent
    folders = {
        "judge": sorted((root / "bench" / "judge").rglob("*.py")),
        "convert": sorted((root / "bench" / "convert").glob("*.py")),
    }
    found = {f"shared:{name}": digest([catalog.source_hash(path) for path in paths]) for name, paths in folders.items()}
    return found | _mixer_code(job.row.info)


def _mixer_code(info: JudgedModel) -> dict[str, str]:
    if info.mixer is None:
        return {}
    return {f"mixer:{info.mixer}": catalog.source_hash(catalog.source_file("mixer", info.mixer))}


def _hash(documents: list[Any]) -> str:
    text = json.dumps(documents, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _MemoryErrors:
    """Turns running out of memory into a sentence with the setting that would fit."""

    def __init__(self, job: Job, lm: Any, settings: Settings) -> None:
        self.job, self.lm, self.settings = job, lm, settings

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError):
            return
        torch.cuda.empty_cache()
        rows = fitting_rows(self.lm.model, self.settings.max_length, self.settings.batch_size)
        fix = f"--batch-size {rows} fits" if rows else "not even one row fits: shorten --lengths, or use --precision bf16"
        raise UserError(f"{self.job.task} with {self.job.row.info.name} ran out of memory; {fix}.") from error


@torch.no_grad()
def fitting_rows(model: Any, length: int, tried: int | str) -> int:
    """The largest batch, by halving, whose logits fit; 0 if one row does not.

    Args:
        model: on its device.
        length: of the rows.
        tried: the batch size that did not fit, or "auto".
    """
    rows = 64 if tried == "auto" else int(tried) // 2
    while rows:
        try:
            model(input_ids=torch.zeros(rows, length, dtype=torch.long, device=model.device), use_cache=False).logits.float()
            return rows
        except (torch.OutOfMemoryError, MemoryError):
            torch.cuda.empty_cache()
            rows //= 2
    return 0
