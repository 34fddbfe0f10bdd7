"""Launches the kernels of the delta rule on torch tensors: configurations, strides and allocations.

Shape legend: B batch, T time, H heads of v, G heads of q and k, N chunks, C tokens of a chunk, K key, V value width,
M rows of a constant decay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels._kept import Part, memory_for, parts_of
from kernels.delta_rule import delta_hopper_launch
from kernels.operands import _dot_dtype, _gate, _gate_kind, _nothing, _precision, _rows, _state_like, _triton_dtype, padded


class Launch(NamedTuple):
    """How one kernel is compiled.

    Args:
        tile: columns that a program computes.
        warps: warps of a program.
        stages: depth of the software pipeline of a walk.
    """

    tile: int
    warps: int
    stages: int = 1


class Config(NamedTuple):
    """What a head width takes: `inner` is the width of the value blocks over which the gradient kernel sums."""

    chunk: int
    forward: Launch
    reverse: Launch
    gradients: Launch
    inner: int


# By the larger of K and V (the first at least as large counts), for 16-bit and for fp32 operands.
SIXTEEN_BIT = {
    64: Config(64, Launch(32, 4, 2), Launch(32, 4, 2), Launch(64, 4), 64),
    128: Config(64, Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4), 128),
}
FP32 = {
    64: Config(16, Launch(32, 4), Launch(32, 4), Launch(32, 4), 32),
    128: Config(16, Launch(16, 4), Launch(16, 4), Launch(32, 4), 32),
    256: Config(16, Launch(16, 8), Launch(16, 8), Launch(32, 4), 32),
}

COUPLING_REGISTERS = 168
"""Registers of a thread of the coupling kernel of 16-bit heads, at most: three warps then share a scheduler."""


def operand_dtype(q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor) -> torch.dtype:
    """The dtype of the tensor cores' operands: the narrowest given, but fp32 for heads wider than 128.

    The assembler of Triton 3.6 (ptxas 12.8) breaks the 16-bit walk of wider heads: it reads outside of shared memory.
    """
    wide = max(k_BTGK.shape[3], v_BTHV.shape[3]) > max(SIXTEEN_BIT)
    return torch.float32 if wide else _dot_dtype(q_BTGK, k_BTGK, v_BTHV)


def config_of(k_dim: int, v_dim: int, dtype: torch.dtype) -> Config:
    """The shipped configuration for operands of a dtype."""
    table = FP32 if dtype == torch.float32 else SIXTEEN_BIT
    return next(config for limit, config in table.items() if max(k_dim, v_dim) <= limit)


class Kept(NamedTuple):
    """What the backward pass reads again; all but the couplings and cumulated decays are empty if it will not run.

    Args:
        couplings: H [B, H, N, C, C], see `kernels.delta_rule.delta_triton`, in the dtype of the tensor cores.
        decays: cumulated log2 decays [B, H, N, C] in fp32, or empty.
        errors: E [B, T, H, V].
        states: the state that enters each chunk [B, H, N, K, V].
        memory: in which all of these lie.
    """

    couplings: Tensor
    decays: Tensor
    errors: Tensor
    states: Tensor
    memory: Tensor


def kept_like(q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay: Tensor | None, *, keep: bool) -> Kept:
    """Unwritten tensors of the sizes that `forward` returns."""
    return kept_in(kept_memory(q_BTGK, k_BTGK, v_BTHV, log_decay, keep=keep), q_BTGK, k_BTGK, v_BTHV, log_decay, keep=keep)


def kept_memory(q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay: Tensor | None, *, keep: bool) -> Tensor:
    """Unwritten memory for all of it, see `kernels._kept`."""
    return memory_for(_kept_parts(q_BTGK, k_BTGK, v_BTHV, log_decay, keep=keep), v_BTHV)


def kept_in(memory: Tensor, q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay: Tensor | None, *, keep: bool) -> Kept:
    """What lies in it."""
    return Kept(*parts_of(memory, _kept_parts(q_BTGK, k_BTGK, v_BTHV, log_decay, keep=keep)), memory)


def _kept_parts(q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay: Tensor | None, *, keep: bool) -> list[Part]:
    """Shapes and dtypes of `Kept`."""
    batch, length, heads, v_dim = v_BTHV.shape
    dot = operand_dtype(q_BTGK, k_BTGK, v_BTHV)
    chunk = config_of(k_BTGK.shape[3], v_dim, dot).chunk
    blocks, none = (batch, heads, -(-length // chunk)), (0,)
    return [
        ((*blocks, chunk, chunk), dot),
        (none if log_decay is None else (*blocks, chunk), torch.float32),
        (v_BTHV.shape if keep else none, dot),
        ((*blocks, k_BTGK.shape[3], v_dim) if keep else none, dot),
    ]


def forward(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    log_decay: Tensor | None,
    state_BHKV: Tensor | None,
    *,
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Kept]:
    """The delta rule without a decay or with a scalar one.

    Args:
        q_BTGK: queries.
        k_BTGK: keys.
        v_BTHV: values.
        beta_BTH: write strengths.
        log_decay: None, [M, H] where M divides B and row b * M / B is that of batch b, or [B, T, H]; fp32.
        state_BHKV: S_0 in fp32, or None for zero.
        return_state: whether the final state is wanted.
        keep: whether `backward` will run.

    Returns:
        The outputs [B, T, H, V] in the dtype of v, the final state [B, H, K, V] in fp32 or an empty tensor, and what
        `backward` needs.
    """
    k_dim = k_BTGK.shape[3]
    config = config_of(k_dim, v_BTHV.shape[3], operand_dtype(q_BTGK, k_BTGK, v_BTHV))
    kept = kept_like(q_BTGK, k_BTGK, v_BTHV, log_decay, keep=keep)
    o = torch.empty_like(v_BTHV, memory_format=torch.contiguous_format)
    last = _state_like(v_BTHV, k_dim) if return_state else _nothing(v_BTHV)
    (q, k, v), _, _ = _rows(q_BTGK, k_BTGK, v_BTHV)
    beta, first = beta_BTH.contiguous(), None if state_BHKV is None else state_BHKV.contiguous()
    gate, gated = delta_hopper_launch.Gate(*_gate(log_decay, len(v), v)), log_decay is not None
    wanted = {"gated": gated, "return_state": return_state, "keep": keep}
    plan = delta_hopper_launch.plan_of(k, v, gated=gated, keep=keep) if delta_hopper_launch.fit(k_dim, q, k, v) else None
    if plan is None:
        _couple(k, beta, gate, kept, _gate_kind(log_decay))
        _walk(q, k, v, beta, kept, first, o, last, config.forward, **wanted)
    else:
        delta_hopper_launch.forward(q, k, v, beta, gate, kept, first, o, last, plan, **wanted)
    return o, last, kept


def _couple(k: Tensor, beta: Tensor, gate: delta_hopper_launch.Gate, kept: Kept, kind: int) -> None:
    """Writes the couplings and the cumulated decays."""
    from kernels.delta_rule import delta_coupling_triton

    (batch, length, groups, k_dim), (heads, chunks, chunk), dot = k.shape, kept.couplings.shape[1:4], kept.couplings.dtype
    single = dot == torch.float32
    _, strides, unit = _rows(k)
    delta_coupling_triton.coupling_kernel[(batch * heads * chunks,)](
        k, beta, gate.log_decay, kept.couplings, kept.decays, *strides, *gate.strides, length, chunks, heads, heads // groups,
        gate.every, K=k_dim, BK=padded(k_dim), UNIT=unit, C=chunk, GATE=kind, DOT=_triton_dtype(dot), PRECISION=_precision(dot),
        MERGE=_triton_dtype(torch.float32 if single else torch.float16), num_warps=1,
        maxnreg=None if single else COUPLING_REGISTERS,
    )  # fmt: skip


def _walk(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, kept: Kept, first: Tensor | None, o: Tensor, last: Tensor, launch: Launch,
    *, gated: bool, return_state: bool, keep: bool,
) -> None:  # fmt: skip
    """The forward walk in plain Triton; writes o, last, and what is kept."""
    from kernels.delta_rule import delta_triton

    (_, length, heads, v_dim), k_dim, dot = v.shape, k.shape[3], kept.couplings.dtype
    tile = min(launch.tile, padded(v_dim))
    _, strides, unit = _rows(q, k, v)
    delta_triton.forward_kernel[(len(v) * heads * -(-v_dim // tile),)](
        q, k, v, beta, kept.couplings, kept.decays, v if first is None else first, o, last, kept.errors, kept.states,
        *strides, length, heads, heads // k.shape[2],
        K=k_dim, V=v_dim, BK=padded(k_dim), BV=tile, UNIT=unit, C=kept.couplings.shape[3],
        GATED=gated, FIRST=first is not None, LAST=return_state, KEEP=keep,
        DOT=_triton_dtype(dot), PRECISION=_precision(dot), STAGES=launch.stages, num_warps=launch.warps,
    )  # fmt: skip


def backward(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    beta_BTH: Tensor,
    log_decay: Tensor | None,
    state_BHKV: Tensor | None,
    kept: Kept,
    do_BTHV: Tensor,
    dfinal_BHKV: Tensor | None,
    *,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`.

    Args:
        q_BTGK: as for `forward`, and so are k, beta, log_decay and state.
        k_BTGK: keys.
        beta_BTH: write strengths.
        log_decay: log decays.
        state_BHKV: S_0.
        kept: what `forward` kept.
        do_BTHV: gradient of the outputs.
        dfinal_BHKV: gradient of the final state, or None for zero.
        gate_grad: whether the gradient of the log decays is wanted.

    Returns:
        Gradients of q, k, v, beta, log_decay (or an empty tensor) and state (or an empty tensor).
    """
    batch, length, heads, v_dim = do_BTHV.shape
    groups, k_dim = k_BTGK.shape[2:]
    dlast = None if dfinal_BHKV is None else dfinal_BHKV.float().contiguous()
    dfirst = None if state_BHKV is None else _state_like(do_BTHV, k_dim)
    dq, dk = (x.new_empty(batch, length, heads, k_dim) for x in (q_BTGK, k_BTGK))
    dv, beta = torch.empty_like(do_BTHV, memory_format=torch.contiguous_format), beta_BTH.contiguous()
    dbeta = torch.empty_like(beta)
    (q, k, do), _, _ = _rows(q_BTGK, k_BTGK, do_BTHV)
    config = config_of(k_dim, v_dim, kept.couplings.dtype)
    on_hopper = delta_hopper_launch.fit(k_dim, q, k, do)
    parts = 1 if on_hopper else -(-k_dim // min(config.gradients.tile, padded(k_dim)))
    dgates = do_BTHV.new_empty((parts, batch, length, heads) if gate_grad else 0, dtype=torch.float32)
    launch = delta_hopper_launch.backward if on_hopper else _walk_back
    launch(q, k, do, beta, kept, dlast, (dq, dk, dv, dbeta, dgates), dfirst, config, gated=log_decay is not None)
    if groups < heads:
        dq, dk = (x.unflatten(2, (groups, -1)).sum(3) for x in (dq, dk))
    dgate = _summed(dgates, log_decay) if gate_grad and log_decay is not None else dgates
    return dq, dk, dv, dbeta, dgate, _nothing(do_BTHV) if dfirst is None else dfirst


def _walk_back(
    q: Tensor, k: Tensor, do: Tensor, beta: Tensor, kept: Kept, dlast: Tensor | None, grads: tuple[Tensor, ...],
    dfirst: Tensor | None, config: Config, *, gated: bool,
) -> None:  # fmt: skip
    """The gradients in plain Triton: a walk, then all chunks at once; writes `grads` (dq, dk, dv, dbeta, dgates) and dfirst."""
    from kernels.delta_rule import delta_gradients_triton, delta_triton

    batch, length, heads, v_dim = do.shape
    k_dim, dot, chunks = k.shape[3], kept.couplings.dtype, kept.couplings.shape[2]
    solved = torch.empty_like(do, memory_format=torch.contiguous_format)
    dstates = torch.empty_like(kept.states)
    _, strides, unit = _rows(q, k, do)
    shared = {"K": k_dim, "V": v_dim, "UNIT": unit, "C": config.chunk, "GATED": gated}
    shared |= {"DOT": _triton_dtype(dot), "PRECISION": _precision(dot)}
    tile = min(config.reverse.tile, padded(v_dim))
    delta_triton.reverse_kernel[(batch * heads * -(-v_dim // tile),)](
        q, k, do, beta, kept.couplings, kept.decays, do if dlast is None else dlast,
        solved, do if dfirst is None else dfirst, dstates, *strides, length, heads, heads // k.shape[2],
        **shared, BK=padded(k_dim), BV=tile, FIRST=dfirst is not None, DLAST=dlast is not None,
        STAGES=config.reverse.stages, num_warps=config.reverse.warps,
    )  # fmt: skip
    tile = min(config.gradients.tile, padded(k_dim))
    tiles = -(-k_dim // tile)
    delta_gradients_triton.gradients_kernel[(batch * heads * chunks * tiles,)](
        q, k, do, beta, kept.decays, kept.errors, solved, kept.states, dstates, *grads,
        *strides, length, chunks, batch, heads, heads // k.shape[2],
        **shared, TK=tile, BV=min(config.inner, padded(v_dim)), TV=padded(-(-v_dim // tiles)), GATE_GRAD=grads[4].numel() > 0,
        num_warps=config.gradients.warps,
    )  # fmt: skip


def _summed(dgates: Tensor, log_decay: Tensor) -> Tensor:
    """The gradient of the log decays from its part of each key tile; a constant decay is that of all its tokens."""
    dgate_BTH = dgates.sum(0) if len(dgates) > 1 else dgates[0]
    if log_decay.ndim == 3:
        return dgate_BTH
    return dgate_BTH.sum(1).unflatten(0, (log_decay.shape[0], -1)).sum(1)
