"""Conversion on a GPU: the gate, the CUDA graph of a decoding step, and one step of every kind of stage in bf16."""

import pytest
import torch

from bench.convert.data import Corpus, TrainingData
from bench.convert.decode import Decoder
from bench.convert.gate import check_model
from bench.convert.retrieval import Search, find_far_heads
from bench.convert.spec import LayerPlan, Source, Stage
from bench.convert.stage import StageTrainer
from bench.convert.student import build_student
from tests.convert.conftest import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PLANS = {
    "lolcats": LayerPlan(options={"feature_map": "hedgehog"}, window=7, sinks=2),
    "gate": LayerPlan(mixer="gated_delta_net", window=7, sinks=2, combine="gate"),
    "far": LayerPlan(mixer=None, combine="sum", window=7, sinks=2, far_heads="0.1,1", far_window=20),
    "kept": LayerPlan(mixer=None, combine="sum", window=7, sinks=2, far_heads="0.1,1", far_window=20, far_keys="best"),
    "mamba2": LayerPlan(mixer="mamba2", window=0, combine="sum"),
}


def tokens() -> torch.Tensor:
    return torch.randint(1, 280, (3, 120), generator=torch.Generator().manual_seed(1)).cuda()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_gate_on_gpu(plan: LayerPlan):
    result = check_model(build_student(tiny().cuda(), [plan] * 2).eval(), tokens())
    assert result.passed, result.sentence()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_graph_steps_like_the_model(plan: LayerPlan):
    student, x = build_student(tiny().cuda(), [plan] * 2).eval(), tokens()
    with torch.no_grad():
        wanted = student(x, use_cache=False).logits
        decoder = Decoder(student, student(x[:, :100], use_cache=True).cache)
    assert decoder.graph is not None
    for t in range(100, 120):
        torch.testing.assert_close(decoder.step(x[:, t]), wanted[:, t], atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("capture", ["attn_out", "mixer_out", "block_out", "logits"])
def test_stages_train_in_bf16(capture: str):
    teacher = tiny().cuda().requires_grad_(False)
    student = build_student(teacher, [PLANS["gate"]] * 2)
    loss = {"loss": "kl_ce", "kl": 1.0} if capture == "logits" else {}
    stage = Stage(capture=capture, seq_len=64, batch_tokens=256, train=("mixer", "qkv"), schedule="constant", **loss)
    corpus = Corpus(Source(kind="text", where="x"), torch.randint(1, 280, (20_000,)).int().numpy())
    trainer = StageTrainer(student, teacher, stage, 0, TrainingData([corpus], None, 0), "bf16")
    losses = [trainer.step(0.0)["loss"] for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())


def test_scores_and_logits_train_with_kept_keys_in_bf16():
    teacher = tiny().cuda().requires_grad_(False)
    student = build_student(teacher, [PLANS["kept"]] * 2)
    corpus = Corpus(Source(kind="text", where="x"), torch.randint(1, 280, (20_000,)).int().numpy())
    for index, (capture, loss) in enumerate((("far_attention", {}), ("logits", {"loss": "kl_ce", "kl": 1.0}))):
        named = {"seq_len": 64, "batch_tokens": 256, "schedule": "constant", "lr": 3e-3, "train": ("all",)}
        stage = Stage(capture=capture, **named | ({"train": ("mixer",)} if capture == "far_attention" else {}), **loss)
        trainer = StageTrainer(student, teacher, stage, index, TrainingData([corpus], None, 0), "bf16")
        losses = [trainer.step(0.0)["loss"] for _ in range(30)]
        assert sum(losses[-5:]) < sum(losses[:5]), capture
        trainer.finish()


def test_gates_train_on_gpu(tokenizer):
    teacher = tiny(max_position_embeddings=256).cuda().requires_grad_(False)
    corpus = Corpus(Source(kind="text", where="x"), torch.randint(1, 280, (20_000,)).int().numpy())
    plan = PLANS["far"].model_copy(update={"far_heads": "auto:2"})
    search = Search(steps=5, rows=2, length=200)
    heads, gates = find_far_heads(teacher, tokenizer, TrainingData([corpus], tokenizer, 0), plan, 2, bf16=True, search=search)
    assert len(heads.split(",")) == 2
    assert all(0.5 < gate < 1 for gate in gates.values())


def test_generation_replays_graphs_and_says_the_same(monkeypatch: pytest.MonkeyPatch):
    student = build_student(tiny().cuda(), [PLANS["gate"]] * 2).eval()
    rows, mask = tokens(), torch.ones_like(tokens())
    mask[0, :50] = 0
    given = {"attention_mask": mask, "max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    recorded = student.generate(rows, **given)
    assert [decoder.graph is not None for decoder in student.decoders.values()] == [True]
    again = student.generate(rows, **given)
    monkeypatch.setattr(type(student), "_may_record", lambda *_: False)
    plain = student.generate(rows, **given)
    assert torch.equal(recorded, plain)
    assert torch.equal(again, plain)
