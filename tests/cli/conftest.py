"""A tiny sweep that trains in a second, run through the real command line in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.cli import app

TINY = [
    "--task=mqar",
    "--device=cpu",
    "--jobs=1",
    "--set=task.vocab_size=32",
    "--set=task.train_cells=16x2:64",
    "--set=task.valid_cells=16x2:16",
    "--set=task.test_cells=16x2:16+16x4:16",
    "--set=model.d_model=16",
    "--set=train.batch_size=32",
    "--set=train.epochs=1",
]


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """JSON lines of one kind on stdout; every line must be JSON."""
        content = [json.loads(line) for line in self.out.splitlines()]
        return [line for line in content if line["kind"] == kind]


@dataclass
class Bench:
    folder: Path

    def __call__(self, *arguments: str) -> Outcome:
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        return Outcome(result.exit_code, result.stdout, result.stderr)

    def tiny(self, *arguments: str) -> Outcome:
        """`bench synthetic` on the tiny sweep."""
        return self("synthetic", *TINY, *arguments)

    def files(self) -> set[str]:
        """Every file below the working folder."""
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path)
