"""Converted layers: faithful to the teacher, to the published rules, and the same function however they are called."""

import importlib
from pathlib import Path

import pytest
import torch

import mixers
from bench.convert.branches import SharedDenominator, WindowBranch, projected, rotate
from bench.convert.cache import LinearizedCache
from bench.convert.decode import Decoder
from bench.convert.fit import attention_shape
from bench.convert.gate import check_model
from bench.convert.layer import GATE_BIAS, spans
from bench.convert.parameters import parameter_group
from bench.convert.run import check_transplant
from bench.convert.spec import LayerPlan
from bench.convert.student import LinearizedForCausalLM, build_student
from bench.errors import UserError
from kernels.banded_sums import banded_attention_sums
from mixers import REGISTRY
from mixers.linear_attention import LinearAttention
from tests.convert.conftest import tiny

for path in sorted(Path(mixers.__file__).parent.glob("[!_]*.py")):
    importlib.import_module(f"mixers.{path.stem}")
GROWING = ("attention", "block_topk", "hax", "hyena", "static_sparse")
CONSTANT = [name for name in sorted(REGISTRY) if name not in GROWING]
HEDGEHOG = {"feature_map": "hedgehog"}


def tokens(rows: int = 3, length: int = 60) -> torch.Tensor:
    return torch.randint(1, 280, (rows, length), generator=torch.Generator().manual_seed(1))


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


@pytest.mark.parametrize("name", CONSTANT)
def test_any_mixer_with_a_window_is_one_function(name: str, teacher, tmp_path: Path):
    options = HEDGEHOG if name == "linear_attention" else {}
    plan = LayerPlan(mixer=name, options=options, window=7, sinks=2, combine="gate")
    student = build_student(teacher, [plan, None]).eval()
    student.save_pretrained(tmp_path)
    result = check_model(student, tokens(), folder=tmp_path)
    assert result.passed, result.sentence()


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


def test_a_mixer_whose_gates_need_another_width_says_so():
    with pytest.raises(UserError, match="retention does not fit this model: its input must be as wide as its heads, which are 128"):
        build_student(tiny("Qwen3", head_dim=32), [LayerPlan(mixer="retention", combine="gate")] * 2)


def test_a_shared_state_is_what_every_reader_would_have(teacher):
    """Query heads of a group read one state; with gates that do not differ by head, repeated states are the same."""
    torch.manual_seed(0)
    plan = LayerPlan(mixer="liger", window=0, combine="sum")
    shared = build_student(teacher, [plan.model_copy(update={"groups": "share"})] * 2).eval()
    repeated = build_student(teacher, [plan] * 2).eval()
    torch.testing.assert_close(shared(tokens()).logits, repeated(tokens()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "combine"), [("mamba2", "gate"), ("linear_attention", "shared_denominator")])
def test_a_state_that_cannot_be_shared_says_why(name: str, combine: str, teacher):
    plan = LayerPlan(mixer=name, options=HEDGEHOG if name == "linear_attention" else {}, combine=combine, groups="share")
    with pytest.raises(UserError, match=f"groups=share cannot be had with {name} under combine={combine}"):
        build_student(teacher, [plan] * 2)


def test_copied_heads_are_not_bent(teacher):
    for name in ("gated_delta_net", "delta_net", "kda"):
        mixer = build_student(teacher, [LayerPlan(mixer=name, combine="gate")] * 2).converted()[0].mixer.mixer
        assert (mixer.conv.taps, mixer.conv.silu) == (0, False)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 0), (5, 3), (64, 2)])
def test_a_shared_denominator_is_one_function(window: int, sinks: int, teacher):
    plan = LayerPlan(options=HEDGEHOG, window=window, sinks=sinks)
    result = check_model(build_student(teacher, [plan, plan]).eval(), tokens(2, 90))
    assert result.passed, result.sentence()


@pytest.mark.parametrize("name", GROWING)
def test_a_state_that_grows_is_refused(name: str, teacher):
    with pytest.raises(UserError, match="linearises nothing"):
        build_student(teacher, [LayerPlan(mixer=name, combine="gate")] * 2)


