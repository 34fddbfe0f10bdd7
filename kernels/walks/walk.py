"""Linear attention with scalar decays by the walks of `kernels.walks.walk_triton`: allocations, strides and launches.

The forward pass of most 16-bit heads on Hopper is that of `kernels.walks.walk_hopper_launch`, and heads that share their keys take
`kernels.walks.walk_grouped`, where it suits.

Shape legend: B batch, T time, H heads of v, G heads of q and k, K key, V value width, M rows of a constant decay.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.operands import (
    _dot_dtype,
    _gate_kind,
    _narrow,
    _nothing,
    _precision,
    _rows,
    _state_like,
    _triton_dtype,
    padded,
)
from kernels.walks import walk_grouped, walk_hopper_launch, walk_hopper_plan, walk_hopper_shared_launch
from kernels.walks.walk_config import Backward, Config, backward_config, forward_config, tile_of
from kernels.walks.walk_crossings import Segments
from kernels.walks.walk_decays import RowSums, decay_gradient, gate_every, gate_of
from kernels.walks.walk_pieces import n_segments, share_out
from kernels.walks.walk_segments import segments

MAX_WIDTH = 256
SUM_ROWS = 16
"""Tokens of a tile of the sums over heads."""


class Inputs(NamedTuple):
    """What both passes get.

    Args:
        q: queries [B, T, G, K].
        k: keys [B, T, G, K].
        v: values [B, T, H, V].
        log_decay: None, [M, H] where M divides B and row b * M / B is that of batch b, or [B, T, H]; fp32.
        state: S_0 in fp32, or None for zero; [B * N, H, K, V] with N packed sequences.
        starts: where the N sequences packed in each row start, and the end of the last, [N + 1]; None for one sequence.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    state: Tensor | None
    starts: Tensor | None


class Gradients(NamedTuple):
    """What comes back.

    Args:
        do: gradient of the outputs.
        final: the final state, needed for the gradient of the decays if `dfinal` is given.
        dfinal: gradient of the final state, or None for zero.
    """

    do: Tensor
    final: Tensor | None
    dfinal: Tensor | None


