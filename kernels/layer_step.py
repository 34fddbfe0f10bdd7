"""One decoded token of a whole layer but its projections: short convolution, activation, recurrence, norm and output gate.

A step is bound by the bytes of the state, so what surrounds the recurrence should cost no launch of its own and no trip to
memory: on a GPU `layer_step` is one launch. Its definition is `kernels.steps.layer_step_reference`.

Shape legend: B batch, H heads of v and of the state, G heads of q and k (G divides H), K key, V value width, C channels of a
convolution, J taps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from kernels._arguments import check_arguments, check_axes
from kernels.step import may_write, step_obstacle
from kernels.step_form import MAX_TAPS, StepForm
from kernels.steps.layer_step_operator import layer_step_in_place, layer_step_operator
from kernels.steps.layer_step_reference import Apart, Packed, layer_step_reference

OPERATION = "layer_step"


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
    sample = qkv[0]
    taps, bias, tail = (None, None, None) if conv is None else conv
    around = (taps, bias, decay_bias, log_rate_H, skip_H, norm_weight, norm_bias_HV, gate_BE)
    states = (state_BHKV, tail, sums_BHK)
    groups = _check(qkv, decay, beta_BH, states, around, form)
    if decay is not None and decay.ndim == 1:
        decay = decay.expand(state_BHKV.shape[:2])
    rest = (decay, beta_BH, *states, *around)
    obstacle = _obstacle(state_BHKV, 0 if taps is None else taps.shape[1], state_BHKV.shape[1] // groups, form)
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


def _check(
    qkv: Packed | Apart,
    decay: Tensor | None,
    beta: Tensor | None,
    states: tuple[Tensor, Tensor | None, Tensor | None],
    around: tuple[Tensor | None, ...],
    form: StepForm,
) -> int:
    """Refuses tensors that do not belong together; returns the heads of q and k.

    Raises:
        ValueError: shapes or devices do not match.
    """
    state, tail, sums = states
    taps, bias, decay_bias, log_rate, skip, norm_weight, norm_bias, gate = around
    check_axes("state", state, "B H K V")
    for name, x in zip(("x",) if isinstance(qkv, Packed) else ("q", "k", "v"), qkv, strict=False):
        check_axes(name, x, "B C" if isinstance(qkv, Packed) else "B heads width")
    if taps is not None:
        check_axes("taps", taps, "C J")
    batch, heads, k_dim, v_dim = state.shape
    groups = _groups(qkv, state, convolved=taps is not None)
    decays = {1: (heads,), 2: (batch, heads)}.get(0 if decay is None else decay.ndim, (batch, heads, k_dim))
    expected = {
        "log_decay" if form.decay == "log" else "decay": (decay, decays),
        "decay_bias": (decay_bias, decays[1:]),
        "log_rate": (log_rate, (heads,)),
        "beta": (beta, (batch, heads)),
        "sums": (sums, (batch, heads, k_dim)),
        "skip": (skip, (heads,)),
        "norm_weight": (norm_weight, (v_dim,) if form.norm == "rms" else (heads, v_dim)),
        "norm_bias": (norm_bias, (heads, v_dim)),
        "gate": (gate, (batch, heads * v_dim)),
    }
    if taps is not None and tail is not None:
        channels = qkv[0].shape[1]
        expected |= {"taps": (taps, (channels, taps.shape[-1])), "bias": (bias, (channels,))}
        expected["tail"] = (tail, (batch, taps.shape[-1] - 1, channels))
    check_arguments(state, expected, first="state", unbounded=("beta",) if form.open_beta else ())
    return groups


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
