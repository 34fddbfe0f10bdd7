"""Compiled stages compute what plain ones do, and every layer runs the same compiled function."""

from functools import partial

import pytest
import torch

from bench.convert import stage as stages
from bench.convert.compiled import compile_parts
from bench.convert.data import Corpus, TrainingData
from bench.convert.spec import LayerPlan, Lora, Source, Stage
from bench.convert.stage import StageTrainer
from bench.convert.student import build_student
from tests.convert.conftest import tiny

PLANS = {
    "gate": LayerPlan(mixer="gated_delta_net", groups="share", window=7, sinks=2, combine="gate"),
    "lolcats": LayerPlan(options={"feature_map": "hedgehog"}, window=7, sinks=2),
    "far": LayerPlan(mixer=None, combine="sum", window=7, sinks=2, far_heads="0.1,1.1", far_window=20, far_keys="best"),
}
LOGITS = {"capture": "logits", "loss": "kl_ce", "kl": 1.0, "ce": 0.5}
STAGES = {
    "attn_out": Stage(capture="attn_out"),
    "mixer_out": Stage(capture="mixer_out", train=("mixer", "qkv")),
    "block_out": Stage(capture="block_out", train=("all",)),
    "logits": Stage(**LOGITS, train=("all",)),
    "lora": Stage(**LOGITS, train=("mixer",), lora=Lora()),
}
PAIRS = [("gate", name) for name in STAGES]
PAIRS += [("lolcats", "attn_out"), ("lolcats", "logits"), ("far", "logits")]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at an activation's
@pytest.mark.parametrize(("plan", "stage"), PAIRS)
def test_compiled_stages_train_alike(plan: str, stage: str, monkeypatch: pytest.MonkeyPatch):
    """Traced by torch.compile but run by torch itself, which needs no compiler."""
    monkeypatch.setattr(stages, "compile_parts", partial(compile_parts, backend="eager"))
    corpus = Corpus(Source(kind="text", where="x"), torch.randint(1, 280, (5000,)).int().numpy())
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        teacher = tiny().requires_grad_(False)
        student = build_student(teacher, [PLANS[plan]] * 2)
        used = STAGES[stage].model_copy(update={"seq_len": 32, "batch_tokens": 64, "schedule": "constant"})
        trainer = StageTrainer(student, teacher, used, 0, TrainingData([corpus], None, 0), "fp32", compiled=compiled)
        losses.append([trainer.step(0.0)["loss"] for _ in range(3)])
        trainer.finish()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    counters = torch._dynamo.utils.counters
    assert 0 < counters["frames"]["ok"] <= 4, "two layers share their compiled functions"
    assert not counters["graph_break"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_every_layout_of_far_heads_is_compiled(monkeypatch: pytest.MonkeyPatch):
    """More layers that differ than torch keeps variants of a function: none of them may fall back to plain Python."""
    monkeypatch.setattr(stages, "compile_parts", partial(compile_parts, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layouts = ("", "0", "1", "2", "0 1", "0 2", "1 2", "0 1 2", "")
    far = ",".join(f"{layer}.{head}" for layer, heads in enumerate(layouts) for head in heads.split())
    teacher = tiny(num_hidden_layers=9, hidden_size=48, num_attention_heads=3, num_key_value_heads=3).requires_grad_(False)
    student = build_student(teacher, [PLANS["far"].model_copy(update={"far_heads": far})] * 9)
    corpus = Corpus(Source(kind="text", where="x"), torch.randint(1, 280, (5000,)).int().numpy())
    used = STAGES["logits"].model_copy(update={"seq_len": 32, "batch_tokens": 64, "schedule": "constant"})
    limit = torch._dynamo.config.recompile_limit
    trainer = StageTrainer(student, teacher, used, 0, TrainingData([corpus], None, 0), "fp32", compiled=True)
    for _ in range(2):
        trainer.step(0.0)
    trainer.finish()
    counters = torch._dynamo.utils.counters
    assert counters["frames"]["ok"] == counters["frames"]["total"] == 9, "eight layouts and the teacher's block"
    assert torch._dynamo.config.recompile_limit == limit
