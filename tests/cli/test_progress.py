"""Progress bars on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from bench.commands.console import Output
from bench.commands.progress import SweepProgress


def test_notes_on_a_terminal_keep_their_brackets() -> None:
    output, screen = Output(), io.StringIO()
    output.console = Console(file=screen, force_terminal=True, width=120, highlight=False)
    with SweepProgress(output, total=1) as progress:
        progress.note("failed: KeyError: [/root/x] and [bold]")
    assert "failed: KeyError: [/root/x] and [bold]" in screen.getvalue()
