"""What only training or recording would refuse is refused before either, in one sentence; what works is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import catalog
from mixers import REGISTRY
from synthetic_tasks import TASKS
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
MIXER = """
import torch
from mixers import Mixer, mixer

@mixer("{name}")
class {cls}(Mixer):
    def __init__(self, d_model, *, layer=0, pattern="causal_self"):
        super().__init__(d_model, pattern=pattern)
        self.gain = torch.nn.Parameter(torch.ones(d_model))
        self.decay = torch.nn.Parameter(torch.zeros(d_model))

    def forward(self, x_BTD, state=None, *, context_BSD=None):
        if context_BSD is not None:
            raise ValueError("no context")
        s = self.init_state(x_BTD.shape[0], 0, device=x_BTD.device, dtype=x_BTD.dtype) if state is None else state
        y = []
        for x_BD in x_BTD.unbind(1):
            y_BD, s = self.step(x_BD, s)
            y.append(y_BD)
        return torch.stack(y, 1), None if state is None else s

    def step(self, x_BD, state):
        s = torch.sigmoid(self.decay) * state["s"] + x_BD
        return self.gain * s, dict(s=s)

    def init_state(self, batch, max_len, *, device="cpu", dtype=torch.float32):
        return dict(s=torch.zeros(batch, self.d_model, device=device, dtype=dtype))
"""


@pytest.fixture(autouse=True)
def _loose_names_are_forgotten() -> Iterator[None]:
    """What the files of these tests register is not met by other tests."""
    before = [(table, set(table)) for table in (REGISTRY, TASKS)]
    yield
    for table, known in before:
        for name in [name for name in table if name not in known and table[name].__module__.startswith("bench_loose_")]:
            del table[name]


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


def test_two_loose_mixers_of_one_name(bench: Bench) -> None:
    for file, name, cls in (("a", "same", "A"), ("b", "same", "B"), ("c", "other", "C")):
        Path(f"{file}.py").write_text(MIXER.format(name=name, cls=cls))
    outcome = bench("synthetic", *TINY, "--mixer=./a.py@A,./b.py@B", "--dry-run")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    for word in ("./a.py@A", "./b.py@B", "'same'", "both register"):
        assert word in outcome.err
    assert bench("synthetic", *TINY, "--mixer=./b.py@B,b.py@B,./c.py@C", "--dry-run").code == 0


def test_a_loose_mixer_under_a_name_of_the_zoo(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.load("mixer", "gla")
    monkeypatch.setitem(REGISTRY, "gla", REGISTRY["gla"])  # put back afterwards
    Path("loose.py").write_text(MIXER.format(name="gla", cls="Mine"))
    outcome = bench("synthetic", *TINY, "--mixer=./loose.py@Mine,gla", "--dry-run")
    assert outcome.code == 2
    for word in ("loose.py", "gla.py", "both register", "'gla'"):
        assert word in outcome.err


def test_a_recipe_that_raises(bench: Bench) -> None:
    Path("rec.py").write_text("def mine():\n    raise KeyError('oops')\n")
    outcome = bench("synthetic", "--recipe=./rec.py@mine", "--dry-run")
    assert outcome.code == 2
    assert "'./rec.py@mine' failed: KeyError: 'oops'" in outcome.err and outcome.err.count("\n") == 1
