"""`bench status`: what a store holds and what is running, from any machine that sees the folder."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.commands.console import Output, seconds_text
from bench.commands.progress import run_name
from bench.errors import UserError
from bench.store import Store

STALE_SECONDS = 60.0


def run(root: Path, output: Output) -> int:
    """Prints counts by task and status, runs in flight, checkpoints left behind, and failures.

    Raises:
        UserError: there is no store.
    """
    if not root.is_dir():
        raise UserError(f"There is no store at {root}; `bench synthetic --task mqar` makes one, or name another with --store.")
    records, warnings = Store(root).load()
    counts = Counter((record.spec.task.name, record.status) for record in records)
    for (task, status), count in sorted(counts.items()):
        output.say(f"{task}: {count} {status}")
        output.emit("count", {"task": task, "status": status, "runs": count})
    evals, eval_warnings = Store(root).load_evals()
    for model, count in Counter(record.model.name for record in evals).items():
        output.say(f"{model}: {count} evaluation{'s' if count > 1 else ''}")
        output.emit("evaluations", {"model": model, "count": count})
    if not counts and not evals:
        output.say(f"{root} holds no finished run.")
    for record in records:
        if record.status != "done":
            output.say(f"{record.status}: {run_name(record.spec, record.label)}: {record.reason}")
            output.emit("failure", {"run_id": record.run_id, "status": record.status, "reason": record.reason})
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        _in_flight(folder, output)
    for warning in (*warnings, *eval_warnings):
        output.say(warning)
        output.emit("warning", {"text": warning})
    return 0


def _in_flight(folder: Path, output: Output) -> None:
    """A run that is being trained, or one that was stopped and left a checkpoint."""
    progress = _read(folder / "progress.json")
    if progress is not None and time.time() - progress["time"] < STALE_SECONDS:
        share = progress["step"] / progress["steps"]
        text = f"running: {folder.name} on {progress['host']}, {share:.0%} of {progress['steps']} steps"
        if 0 < share < 1:
            left = (time.time() - progress["started"]) * (1 - share) / share
            text += f", at most {seconds_text(left)} left"
        output.say(text)
        output.emit("running", {"run_id": folder.name, **progress})
    elif (folder / "checkpoint.pt").exists():
        output.say(f"stopped: {folder.name} has a checkpoint; the command that started it goes on from there.")
        output.emit("stopped", {"run_id": folder.name})


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
