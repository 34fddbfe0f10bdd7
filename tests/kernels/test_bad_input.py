"""Every door of the kernels refuses what it cannot take, naming the argument, before a form is picked: one table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.adamw import adamw_step
from kernels.attention import attention, banded_attention
from kernels.conv import gated_long_conv, long_conv, short_conv, short_conv_step
from kernels.cross_entropy import labelled_cross_entropy
from kernels.distillation import distillation_rows
from kernels.dplr import dplr_recurrence
from kernels.gated_conv import gated_conv
from kernels.gated_norm import gated_norm
from kernels.indexed_attention import block_attention, decode_attention, sparse_attention
from kernels.kept_step import Kept, kept_step
from kernels.labelled_head import labelled_head
from kernels.layer_step import Apart, Conv, Packed, layer_step
from kernels.norms import norm_pair, stream_norm
from kernels.recurrence import linear_recurrence, normalized_recurrence
from kernels.rows import read_rows
from kernels.scan import gated_selective_scan, scan, selective_scan
from kernels.ssd import Conv as SSDConv
from kernels.ssd import Heads, Sizes, ssd
from kernels.ssd import State as SSDState
from kernels.step import recurrent_step
from kernels.step_form import StepForm
from kernels.taylor import n_features, taylor_attention
from kernels.values import checked_values
from kernels.window_step import Stored, window_step

B, T, H, K, V, D, N, J = 2, 5, 2, 4, 3, 6, 4, 3


class Door(NamedTuple):
    """A function of tensors, and those by the names that messages use."""

    call: Callable[..., Any]
    tensors: dict[str, Tensor]


def r(*size: int) -> Tensor:
    return torch.randn(size)


def qkv(*axes: int) -> dict[str, Tensor]:
    return {"q": r(*axes, K), "k": r(*axes, K), "v": r(*axes, V)}


def packed_step(*given: Tensor) -> object:
    state, x, taps, bias, tail, decay, decay_bias, log_rate, beta, norm_weight, gate, skip = given
    named = {"beta_BH": beta, "norm_weight": norm_weight, "gate_BE": gate, "skip_H": skip}
    rate = {"decay": decay, "decay_bias": decay_bias, "log_rate_H": log_rate}
    form = StepForm(decay="rate", open_beta=True, norm="rms")
    return layer_step(Packed(x, (0, H * K, 2 * H * K)), state, form, conv=Conv(taps, bias, tail), **named, **rate)


def linear(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None = None, state: Tensor | None = None) -> object:
    return linear_recurrence(q, k, v, log_decay=log_decay, beta_BTH=beta, state_BHKV=state)


def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor, beta: Tensor, a: Tensor, b: Tensor) -> object:
    return recurrent_step(q, k, v, state, log_decay=log_decay, beta_BH=beta, rank_one=(a, b))


def banded(q: Tensor, k: Tensor, v: Tensor, start: Tensor, sink_k: Tensor, sink_v: Tensor) -> object:
    return banded_attention(q, k, v, window=3, start_B=start, sink_kv=(sink_k, sink_v))


def windowed(q: Tensor, k: Tensor, v: Tensor, *stored: Tensor) -> object:
    return window_step(q, k, v, Stored(*stored), window=3)


C = 2 * H * K + H * V
SCANNED = {"x": r(B, T, D), "dt": r(B, T, D).abs(), "rate": r(D, N).abs(), "b": r(B, T, N), "c": r(B, T, N), "state": r(B, D, N)}
AROUND = {
    "state": r(B, H, K, V), "x": r(B, C), "taps": r(C, J), "bias": r(C), "tail": r(B, J - 1, C), "decay": r(B, H),
    "decay_bias": r(H), "log_rate": r(H), "beta": r(B, H), "norm_weight": r(V), "gate": r(B, H * V), "skip": r(H),
}  # fmt: skip
STEP = {"state": r(B, H, K, V), "log_decay": -r(B, H).abs(), "beta": r(B, H).sigmoid(), "a": r(B, H, K), "b": r(B, H, K)}
TAYLOR = {"state[0]": r(B, H, n_features(K), V), "state[1]": r(B, H, n_features(K))}
SINKS = {"start": torch.ones(B, dtype=torch.long), "sink_kv[0]": r(B, H, 1, K), "sink_kv[1]": r(B, H, 1, V)}
MOMENTS = {name: torch.ones(B, V) for name in ("weights", "gradient", "first", "second")}
LABELS = {"labels": torch.zeros(B, dtype=torch.long)}
ROWS_OF_EACH = torch.tensor([[0, 4, 2]]).repeat(B, 1)
DOORS = {
    "linear_recurrence": Door(
        linear, {**qkv(B, T, H), "log_decay": -r(B, T, H).abs(), "beta": r(B, T, H).sigmoid(), "state": r(B, H, K, V)}
    ),
    "vector gates": Door(linear, {**qkv(B, T, H), "log_decay": -r(B, T, H, K).abs()}),
    "normalized_recurrence": Door(
        lambda q, k, v, *sums: normalized_recurrence(q, k, v, state=sums),
        {**qkv(B, T, H), "state[0]": r(B, H, K, V), "state[1]": r(B, H, K)},
    ),
    "dplr_recurrence": Door(
        lambda q, k, v, a, b, log_decay, state: dplr_recurrence(q, k, v, a, b, log_decay_BTHK=log_decay, state_BHKV=state),
        {**qkv(B, T, H), "a": r(B, T, H, K), "b": r(B, T, H, K), "log_decay": -r(B, T, H, K).abs(), "state": r(B, H, K, V)},
    ),
    "taylor_attention": Door(lambda q, k, v, *sums: taylor_attention(q, k, v, eps=1e-6, state=sums), {**qkv(B, T, H), **TAYLOR}),
    "recurrent_step": Door(step, {**qkv(B, H), **STEP}),
    "layer_step": Door(packed_step, AROUND),
    "layer_step apart": Door(
        lambda state, q, k, v, sums: layer_step(Apart(q, k, v), state, StepForm(norm="sums"), sums_BHK=sums),
        {"state": r(B, H, K, V), **qkv(B, H), "sums": r(B, H, K)},
    ),
    "window_step": Door(
        windowed,
        {
            **qkv(B, H),
            **{"stored k": r(B, H, 2, K), "stored v": r(B, H, 2, V), "position": torch.ones(B, dtype=torch.long)},
            **{"sink k": r(B, H, 1, K), "sink v": r(B, H, 1, V)},
        },
    ),
    "kept_step": Door(
        lambda q, k, v, score, *stored: kept_step(q, k, v, score, Stored(*stored[:5]), Kept(*stored[5:])),
        {
            **qkv(B, H),
            "score": r(B, H),
            **{"stored k": r(B, H, 2, K), "stored v": r(B, H, 2, V), "position": torch.ones(B, dtype=torch.long)},
            **{"sink k": r(B, H, 1, K), "sink v": r(B, H, 1, V)},
            **{"kept k": r(B, H, 3, K), "kept v": r(B, H, 3, V), "kept score": r(B, H, 3), "near score": r(B, H, 2)},
        },
    ),
    "scan": Door(scan, {"a": r(B, T, D), "x": r(B, T, D), "state": r(B, D)}),
    "selective_scan": Door(selective_scan, SCANNED),
    "gated_selective_scan": Door(
        lambda *scanned: gated_selective_scan(*scanned[:6], dt_bias_D=scanned[6], skip_D=scanned[7], gate_BTD=scanned[8]),
        {{"dt": "raw_dt"}.get(name, name): tensor for name, tensor in SCANNED.items()}
        | {"dt_bias": r(D), "skip": r(D), "gate": r(B, T, D)},
    ),
    "gated_norm": Door(gated_norm, {"x": r(B, T, D), "gate": r(B, T, D), "weight": r(D)}),
    "ssd": Door(
        lambda row, taps, bias, step_bias, log_rate, skip, s, tail: ssd(
            row, SSDConv(taps, bias), Heads(step_bias, log_rate, skip), Sizes(1, N, K), SSDState(s, tail)
        ),
        {
            "row": r(B, T, H * K + 2 * N + H),
            "taps": r(H * K + 2 * N, J),
            "bias": r(H * K + 2 * N),
            **{name: r(H) for name in ("step_bias", "log_rate", "skip")},
            "s": r(B, H, N, K),
            "tail": r(B, J - 1, H * K + 2 * N),
        },
    ),
    "stream_norm": Door(stream_norm, {"r": r(B, T, D), "weight": r(D), "rows": ROWS_OF_EACH}),
    "short_conv": Door(short_conv, {"x": r(B, T, D), "weight": r(D, J), "bias": r(D), "tail": r(B, J - 1, D)}),
    "short_conv_step": Door(short_conv_step, {"x": r(B, D), "weight": r(D, J), "bias": r(D), "tail": r(B, J - 1, D)}),
    "gated_conv": Door(gated_conv, {"x": r(B, T, D), "weight": r(D, D), "bias": r(D), "taps": r(D, J), "tap_bias": r(D)}),
    "long_conv": Door(long_conv, {"x": r(B, T, D), "filter": r(D, T)}),
    "gated_long_conv": Door(gated_long_conv, {"qkv": r(3 * D, B, T), "bias": r(3 * D), "filter": r(D, T), "shift": r(D, J)}),
    "banded_attention": Door(banded, {**qkv(B, H, T), **SINKS}),
    "sparse_attention": Door(lambda q, k, v: sparse_attention(q, k, v, pattern="strided", stride=2), qkv(B, H, T)),
    "block_attention": Door(
        lambda q, k, v, chosen: block_attention(q, k, v, chosen, block=2),
        {**qkv(B, H, T), "chosen": torch.ones(B, H, T, 3, dtype=torch.bool)},
    ),
    "decode_attention": Door(
        decode_attention, {"q": r(B, H, K), "k": r(B, H, T, K), "v": r(B, H, T, V), "seen": torch.ones(B, H, T, dtype=torch.bool)}
    ),
    "labelled_cross_entropy": Door(labelled_cross_entropy, {"logits": r(B, V), **LABELS}),
    "labelled_head": Door(labelled_head, {"h": r(B, D), "weight": r(V, D), **LABELS}),
    "norm_pair": Door(
        lambda x, a, b, c, d, rows: norm_pair(x, (a, b), (c, d), rows),
        {"r": r(B, T, D), **{f"{name}[{i}]": r(D) for name in ("first", "second") for i in (0, 1)}, "rows": ROWS_OF_EACH},
    ),
    "read_rows": Door(
        lambda q, x, rows: read_rows(q, x, rows, weights="softmax"), {"q": r(B, H, 3, D), "x": r(B, T, D), "rows": ROWS_OF_EACH}
    ),
    "distillation_rows": Door(partial(distillation_rows, kl=1.0, ce=1.0), {"logits": r(B, V), "teacher": r(B, V), **LABELS}),
    "adamw_step": Door(partial(adamw_step, weight_decay=0.1), MOMENTS | {"rates": torch.ones(B), "steps": torch.ones(B)}),
}
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda x: x.float() if not x.is_floating_point() else x.long(),
    "complex": lambda x: x.to(torch.complex64),
    "shape": lambda x: torch.cat((x, x), -1),
    "axes": lambda x: x[None],
    "scalar": lambda x: x.flatten()[0],
    "transposed": lambda x: x.mT if x.ndim > 1 and x.shape[-1] != x.shape[-2] else x[None],
    "device": lambda x: x.to("meta"),
}
FREE = {(door, "v") for door in ("vector gates", "sparse_attention", "block_attention", "decode_attention")} | {
    ("labelled_cross_entropy", "logits"),
    ("long_conv", "filter"),
    ("norm_pair", "rows"),
    ("stream_norm", "rows"),
    ("ssd", "row"),
    ("gated_conv", "taps"),
    ("gated_long_conv", "filter"),
    ("gated_long_conv", "shift"),
}
"""Tensors whose last axis may have any length."""
FREE_PAIR = {("gated_long_conv", "qkv")}
"""Tensors whose last two axes may."""
ROWS = [
    (door, argument, fault)
    for door in DOORS
    for argument in DOORS[door].tensors
    for fault in FAULTS
    if fault != "shape" or (door, argument) not in FREE
    if fault not in ("shape", "transposed") or (door, argument) not in FREE_PAIR
]


@pytest.mark.parametrize("door", DOORS)
def test_the_good_call_passes(door: str):
    DOORS[door].call(*(x.clone() for x in DOORS[door].tensors.values()))


@pytest.mark.parametrize(("door", "argument", "fault"), ROWS)
def test_fault_is_named(door: str, argument: str, fault: str):
    """One sentence that names the argument or what it has to fit, and nothing is picked or launched."""
    tensors = dict(DOORS[door].tensors)
    tensors[argument] = FAULTS[fault](tensors[argument])
    untouched = mock.patch.object(dispatch, "_obstacle", side_effect=AssertionError("a form was picked"))
    with untouched, pytest.raises(ValueError) as refused:
        DOORS[door].call(*tensors.values())
    said = str(refused.value)
    others = [name for name in DOORS[door].tensors if said.startswith((f"{name} ha", f"{name} is"))]
    # a wrong last axis may show in a tensor that has to fit
    assert others and (fault == "shape" or argument in others or f"{argument} " in said), said
    assert any(words in said for words in ("it is", "it must be", "must be", "move them", "needs", "takes", "it has", "divide")), (
        said
    )


@pytest.mark.parametrize("door", ["sparse_attention", "block_attention"])
@pytest.mark.parametrize("names", [("k",), ("v",), ("k", "v")])
def test_keys_of_other_tokens(door: str, names: tuple[str, ...]):
    tensors = dict(DOORS[door].tensors)
    for name in names:
        tensors[name] = torch.cat((tensors[name], tensors[name]), 2)
    with pytest.raises(ValueError, match=f"{names[0]} has shape"):
        DOORS[door].call(*tensors.values())


@pytest.mark.parametrize(
    ("door", "argument"), [("norm_pair", "rows"), ("stream_norm", "rows"), ("read_rows", "rows"), ("distillation_rows", "labels")]
)
def test_places_of_eight_bits(door: str, argument: str):
    """torch reads from places of 32 and 64 bits."""
    tensors = dict(DOORS[door].tensors)
    tensors[argument] = tensors[argument].to(torch.int8)
    with pytest.raises(ValueError, match=f"{argument} has dtype torch.int8"):
        DOORS[door].call(*tensors.values())


@pytest.mark.parametrize("door", DOORS)
def test_one_tensor_in_another_dtype(door: str):
    """It is cast, or refused by name; a device that casts must not hide what another one refuses."""
    for argument, x in DOORS[door].tensors.items():
        if x.is_floating_point():
            try:
                DOORS[door].call(*(DOORS[door].tensors | {argument: x.bfloat16()}).values())
            except ValueError as refused:
                assert "dtype" in str(refused) or "takes contiguous" in str(refused), refused


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: block_attention(x, x, x, torch.ones(B, H, T, 1, dtype=torch.bool), block=0), "block=0"),
        (lambda x: sparse_attention(x, x, x, pattern="strided", stride=0), "stride=0"),
        (lambda x: sparse_attention(x, x, x, pattern="dilated", window=0, dilation=1), "window=0"),
        (lambda x: sparse_attention(x, x, x, pattern="power", window=1, sinks=-1), "sinks=-1"),
        (lambda x: linear_recurrence(x, x, x, chunk=0), "chunk=0"),
        (lambda x: linear_recurrence(x, x, x, chunk=48), "chunk=48"),
        (lambda x: read_rows(x, x[:, 0], ROWS_OF_EACH, weights="other"), "weights is 'other'"),
    ],
)
def test_numbers_out_of_range(call: Callable[[Tensor], object], words: str):
    with pytest.raises(ValueError, match=words):
        call(r(B, H, T, K))


def test_wide_heads_of_chosen_blocks_take_the_torch_form():
    q = r(1, 1, 4, 300)
    chosen = torch.ones(1, 1, 4, 2, dtype=torch.bool)
    torch.testing.assert_close(block_attention(q, q, q, chosen, block=2), attention(q, q, q, causal=True))


def test_chosen_blocks_compile_with_a_symbolic_number_of_heads():
    """Whose tile of a list depends on the largest power of two that divides it."""
    attend = torch.compile(lambda q, c: block_attention(q, q, q, c, block=2), fullgraph=True, backend="eager", dynamic=True)
    for heads in (2, 4, 6):
        q, chosen = r(1, heads, T, K), torch.ones(1, heads, T, 3, dtype=torch.bool)
        torch.testing.assert_close(attend(q, chosen), attention(q, q, q, causal=True))


def test_tokens_that_see_no_block_are_found_by_the_checked_mode():
    q, chosen = r(1, 1, 4, K), torch.zeros(1, 1, 4, 2, dtype=torch.bool)
    chosen[..., 1] = True  # the first two tokens come before this block
    with checked_values(), pytest.raises(ValueError, match="chosen has 2 rows that see nothing"):
        block_attention(q, q, q, chosen, block=2)


FORMS = {
    "scan": "reference",
    "selective_scan": "reference",
    "short_conv": "chunked",
    "long_conv": "chunked",
    "read_rows": "chunked",
}


@pytest.mark.parametrize("door", FORMS)
def test_a_forced_reference_is_one_or_says_that_plain_torch_is(door: str):
    call, tensors = DOORS[door]
    with dispatch.use_backend("reference"), dispatch.watched() as seen:
        forced = call(*tensors.values())
    assert seen[door] == FORMS[door]
    torch.testing.assert_close(forced, call(*tensors.values()))


EMPTY = (
    "linear_recurrence",
    "vector gates",
    "dplr_recurrence",
    "taylor_attention",
    "selective_scan",
    "short_conv",
    "long_conv",
    "scan",
)


@pytest.mark.parametrize("door", EMPTY)
def test_no_tokens(door: str):
    tensors = {name: x[:, :0] if x.ndim > 2 and x.shape[:2] == (B, T) else x for name, x in DOORS[door].tensors.items()}
    with pytest.raises(ValueError, match=r"has shape \(2, 0, .*none of them 0|has no tokens"):
        DOORS[door].call(*tensors.values())
