"""Launches the kernels of `kernels.walk_triton` on torch tensors: configurations, strides and allocations.

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
    product_width,
)
from kernels.walk_pieces import Pieces, share_out

MAX_WIDTH = 256


class Config(NamedTuple):
    """How a kernel is compiled.

    Args:
        chunk: tokens of a chunk.
        tile: columns of the output that one program computes.
        warps: warps of a program.
        stages: depth of the software pipeline that loads the chunks.
        turned: whether outputs are transposed, see `kernels.walk_turned_triton`.
    """

    chunk: int
    tile: int
    warps: int
    stages: int
    turned: bool = False


class Backward(NamedTuple):
    """How the gradients are walked.

    Args:
        queries: the walk of queries.
        keys: the joint walk of keys and values in a launch of its own, or None: in that of the queries, or apart.
        together: whether keys and values walk together, all columns in one program, or apart.
    """

    queries: Config
    keys: Config | None = None
    together: bool = False


# By the width of the inner dimension (the first at least as large counts), for 16-bit and for fp32 operands.
FORWARD_16 = {64: Config(64, 64, 4, 3), 128: Config(64, 64, 4, 2, turned=True), 256: Config(64, 32, 8, 1)}
BACKWARD_16 = {
    (64, 64): Backward(Config(64, 64, 4, 3), together=True),
    (128, 64): Backward(Config(64, 128, 4, 1), together=True),
    (128, 128): Backward(Config(64, 64, 4, 2, turned=True), Config(64, 128, 8, 2, turned=True), together=True),
    (256, 256): Backward(Config(64, 16, 8, 1)),
}
"""By the larger and the smaller of K and V."""
SEGMENT_16 = {64: Config(64, 64, 4, 3), 128: Config(64, 64, 4, 3), 256: Config(64, 32, 8, 1)}
FP32 = {64: Config(32, 32, 4, 1), 128: Config(16, 16, 4, 1), 256: Config(16, 32, 8, 1)}
BACKWARD_32 = {(width, width): Backward(config) for width, config in FP32.items()}
GATE_ROWS, GATE_HEADS = 128, 16
"""Tokens and heads of a tile of the decays that are summed over chunks."""
DECAY_ROWS, DECAY_SEGMENTS = 2048, 16
"""Tokens of a tile of the decays' gradient, and programs that share a long row."""
SUM_ROWS = 16
"""Tokens of a tile of the sums over heads."""


def forward_config(k_dim: int, dtype: torch.dtype) -> Config:
    """The shipped configuration of the forward walk."""
    return _by_width(FP32 if dtype == torch.float32 else FORWARD_16, k_dim)


def backward_config(k_dim: int, v_dim: int, dtype: torch.dtype) -> Backward:
    """The shipped configuration of the three backward walks, whose inner dimensions are V, V and K."""
    wide, narrow = max(k_dim, v_dim), min(k_dim, v_dim)
    table = BACKWARD_32 if dtype == torch.float32 else BACKWARD_16
    return next(config for (most, least), config in table.items() if wide <= most and narrow <= least)


def tile_of(config: Config, width: int, dtype: torch.dtype) -> int:
    """Columns of the output of one program."""
    return min(config.tile, product_width(width, dtype))


def _by_width(table: dict[int, Config], width: int) -> Config:
    return next(config for limit, config in table.items() if width <= limit)