def forward(inputs: Inputs, *, return_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Linear attention with a scalar decay.

    Args:
        inputs: see `Inputs`.
        return_state: whether the final states are wanted.

    Returns:
        The outputs [B, T, H, V] in the dtype of v; the final states, shaped like the given ones, in fp32, or an empty tensor;
        and what `backward` starts from, or an empty tensor: the states that enter the segments of long rows [B, P, H, K, V], or
        the chunks of heads that share keys.
    """
    from kernels.walks.walk_forward_triton import forward_kernel

    q, k, v, log_decay, state, starts = inputs
    dot = _dot_dtype(q, k, v)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    shared = walk_grouped.suits(q, k, v, starts)
    if (
        walk_hopper_plan.suits(inputs)
        or walk_hopper_plan.suits_forward(inputs)
        or (shared and walk_hopper_plan.suits_shared(inputs))
    ):
        return walk_hopper_launch.forward(inputs, o, return_state=return_state)
    (q, k, v), strides, unit = _rows(*_narrow(dot, q, k, v))
    if shared:
        return walk_grouped.forward(q, k, v, log_decay, state, o, return_state=return_state)
    batch, length, heads, v_dim = v.shape
    k_dim = k.shape[3]
    config = forward_config(k_dim, v_dim, dot, gated=log_decay is not None)
    tile = tile_of(config, v_dim, dot)
    pieces = share_out(k, v, starts)
    last = _state_like(v, k_dim, pieces.sequences(batch)) if return_state else _nothing(v)
    gate = gate_of(log_decay, v)
    sums, decays = segments(k, v, gate, _gate_kind(log_decay), pieces, config.chunk, reverse=False)
    entering = torch.empty_like(sums)
    forward_kernel[(batch * pieces.number * heads * -(-v_dim // tile),)](
        q, k, v, gate, v if state is None else state.contiguous(), o, last,
        v if pieces.starts is None else pieces.starts, sums, decays, entering,
        *strides, length, heads, heads // k.shape[2], gate_every(log_decay, batch), pieces.number, pieces.length,
        K=k_dim, V=v_dim, BK=padded(k_dim), BV=tile, UNIT=unit, C=config.chunk,
        GATE=_gate_kind(log_decay), FIRST=state is not None, LAST=return_state, PIECES=pieces.kind, TURNED=config.turned,
        DOT=_triton_dtype(dot), PRECISION=_precision(dot), STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return o, last, entering


def entering_like(inputs: Inputs) -> Tensor:
    """Room for what `forward` keeps for `backward`."""
    q, k, v, _, _, starts = inputs
    states = (v.shape[2], k.shape[3], v.shape[3])
    if walk_hopper_plan.suits(inputs):
        return walk_hopper_plan.entering_like(inputs)
    if walk_grouped.suits(q, k, v, starts):
        if walk_hopper_plan.suits_shared(inputs):
            return walk_hopper_plan.shared_like(inputs)
        return v.new_empty(v.shape[0], walk_grouped.n_chunks(v.shape[1]), *states, dtype=_dot_dtype(q, k, v))
    number = 1 if starts is not None else n_segments(k, v)
    return v.new_empty((v.shape[0], number, *states) if number > 1 else 0, dtype=torch.float32)


def backward(
    inputs: Inputs, entering: Tensor, gradients: Gradients, *, gate_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`.

    Args:
        inputs: see `Inputs`.
        entering: what `forward` kept.
        gradients: see `Gradients`.
        gate_grad: whether the gradient of the log decays is wanted.

    Returns:
        Gradients of q, k, v, log_decay (or an empty tensor) and state (or an empty tensor).
    """
    q, k, v, log_decay, state, starts = inputs
    do, final, dfinal = gradients
    dot = _dot_dtype(q, k, v)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    dfirst = _nothing(v) if state is None else torch.empty_like(state, dtype=torch.float32, memory_format=torch.contiguous_format)
    dlast = None if dfinal is None else dfinal.float().contiguous()
    narrow = _narrow(dot, q, k, v, do)
    back = _walk_back
    if walk_hopper_plan.suits(inputs):
        back = walk_hopper_launch.backward
    elif walk_grouped.suits(q, k, v, starts):
        back = walk_hopper_shared_launch.backward if walk_hopper_plan.suits_shared(inputs) else walk_grouped.backward
    dq, dk, rowsums = back(narrow, inputs, entering, dlast, dv, dfirst, gate_grad=gate_grad)
    dgate = _nothing(v)
    if gate_grad:
        assert log_decay is not None
        dgate = decay_gradient(rowsums, log_decay, starts, final, dlast, dot)
    heads_of = dq.shape[2] // k.shape[2]
    if heads_of > 1:
        dq, dk = _sum_heads(dq, dk, k.shape[2])
    return dq, dk, dv, dgate, dfirst


def _walk_back(
    narrow: tuple[Tensor, ...],
    inputs: Inputs,
    entering: Tensor,
    dlast: Tensor | None,
    dv: Tensor,
    dfirst: Tensor,
    *,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, RowSums]:
    """Gradients of queries and keys for each head [B, T, H, K], and what sums to that of the cumulated decays.

    `narrow` are q, k, v and do in the dtype of the products; `dv` and `dfirst` are written.
    """
    from kernels.walks.walk_gradients_triton import apart_kernel
    from kernels.walks.walk_triton import FULL_PROBE, NO_PROBE, SEGMENTS, STATE_PROBE

    (q, k, v, do), strides, unit = _rows(*narrow)
    batch, length, heads, v_dim = v.shape
    k_dim, state, log_decay = k.shape[3], inputs.state, inputs.log_decay
    config = backward_config(k_dim, v_dim, v.dtype, gated=log_decay is not None)
    tile_k, tile_v = (tile_of(config.queries, width, v.dtype) for width in (k_dim, v_dim))
    key_tiles, value_tiles = -(-k_dim // tile_k), -(-v_dim // tile_v)
    pieces = share_out(k, v, inputs.starts)
    dq, dk = (x.new_empty(batch, length, heads, k_dim) for x in (inputs.q, inputs.k))
    with_rowsums = key_tiles + 1 if config.together else 2 * key_tiles
    rowsums = v.new_empty((with_rowsums, batch, heads, length) if gate_grad else 0, dtype=torch.float32)
    gate = gate_of(log_decay, v)
    sums, decays = segments(q, do, gate, _gate_kind(log_decay), pieces, config.queries.chunk, reverse=True)
    probe = NO_PROBE if not gate_grad else STATE_PROBE if config.together else FULL_PROBE
    for kernel, parts, own, flags in _backward_launches(config, key_tiles, value_tiles):
        if kernel is not apart_kernel:
            flags["QUERY_PROBE"] = probe.value
        kernel[(batch * pieces.number * heads * parts,)](
            q, k, v, gate, v if state is None else state.contiguous(), do,
            v if dlast is None else dlast, dq, dk, dv, dfirst, rowsums,
            v if pieces.starts is None else pieces.starts, entering, sums, decays,
            *strides, length, batch, heads, heads // k.shape[2], gate_every(log_decay, batch), pieces.number, pieces.length,
            K=k_dim, V=v_dim, BK=padded(k_dim), BV=padded(v_dim), TK=tile_k, TV=tile_v, UNIT=unit, C=own.chunk,
            GATE=_gate_kind(log_decay), FIRST=state is not None, DLAST=dlast is not None, GATE_GRAD=gate_grad, PIECES=pieces.kind,
            DOT=_triton_dtype(v.dtype), PRECISION=_precision(v.dtype), STAGES=own.stages, num_warps=own.warps, **flags,
        )  # fmt: skip
    between = Segments(entering, sums, decays, pieces.length) if pieces.kind == SEGMENTS.value else None
    return dq, dk, RowSums(rowsums, key_tiles if config.together else 0, config.queries.chunk, between)


def _backward_launches(config: Backward, key_tiles: int, value_tiles: int) -> list[tuple[Any, int, Config, dict[str, Any]]]:
    """Kernels of the backward pass, the parts of a head in each, configurations and flags."""
    from kernels.walks.walk_gradients_triton import ALL, KEYS_AND_VALUES, QUERIES, apart_kernel, backward_kernel

    def flags(roles: Any, own: Config) -> dict[str, Any]:
        return {"ROLES": roles.value, "TURNED": own.turned}

    queries, keys = config.queries, config.keys
    if config.together and keys is None:
        return [(backward_kernel, key_tiles + 1, queries, flags(ALL, queries))]
    first = (backward_kernel, key_tiles, queries, flags(QUERIES, queries))
    if keys is None:
        return [first, (apart_kernel, key_tiles + value_tiles, queries, {})]
    return [first, (backward_kernel, 1, keys, flags(KEYS_AND_VALUES, keys))]


def _sum_heads(dq_BTHK: Tensor, dk_BTHK: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys that heads share, [B, T, G, K]."""
    from kernels.walks.walk_gradients_triton import sum_heads_kernel

    batch, length, heads, k_dim = dq_BTHK.shape
    dq, dk = (x.new_empty(batch, length, groups, k_dim) for x in (dq_BTHK, dk_BTHK))
    rows = batch * length * groups
    sum_heads_kernel[(2 * -(-rows // SUM_ROWS),)](
        dq_BTHK, dk_BTHK, dq, dk, rows, heads // groups, WIDTH=k_dim, BLOCK=padded(k_dim), ROWS=SUM_ROWS, num_warps=4
    )
    return dq, dk
