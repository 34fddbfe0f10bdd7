"""Decoding of converted models: padded batches, states of one size, a recorded step."""

import pytest
import torch

from bench.convert.cache import LinearizedCache
from bench.convert.decode import Decoder
from bench.convert.spec import LayerPlan
from bench.convert.student import LinearizedForCausalLM, build_student
from tests.convert.conftest import tokens


def test_generation_of_a_padded_batch_is_that_of_its_rows(teacher):
    student = build_student(teacher, [LayerPlan(mixer="gated_delta_net", window=4, combine="gate"), None]).eval()
    x = tokens(2, 30)
    mask = torch.ones_like(x)
    mask[1, :11] = 0
    padded = x.where(mask.bool(), 0)
    given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = student.generate(padded, attention_mask=mask, **given)[:, 30:]
    alone = student.generate(x[1:, 11:], attention_mask=mask[1:, 11:], **given)[:, 19:]
    assert together[1].tolist() == alone[0].tolist()


def test_the_state_does_not_grow(teacher):
    student = build_student(teacher, [LayerPlan(mixer="kda", window=4, sinks=1, combine="gate")] * 2).eval()
    sizes = {student(tokens(2, length), use_cache=True).cache.nbytes() for length in (2, 40, 90)}
    assert len(sizes) == 1


def test_a_decoder_on_fixed_buffers_says_what_the_model_says(teacher):
    student = build_student(teacher, [LayerPlan(mixer="gated_delta_net", window=5, sinks=1, combine="gate")] * 2).eval()
    x = tokens(2, 40)
    wanted = student(x, use_cache=False).logits
    decoder = Decoder(student, student(x[:, :17], use_cache=True).cache)
    places = [tensor.data_ptr() for state in decoder.states for tensor in state.values()]
    for t in range(17, 40):
        torch.testing.assert_close(decoder.step(x[:, t]), wanted[:, t], atol=1e-3, rtol=1e-3)
    assert places == [tensor.data_ptr() for state in decoder.states for tensor in state.values()]


def test_a_decoder_refuses_a_growing_cache(teacher):
    student = build_student(teacher, [LayerPlan(mixer=None, window=5), None]).eval()
    with pytest.raises(ValueError, match="every layer is converted"):
        Decoder(student, student(tokens(), use_cache=True).cache)


def test_a_recorded_step_serves_several_caches_in_turn(teacher, monkeypatch):
    """On a CPU the step is run instead of replayed; what moves between caches and buffers is the same."""

    def single(_: object, ids: torch.Tensor, cache: LinearizedCache | None) -> bool:
        return ids.shape[1] == 1 and cache is not None and cache.steps_on_graph

    monkeypatch.setattr(LinearizedForCausalLM, "_may_record", single)
    monkeypatch.setattr("bench.convert.decode.STEPS_BEFORE_CAPTURE", 1)
    student = build_student(teacher, [LayerPlan(mixer="gated_delta_net", window=5, sinks=1, combine="gate")] * 2).eval()
    x, other = tokens(2, 40), tokens(2, 40).flip(1)
    wanted = [student(a, use_cache=False).logits for a in (x, other)]
    caches = [student(a[:, :17], use_cache=True).cache for a in (x, other)]
    for t in range(17, 40):
        for a, cache, logits in zip((x, other), caches, wanted, strict=True):
            found = student(a[:, t : t + 1], cache=cache, use_cache=True).logits
            torch.testing.assert_close(found[:, 0], logits[:, t], atol=1e-3, rtol=1e-3)
    assert len(student.decoders) == 1
    assert all(cache.get_seq_length() == 40 for cache in caches)
    caches[1].reorder_cache(torch.tensor([1, 1]))
    found = student(other[:1, :1].expand(2, 1), cache=caches[1], use_cache=True).logits
    torch.testing.assert_close(found[0], found[1])
