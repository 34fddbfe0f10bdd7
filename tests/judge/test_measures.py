"""What is timed computes the same as the parallel pass; batches by budget change no score; letters and chance are counted right."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bench.convert.spec import LayerPlan
from bench.convert.student import build_student
from bench.judge.decoding import GrowingDecoder, KeyValueDecoder, decoder
from bench.judge.outcome import answer_counts, chance_of, item_rows, primary_metric
from bench.judge.speed import memory_and_speed
from bench.judge.suites import Size
from tests.convert.conftest import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
PLAN = LayerPlan(mixer="linear_attention", window=8)


@torch.no_grad()
def check_decoder(model, tokens_T: torch.Tensor, kind: str, tolerance: float) -> None:
    """Steps from a prefill, in three equal rows, against one pass over everything."""
    wanted = model(input_ids=tokens_T[None], use_cache=False).logits[0]
    start = len(tokens_T) - 9
    cache = model(input_ids=tokens_T[None, :start], use_cache=True).cache
    made = decoder(model, cache, 3, room=9)
    assert type(made).__name__ == kind
    for index in range(start, len(tokens_T)):
        logits_BV = made.step(tokens_T[index].expand(3))
        for row in logits_BV:
            torch.testing.assert_close(row, wanted[index], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("kind", "plans"),
    [("KeyValueDecoder", None), ("Decoder", [PLAN, PLAN]), ("GrowingDecoder", [PLAN, None])],
    ids=["teacher", "student", "student that keeps softmax"],
)
def test_decoding_is_the_parallel_pass(kind: str, plans: list | None):
    model = tiny() if plans is None else build_student(tiny(), plans).eval()
    check_decoder(model, torch.randint(0, 280, (41,), generator=torch.Generator().manual_seed(0)), kind, 1e-4)


def test_windowed_softmax_models_decode_on_their_own_cache():
    model = tiny("Mistral", sliding_window=16, max_position_embeddings=64)
    cache = model(input_ids=torch.arange(30)[None], use_cache=True).cache
    made = decoder(model, cache, 2, room=4)
    assert isinstance(made, GrowingDecoder) and made.step(torch.ones(2, dtype=torch.long)).shape == (2, 280)


def test_the_static_cache_decodes_as_often_as_it_promises():
    model = tiny()
    cache = model(input_ids=torch.arange(20)[None], use_cache=True).cache
    made = KeyValueDecoder(model, cache, 1, room=5)
    for _ in range(5):
        assert torch.isfinite(made.step(torch.ones(1, dtype=torch.long))).all()


def test_memory_is_counted_at_each_length():
    size = Size(limit=1, lengths=(64,), windows=1, window_tokens=8, measured=(16, 48), batches=(1, 2))
    found = memory_and_speed(tiny(), size)
    state = {item.slice: item.value for item in found if item.name == "state_bytes"}
    assert state == {"16": 2 * 2 * 16 * 2 * 16 * 4, "48": 2 * 2 * 48 * 2 * 16 * 4}  # layers, k and v, tokens, heads, width, fp32
    speeds = [item.slice for item in found if item.name == "decode_tokens_per_second"]
    assert speeds == [f"batch {b}, context {n}, eager" for n in (16, 48) for b in (1, 2)]
    half = nn.Module.to(tiny(), torch.bfloat16)
    assert {i.slice: i.value for i in memory_and_speed(half, size) if i.name == "state_bytes"} == {
        k: v / 2 for k, v in state.items()
    }


def test_batches_by_budget_change_no_score(tokenizer):
    from lm_eval.api.instance import Instance

    from bench.judge.harness import language_model

    model = tiny()
    prompts = ["The window", "Every number in this table names the record it was read from. " * 5, "A mixer reads one token"]
    scored = [Instance("loglikelihood", {}, (prompt, " where most"), i) for i, prompt in enumerate(prompts)]
    asked = [Instance("generate_until", {}, (p, {"until": ["<no>"], "max_gen_toks": 5}), i) for i, p in enumerate(prompts)]
    rolled = [Instance("loglikelihood_rolling", {}, (prompt,), i) for i, prompt in enumerate(prompts)]
    free, one = (language_model(model, tokenizer, batch_size=size, max_length=256) for size in ("auto", 1))
    for mine, other in zip(free.loglikelihood(scored), one.loglikelihood(scored), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-3) and mine[1] == other[1]
    assert free.generate_until(asked) == one.generate_until(asked)
    assert free.loglikelihood_rolling(rolled) == pytest.approx(one.loglikelihood_rolling(rolled), abs=1e-2)
    assert free.rows(4096, scored=True) == 1 and free.rows(512, scored=True) == 8


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("batch_size", ["auto", 8])
def test_likelihoods_are_those_of_stock_lm_eval(tokenizer, converted: bool, batch_size: int | str):
    from lm_eval.models import huggingface

    from bench.judge.budget import BudgetLM

    plan = LayerPlan(mixer=None, combine="sum", window=7, sinks=2, far_heads="0.1,1.1", far_window=20, far_keys="best")
    model = build_student(tiny(), [plan] * 2).eval() if converted else tiny()
    draw = np.random.default_rng(0)
    sizes = [(int(draw.integers(1, 90)), int(draw.integers(1, 9))) for _ in range(30)]
    asked = [(("", str(i)), draw.integers(1, 280, a).tolist(), draw.integers(1, 280, b).tolist()) for i, (a, b) in enumerate(sizes)]
    asked += [(("letter", str(i)), asked[0][1], [i + 5]) for i in range(4)]  # the same input, read once
    named = {"tokenizer": tokenizer, "max_length": 64, "softmax_dtype": "float32"}  # shorter than some requests
    stock: Any = huggingface.HFLM
    wanted = stock(model, batch_size=8, backend="causal", **named)._loglikelihood_tokens(asked, disable_tqdm=True)
    found = BudgetLM(model, batch_size=batch_size, **named)._loglikelihood_tokens(asked)
    for mine, other in zip(found, wanted, strict=True):
        assert mine == (pytest.approx(other[0], abs=1e-4), other[1])


def sample(answers: list, target: object, **fields: object) -> dict:
    common = {"doc_id": 0, "prompt_hash": "0" * 64, "filter": "none", "doc": {}, "metrics": ["acc"], "acc": 1.0}
    return {**common, "filtered_resps": answers, "target": target, **fields}


def test_letters_given_and_right_are_counted():
    choices = [sample([(-1.0, False), (-0.5, False), (-2.0, False)], 0), sample([(-1.0, False), (-3.0, False), (-2.0, False)], 2)]
    counts = {c.answer: (c.chosen, c.correct) for c in answer_counts("multiple_choice", choices)}
    assert counts == {"A": (1, 1), "B": (1, 0), "C": (0, 1)}
    assert chance_of("multiple_choice", choices) == pytest.approx(1 / 3)
    said = [sample(["The answer is (B)."], "B"), sample([" no idea"], "(C)")]
    counts = {c.answer: (c.chosen, c.correct) for c in answer_counts("generate_until", said)}
    assert counts == {"B": (1, 1), "C": (0, 1), "none": (1, 0)}
    assert answer_counts("generate_until", [sample(["42"], "42")]) == []
    assert chance_of("generate_until", said) == 0.0
    assert chance_of("loglikelihood_rolling", said) is None


def test_rulers_lengths_become_one_metric_and_a_length():
    ruler = sample(["7"], ["7"], metrics=["4096", "512"], doc={"max_length": 512}) | {"4096": -1.0, "512": 1.0}
    (row,) = item_rows([ruler])
    assert (row["metric"], row["value"], row["length"]) == ("acc", 1.0, 512)
    assert primary_metric("niah_single_1", {"4096,none": -1, "512,none": 1.0}) == "acc"
    assert primary_metric("hellaswag", {"acc,none": 0.3, "acc_norm,none": 0.4}) == "acc_norm"
    assert primary_metric("arc_easy", {"acc,none": 0.3, "acc_norm,none": 0.4}) == "acc"
