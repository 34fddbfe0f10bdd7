"""Which teachers can be converted, and what a converted layer takes over from them."""

import pytest
import torch

from bench.convert.fit import attention_shape
from bench.convert.gate import check_model
from bench.convert.layer import GATE_BIAS
from bench.convert.run import check_transplant
from bench.convert.spec import LayerPlan
from bench.convert.student import build_student
from bench.errors import UserError
from tests.convert.conftest import HEDGEHOG, tiny, tokens


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma3Text"])
def test_a_teacher_taken_over_unchanged_says_the_same(kind: str):
    changes = {"sliding_window": None} if kind == "Mistral" else {}
    changes |= {"layer_types": ["full_attention"] * 2} if kind == "Gemma3Text" else {}
    check_transplant(tiny(kind, **changes), tokens(1))


def test_an_attention_that_rotates_otherwise_is_refused():
    with pytest.raises(UserError, match=r"\(CohereAttention, layer 0\) computes something else"):
        check_transplant(tiny("Cohere", logit_scale=1.0), tokens(1))


def test_norms_over_all_heads_are_named():
    with pytest.raises(UserError, match=r"Layer 0 \(Olmo2Attention\) cannot be converted: it norms queries over 64"):
        build_student(tiny("Olmo2"), [LayerPlan()] * 2)


def test_fused_projections_are_named():
    with pytest.raises(UserError, match=r"Layer 0 \(Phi3Attention\) cannot be converted: it has no separate q_proj"):
        build_student(tiny("Phi3"), [LayerPlan()] * 2)


def test_shape_of_grouped_heads(teacher):
    shape = attention_shape(teacher.model.layers[0].self_attn, "Layer 0")
    assert (shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.width) == (4, 2, 16, 64)


def test_a_mixer_whose_gates_need_another_width_says_so():
    with pytest.raises(UserError, match="retention does not fit this model: its input must be as wide as its heads, which are 128"):
        build_student(tiny("Qwen3", head_dim=32), [LayerPlan(mixer="retention", combine="gate")] * 2)


@pytest.mark.parametrize("groups", ["repeat", "share"])
@pytest.mark.parametrize("name", ["gated_delta_net", "delta_net", "gla", "linear_attention", "liger", "normalized_gla", "supra"])
def test_heads_wider_than_the_model_are_taken_over(name: str, groups: str):
    wide = tiny("Qwen3", head_dim=32)
    plan = LayerPlan(mixer=name, options=HEDGEHOG if name == "linear_attention" else {}, groups=groups, window=7, combine="sum")
    student = build_student(wide, [plan] * 2).eval()
    result = check_model(student, tokens())
    assert result.passed, result.sentence()
    heads = {"repeat": 4, "share": 2}[groups]
    assert student.converted()[0].init_state(1, device="cpu", dtype=torch.float32)["mixer.s"].shape[1] == heads


def test_copied_heads_are_not_bent(teacher):
    for name in ("gated_delta_net", "delta_net", "kda"):
        mixer = build_student(teacher, [LayerPlan(mixer=name, combine="gate")] * 2).converted()[0].mixer.mixer
        assert (mixer.conv.taps, mixer.conv.silu) == (0, False)


def test_mamba2_starts_from_the_teachers_projections(teacher):
    student = build_student(teacher, [LayerPlan(mixer="mamba2", window=0)] * 2)
    mixer, attention = student.converted()[1].own_projections, teacher.model.layers[1].self_attn
    _, x, b, c, _ = mixer.in_proj.weight.split((64, 64, 64, 64, 4))
    assert torch.equal(x[:16], attention.v_proj.weight[:16])
    assert torch.equal(x[16:32], attention.v_proj.weight[:16])
    assert torch.equal(b[48:], attention.k_proj.weight[16:])
    torch.testing.assert_close(c, attention.q_proj.weight * 16**-0.5)
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)


def test_mixers_keep_their_own_initial_values(teacher):
    plans = [LayerPlan(mixer="normalized_gla", window=4, combine="gate"), LayerPlan(mixer="mamba2", window=0)]
    first, second = build_student(teacher, plans).converted().values()
    assert first.gate.weight.abs().max() == 0
    assert first.gate.bias.tolist() == [GATE_BIAS] * 4
    assert first.mixer.mixer.gate_proj.bias.tolist() == [6.0] * 4
    assert second.own_projections.in_proj.weight[:64].std() > 0.05  # torch's own draw; a Llama's has 0.02
