"""One decoded token of a whole layer but its projections: short convolution, activation, recurrence, norm and output gate.

A step is bound by the bytes of the state, so what surrounds the recurrence should cost no launch of its own and no trip to
memory: on a GPU `layer_step` is one launch. Its definition is the torch form below.

Shape legend: B batch, H heads of v and of the state, G heads of q and k (G divides H), K key, V value width, C channels of a
convolution, J taps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import dispatch
from kernels._arguments import check_arguments, check_axes
from kernels.layer_step_operator import layer_step_in_place, layer_step_operator
from kernels.step import may_write, recurrent_step_reference, step_obstacle
from kernels.step_form import MAX_TAPS, StepForm

OPERATION = "layer_step"
UNIT_EPS = 1e-6


class Packed(NamedTuple):
    """q, k and v side by side in one row, as one projection makes them, each with its heads one after the other.

    Args:
        x_BC: [B, C], C = 2 G K + H V.
        places: first channels of q, k and v.
    """

    x_BC: Tensor
    places: tuple[int, int, int]


class Apart(NamedTuple):
    """q [B, G, K], k [B, G, K] and v [B, H, V] on their own."""

    q_BGK: Tensor
    k_BGK: Tensor
    v_BHV: Tensor


class Conv(NamedTuple):
    """A short convolution over the channels of `Packed`.

    Args:
        taps_CJ: the last one meets the new token.
        bias_C: or None.
        tail_BPC: the J - 1 inputs before the new one.
    """

    taps_CJ: Tensor
    bias_C: Tensor | None
    tail_BPC: Tensor


class Stepped(NamedTuple):
    """What a step returns: the output [B, H V], and the new states of which a layer may lack some."""

    y_BE: Tensor
    state_BHKV: Tensor
    tail_BPC: Tensor | None
    sums_BHK: Tensor | None


def fuses(sample: Tensor, state: Tensor, weights: Iterable[Tensor] = (), *, taps: int = 0) -> bool:
    """Whether a layer's step is one launch here: the Triton form is picked, and no gradient is to come.

    Args:
        sample: the layer's input.
        state: [B, H, K, V].
        weights: those that may want a gradient.
        taps: of the short convolution.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (sample, state, *weights)):
        return False
    return dispatch.pick(OPERATION, sample, obstacle=_obstacle(state, taps, 1, StepForm())) == "triton"


