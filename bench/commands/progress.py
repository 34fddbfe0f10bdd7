"""Progress of a sweep: one bar for the sweep and one for each fleet in flight, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bench.commands.console import Output, seconds_text
from bench.records import RunRecord

if TYPE_CHECKING:
    from bench.launch import Fleet
    from bench.train import Progress as TrainProgress


class SweepProgress:
    """Shows a sweep as it runs; use it as a context manager.

    Args:
        output: where to.
        total: runs that are still to be done.
    """

    def __init__(self, output: Output, total: int) -> None:
        self.output, self.total, self.finished = output, total, 0
        self.began = time.monotonic()
        self.bars: dict[Fleet, TaskID] = {}
        self.live: Progress | None = None
        if output.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
            self.live = Progress(*columns, console=output.console)

    def __enter__(self) -> SweepProgress:
        if self.live is not None:
            self.live.start()
            self.sweep_bar = self.live.add_task("sweep", total=self.total, note=f"0 of {self.total} runs")
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def start(self, fleet: Fleet, name: str) -> None:
        """A fleet begins."""
        if self.live is not None:
            self.bars[fleet] = self.live.add_task(name, total=None, note="starting")

    def update(self, fleet: Fleet, progress: TrainProgress) -> None:
        """A fleet got on."""
        if self.live is not None:
            accuracy = "" if progress.accuracy is None else f"accuracy {progress.accuracy:.3f}"
            note = f"loss {progress.loss:.3f} {accuracy}"
            self.live.update(self.bars[fleet], completed=progress.step, total=progress.steps, note=note)

    def finish(self, record: RunRecord, name: str) -> None:
        """A run ended; says how in one line."""
        self.finished += 1
        line = f"[{self.finished}/{self.total}] {name}: {outcome_text(record)}"
        if self.live is None:
            self.output.say(line)
            return
        self.live.console.print(line, markup=False)
        self.live.update(self.sweep_bar, completed=self.finished, note=f"{self.finished} of {self.total} runs")

    def end(self, fleet: Fleet) -> None:
        """A fleet is over."""
        if self.live is not None:
            self.live.remove_task(self.bars.pop(fleet))

    def note(self, text: str) -> None:
        """A line between the bars; its brackets are no markup."""
        if self.live is None:
            self.output.say(text)
        else:
            self.live.console.print(text, markup=False)


def outcome_text(record: RunRecord) -> str:
    """How a run ended, in a few words."""
    if record.status != "done":
        return f"{record.status} ({record.reason})"
    split = "test" if record.role == "report" else "validation"
    value = record.metric("test" if record.role == "report" else "valid", "accuracy")
    shown = "no accuracy" if value is None else f"{split} accuracy {value:.3f}"
    return f"{shown}, {record.epochs_run} epochs, {seconds_text(record.wall_seconds)}"


def fleet_name(fleet: Fleet, names: list[str]) -> str:
    """A fleet in its progress bar."""
    return names[0] if len(fleet) == 1 else f"{names[0]} and {len(fleet) - 1} more"