def test_a_mixer_without_a_normaliser_cannot_share_one(teacher):
    with pytest.raises(UserError, match="needs linear_attention with normalize=true"):
        build_student(teacher, [LayerPlan(mixer="gla")] * 2)


def test_shared_denominator_by_its_definition():
    torch.manual_seed(0)
    heads, dim, length, window, sinks = 2, 4, 23, 5, 2
    mixer = LinearAttention(heads * dim, n_heads=heads, feature_map="hedgehog")
    branch = SharedDenominator(mixer, WindowBranch(1, dim, window=window, sinks=sinks)).double()
    torch.nn.init.normal_(branch.gamma_logit)
    torch.nn.init.normal_(branch.phi_q.weight)
    q = torch.randn(2, heads, length, dim, dtype=torch.float64)
    k, v = torch.randn(2, 2, 1, length, dim, dtype=torch.float64).unbind(0)
    found, _ = branch(q, k, v, None)
    k, v = k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1)
    phi_q, phi_k = (phi(a.transpose(1, 2)).transpose(1, 2) for phi, a in ((branch.phi_q, q), (branch.phi_k, k)))
    gamma = branch.gamma_logit.sigmoid()
    for t in range(length):
        near = [s for s in range(t + 1) if t - s < window or s < sinks]
        older = [s for s in range(t + 1) if s not in near]
        scores = torch.einsum("bhk,bhsk->bhs", q[:, :, t], k[:, :, near]) * dim**-0.5
        weights = gamma[:, None] * (scores - scores.amax(-1, keepdim=True)).exp()
        linear = torch.einsum("bhf,bhsf->bhs", phi_q[:, :, t], phi_k[:, :, older])
        values = torch.cat((v[:, :, near], v[:, :, older]), 2)
        both = torch.cat((weights, linear), -1)
        wanted = torch.einsum("bhs,bhsk->bhk", both, values) / both.sum(-1, keepdim=True)
        torch.testing.assert_close(found[:, :, t], wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("length", [11, 90])
def test_null_logits_only_enter_the_normaliser(length: int):
    torch.manual_seed(0)
    branch = WindowBranch(2, 4, window=5, sinks=0, null_shape=(2, 3)).double()
    torch.nn.init.normal_(branch.null_logits)
    q, k, v = torch.randn(3, 2, 2, length, 4, dtype=torch.float64).unbind(0)
    found, _ = branch(q, k, v, None)
    scores = q @ k.mT * 4**-0.5
    scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril().triu(-4), float("-inf"))
    wanted = (torch.cat((scores, branch.null_logits[:, None].expand(2, -1, length, -1)), -1).softmax(-1))[..., :length] @ v
    torch.testing.assert_close(found, wanted)


def test_a_window_with_null_logits_is_one_function(teacher):
    plan = LayerPlan(mixer="normalized_gla", window=7, window_rope="drop", sink_logits=4, sinks=2, combine="sum")
    result = check_model(build_student(teacher, [plan] * 2).eval(), tokens(2, 90))
    assert result.passed, result.sentence()


