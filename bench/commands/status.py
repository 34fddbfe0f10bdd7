"""`bench status`: what a store holds, what is running and where, and what was stopped, from any machine that sees the folder."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.announce import Found, sweeps
from bench.claims import Owner, holder
from bench.commands.console import Output, seconds_text
from bench.errors import UserError
from bench.store import Store

WATCH_SECONDS = 2.0


def run(root: Path, output: Output, *, watch: bool = False) -> int:
    """Prints counts by task and status, drivers and runs at work, what was left behind, and failures.

    Args:
        root: folder of the store.
        output: where to.
        watch: print it again every two seconds until Ctrl-C.

    Raises:
        UserError: there is no store.
    """
    if not root.is_dir():
        raise UserError(f"There is no store at {root}; `bench synthetic --task mqar` makes one, or name another with --store.")
    store = Store(root)
    if not watch:
        _show(store, output)
        return 0
    try:
        while True:
            if output.console.is_terminal:
                output.console.clear()
            else:
                output.say(time.strftime("--- %H:%M:%S"))
            _show(store, output)
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        return 0


def _show(store: Store, output: Output) -> None:
    records, warnings = store.load()
    counts = Counter((record.spec.task.name, record.status) for record in records)
    for (task, status), count in sorted(counts.items()):
        output.say(f"{task}: {count} {status}")
        output.emit("count", {"task": task, "status": status, "runs": count})
    evals, eval_warnings = store.load_evals()
    for model, count in Counter(record.model.name for record in evals).items():
        output.say(f"{model}: {count} evaluation{'s' if count > 1 else ''}")
        output.emit("evaluations", {"model": model, "count": count})
    if not counts and not evals:
        output.say(f"{store.root} holds no finished run.")
    for record in records:
        if record.status != "done":
            output.say(f"{record.status}: {record.spec.name()}: {record.reason}")
            output.emit("failure", {"run_id": record.run_id, "status": record.status, "reason": record.reason})
    for found in sweeps(store):
        _driver(found, output)
    done = {record.run_id for record in records}
    for folder in sorted(path for path in store.root.iterdir() if path.is_dir() and path.name[0] != "."):
        if folder.name not in done:
            _in_flight(store, folder, output)
    for warning in (*warnings, *eval_warnings):
        output.say(warning)
        output.emit("warning", {"text": warning})


def _driver(found: Found, output: Output) -> None:
    """A command that is at work, or was killed."""
    sweeping = found.sweeping
    state = "sweep" if found.alive else "sweep that was killed"
    output.say(
        f"{state}: {sweeping.finished} of {sweeping.total} runs in {seconds_text(time.time() - sweeping.started)}, "
        f"{sweeping.launch} launch from {sweeping.owner.host}: {sweeping.command}"
    )
    output.emit("sweep", {"alive": found.alive, **sweeping.model_dump(mode="json")})


def _in_flight(store: Store, folder: Path, output: Output) -> None:
    """A run without a record: one that is being trained, or one that was stopped."""
    owner, progress = holder(store, folder.name), _read(folder / "progress.json")
    if owner is not None:
        output.say(f"running: {_running_text(folder.name, owner, progress)}")
        output.emit("running", {"run_id": folder.name, "host": owner.host, "pid": owner.pid, **(progress or {})})
    elif (folder / "checkpoint.pt").exists() or progress is not None:
        name = (
            folder.name
            if progress is None
            else f"{progress['run']} ({folder.name}), {progress['step'] / progress['steps']:.0%} done"
        )
        kept = "from its checkpoint" if (folder / "checkpoint.pt").exists() else "again"
        output.say(f"stopped: {name}; the command that started it trains it {kept}.")
        output.emit("stopped", {"run_id": folder.name})


def _running_text(run_id: str, owner: Owner, progress: dict[str, Any] | None) -> str:
    where = f"on {owner.host} (process {owner.pid})"
    if progress is None:
        return f"{run_id} {where}, starting"
    share = progress["step"] / progress["steps"]
    text = f"{progress['run']} ({run_id}) {where}, {share:.0%} of {progress['steps']} steps"
    text += f", heard of {seconds_text(max(0.0, time.time() - progress['time']))} ago"
    done, missing = progress["step"] - progress.get("first", 0), progress["steps"] - progress["step"]
    if done > 0 and missing > 0:
        left = (progress["time"] - progress["started"]) * missing / done
        text += f", at most {seconds_text(left)} left"
    return text


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
