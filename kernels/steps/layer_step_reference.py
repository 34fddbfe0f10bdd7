"""The definition of a layer's decoding step in torch: convolution, activation, recurrence, norm and output gate.

Shape legend: B batch, H heads of v and of the state, G heads of q and k (G divides H), K key, V value width, C channels of a
convolution, J taps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.step import recurrent_step_reference
from kernels.step_form import StepForm

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
        filtered_BC, new_tail = _filtered(qkv.x_BC.to(wide), tail, taps.to(wide), bias)
        qkv = Packed(filtered_BC, qkv.places)
    q, k, v = (x.to(wide) for x in (_split(qkv, state) if isinstance(qkv, Packed) else qkv))
    if form.silu:
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    if form.unit:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS) for x in (q, k))
    q, k = q * form.scale, k * form.key_scale
    log_decay, time_step = (None, None) if decay is None else _decay(decay.to(wide), decay_bias, log_rate, form)
    written = v * time_step[..., None] if form.stepped and time_step is not None else v
    strength = beta if beta is None or not form.open_beta else form.max_beta * torch.sigmoid(beta.to(wide))
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


def _filtered(x_BC: Tensor, tail_BPC: Tensor, taps_CJ: Tensor, bias_C: Tensor | None) -> tuple[Tensor, Tensor]:
    """The newest input after the short convolution, and the new tail."""
    window_BJC = torch.cat((tail_BPC.to(x_BC.dtype), x_BC[:, None]), 1)
    filtered_BC = (window_BJC * taps_CJ.t()).sum(1)
    return filtered_BC if bias_C is None else filtered_BC + bias_C, window_BJC[:, 1:].to(tail_BPC.dtype)


def _decay(decay: Tensor, bias: Tensor | None, log_rate: Tensor | None, form: StepForm) -> tuple[Tensor, Tensor | None]:
    """The log decay, and the time step that it was made of, if any."""
    if form.decay == "rate":
        assert bias is not None and log_rate is not None
        time_step = F.softplus(decay + bias)
        return -(log_rate.exp() if decay.ndim == 2 else log_rate.exp()[:, None]) * time_step, time_step
    return F.logsigmoid(decay) / form.temperature if form.decay == "sigmoid" else decay, None


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