def layer_step(
    qkv: Packed | Apart,
    state_BHKV: Tensor,
    form: StepForm,
    *,
    conv: Conv | None = None,
    decay: Tensor | None = None,
    decay_bias: Tensor | None = None,
    log_rate_H: Tensor | None = None,
    beta_BH: Tensor | None = None,
    sums_BHK: Tensor | None = None,
    skip_H: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias_HV: Tensor | None = None,
    gate_BE: Tensor | None = None,
) -> Stepped:
    """One token through convolution, activation, recurrence, norm and gate, as `form` says; sums are made in fp32.

    Args:
        qkv: queries, keys and values as projected; fewer heads of q and k than of v are shared by groups.
        state_BHKV: S, in fp32, bf16 or fp16.
        form: see `StepForm`.
        conv: the short convolution, of which q, k and v are the newest inputs.
        decay: None, [H], [B, H] or [B, H, K]; see `StepForm.decay`.
        decay_bias: [H] or [H, K].
        log_rate_H: log of the decay rates.
        beta_BH: write strength of the delta rule.
        sums_BHK: decayed sum of the keys, for the norm `sums`.
        skip_H: adds skip times v, after its convolution, to the output.
        norm_weight: [V], or [H, V] for the norms layer and row.
        norm_bias_HV: for the norm layer.
        gate_BE: input of the output gate, [B, H V].

    Returns:
        See `Stepped`: new tensors, or inside `kernels.step.states_in_place` the given ones, written over.

    Raises:
        ValueError: shapes or devices do not match.
    """
    check_axes("state", state_BHKV, "B H K V")
    for name, x in zip(("x",) if isinstance(qkv, Packed) else ("q", "k", "v"), qkv, strict=False):
        check_axes(name, x, "B C" if isinstance(qkv, Packed) else "B heads width")
    if conv is not None:
        check_axes("taps", conv.taps_CJ, "C J")
    sample = qkv[0]
    taps, bias, tail = (None, None, None) if conv is None else conv
    batch, heads, k_dim, v_dim = state_BHKV.shape
    groups = _groups(qkv, state_BHKV, convolved=conv is not None)
    decays = {1: (heads,), 2: (batch, heads)}.get(0 if decay is None else decay.ndim, (batch, heads, k_dim))
    expected = {
        "log_decay" if form.decay == "log" else "decay": (decay, decays),
        "decay_bias": (decay_bias, decays[1:]),
        "log_rate": (log_rate_H, (heads,)),
        "beta": (beta_BH, (batch, heads)),
        "sums": (sums_BHK, (batch, heads, k_dim)),
        "skip": (skip_H, (heads,)),
        "norm_weight": (norm_weight, (v_dim,) if form.norm == "rms" else (heads, v_dim)),
        "norm_bias": (norm_bias_HV, (heads, v_dim)),
        "gate": (gate_BE, (batch, heads * v_dim)),
    }
    if taps is not None and tail is not None:
        channels = sample.shape[1]
        expected |= {"taps": (taps, (channels, taps.shape[-1])), "bias": (bias, (channels,))}
        expected["tail"] = (tail, (batch, taps.shape[-1] - 1, channels))
    check_arguments(state_BHKV, expected, first="state", unbounded=("beta",) if form.open_beta else ())
    if decay is not None and decay.ndim == 1:
        decay = decay.expand(batch, heads)
    states = (state_BHKV, tail, sums_BHK)
    rest = (decay, beta_BH, *states, taps, bias, decay_bias, log_rate_H, skip_H, norm_weight, norm_bias_HV, gate_BE)
    obstacle = _obstacle(state_BHKV, 0 if taps is None else taps.shape[1], heads // groups, form)
    if dispatch.pick(OPERATION, sample, obstacle=obstacle) != "triton":
        y, *new = layer_step_reference(qkv, *rest, form)
        if may_write():
            new = [None if x is None else old.copy_(x) for old, x in zip(states, new, strict=True)]
        return Stepped(y, *new)
    parts, places = ((qkv.x_BC, None, None), list(qkv.places)) if isinstance(qkv, Packed) else (qkv, [0, 0, 0])
    if may_write() and all(x is None or x.is_contiguous() for x in states):
        return Stepped(layer_step_in_place(*parts, *rest, places, *form).flatten(1), *states)
    y, *new = layer_step_operator(*parts, *rest, places, *form)
    return Stepped(y.flatten(1), *(None if old is None else x for old, x in zip(states, new, strict=True)))


def _obstacle(state: Tensor, taps: int, group: int, form: StepForm) -> str | None:
    """What keeps a layer's step from its Triton kernel."""
    if taps > MAX_TAPS:
        return f"{taps} taps are more than {MAX_TAPS}"
    if taps and group > 1 and form.norm in ("rms", "layer", "sums"):
        return "keys are shared by heads that are normed"
    return step_obstacle(state)


def _groups(qkv: Packed | Apart, state: Tensor, *, convolved: bool) -> int:
    """Heads of q and k.

    Raises:
        ValueError: q, k and v do not fit the state.
    """
    batch, heads, k_dim, v_dim = state.shape
    if isinstance(qkv, Apart):
        if convolved:
            raise ValueError("a convolution runs over q, k and v in one row; give them as Packed")
        groups = qkv.q_BGK.shape[1]
        shapes = {"q": (batch, groups, k_dim), "k": (batch, groups, k_dim), "v": (batch, heads, v_dim)}
        check_arguments(state, {name: (x, shapes[name]) for name, x in zip("qkv", qkv, strict=True)}, first="state")
    else:
        check_arguments(state, {"x": (qkv.x_BC, (batch, qkv.x_BC.shape[-1]))}, first="state")
        groups, over = divmod(qkv.x_BC.shape[1] - heads * v_dim, 2 * k_dim)
        if over:
            raise ValueError(
                f"x has {qkv.x_BC.shape[1]} channels; with a state of shape {tuple(state.shape)} and G heads of q and k "
                f"it has 2 G * {k_dim} + {heads * v_dim}"
            )
    if groups < 1 or heads % groups:
        raise ValueError(
            f"q and k have {groups} heads and the state {heads}; the heads of the state must be a multiple of those of q"
        )
    return groups


def layer_step_reference(
    qkv: Packed | Apart,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    tail: Tensor | None,
    sums: Tensor | None,
    taps: Tensor | None,
    bias: Tensor | None,
    decay_bias: Tensor | None,
    log_rate: Tensor | None,
    skip: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gate: Tensor | None,
    form: StepForm,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The definition, in fp32 or better: output [B, H V], state, tail and sums of keys."""
    dtype = qkv[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    new_tail = tail
    if taps is not None and tail is not None:
        assert isinstance(qkv, Packed)
        window_BJC = torch.cat((tail.to(wide), qkv.x_BC[:, None].to(wide)), 1)
        filtered_BC = (window_BJC * taps.t().to(wide)).sum(1)
        qkv = Packed(filtered_BC if bias is None else filtered_BC + bias, qkv.places)
        new_tail = window_BJC[:, 1:].to(tail.dtype)
    q, k, v = (x.to(wide) for x in (_split(qkv, state) if isinstance(qkv, Packed) else qkv))
    if form.silu:
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    if form.unit:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS) for x in (q, k))
    q, k = q * form.scale, k * form.key_scale
    log_decay, strength = decay, beta
    written = v
    if decay is not None and form.decay == "rate":
        assert decay_bias is not None and log_rate is not None
        time_step = F.softplus(decay.to(wide) + decay_bias)
        log_decay = -(log_rate.exp() if decay.ndim == 2 else log_rate.exp()[:, None]) * time_step
        written = v * time_step[..., None] if form.stepped else v
    elif decay is not None and form.decay == "sigmoid":
        log_decay = F.logsigmoid(decay.to(wide)) / form.temperature
    if beta is not None and form.open_beta:
        strength = form.max_beta * torch.sigmoid(beta.to(wide))
    y, new_state = recurrent_step_reference(q, k, written, log_decay, strength, None, None, state)
    if skip is not None:
        y = y + skip[:, None] * v
    new_sums = sums
    if sums is not None:
        kept = 1.0 if log_decay is None else log_decay.exp() if log_decay.ndim == 3 else log_decay.exp()[..., None]
        new_sums = kept * sums.to(wide) + k
        y = y / ((q * new_sums).sum(-1, keepdim=True) + form.eps)
        new_sums = new_sums.to(sums.dtype)
    y = _finished(y, norm_weight, norm_bias, gate, form)
    return y.to(dtype), new_state, new_tail, new_sums


def _split(packed: Packed, state: Tensor) -> tuple[Tensor, ...]:
    """The parts [B, G, K], [B, G, K] and [B, H, V]."""
    _, heads, k_dim, v_dim = state.shape
    keys = (packed.x_BC.shape[1] - heads * v_dim) // 2
    sizes = ((keys, k_dim), (keys, k_dim), (heads * v_dim, v_dim))
    parts = zip(packed.places, sizes, strict=True)
    return tuple(packed.x_BC[:, place : place + size].unflatten(1, (-1, width)) for place, (size, width) in parts)


def _finished(y_BHV: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, form: StepForm) -> Tensor:
    """Norm and output gate: [B, H V]."""
    if form.norm == "row":
        y_BHV = _opened(y_BHV.flatten(1), gate, form)[:, None]
        weight = None if weight is None else weight.flatten()
    if form.norm in ("rms", "row"):
        y_BHV = y_BHV * torch.rsqrt(y_BHV.square().mean(-1, keepdim=True) + form.eps)
    elif form.norm == "layer":
        y_BHV = F.layer_norm(y_BHV, y_BHV.shape[-1:], eps=form.eps)
    y_BHV = y_BHV if weight is None else y_BHV * weight
    y_BHV = y_BHV if bias is None else y_BHV + bias
    return y_BHV.flatten(1) if form.norm == "row" else _opened(y_BHV.flatten(1), gate, form)


def _opened(y_BE: Tensor, gate_BE: Tensor | None, form: StepForm) -> Tensor:
    if gate_BE is None:
        return y_BE
    gate = gate_BE.to(y_BE.dtype)
    return y_BE * (F.silu(gate) if form.gate == "silu" else torch.sigmoid(gate))
