"""Runs `bench convert` on the tests' teacher, in the current folder."""

from pathlib import Path

from typer.testing import CliRunner

from bench.cli import app

SMALL = ["--set", "stages.seq_len=32", "--set", "stages.batch_tokens=64"]


def call(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def convert(folder: Path, text: Path, *arguments: str) -> tuple[int, str, str]:
    """The same of a conversion of the model in a folder on a text."""
    return call("convert", "--model", str(folder), "--data", f"text:{text}", "--device", "cpu", *arguments)
