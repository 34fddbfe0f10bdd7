"""Converted layers: faithful to the published rules, and the same function however they are called."""

import importlib
from pathlib import Path

import pytest
import torch

import mixers
from bench.convert.branches import SharedDenominator, WindowBranch, projected
from bench.convert.gate import check_model
from bench.convert.layer import spans
from bench.convert.spec import LayerPlan
from bench.convert.student import build_student
from bench.errors import UserError
from kernels.banded_sums import banded_attention_sums
from mixers import REGISTRY
from mixers.linear_attention import LinearAttention
from tests.convert.conftest import HEDGEHOG, tokens

for path in sorted(Path(mixers.__file__).parent.glob("[!_]*.py")):
    importlib.import_module(f"mixers.{path.stem}")
GROWING = ("attention", "block_topk", "hax", "hyena", "static_sparse")
CONSTANT = [name for name in sorted(REGISTRY) if name not in GROWING]


@pytest.mark.parametrize("name", CONSTANT)
def test_any_mixer_with_a_window_is_one_function(name: str, teacher, tmp_path: Path):
    options = HEDGEHOG if name == "linear_attention" else {}
    plan = LayerPlan(mixer=name, options=options, window=7, sinks=2, combine="gate")
    student = build_student(teacher, [plan, None]).eval()
    student.save_pretrained(tmp_path)
    result = check_model(student, tokens(), folder=tmp_path)
    assert result.passed, result.sentence()


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 0), (5, 3), (64, 2)])
def test_a_shared_denominator_is_one_function(window: int, sinks: int, teacher):
    plan = LayerPlan(options=HEDGEHOG, window=window, sinks=sinks)
    result = check_model(build_student(teacher, [plan, plan]).eval(), tokens(2, 90))
    assert result.passed, result.sentence()


@pytest.mark.parametrize("name", GROWING)
def test_a_state_that_grows_is_refused(name: str, teacher):
    with pytest.raises(UserError, match="linearises nothing"):
        build_student(teacher, [LayerPlan(mixer=name, combine="gate")] * 2)


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


def test_padding_between_tokens_is_refused():
    assert spans(torch.tensor([[0, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0]])) == [([0, 2], 1, 3), ([1], 0, 2)]
    with pytest.raises(ValueError, match="padding between real tokens"):
        spans(torch.tensor([[1, 0, 1]]))


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


def test_maps_of_one_input_are_one_product_in_training():
    x = torch.randn(2, 5, 16, requires_grad=True)
    maps = [torch.nn.Linear(16, width, bias=bias) for width, bias in ((8, False), (3, True), (4, True))]
    tensors = [x, *(parameter for each in maps for parameter in each.parameters())]
    runs = [projected(x, maps), [each(x) for each in maps]]
    gradients = [torch.autograd.grad(sum(y.sin().sum() for y in run), tensors) for run in runs]
    for found, wanted in zip((*runs[0], *gradients[0]), (*runs[1], *gradients[1]), strict=True):
        torch.testing.assert_close(found, wanted)
    assert len({y.untyped_storage().data_ptr() for y in projected(x, [each for each in maps if each.bias is None] * 2)}) == 1
