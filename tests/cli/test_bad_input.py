"""Every bad input of the issue: one sentence that helps, exit code 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import TINY, Bench

MIXER = """
import torch
from mixers import Mixer, mixer

@mixer("mine")
class Mine(Mixer):
    def __init__(self, d_model, *, layer=0, pattern="causal_self"):
        super().__init__(d_model, pattern=pattern)
        self.out = torch.nn.Linear(d_model, d_model)

    def forward(self, x_BTD, state=None, *, context_BSD=None):
        return self.out(x_BTD.flip(1)), state

    def step(self, x_BD, state):
        return self.out(x_BD), state

    def init_state(self, batch, max_len, *, device="cpu", dtype=torch.float32):
        return {}
"""

CASES = [
    (["synthetic"], ["--task", "--recipe"]),
    (["synthetic", "--task=mqra"], ["mqra", "Did you mean 'mqar'"]),
    ([*["synthetic", *TINY], "--mixer=atention"], ["atention", "Did you mean 'attention'"]),
    (["synthetic", "--recipe=mqr"], ["mqr", "Did you mean 'mqar'"]),
    (["synthetic", *TINY, "--mixer=gla:n_head=2"], ["n_head", "Did you mean 'n_heads'"]),
    (["synthetic", *TINY, "--mixer=gla:n_heads=two"], ["n_heads", "'two'", "integer"]),
    (["synthetic", *TINY, "--mixer=attention:n_heads=3"], ["n_heads=3", "16", "nearest"]),
    (["synthetic", *TINY, "--mixer=gla,,attention"], ["empty name"]),
    (["synthetic", *TINY, "--mixer=gla:n_heads"], ["no value"]),
    (["synthetic", *TINY, "--set=train.learning_rate=1"], ["train.learning_rate", "Did you mean"]),
    (["synthetic", *TINY, "--set=optimizer.lr=1"], ["optimizer.lr", "allowed"]),
    (["synthetic", *TINY, "--set=train.epochs=many"], ["train.epochs=many", "integer"]),
    (["synthetic", *TINY, "--set=train.lr=-1"], ["train.lr=-1", "greater than 0"]),
    (["synthetic", *TINY, "--set=train.lr=1e400"], ["train.lr=", "finite"]),
    (["synthetic", *TINY, "--mixer=gla:gate_temperature=inf"], ["gate_temperature", "finite"]),
    (["synthetic", *TINY, "--report=."], ["folder", "--report"]),
    (["synthetic", *TINY, "--mixer=gla*3+attention"], ["4 layers", "has 2", "--set model.n_layers=4"]),
    (["synthetic", *TINY, "--mixer=gla:expand_k=-1"], ["gla:expand_k=-1", "negative"]),
    (["synthetic", *TINY, "--mixer=based:feature_dim=0"], ["linear_attention:feature_dim=0", "d_model=16", "none of them 0"]),
    (["synthetic", *TINY, "--mixer=delta_net:expand_k=0"], ["delta_net:expand_k=0.0", "d_model=16", "cannot compute"]),
    (["synthetic", *TINY, "--mixer=mamba2:d_state=-1:head_dim=8"], ["mamba2:d_state=-1", "non-negative"]),
    (["synthetic", *TINY, "--mixer=hyena:max_len=8"], ["hyena:max_len=8", "raise max_len"]),
    (["synthetic", *TINY, "--set=model.n_layers=1e8"], ["model.n_layers=1e8", "less than or equal to 1024"]),
    (["synthetic", *TINY, "--mixer=gla*100000000"], ["gla*100000000", "1024 layers at most"]),
    (["compare", "gla", "attention", "--fail=accuracy:nan"], ["no number"]),
    (["synthetic", *TINY, "--set=train.epochs"], ["no value"]),
    (["synthetic", *TINY, "--set=task.train_cells=16x8:64"], ["8 pairs", "length 16"]),
    (["synthetic", *TINY, "--set=task.vocab_size=8", "--set=task.train_cells=64x4:64"], ["vocab_size=8", "keys"]),
    (["synthetic", *TINY, "--set=task.vocab=8"], ["vocab", "Did you mean 'vocab_size'"]),
    (["synthetic", *TINY, "--rerun=everything"], ["everything", "failed", "all"]),
    (["synthetic", *TINY, "--device=tpu"], ["tpu", "cuda"]),
    (["synthetic", "--task=mqar_overwrite", "--recipe=mqar"], ["mqar_overwrite"]),
    (["synthetic", *TINY, "--mixer=./absent.py@Mine"], ["no file"]),
    (["synthetic", *TINY, "--check"], ["--check", "--recipe"]),
    (["synthetic", *TINY, "--recipe=mqar", "--check"], ["published values 'mqar'", "readme_plot"]),
    (["synthetic", "--recipe=readme_plot", "--set=train.epochs=1,2", "--check"], ["Attention d=64", "several settings"]),
    (["synthetic", *TINY, "--recipe=readme_plot", "--check"], ["nothing to compare", "readme_plot.csv"]),
    (["throughput", "--kernel=gated_dleta"], ["gated_dleta", "Did you mean 'gated_delta'", "bench list kernels"]),
    (["throughput", "--mixer=atention"], ["atention", "Did you mean 'attention'"]),
    (["throughput", "--mode=decoding"], ["decoding", "Did you mean 'decode'"]),
    (["throughput", "--length=512,many"], ["--length", "'512,many'", "positive whole numbers"]),
    (["throughput", "--width=0"], ["--width", "'0'", "positive"]),
    (["throughput", "--dtype=fp8"], ["fp8", "bf16"]),
    (["throughput", "--preset=kernel"], ["'kernel'", "Did you mean 'kernels'"]),
    (["throughput", "--device=tpu"], ["tpu", "cuda"]),
    (["throughput", "--device=gpu:1"], ["'gpu:1'", "Did you mean 'cuda:1'"]),
    (["throughput", "--mixer=gla", "--width=65", "--length=16", "--device=cpu"], ["gla at d_model=65", "n_heads=2", "nearest"]),
    (["list", "mixer"], ["'mixer'", "Did you mean 'mixers'"]),
    (["status"], ["no store", "results/runs"]),
    (["report"], ["results/runs"]),
    (["compare", "gla", "attention"], ["no runs"]),
    (["compare", "gla", "attention", "--fail=acc:-0.1"], ["acc", "Did you mean 'accuracy'"]),
    (["compare", "gla", "attention", "--fail=accuracy"], ["no number"]),
    (["check", "glaa"], ["glaa", "Did you mean 'gla'"]),
]


@pytest.mark.parametrize(("arguments", "words"), CASES, ids=[" ".join(case[0][-1:]) for case in CASES])
def test_bad_input_is_one_sentence(bench: Bench, arguments: list[str], words: list[str]) -> None:
    outcome = bench(*arguments)
    assert outcome.code == 2
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    for word in words:
        assert word in outcome.err
    assert bench.files() == set()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has CUDA")
def test_cuda_without_cuda(bench: Bench) -> None:
    outcome = bench("synthetic", *TINY, "--device=cuda")
    assert outcome.code == 2
    assert "no CUDA device" in outcome.err
    assert bench.files() == set()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("class Other:\n    pass\n", ["Mine", "Other"]),
        ("raise SystemExit(5)\n", ["cannot be imported", "SystemExit"]),
        ("import nonexistent_package\n", ["cannot be imported", "nonexistent_package"]),
        ("class Mine:\n    pass\n", ["not a Mixer subclass"]),
        (MIXER, ["breaks the contract", "causality"]),
    ],
    ids=["no class", "it leaves", "import fails", "not a mixer", "breaks the contract"],
)
def test_loose_file(bench: Bench, source: str, words: list[str]) -> None:
    Path("mine.py").write_text(source)
    outcome = bench("synthetic", *TINY, "--mixer=./mine.py@Mine")
    assert outcome.code == 2
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    for word in words:
        assert word in outcome.err
    assert {name for name in bench.files() if "pycache" not in name} == {"mine.py"}


def test_unwritable_store(bench: Bench) -> None:
    Path("store").write_text("a file where the store should be")
    outcome = bench.tiny("--mixer=attention", "--store=store")
    assert outcome.code == 2
    assert "cannot be written" in outcome.err
    assert "--store" in outcome.err
    assert Path("store").read_text() == "a file where the store should be"


def test_spoilt_records_are_skipped_with_a_warning_and_kept(bench: Bench) -> None:
    bench.tiny("--mixer=attention", "--seeds=1", "--set=train.lr=1e-3")
    (good,) = Path("results/runs").iterdir()
    text = (good / "record.json").read_text()
    spoilt = {
        "truncated": text[: len(text) // 2],
        "foreign": json.dumps({"hello": "world"}),
        "newer": text.replace('"schema_version": 1', '"schema_version": 99'),
        "invalid": text.replace('"role": "report"', '"role": "party"'),
    }
    for name, content in spoilt.items():
        (Path("results/runs") / name).mkdir()
        (Path("results/runs") / name / "record.json").write_text(content)
    outcome = bench("report", "--json")
    assert outcome.code == 0
    warnings = [line["text"] for line in outcome.lines("warning")]
    for name, word in {"truncated": "JSON", "foreign": "not a Mixer Bench record", "newer": "99", "invalid": "role"}.items():
        assert any(name in warning and word in warning for warning in warnings), (name, warnings)
        assert (Path("results/runs") / name / "record.json").read_text() == spoilt[name]
    assert outcome.lines("report")[0]["runs"] == 1


def test_only_spoilt_records_is_an_empty_store(bench: Bench) -> None:
    Path("results/runs/x").mkdir(parents=True)
    Path("results/runs/x/record.json").write_text("{")
    outcome = bench("report")
    assert outcome.code == 2
    assert "holds no runs" in outcome.err
    assert not Path("results/reports").exists()


def test_debug_shows_the_traceback(bench: Bench) -> None:
    assert "Traceback" in bench("synthetic", "--task=mqra", "--debug").err
    assert "Traceback" not in bench("synthetic", "--task=mqra").err


def test_usage_errors_are_code_2(bench: Bench) -> None:
    assert bench("synthetic", "--tsk=mqar").code == 2
    assert bench("syntetic").code == 2
    assert bench.files() == set()
