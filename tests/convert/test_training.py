"""Losses by their definition, layers aligned at once as alone, and a killed conversion that ends like an undisturbed one."""

import itertools
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench import catalog
from bench.convert import loop, losses
from bench.convert.align import alignment_backward
from bench.convert.gate import check_model
from bench.convert.losses import IGNORED, layer_loss, next_token_loss, weights_loss
from bench.convert.measure import agreement, cache_bytes, window_of_equal_bytes
from bench.convert.parameters import choose_parameters
from bench.convert.resolve import load_recipe
from bench.convert.run import Conversion
from bench.convert.spec import LayerPlan, Lora, Recipe, Stage
from bench.convert.stage import StageTrainer, interleaved
from bench.convert.student import build_student
from bench.errors import UserError
from tests.convert.conftest import HEDGEHOG, tokens
from tests.convert.texts import data_of


@pytest.mark.parametrize(("kl", "ce", "z", "temperature"), [(1.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.2, 1.0), (0.7, 0.3, 0.1, 2.0)])
def test_next_token_loss_and_gradient_by_their_definition(
    kl: float, ce: float, z: float, temperature: float, monkeypatch: pytest.MonkeyPatch
):
    """In two chunks, the last of which is not full."""
    monkeypatch.setattr(losses, "MIN_CHUNK", 4)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 11 * 7)
    torch.manual_seed(0)
    hidden, head = torch.randn(13, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    teacher, teacher_head = torch.randn(13, 5), torch.randn(11, 5)
    targets = torch.randint(0, 11, (13,))
    targets[[2, 12]] = IGNORED
    named = {"teacher_ND": teacher, "teacher_head_VD": teacher_head, "temperature": temperature}
    loss, parts = next_token_loss(hidden, head, targets, ce=ce, kl=kl, z=z, **named)
    found = torch.autograd.grad(loss, (hidden, head))
    known = targets != IGNORED
    logits, wanted = (hidden @ head.t())[known], (teacher @ teacher_head.t())[known]
    cross = F.cross_entropy(logits, targets[known])
    log_s, log_t = ((a / temperature).log_softmax(-1) for a in (logits, wanted))
    divergence = temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    torch.testing.assert_close(parts, torch.stack([divergence, cross]).detach())
    expected = kl * divergence + ce * cross + z * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(loss, expected)
    for gradient, exact in zip(found, torch.autograd.grad(expected, (hidden, head)), strict=True):
        torch.testing.assert_close(gradient, exact)


def test_layer_losses_by_their_definition():
    a, b = torch.randn(2, 2, 3, 4).unbind(0)
    torch.testing.assert_close(layer_loss("mse", a, b), F.mse_loss(a, b))
    torch.testing.assert_close(layer_loss("l2", a, b), ((a - b) ** 2).sum(-1).sqrt().mean())
    rows, target = torch.rand(2, 2, 3, 4, 4).unbind(0)
    torch.testing.assert_close(weights_loss("frobenius", rows, target), ((rows - target) ** 2).sum((-1, -2)).sqrt().mean())
    torch.testing.assert_close(weights_loss("cross_entropy", rows, target), -(target * rows.log()).sum(-1).mean())


@pytest.mark.parametrize("capture", ["attn_out", "mixer_out", "block_out"])
def test_layers_learn_on_the_teachers_stream_and_apart(capture: str, teacher):
    plans = [LayerPlan(options=HEDGEHOG, window=5)] * 2
    stage = Stage(capture=capture, loss="mse")

    def gradients(kept: list) -> dict[str, torch.Tensor]:
        student = build_student(teacher, kept)
        choose_parameters(student, teacher, stage)
        alignment_backward(student, teacher, tokens(2, 20), stage, float(sum(plan is not None for plan in kept)))
        return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    together = gradients(plans)
    assert together
    for alone in (gradients([plans[0], None]), gradients([None, plans[1]])):
        for name, gradient in alone.items():
            torch.testing.assert_close(together.pop(name), gradient)
    assert not together


def test_alignment_of_an_exact_copy_has_no_loss(teacher):
    student = build_student(teacher, [LayerPlan(mixer=None, window=512)] * 2)
    student.requires_grad_(True)
    for capture in ("attn_out", "mixer_out", "block_out"):
        loss = alignment_backward(student, teacher, tokens(2, 20), Stage(capture=capture), 1.0)
        assert loss < 1e-10, capture


STAGES = (
    Stage(capture="attn_out", lr=1e-2, schedule="plateau", seq_len=32, batch_tokens=64, tokens=64 * 6),
    Stage(
        capture="logits", loss="kl_ce", kl=1.0, ce=0.1, lr=1e-3, lora=Lora(dropout=0.2), seq_len=32, batch_tokens=64, tokens=64 * 6
    ),
)
PLAN = LayerPlan(options=HEDGEHOG, window=6)


def conversion(teacher, tokenizer, text: Path, out: Path, **changes) -> Conversion:
    out.with_name(f".{out.name}.partial").mkdir(exist_ok=True)
    recipe = Recipe(name="test", summary="", plan=PLAN, stages=STAGES).model_copy(update=changes)
    given = {"precision": "fp32", "seconds": None, "store_dtype": torch.float32, "held_rows": 2}
    data = data_of(text, tokenizer)
    return Conversion(teacher=teacher, tokenizer=tokenizer, recipe=recipe, data=data, out=out, model="tiny", **given)


class Killed(BaseException):
    """Ends a process where it stands, as kill -9 does: nothing is cleaned up."""


@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_conversion_ends_like_an_undisturbed_one(
    stage: int, teacher, tokenizer, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = conversion(teacher, tokenizer, text, tmp_path / "whole")
    assert whole.run().passed
    step = StageTrainer.step

    def fatal(trainer: StageTrainer, progress: float) -> dict[str, float]:
        if trainer.index == stage and trainer.step_number == 4:
            raise Killed
        return step(trainer, progress)

    monkeypatch.setattr(StageTrainer, "step", fatal)
    with pytest.raises(Killed):
        conversion(teacher, tokenizer, text, tmp_path / "cut").run(checkpoint_seconds=0)
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(StageTrainer, "step", step)
    torch.manual_seed(99)
    resumed = conversion(teacher, tokenizer, text, tmp_path / "cut")
    assert resumed.run().passed
    for (name, a), (_, b) in zip(whole.student.state_dict().items(), resumed.student.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert not (tmp_path / ".cut.partial").exists()


def test_a_checkpoint_of_other_settings_is_not_continued(teacher, tokenizer, text: Path, tmp_path: Path, monkeypatch):
    step = StageTrainer.step

    def interrupted(trainer: StageTrainer, progress: float) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, progress)

    monkeypatch.setattr(StageTrainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conversion(teacher, tokenizer, text, tmp_path / "out").run()
    stored = torch.load(tmp_path / ".out.partial/checkpoint.pt", weights_only=True)
    assert stored["trainer"]["step"] == 1, "the step in flight is finished, and no other begins"
    with pytest.raises(UserError, match="unfinished conversion with other settings"):
        conversion(teacher, tokenizer, text, tmp_path / "out", seed=5).run()


def test_training_brings_the_student_closer(teacher, tokenizer, text: Path, tmp_path: Path):
    made = conversion(teacher, tokenizer, text, tmp_path / "out", stages=(STAGES[0].model_copy(update={"tokens": 64 * 60}),))
    made.run()
    assert made.rows["student"]["kl"] < 0.9 * made.rows["student before training"]["kl"]


def test_kl_guided_selection_keeps_the_layers_that_matter(teacher, tokenizer, text: Path, tmp_path: Path):
    plan = PLAN.model_copy(update={"layers": "kl:1"})
    made = conversion(teacher, tokenizer, text, tmp_path / "out", plan=plan)
    made.run()
    scores = made.rows["kl when a layer is restored"]
    kept = [index for index, plan in enumerate(made.student.plans) if plan is None]
    assert kept == [int(min(scores, key=scores.get))]


def test_adapters_are_merged_and_gone(teacher, tokenizer, text: Path):
    student = build_student(teacher, [PLAN, None])
    names = set(student.state_dict())
    trainer = StageTrainer(student, teacher, STAGES[1], 0, data_of(text, tokenizer), "fp32")
    before = student.lm.model.layers[1].self_attn.q_proj.weight.clone()
    for _ in range(3):
        trainer.step(0.0)
    assert torch.equal(student.lm.model.layers[1].self_attn.q_proj.base_layer.weight, before)
    trainer.finish()
    assert set(student.state_dict()) == names
    assert not torch.equal(student.lm.model.layers[1].self_attn.q_proj.weight, before)


def test_running_out_of_memory_halves_the_micro_batch(teacher, tokenizer, text: Path, tmp_path: Path, monkeypatch):
    made = conversion(teacher, tokenizer, text, tmp_path / "out")
    trainer = StageTrainer(made.student, teacher, STAGES[0], 0, made.data, "fp32")
    backward, sizes = StageTrainer._backward, []

    def greedy(self: StageTrainer, part: torch.Tensor, share: float) -> dict[str, float]:
        sizes.append(len(part))
        if len(part) > 1:
            raise torch.OutOfMemoryError
        return backward(self, part, share)

    monkeypatch.setattr(StageTrainer, "_backward", greedy)
    loop.step(trainer, 0.0)
    assert sizes == [2, 1, 1]
    monkeypatch.setattr(StageTrainer, "_backward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(UserError, match=r"try --set stages\.seq_len=16"):
        loop.step(trainer, 0.0)


def test_the_gate_sees_a_cache_that_forgets_and_padding_that_leaks(teacher, monkeypatch):
    from bench.convert.cache import StateLayer
    from bench.convert.layer import LinearizedAttention

    student = build_student(teacher, [PLAN] * 2).eval()
    with monkeypatch.context() as patch:
        patch.setattr(LinearizedAttention, "_padded", lambda self, x, rope, state, _: self.segment(x, rope, state))
        errors = check_model(student, tokens()).errors
        assert errors["left-padded"] > 0.01 > max(errors["chunked"], errors["step"])
    monkeypatch.setattr(StateLayer, "store", lambda self, state, n: setattr(self, "seen", self.seen + n))
    errors = check_model(student, tokens()).errors
    assert min(errors["chunked"], errors["step"]) > 0.01 > errors["batched"]


def test_equal_bytes_are_counted_from_live_caches(teacher):
    student = build_student(teacher, [LayerPlan(mixer=None, window=21, sinks=4)] * 2)
    assert cache_bytes(teacher) == (0, 2 * 2 * 2 * 16 * 4)
    assert window_of_equal_bytes(student, teacher) == 21
    assert agreement(teacher, teacher, tokens())["kl"] == pytest.approx(0, abs=1e-6)


def test_every_published_recipe_is_there():
    published = [
        "hedgehog",
        "lolcats",
        "supra",
        "mohawk",
        "mamba_in_llama",
        "liger",
        "lizard",
        "lawcat",
        "radlads",
        "haller",
        "swa",
    ]
    assert set(published) <= set(catalog.conversions())
    for name in published:
        assert load_recipe(name).name == name
        assert "arXiv" in load_recipe(name).summary or name == "swa"


def test_layers_are_replaced_step_by_step(teacher, text: Path, tokenizer):
    """In the first half of the stage the teacher's attention stands in for one of two layers, which then must not learn."""
    student = build_student(teacher, [LayerPlan(mixer="gated_delta_net", window=0, combine="sum")] * 2)
    stage = Stage(capture="logits", loss="kl_ce", kl=1.0, train=("mixer",), replace=(0.5, 1.0), seq_len=16, batch_tokens=64)
    trainer = StageTrainer(student, teacher, stage, 0, data_of(text, tokenizer), "fp32")

    def moved(progress: float) -> list[bool]:
        before = [layer.mixer.mixer.gate_proj.weight.clone() for layer in student.converted().values()]
        trainer.step(progress)
        after = [layer.mixer.mixer.gate_proj.weight for layer in student.converted().values()]
        return [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]

    assert moved(0.1) == [True, False]
    assert moved(0.5) == [True, True]
    trainer.step(0.1)
    trainer.finish()
    assert not any(layer.stand_in for layer in student.converted().values())


def test_turns_are_spread_over_the_layers():
    assert interleaved(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert sorted(interleaved(30)) == list(range(30))
    first = sorted(index for index, turn in enumerate(interleaved(30)) if turn < 8)
    assert max(b - a for a, b in itertools.pairwise(first)) <= 4


def test_replacing_belongs_to_logits():
    with pytest.raises(ValueError, match="replace belongs to a stage that captures logits"):
        Stage(capture="mixer_out", replace=(0.5, 1.0))


def test_compiling_is_no_progress_but_takes_time(monkeypatch: pytest.MonkeyPatch):
    """Of 100 s the first step takes 60: the learning rate falls over the other 40, and the stage ends in time."""
    clock, shares = [0.0], []
    monkeypatch.setattr("bench.convert.loop.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def step(trainer: SimpleNamespace, share: float) -> dict[str, float]:
        clock[0] += 1.0 if shares else 60.0
        shares.append(share)
        trainer.tokens += 10
        return {"loss": 1.0}

    monkeypatch.setattr("bench.convert.loop.step", step)
    stage = Stage(capture="mixer_out", tokens=1_000_000)
    trainer: Any = SimpleNamespace(device=torch.device("cpu"), stage=stage, index=0, tokens=0, step_number=0)
    stage_loop = loop.StageLoop(trainer, 1, 100.0, 0.0, lambda _: None, lambda _: None, 1e9)
    assert stage_loop.run()["seconds"] == 100.0
    assert shares == pytest.approx([0.0, *(i / 40 for i in range(40))], abs=1e-4)
