"""Bounds against figures computed by hand, plans, and a gate that lets no wrong kernel through; on a CPU."""

from __future__ import annotations

import pytest
import torch

from bench.errors import UserError
from bench.spec import LayerSpec
from bench.throughput import bounds, subjects
from bench.throughput import mixers as whole
from bench.throughput.bounds import Cost, Shape
from bench.throughput.draws import Draw
from bench.throughput.kernels import OPERATIONS, Recurrence
from bench.throughput.measure import Session
from bench.throughput.mixers import Stack
from bench.throughput.mixers import problem as mixer_problem
from bench.throughput.names import KERNELS
from bench.throughput.plan import Row, SpeedRequest, plan
from bench.throughput.problem import check, relative_error
from kernels.dispatch import watched
from kernels.indexed.chosen_launch import BY_KEY_FROM
from kernels.recurrence import linear_recurrence

MAIN = Shape(8, 2048, 16, 16, 128, 128)
TOKENS = 8 * 2048


def milliseconds(cost: Cost) -> float:
    """On the GPU whose floors are quoted: 4,270 GB/s and 682 TFLOP/s."""
    return 1e3 * max(cost.seconds(4.27e12, 682e12))


@pytest.mark.parametrize(
    ("name", "width", "forward", "both"),
    [
        ("linear", 128, 0.063, 0.173),
        ("linear", 64, 0.0314, 0.0864),
        ("ssd", 64, 0.022, 0.079),
        ("delta", 128, 0.0698, 0.244),
        ("delta", 64, 0.0317, 0.0885),
        ("gla", 128, 0.0786, 0.220),
        ("kda", 128, 0.0790, 0.244),
        ("window", 128, 0.063, 0.173),
    ],
)
def test_floors_are_those_that_are_quoted(name, width, forward, both):
    """Worked out apart from this program, by the formulas that the module states."""
    shape = KERNELS[name].shape(8, 2048, 16, width)
    for mode, quoted in (("forward", forward), ("train", both)):
        assert milliseconds(OPERATIONS[name].cost(shape, mode, 2)) == pytest.approx(quoted, rel=0.02), mode


def test_bytes_are_tensors_read_and_written_once():
    one = TOKENS * 16 * 128 * 2
    gate = TOKENS * 16 * 4
    plain = {"gate": "none", "delta": False, "item": 2}
    assert bounds.recurrence(MAIN, "forward", **plain).bytes == 4 * one
    assert bounds.recurrence(MAIN, "train", **plain).bytes == 11 * one
    assert bounds.recurrence(MAIN, "train", gate="scalar", delta=True, item=2).bytes == 11 * one + 2 * 3 * gate
    assert bounds.recurrence(MAIN, "forward", gate="vector", delta=False, item=2).bytes == 5 * one
    state = 8 * 16 * 128 * 128 * 4
    assert bounds.recurrence(MAIN, "decode", **plain).bytes == 2 * state + 8 * 16 * 128 * 2 * 4
    assert bounds.recurrence(MAIN, "prefill", **plain).bytes == 4 * one + 2 * state


