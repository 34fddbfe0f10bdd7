"""What only training or recording would refuse is refused before either, in one sentence; what works is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import catalog
from tests.cli.conftest import TINY, Bench

TASK = """
import numpy as np
from synthetic_tasks import Batch, Cell, Task, task

@task("mine")
class Mine(Task):
    vocab_size = 8

    def __init__(self, *, fault: str = "no"):
        self.fault = fault

    def cells(self, split):
        return () if self.fault == split else (Cell("only", 8, 32, {"length": 8}),)

    def sample(self, cell, examples, rng):
        assert self.fault != "sample", "nothing to draw"
        inputs = rng.integers(0, 8, (examples, cell.length), dtype=np.int32)
        return Batch(inputs, inputs, np.ones_like(inputs, bool))

    def ceilings(self, cell):
        if self.fault == "ceilings":
            raise KeyError("chance")
        return {"chance": float("nan") if self.fault == "nan" else 1 / 8}

    def bits_needed(self, cell):
        return 24.0 / (self.fault != "bits")

    def solve(self, batch):
        return batch.inputs
"""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("ceilings", ["ceilings", "'only'", "KeyError: 'chance'"]),
        ("nan", ["ceilings.chance", "finite"]),
        ("bits", ["bits", "ZeroDivisionError"]),
        ("sample", ["an example of its train cell 'only'", "nothing to draw"]),
        ("test", ["no cells", "test split"]),
    ],
)
def test_a_task_that_cannot_be_recorded(bench: Bench, fault: str, words: list[str]) -> None:
    Path("loose.py").write_text(TASK)
    small = ["--device=cpu", "--set=model.d_model=16", "--mixer=attention"]
    outcome = bench("synthetic", "--task=./loose.py@Mine", *small, f"--set=task.fault={fault}")
    assert outcome.code == 2
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    for word in ["./loose.py@Mine", *words]:
        assert word in outcome.err
    assert {name for name in bench.files() if "pycache" not in name} == {"loose.py"}
    assert bench("synthetic", "--task=./loose.py@Mine", *small, "--dry-run").code == 0


def test_every_mixer_of_the_zoo_passes(bench: Bench) -> None:
    options = {"base_conv": ":implicit=true", "attention": ":positions=learned", "rwkv7": ":head_dim=16"}
    names = ",".join(name + options.get(name, "") for name in catalog.names("mixer"))
    outcome = bench("synthetic", *TINY, "--set=model.d_model=64", f"--mixer={names}", "--dry-run")
    assert outcome.code == 0, outcome.err


def test_a_length_is_refused_only_where_it_matters(bench: Bench) -> None:
    assert bench("synthetic", *TINY, "--mixer=attention:max_len=8", "--dry-run").code == 0
    assert bench("synthetic", *TINY, "--mixer=attention:max_len=16:positions=learned", "--dry-run").code == 0
    outcome = bench("synthetic", *TINY, "--mixer=attention:max_len=15:positions=learned", "--dry-run")
    assert outcome.code == 2
    assert "max_len=15" in outcome.err
