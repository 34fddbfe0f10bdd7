"""Far heads: the few key heads with a long window, named by the plan or found by cutting one head after the other."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.convert.data import load_data
from bench.convert.far import far_heads
from bench.convert.gate import check_model
from bench.convert.measure import cache_bytes
from bench.convert.rendered import single_fact
from bench.convert.resolve import resolve_recipe
from bench.convert.retrieval import GatedReach, Search, answer_divergence, find_far_heads
from bench.convert.spec import LayerPlan, Source
from bench.convert.student import build_student
from bench.errors import UserError
from tests.convert.conftest import tiny

NEAR = LayerPlan(mixer=None, window=7, sinks=2, combine="sum")


def tokens() -> torch.Tensor:
    return torch.randint(1, 280, (3, 60), generator=torch.Generator().manual_seed(1))


def far(heads: str, window: int = 20, **changes) -> LayerPlan:
    return NEAR.model_copy(update={"far_heads": heads, "far_window": window} | changes)


@pytest.mark.parametrize("changes", [{}, {"mixer": "gated_delta_net", "combine": "gate", "groups": "share"}])
@pytest.mark.parametrize("heads", ["0.1", "0.1,1"])
def test_unequal_windows_are_one_function(heads: str, changes: dict, teacher, tmp_path: Path):
    student = build_student(teacher, [far(heads, **changes)] * 2).eval()
    student.save_pretrained(tmp_path)
    result = check_model(student, tokens(), folder=tmp_path)
    assert result.passed, result.sentence()


@pytest.mark.parametrize("keys", ["newest", "best"])
@pytest.mark.parametrize("heads", ["0.1,1.2", "0.0,0.2,1.0,1.1"])
def test_far_heads_need_not_be_neighbours(heads: str, keys: str):
    model = tiny(hidden_size=96, num_attention_heads=6, num_key_value_heads=3)
    result = check_model(build_student(model, [far(heads, far_keys=keys)] * 2).eval(), tokens())
    assert result.passed, result.sentence()


def test_each_head_sees_as_far_as_the_plan_says(teacher):
    """A changed token moves a head's output as long as it is within that head's window."""
    layer = build_student(teacher, [far("0.1", sinks=0)] * 2).eval().converted()[0]
    q, k, v = (torch.randn(1, heads, 40, 16) for heads in (4, 2, 2))
    changed = v.clone()
    changed[:, :, 10] += 1
    assert layer.window is not None
    moved = (layer.window(q, k, changed, None)[0] - layer.window(q, k, v, None)[0]).abs().amax((0, 3)) > 1e-6
    first, last = moved.int().argmax(1), 39 - moved.flip(1).int().argmax(1)
    assert first.tolist() == [10] * 4
    assert last.tolist() == [16, 16, 29, 29]


def test_far_heads_that_see_everything_are_the_teacher(teacher):
    student = build_student(teacher, [far("0,1", 100)] * 2).eval()
    torch.testing.assert_close(student(tokens()).logits, teacher(tokens()).logits, atol=1e-4, rtol=1e-4)


def test_bytes_follow_the_heads(teacher):
    """Six of 9 stored near keys become 19 + 2 in one of four heads, and nothing grows."""
    (near, growth), (uneven, more) = (cache_bytes(build_student(teacher, [plan] * 2).eval()) for plan in (NEAR, far("0.1")))
    per_key = 2 * 16 * 4
    assert (growth, more) == (0, 0)
    assert uneven - near == (19 - 6) * per_key + 8  # and a position of its own


@pytest.mark.parametrize(
    ("heads", "found"), [("0.1", {0: [1]}), ("1, 0.1", {0: [1], 1: [0, 1]}), ("1.1,1.0", {1: [0, 1]}), ("", {})]
)
def test_heads_are_named_by_layer(heads: str, found: dict):
    assert far_heads(NEAR.model_copy(update={"far_heads": heads}), 2, 2) == found


@pytest.mark.parametrize("heads", ["2", "0.2", "0-1", "auto:0", "auto"])
def test_heads_that_are_not_there(heads: str, teacher):
    with pytest.raises(UserError, match=rf"far_heads='{heads}' does not name key heads of this model, which has 2 layers of 2"):
        build_student(teacher, [far(heads)] * 2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["plan.far_window=0"], "set both"),
        (["plan.far_window=160"], "need a window of at most far_window keys"),
        (["plan.sink_logits=1"], "without sink_logits"),
    ],
)
def test_plans_that_make_no_sense(settings: list[str], sentence: str):
    with pytest.raises(UserError, match=sentence):
        resolve_recipe("far_heads", settings=settings)


def test_a_list_stays_text_on_the_command_line():
    assert resolve_recipe("far_heads", settings=["plan.far_heads=18.10"]).plan.far_heads == "18.10"


def test_a_fact_stands_early_and_is_asked_for_at_the_end(tokenizer):
    text = np.full(1000, 7)
    for seed in range(5):
        ids, size = single_fact(tokenizer, np.random.default_rng(seed), 300, lambda n: text[:n])
        answer = tokenizer.decode(ids[-size:]).strip()
        assert len(ids) == 300
        assert answer.isdigit()
        assert answer in tokenizer.decode(ids[:200])


def test_only_the_answer_counts(teacher):
    """The divergence is the mean over answer tokens of KL, text by text."""
    rows, sizes = tokens(), (3, 1, 2)
    other = tiny(initializer_range=0.1)
    log_q, log_p = (model(rows).logits.log_softmax(-1) for model in (teacher, other))
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    expected = sum(kl[row, 59 - size : 59].sum() for row, size in enumerate(sizes)) / sum(sizes)
    torch.testing.assert_close(answer_divergence(other, teacher, rows, torch.tensor(sizes)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("gate", "plan"), [(0.0, NEAR), (1.0, far("0,1", 100))])
def test_gates_lie_between_window_and_everything(gate: float, plan: LayerPlan, teacher):
    wanted = build_student(teacher, [plan] * 2).eval()
    gated = build_student(teacher, [NEAR] * 2).eval()
    for layer in gated.converted().values():
        reach = GatedReach(layer.shape, NEAR, 60)
        reach.gate_G.data.fill_(gate)
        layer.add_module("window", reach)
    torch.testing.assert_close(gated(tokens(), use_cache=False).logits, wanted(tokens()).logits, atol=1e-4, rtol=1e-4)


def test_the_head_that_reads_keeps_its_gate(tokenizer, text: Path):
    """Where one key head alone writes into the stream, the others' gates close at the price of being open."""
    reading = tiny(max_position_embeddings=128, initializer_range=0.5)
    for index, layer in enumerate(reading.model.layers):
        layer.self_attn.o_proj.weight.data[:, (0 if index == 0 else 32) :] = 0  # query heads 0 and 1 read key head 0
    reading.requires_grad_(False)
    data = load_data([Source(kind="text", where=str(text))], tokenizer, 280, 0, min_length=64, cap=10**6)
    search = Search(steps=22, rows=2, length=96)
    heads, gates = find_far_heads(reading, tokenizer, data, far("auto:1"), 1, bf16=False, search=search)
    assert heads == "1.0"
    assert gates["1.0"] > 2 * max(value for name, value in gates.items() if name != "1.0")
    with pytest.raises(UserError, match="asks for more key heads than this model has"):
        find_far_heads(reading, tokenizer, data, far("auto:5"), 5, bf16=False, search=search)