def forward(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor | None,
    state_BHKV: Tensor | None,
    starts: Tensor | None,
    *,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Linear attention with a scalar decay.

    Args:
        q_BTGK: queries.
        k_BTGK: keys.
        v_BTHV: values.
        log_decay: None, [M, H] where M divides B and row b * M / B is that of batch b, or [B, T, H]; fp32.
        state_BHKV: S_0 in fp32, or None for zero; [B * N, H, K, V] with N packed sequences.
        starts: where the N sequences packed in each row start, and the end of the last, [N + 1]; None for one sequence.
        return_state: whether the final states are wanted.

    Returns:
        The outputs [B, T, H, V] in the dtype of v; the final states, shaped like the given ones, in fp32, or an empty tensor;
        and the states that enter the segments of long rows [B, P, H, K, V], for `backward`, or an empty tensor.
    """
    from kernels import walk_forward_triton

    batch, length, heads, v_dim = v_BTHV.shape
    k_dim = k_BTGK.shape[3]
    dot = _dot_dtype(q_BTGK, k_BTGK, v_BTHV)
    config = forward_config(k_dim, dot)
    tile = tile_of(config, v_dim, dot)
    pieces = share_out(k_BTGK, v_BTHV, starts)
    o = torch.empty_like(v_BTHV, memory_format=torch.contiguous_format)
    last = _state_like(v_BTHV, k_dim, pieces.sequences(batch)) if return_state else _nothing(v_BTHV)
    (q, k, v), strides, unit = _rows(*_narrow(dot, q_BTGK, k_BTGK, v_BTHV))
    gate = _cumulated(log_decay, v, pieces, config.chunk)
    sums, decays = _segments(k, v, gate, _gate_kind(log_decay), pieces, config.chunk, reverse=False)
    entering = torch.empty_like(sums)
    walk_forward_triton.forward_kernel[(batch * pieces.number * heads * -(-v_dim // tile),)](
        q, k, v, gate, v if state_BHKV is None else state_BHKV.contiguous(), o, last,
        v if pieces.starts is None else pieces.starts, sums, decays, entering,
        *strides, length, heads, heads // k.shape[2], _gate_every(log_decay, batch), pieces.number, pieces.length,
        K=k_dim, V=v_dim, BK=padded(k_dim), BV=tile, UNIT=unit, C=config.chunk,
        GATE=_gate_kind(log_decay), FIRST=state_BHKV is not None, LAST=return_state, PIECES=pieces.kind, TURNED=config.turned,
        DOT=_triton_dtype(dot), PRECISION=_precision(dot), STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return o, last, entering


def backward(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor | None,
    state_BHKV: Tensor | None,
    starts: Tensor | None,
    entering_BPHKV: Tensor,
    do_BTHV: Tensor,
    final_BHKV: Tensor | None,
    dfinal_BHKV: Tensor | None,
    *,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`.

    Args:
        q_BTGK: as for `forward`, and so are k, v, log_decay, state and starts.
        k_BTGK: keys.
        v_BTHV: values.
        log_decay: log decays.
        state_BHKV: S_0.
        starts: bounds of packed sequences.
        entering_BPHKV: what `forward` kept.
        do_BTHV: gradient of the outputs.
        final_BHKV: the final state, needed for the gradient of the decays if `dfinal_BHKV` is given.
        dfinal_BHKV: gradient of the final state, or None for zero.
        gate_grad: whether the gradient of the log decays is wanted.

    Returns:
        Gradients of q, k, v, log_decay (or an empty tensor) and state (or an empty tensor).
    """
    from kernels import walk_gradients_triton
    from kernels.walk_triton import FULL_PROBE, NO_PROBE, STATE_PROBE

    batch, length, heads, v_dim = v_BTHV.shape
    groups, k_dim = k_BTGK.shape[2:]
    dot = _dot_dtype(q_BTGK, k_BTGK, v_BTHV)
    config = backward_config(k_dim, v_dim, dot)
    tile_k, tile_v = (tile_of(config.queries, width, dot) for width in (k_dim, v_dim))
    key_tiles, value_tiles = -(-k_dim // tile_k), -(-v_dim // tile_v)
    pieces = share_out(k_BTGK, v_BTHV, starts)
    dq_BTHK, dk_BTHK = (x.new_empty(batch, length, heads, k_dim) for x in (q_BTGK, k_BTGK))
    dv = torch.empty_like(v_BTHV, memory_format=torch.contiguous_format)
    dfirst = _nothing(v_BTHV) if state_BHKV is None else _state_like(v_BTHV, k_dim, pieces.sequences(batch))
    with_rowsums = key_tiles + 1 if config.together else 2 * key_tiles
    rowsums = v_BTHV.new_empty((with_rowsums, batch, heads, length) if gate_grad else 0, dtype=torch.float32)
    (q, k, v, do), strides, unit = _rows(*_narrow(dot, q_BTGK, k_BTGK, v_BTHV, do_BTHV))
    gate = _cumulated(log_decay, v, pieces, config.queries.chunk)
    sums, decays = _segments(q, do, gate, _gate_kind(log_decay), pieces, config.queries.chunk, reverse=True)
    probe = NO_PROBE if not gate_grad else STATE_PROBE if config.together else FULL_PROBE
    for kernel, parts, own, flags in _backward_launches(config, key_tiles, value_tiles):
        if kernel is walk_gradients_triton.backward_kernel:
            flags["QUERY_PROBE"] = probe.value
        kernel[(batch * pieces.number * heads * parts,)](
            q, k, v, gate, v if state_BHKV is None else state_BHKV.contiguous(), do,
            v if dfinal_BHKV is None else dfinal_BHKV.float().contiguous(), dq_BTHK, dk_BTHK, dv, dfirst, rowsums,
            v if pieces.starts is None else pieces.starts, entering_BPHKV, sums, decays,
            *strides, length, batch, heads, heads // groups, _gate_every(log_decay, batch), pieces.number, pieces.length,
            K=k_dim, V=v_dim, BK=padded(k_dim), BV=padded(v_dim), TK=tile_k, TV=tile_v, UNIT=unit, C=own.chunk,
            GATE=_gate_kind(log_decay), FIRST=state_BHKV is not None, DLAST=dfinal_BHKV is not None,
            GATE_GRAD=gate_grad, PIECES=pieces.kind,
            DOT=_triton_dtype(dot), PRECISION=_precision(dot), STAGES=own.stages, num_warps=own.warps, **flags,
        )  # fmt: skip
    if groups < heads:
        dq_BTHK, dk_BTHK = _sum_heads(dq_BTHK, dk_BTHK, groups)
    dgate = _nothing(v_BTHV)
    if gate_grad:
        assert log_decay is not None
        dgate = _decay_gradient(rowsums, log_decay, pieces.starts, final_BHKV, dfinal_BHKV)
    return dq_BTHK, dk_BTHK, dv, dgate, dfirst


def _backward_launches(config: Backward, key_tiles: int, value_tiles: int) -> list[tuple[Any, int, Config, dict[str, Any]]]:
    """Kernels of the backward pass, the parts of a head in each, configurations and flags."""
    from kernels.walk_gradients_triton import ALL, KEYS_AND_VALUES, QUERIES, apart_kernel, backward_kernel

    def flags(roles: Any, own: Config) -> dict[str, Any]:
        return {"ROLES": roles.value, "TURNED": own.turned}

    queries, keys = config.queries, config.keys
    if config.together and keys is None:
        return [(backward_kernel, key_tiles + 1, queries, flags(ALL, queries))]
    first = (backward_kernel, key_tiles, queries, flags(QUERIES, queries))
    if keys is None:
        return [first, (apart_kernel, key_tiles + value_tiles, queries, {})]
    return [first, (backward_kernel, 1, keys, flags(KEYS_AND_VALUES, keys))]


def _gate_every(log_decay: Tensor | None, batch: int) -> int:
    """How many batches share a row of a constant decay."""
    return 1 if log_decay is None or log_decay.ndim == 3 else batch // log_decay.shape[0]


def _cumulated(log_decay: Tensor | None, spare: Tensor, pieces: Pieces, chunk: int) -> Tensor:
    """Decays as the walks read them: [M, H] as given, those of each token as log2 sums from the start of its chunk, [B, H, T]."""
    from kernels.walk_forward_triton import cumulate_kernel
    from kernels.walk_triton import SEQUENCES

    if log_decay is None:
        return spare
    gate = log_decay.contiguous()
    if gate.ndim == 2:
        return gate
    batch, length, heads = gate.shape
    sums = gate.new_empty(batch, heads, length)
    blocks = 1 if pieces.kind == SEQUENCES.value else -(-pieces.length // GATE_ROWS)
    cumulate_kernel[(batch * pieces.number * -(-heads // GATE_HEADS) * blocks,)](
        gate, gate if pieces.starts is None else pieces.starts, sums, length, heads, pieces.number, pieces.length, blocks,
        PIECES=pieces.kind, C=chunk, ROWS=GATE_ROWS, HEADS=GATE_HEADS, num_warps=4,
    )  # fmt: skip
    return sums


def _segments(
    b: Tensor, c: Tensor, gate: Tensor, gate_kind: int, pieces: Pieces, chunk: int, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state [B, P, H, K, V] and its log2 decay [B, P, H]; empty without segments."""
    from kernels import walk_forward_triton, walk_triton

    if pieces.kind != walk_triton.SEGMENTS.value:
        return _nothing(c), _nothing(c)
    batch, length, heads, v_dim = c.shape
    k_dim = b.shape[3]
    config = _by_width(FP32 if c.dtype == torch.float32 else SEGMENT_16, k_dim)
    tile = tile_of(config, v_dim, c.dtype)
    sums = c.new_empty(batch, pieces.number, heads, k_dim, v_dim, dtype=torch.float32)
    decays = sums.new_empty(batch, pieces.number, heads)
    _, strides, unit = _rows(b, c)
    gate_every = batch // gate.shape[0] if gate_kind == walk_triton.CONSTANT_GATE.value else 1
    walk_forward_triton.segment_kernel[(batch * (pieces.number - 1) * heads * -(-v_dim // tile),)](
        b, c, gate, sums, decays,
        *strides, length, heads, heads // b.shape[2], gate_every, pieces.number, pieces.length,
        K=k_dim, V=v_dim, BK=padded(k_dim), BV=tile, UNIT=unit, C=chunk, GATE=gate_kind, REVERSE=reverse,
        DOT=_triton_dtype(c.dtype), PRECISION=_precision(c.dtype), STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return sums, decays


def _sum_heads(dq_BTHK: Tensor, dk_BTHK: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys that heads share, [B, T, G, K]."""
    from kernels.walk_gradients_triton import sum_heads_kernel

    batch, length, heads, k_dim = dq_BTHK.shape
    dq, dk = (x.new_empty(batch, length, groups, k_dim) for x in (dq_BTHK, dk_BTHK))
    rows = batch * length * groups
    sum_heads_kernel[(2 * -(-rows // SUM_ROWS),)](
        dq_BTHK, dk_BTHK, dq, dk, rows, heads // groups, WIDTH=k_dim, BLOCK=padded(k_dim), ROWS=SUM_ROWS, num_warps=4
    )
    return dq, dk


def _decay_gradient(
    rowsums: Tensor, log_decay: Tensor, starts: Tensor | None, final_BHKV: Tensor | None, dfinal_BHKV: Tensor | None
) -> Tensor:
    """Gradient of the log decays: each is part of the cumulated decay of its own and all later tokens of its sequence."""
    from kernels.walk_gradients_triton import decay_gradient_kernel
    from kernels.walk_triton import SEGMENTS, SEQUENCES

    parts, batch, heads, length = rowsums.shape
    ends = None
    if dfinal_BHKV is not None:
        assert final_BHKV is not None
        ends = (final_BHKV * dfinal_BHKV).sum((-2, -1))
    tokens = max(DECAY_ROWS, -(-length // DECAY_SEGMENTS))
    pieces = -(-length // tokens) if starts is None else starts.shape[0] - 1
    later_BTH = rowsums.new_empty(batch, length, heads)
    decay_gradient_kernel[(batch * pieces * heads,)](
        rowsums, rowsums if starts is None else starts, rowsums if ends is None else ends, later_BTH,
        length, batch, heads, pieces, tokens,
        PARTS=parts, ENDS=ends is not None, PIECES=(SEGMENTS if starts is None else SEQUENCES).value,
        ROWS=DECAY_ROWS, num_warps=8,
    )  # fmt: skip
    if log_decay.ndim == 3:
        return later_BTH
    return later_BTH.sum(1).unflatten(0, (log_decay.shape[0], -1)).sum(1)