def test_operations_by_hand():
    token = 2 * 64 * (128 + 128) + 4 * 128 * 128
    assert bounds.recurrence(MAIN, "forward", gate="none", delta=False, item=2).flops == TOKENS * 16 * token
    delta = 2 * 64 * 5 * 128 + 6 * 128 * 128
    assert bounds.recurrence(MAIN, "train", gate="none", delta=True, item=2).flops == TOKENS * 16 * delta * 7 // 2
    assert bounds.visible_pairs(5, None) == 15
    assert bounds.visible_pairs(5, 2) == 1 + 2 * 4
    assert bounds.attention(Shape(1, 4, 2, 2, 8, 8), "forward", item=2, pairs=10).flops == 10 * 2 * 2 * 16
    # blocks of 64: tokens of the third block see two chosen blocks whole, and their own up to themselves
    blocks = OPERATIONS["chosen_blocks"].cost(Shape(1, 160, 1, 1, 8, 8), "forward", 2)
    assert blocks.flops == 2 * 16 * (64 * 64 + 32 * 2 * 64 + 2 * 64 * 65 // 2 + 32 * 33 // 2)
    assert bounds.selective_scan(Shape(1, 10, 6, key=4), "forward", item=2).bytes == 10 * (6 * (2 + 4 + 2) + 2 * 2 * 4)
    assert bounds.short_conv(Shape(1, 10, 6), "train", item=4, taps=4) == Cost(5 * 4 * 60, 12 * 2 * 2 * 30)


def test_a_mixer_costs_its_ends_weights_and_products():
    stack = Stack((LayerSpec(mixer="gla"),), 16, 33)
    weights = sum(p.numel() for p in stack.parameters())
    linear = sum(m.weight.numel() for m in stack.modules() if isinstance(m, torch.nn.Linear))
    cost = whole.cost(stack, "train", 2, 32, torch.float32)
    assert cost == Cost(4 * (2 * 2 * 64 * 16 + 3 * weights), 6 * 64 * linear)
    state = 2 * 4 * 8
    assert whole.cost(stack, "decode", 2, 32, torch.float32).bytes == 4 * (2 * 2 * 16 + weights) + 2 * 2 * state * 4


def test_plan_keeps_tokens_equal_over_lengths():
    rows = plan(SpeedRequest(kernels=["linear"], lengths=[512, 8192], modes=["train"]), "cuda")
    assert {(row.batch, row.length) for row in rows} == {(32, 512), (2, 8192)}
    assert {(row.mode, row.width) for row in rows} == {("forward", 64), ("forward", 128), ("train", 64), ("train", 128)}
    assert {row.batch for row in plan(SpeedRequest(kernels=["linear"], lengths=[64, 128], batch=3), "cpu")} == {3}


def test_what_is_named_twice_is_timed_once():
    once = plan(SpeedRequest(kernels=["linear"], lengths=[64], modes=["train"]), "cpu")
    assert plan(SpeedRequest(kernels=["linear,linear"], lengths=[64, 64], modes=["train"]), "cpu") == once


def test_everything_is_planned_unless_something_is_named():
    rows = plan(SpeedRequest(), "cpu")
    assert {row.name for row in rows if row.kind == "kernel"} == set(KERNELS)
    assert {"gla", "based", "attention"} <= {row.name for row in rows if row.kind == "mixer"}
    assert {row.kind for row in plan(SpeedRequest(mixers=["gla"]), "cpu")} == {"mixer"}
    assert {row.name for row in plan(SpeedRequest(mixers=["gla,retention"], heads=4), "cpu")} == {
        "gla:n_heads=4",
        "retention:n_heads=4",
    }


def test_the_preset_has_every_kernel_at_every_shape():
    rows = plan(SpeedRequest(preset="kernels"), "cuda")
    assert {row.name for row in rows} == set(KERNELS)
    linear = {(row.batch, row.length, row.heads, row.width) for row in rows if row.name == "linear" and row.mode == "train"}
    assert linear == {
        *((b, t, 16, d) for b, t in ((8, 2048), (32, 512), (2, 8192), (1, 32_768)) for d in (64, 128)),
        (64, 256, 2, 64),
    }
    assert {(row.batch, row.width) for row in rows if (row.name, row.mode) == ("kda", "decode")} == {
        (batch, width) for batch in (1, 64, 256) for width in (64, 128)
    }


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (SpeedRequest(preset="kernels", lengths=[64]), "--length"),
        (SpeedRequest(preset="kernels", mixers=["gla"]), "leave out --mixer"),
        (SpeedRequest(kernels=["scan"], modes=["decode"]), "Nothing to time"),
    ],
)
def test_plans_that_make_no_sense(request_, words):
    with pytest.raises(UserError, match=words):
        plan(request_, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_refuses_wrong_results(dtype):
    draw = Draw(torch.device("cpu"), dtype, torch.Generator())
    problem = Recurrence("scalar", delta=True).problem(Shape(2, 20, 2, 2, 8, 8), "train", draw)
    assert check(problem, gradients=True, against="").passed

    def scaled(own):
        return {"o": 1.02 * problem.call(own)["o"]}

    def no_gradient(own):
        return problem.call(own | {"beta": own["beta"].detach()})

    def poisoned(own):
        return {"o": problem.call(own)["o"].masked_fill(torch.arange(8) == 3, float("nan"))}

    assert check(problem, gradients=True, against="", function=scaled).worst == "o"
    missing = check(problem, gradients=True, against="", function=no_gradient)
    assert (missing.passed, missing.worst, missing.error) == (False, "dbeta", None)
    assert not check(problem, gradients=False, against="", function=poisoned).passed


def test_the_gate_of_a_mixer_sees_a_wrong_forward(monkeypatch):
    stack = Stack((LayerSpec(mixer="gla"),), 16, 33)
    for mode in ("train", "prefill", "decode"):
        problem = mixer_problem(stack, mode, 2, 16, generator=torch.Generator())
        assert check(problem, gradients=mode == "train", against="").passed, mode
    monkeypatch.setattr("mixers.gla.linear_recurrence", lambda q, k, v, **named: linear_recurrence(q, k, v + k.sum(), **named))
    problem = mixer_problem(stack, "train", 2, 16, generator=torch.Generator())
    assert not check(problem, gradients=True, against="").passed


def test_robust_errors_forgive_single_rows_only():
    want = torch.randn(4, 50, 8)
    got = want.clone()
    got[:, :5] = 0
    assert relative_error(got, want) > 0.1
    assert relative_error(got, want, robust=True) == 0
    assert relative_error(1.1 * want, want, robust=True) > 0.05


def test_rows_that_choose_few_of_many_blocks_have_such_a_gate():
    """The kernels of a small problem, whose tokens read all blocks, are not those of a long one."""
    session = Session(torch.device("cpu"), with_peers=False)
    long, short = (
        subjects.KernelRow(Row("kernel", "chosen_blocks", "train", 1, length, 16, 8, "fp32"), session) for length in (8192, 2048)
    )
    assert (long.few_of_many, short.few_of_many) == (True, False)
    problem, against = long.gated()
    length, most = problem.inputs["q"].shape[2], problem.inputs["blocks"].shape[-1]
    assert length // 64 >= BY_KEY_FROM * most
    assert check(problem, gradients=True, against=against).passed


def test_a_row_that_cannot_run_is_a_record_with_its_reason():
    session = Session(torch.device("cpu"), with_peers=False)
    bad = Row("mixer", "attention", "train", 1, 16, 0, 30, "fp32", (LayerSpec(mixer="attention", options={"n_heads": 4}),))
    record = session.measure(bad)
    assert (record.status, record.tokens_per_second) == ("failed", None)
    assert "n_heads=4" in record.reason


def test_the_form_that_ran_is_seen():
    x = torch.randn(1, 4, 1, 8)
    with watched() as seen:
        linear_recurrence(x, x, x)
    assert seen == {"linear_recurrence": "chunked"}
