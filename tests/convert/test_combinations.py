"""Shared states, copied projections and rotations: what they compute, and which combinations there are."""

import copy

import pytest
import torch

from bench.convert.branches import MixerBranch, rotate
from bench.convert.gate import check_model
from bench.convert.parameters import parameter_group
from bench.convert.spec import LayerPlan
from bench.convert.student import build_student
from bench.errors import UserError
from tests.convert.conftest import HEDGEHOG, tiny, tokens


def test_a_shared_state_is_what_every_reader_would_have(teacher):
    """Query heads of a group read one state; with gates that do not differ by head, repeated states are the same."""
    torch.manual_seed(0)
    plan = LayerPlan(mixer="liger", window=0, combine="sum")
    shared = build_student(teacher, [plan.model_copy(update={"groups": "share"})] * 2).eval()
    repeated = build_student(teacher, [plan] * 2).eval()
    torch.testing.assert_close(shared(tokens()).logits, repeated(tokens()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "gla", "kda", "liger", "normalized_gla", "retention", "supra"])
def test_readers_of_one_state_are_readers_on_their_own(name: str):
    layer = build_student(
        tiny("Qwen3", head_dim=32), [LayerPlan(mixer=name, groups="share", window=0, combine="sum")] * 2
    ).converted()[0]
    alone = copy.deepcopy(layer.mixer.mixer)
    for part in alone.modules():
        part._forward_hooks.clear()
    q, k, v = (torch.randn(2, heads, 9, 32) for heads in (4, 2, 2))
    x = torch.randn(2, 9, 64)
    together, _ = layer.mixer(q, k, v, x, None)
    for reader in (0, 1):
        own, _ = MixerBranch(alone)(q[:, reader::2], k, v, x, None)
        torch.testing.assert_close(together[:, reader::2], own)


@pytest.mark.parametrize(("name", "combine"), [("mamba2", "gate"), ("linear_attention", "shared_denominator")])
def test_a_state_that_cannot_be_shared_says_why(name: str, combine: str, teacher):
    plan = LayerPlan(mixer=name, options=HEDGEHOG if name == "linear_attention" else {}, combine=combine, groups="share")
    with pytest.raises(UserError, match=f"groups=share cannot be had with {name} under combine={combine}"):
        build_student(teacher, [plan] * 2)


def test_a_mixer_without_a_normaliser_cannot_share_one(teacher):
    with pytest.raises(UserError, match="needs linear_attention with normalize=true"):
        build_student(teacher, [LayerPlan(mixer="gla")] * 2)


@pytest.mark.parametrize("plan", [{"mixer": "supra", "rope": "after_map"}, {"mixer": "gla", "projections": "copy"}])
@pytest.mark.parametrize("groups", ["repeat", "share"])
def test_rotated_features_and_copied_projections_are_one_function(plan: dict, groups: str, teacher):
    student = build_student(teacher, [LayerPlan(**plan, groups=groups, window=7, sinks=2, combine="gate")] * 2).eval()
    result = check_model(student, tokens())
    assert result.passed, result.sentence()


def test_features_are_rotated_after_the_map(teacher):
    """Against the definition: positive features, turned by their position, decayed by their distance."""
    plan = LayerPlan(mixer="supra", rope="after_map", window=0, combine="sum")
    layer = build_student(teacher, [plan] * 2).converted()[0]
    x, position = torch.randn(1, 9, teacher.config.hidden_size), torch.arange(9)[None]
    rope = teacher.model.rotary_emb(x, position)
    supra, size = layer.mixer.mixer, layer.head_dim
    q, k, v = (getattr(layer, name)(x).unflatten(-1, (-1, size)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
    k, v = (a.repeat_interleave(q.shape[1] // a.shape[1], 1) for a in (k, v))
    q, k = (supra.feature_proj(a.transpose(1, 2).flatten(2)).relu().unflatten(-1, (-1, size)).transpose(1, 2) for a in (q, k))
    scores = rotate(q, rope) @ rotate(k, rope).mT * size**-0.5
    distance = (torch.arange(9)[:, None] - torch.arange(9)).clamp_min(0)
    decayed = scores * (supra.log_gamma[:, None, None] * distance).exp() * torch.ones(9, 9).tril()
    wanted = torch.nn.functional.layer_norm((decayed @ v).transpose(1, 2), (size,)).flatten(2)
    torch.testing.assert_close(layer.heads_output(x, rope), wanted, atol=1e-5, rtol=1e-4)


def test_copied_projections_start_equal_and_train_apart(teacher):
    plan = LayerPlan(mixer="gated_delta_net", window=7, combine="gate")
    shared = build_student(teacher, [plan] * 2).eval()
    copied = build_student(teacher, [plan.model_copy(update={"projections": "copy"})] * 2).eval()
    copied.load_state_dict(shared.state_dict(), strict=False)
    torch.testing.assert_close(copied(tokens()).logits, shared(tokens()).logits)
    known = {name for name, _ in teacher.named_parameters()}
    groups = {name: parameter_group(name, known) for name, _ in copied.named_parameters() if ".copies." in name}
    assert len(groups) == 6
    assert set(groups.values()) == {"mixer"}


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ({"mixer": "mamba2", "combine": "gate", "projections": "copy"}, "projections=copy cannot be had with mamba2"),
        ({"options": HEDGEHOG, "projections": "copy"}, "under combine=shared_denominator"),
        ({"mixer": "gla", "combine": "gate", "rope": "after_map"}, "only supra rotates its features"),
    ],
)
def test_combinations_that_cannot_be_had_say_why(plan: dict, sentence: str, teacher):
    with pytest.raises(UserError, match=sentence):
        build_student(teacher, [LayerPlan(**plan)] * 2)
