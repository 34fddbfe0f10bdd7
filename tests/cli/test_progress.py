"""Progress bars on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from bench.claims import this_process
from bench.commands import status
from bench.commands.console import Output
from bench.commands.progress import SweepProgress


def test_notes_on_a_terminal_keep_their_brackets() -> None:
    output, screen = Output(), io.StringIO()
    output.console = Console(file=screen, force_terminal=True, width=120, highlight=False)
    with SweepProgress(output, total=1) as progress:
        progress.note("failed: KeyError: [/data/x] and [bold]")
    assert "failed: KeyError: [/data/x] and [bold]" in screen.getvalue()


def test_what_is_left_is_counted_from_where_a_run_went_on() -> None:
    progress = {"run": "mqar gla", "step": 60, "steps": 100, "first": 50, "started": 0.0, "time": 20.0}
    assert "at most 1 min 20 s left" in status._running_text("0123456789ab", this_process(), progress)