@pytest.mark.parametrize(("length", "history", "window", "start"), [(1, 6, 7, 3), (50, 0, 9, 0), (97, 8, 9, 40), (200, 31, 32, 5)])
def test_banded_sums_by_their_definition(length: int, history: int, window: int, start: int):
    torch.manual_seed(length)
    q = torch.randn(2, 3, length, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, history + length, 8, dtype=torch.float64).unbind(0)
    numerator, denominator = banded_attention_sums(q, k, v, window=window, start_B=torch.full((2,), start))
    distance = torch.arange(length)[:, None] - torch.arange(-history, length)
    visible = (distance >= 0) & (distance < window) & (torch.arange(-history, length) + start >= 0)
    scores = (q @ k.mT * 8**-0.5).masked_fill(~visible, float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    torch.testing.assert_close(numerator, weights @ v)
    torch.testing.assert_close(denominator, weights.sum(-1, keepdim=True))


def test_ablations_leave_one_branch(teacher):
    student = build_student(teacher, [LayerPlan(options=HEDGEHOG, window=6)] * 2).eval()
    window = build_student(teacher, [LayerPlan(mixer=None, window=6)] * 2).eval()
    x = tokens()
    both = student(x, use_cache=False).logits
    student.ablate("window")
    torch.testing.assert_close(student(x, use_cache=False).logits, window(x, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    student.ablate("mixer")
    assert (student(x, use_cache=False).logits - both).abs().max() > 0.1
    student.ablate("both")
    torch.testing.assert_close(student(x, use_cache=False).logits, both)


def test_mixers_keep_their_own_initial_values(teacher):
    plans = [LayerPlan(mixer="normalized_gla", window=4, combine="gate"), LayerPlan(mixer="mamba2", window=0)]
    first, second = build_student(teacher, plans).converted().values()
    assert first.gate.weight.abs().max() == 0
    assert first.gate.bias.tolist() == [GATE_BIAS] * 4
    assert first.mixer.mixer.gate_proj.bias.tolist() == [6.0] * 4
    assert second.own_projections.in_proj.weight[:64].std() > 0.05  # torch's own draw; a Llama's has 0.02


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


def test_padding_between_tokens_is_refused():
    assert spans(torch.tensor([[0, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0]])) == [([0, 2], 1, 3), ([1], 0, 2)]
    with pytest.raises(ValueError, match="padding between real tokens"):
        spans(torch.tensor([[1, 0, 1]]))


def test_mamba2_starts_from_the_teachers_projections(teacher):
    student = build_student(teacher, [LayerPlan(mixer="mamba2", window=0)] * 2)
    mixer, attention = student.converted()[1].own_projections, teacher.model.layers[1].self_attn
    _, x, b, c, _ = mixer.in_proj.weight.split((64, 64, 64, 64, 4))
    assert torch.equal(x[:16], attention.v_proj.weight[:16])
    assert torch.equal(x[16:32], attention.v_proj.weight[:16])
    assert torch.equal(b[48:], attention.k_proj.weight[16:])
    torch.testing.assert_close(c, attention.q_proj.weight * 16**-0.5)
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)


def test_matrices_are_what_the_mixers_compute():
    torch.manual_seed(0)
    linear = LinearAttention(16, n_heads=2, feature_map="hedgehog").double()
    qkv = torch.randn(2, 9, 48, dtype=torch.float64)
    heads, _ = linear.mix(qkv, qkv)
    v = qkv[..., 32:].unflatten(-1, (2, 8)).transpose(1, 2)
    torch.testing.assert_close((linear.matrix(qkv) @ v).transpose(1, 2).flatten(2), heads)
    mamba = REGISTRY["mamba2"](16, head_dim=8, d_state=8, n_groups=2, expand=1).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    y, inputs, _, _ = mamba.scan(x, None)
    inputs = inputs.unflatten(-1, (2, 8)).transpose(1, 2)
    scanned = mamba.matrix(x) @ inputs + mamba.skip[:, None, None] * inputs
    torch.testing.assert_close(scanned.transpose(1, 2).flatten(2), y)


def test_shape_of_grouped_heads(teacher):
    shape = attention_shape(teacher.model.layers[0].self_attn, "Layer 0")
    assert (shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.width) == (4, 2, 16, 64)


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


def test_maps_of_one_input_are_one_product_in_training():
    x = torch.randn(2, 5, 16, requires_grad=True)
    maps = [torch.nn.Linear(16, width, bias=bias) for width, bias in ((8, False), (3, True), (4, True))]
    tensors = [x, *(parameter for each in maps for parameter in each.parameters())]
    runs = [projected(x, maps), [each(x) for each in maps]]
    gradients = [torch.autograd.grad(sum(y.sin().sum() for y in run), tensors) for run in runs]
    for found, wanted in zip((*runs[0], *gradients[0]), (*runs[1], *gradients[1]), strict=True):
        torch.testing.assert_close(found, wanted)
    assert len({y.untyped_storage().data_ptr() for y in projected(x, [each for each in maps if each.bias is None] * 2)}) == 1


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
