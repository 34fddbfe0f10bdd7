"""Launches the kernels of `kernels.walk_triton` on torch tensors: configurations, strides and allocations.

Shape legend: B batch, T time, H heads of v, G heads of q and k, K key, V value width, M rows of a constant decay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_WIDTH = 256


class Config(NamedTuple):
    """How a kernel is compiled.

    Args:
        chunk: tokens of a chunk.
        tile: columns of the output that one program computes.
        warps: warps of a program.
        stages: depth of the software pipeline that loads the chunks.
    """

    chunk: int
    tile: int
    warps: int
    stages: int


# By the width of the inner dimension (the first at least as large counts), for 16-bit and for fp32 operands. Chosen so that
# registers do not spill, which fp32 beyond 64 and gated gradients beyond 128 do all the same.
FORWARD_16 = {64: Config(64, 64, 4, 3), 128: Config(64, 64, 4, 2), 256: Config(64, 32, 8, 1)}
BACKWARD_16 = {64: Config(64, 32, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(64, 16, 8, 1)}
FP32 = {64: Config(32, 32, 4, 1), 128: Config(16, 16, 4, 1), 256: Config(16, 32, 8, 1)}


def forward_config(k_dim: int, dtype: torch.dtype) -> Config:
    """The shipped configuration of the forward walk."""
    return _by_width(FP32 if dtype == torch.float32 else FORWARD_16, k_dim)


def backward_config(k_dim: int, v_dim: int, dtype: torch.dtype) -> Config:
    """The shipped configuration of the three backward walks, whose inner dimensions are V, V and K."""
    return _by_width(FP32 if dtype == torch.float32 else BACKWARD_16, max(k_dim, v_dim))


def tile_of(config: Config, width: int, dtype: torch.dtype) -> int:
    """Columns of the output of one program."""
    return min(config.tile, product_width(width, dtype))


def product_width(width: int, dtype: torch.dtype) -> int:
    """The width of a tile that is the right side of a product: narrow ones of 16-bit operands are not safe, see `_narrow`."""
    return max(padded(width), 16 if dtype == torch.float32 else 32)


def _by_width(table: dict[int, Config], width: int) -> Config:
    return next(config for limit, config in table.items() if width <= limit)


def padded(width: int) -> int:
    """The width that a tile has on chip: a power of two that the tensor cores take."""
    return max(16, 1 << (width - 1).bit_length())


def forward(
    q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay: Tensor | None, state_BHKV: Tensor | None, *, return_state: bool
) -> tuple[Tensor, Tensor]:
    """Linear attention with a scalar decay.

    Args:
        q_BTGK: queries.
        k_BTGK: keys.
        v_BTHV: values.
        log_decay: None, [M, H] where M divides B and row b * M / B is that of batch b, or [B, T, H]; fp32.
        state_BHKV: S_0 in fp32, or None for zero.
        return_state: whether the final state is wanted.

    Returns:
        The outputs [B, T, H, V] in the dtype of v, and the final state [B, H, K, V] in fp32, or an empty tensor.
    """
    from kernels import walk_triton

    batch, length, heads, v_dim = v_BTHV.shape
    k_dim = k_BTGK.shape[3]
    dot = _dot_dtype(q_BTGK, k_BTGK, v_BTHV)
    config = forward_config(k_dim, dot)
    tile = tile_of(config, v_dim, dot)
    o = torch.empty_like(v_BTHV, memory_format=torch.contiguous_format)
    last = _state_like(v_BTHV, k_dim) if return_state else _nothing(v_BTHV)
    (q, k, v), strides, unit = _rows(*_narrow(dot, q_BTGK, k_BTGK, v_BTHV))
    gate, gate_strides, gate_every = _gate(log_decay, batch, v)
    walk_triton.forward_kernel[(batch * heads * -(-v_dim // tile),)](
        q, k, v, gate, v if state_BHKV is None else state_BHKV.contiguous(), o, last,
        *strides, *gate_strides, length, heads, heads // k.shape[2], gate_every,
        K=k_dim, V=v_dim, BK=padded(k_dim), BV=tile, UNIT=unit, C=config.chunk,
        GATE=_gate_kind(log_decay), FIRST=state_BHKV is not None, LAST=return_state,
        DOT=_triton_dtype(dot), PRECISION=_precision(dot), STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return o, last


def backward(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor | None,
    state_BHKV: Tensor | None,
    do_BTHV: Tensor,
    final_BHKV: Tensor | None,
    dfinal_BHKV: Tensor | None,
    *,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`.

    Args:
        q_BTGK: as for `forward`, and so are k, v, log_decay and state.
        k_BTGK: keys.
        v_BTHV: values.
        log_decay: log decays.
        state_BHKV: S_0.
        do_BTHV: gradient of the outputs.
        final_BHKV: the final state, needed for the gradient of the decays if `dfinal_BHKV` is given.
        dfinal_BHKV: gradient of the final state, or None for zero.
        gate_grad: whether the gradient of the log decays is wanted.

    Returns:
        Gradients of q, k, v, log_decay (or an empty tensor) and state (or an empty tensor).
    """
    from kernels import walk_triton

    batch, length, heads, v_dim = v_BTHV.shape
    groups, k_dim = k_BTGK.shape[2:]
    dot = _dot_dtype(q_BTGK, k_BTGK, v_BTHV)
    config = backward_config(k_dim, v_dim, dot)
    tile_k, tile_v = tile_of(config, k_dim, dot), tile_of(config, v_dim, dot)
    key_tiles, value_tiles = -(-k_dim // tile_k), -(-v_dim // tile_v)
    dq_BTHK, dk_BTHK = (x.new_empty(batch, length, heads, k_dim) for x in (q_BTGK, k_BTGK))
    dv = torch.empty_like(v_BTHV, memory_format=torch.contiguous_format)
    dfirst = _nothing(v_BTHV) if state_BHKV is None else _state_like(v_BTHV, k_dim)
    rowsums = v_BTHV.new_empty((2 * key_tiles, batch, length, heads) if gate_grad else 0, dtype=torch.float32)
    (q, k, v, do), strides, unit = _rows(*_narrow(dot, q_BTGK, k_BTGK, v_BTHV, do_BTHV))
    gate, gate_strides, gate_every = _gate(log_decay, batch, v)
    walk_triton.backward_kernel[(batch * heads * (2 * key_tiles + value_tiles),)](
        q, k, v, gate, v if state_BHKV is None else state_BHKV.contiguous(), do,
        v if dfinal_BHKV is None else dfinal_BHKV.float().contiguous(), dq_BTHK, dk_BTHK, dv, dfirst, rowsums,
        *strides, *gate_strides, length, batch, heads, heads // groups, gate_every,
        K=k_dim, V=v_dim, BK=padded(k_dim), BV=padded(v_dim), TK=tile_k, TV=tile_v, UNIT=unit, C=config.chunk,
        GATE=_gate_kind(log_decay), FIRST=state_BHKV is not None, DLAST=dfinal_BHKV is not None, GATE_GRAD=gate_grad,
        DOT=_triton_dtype(dot), PRECISION=_precision(dot), STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    if groups < heads:
        dq_BTHK, dk_BTHK = (x.unflatten(2, (groups, -1)).sum(3) for x in (dq_BTHK, dk_BTHK))
    dgate = _nothing(v_BTHV)
    if gate_grad:
        assert log_decay is not None
        dgate = _decay_gradient(rowsums, log_decay, final_BHKV, dfinal_BHKV)
    return dq_BTHK, dk_BTHK, dv, dgate, dfirst


def _decay_gradient(rowsums: Tensor, log_decay: Tensor, final_BHKV: Tensor | None, dfinal_BHKV: Tensor | None) -> Tensor:
    """Gradient of the log decays: each is part of the cumulated decay of its own and all later tokens."""
    later_BTH = rowsums.sum(0).flip(1).cumsum(1).flip(1)
    if dfinal_BHKV is not None:
        assert final_BHKV is not None
        later_BTH = later_BTH + (final_BHKV * dfinal_BHKV).sum((-2, -1))[:, None]
    if log_decay.ndim == 3:
        return later_BTH
    return later_BTH.sum(1).unflatten(0, (log_decay.shape[0], -1)).sum(1)


def _dot_dtype(*operands: Tensor) -> torch.dtype:
    """The dtype of the tensor cores' operands: the narrowest given, as autocast would have it; sums are in fp32."""
    return min((x.dtype for x in operands), key=lambda dtype: dtype.itemsize)


def _narrow(dtype: torch.dtype, *operands: Tensor) -> tuple[Tensor, ...]:
    """Operands in the dtype of the products.

    A kernel that converted them itself would read the wide ones in each walk; and where it did, Triton 3.6 built descriptors
    of 16 columns that tensor cores followed out of shared memory (fp32 values beside 16-bit keys 8 and 16 wide).
    """
    return tuple(x.to(dtype) for x in operands)


def _triton_dtype(dtype: torch.dtype) -> object:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _precision(dtype: torch.dtype) -> str | None:
    """Three TF32 products carry 22 bits; true fp32 has no tensor core, and its unrolled products do not fit the registers."""
    return "tf32x3" if dtype == torch.float32 else None


def _rows(*tensors: Tensor) -> tuple[list[Tensor], list[int], int]:
    """Tensors with unit stride in the last dimension, their other strides in units, and the unit, 8 if all allow it.

    A kernel that multiplies by the unit knows that rows start on 16 bytes, without a recompilation for each stride.
    """
    rows = [x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in tensors]
    strides = [stride for x in rows for stride in x.stride()[:3]]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return rows, [stride // unit for stride in strides], unit


def _gate(log_decay: Tensor | None, batch: int, spare: Tensor) -> tuple[Tensor, tuple[int, int], int]:
    """The log decays, their strides over rows and tokens, and how many batches share a row."""
    if log_decay is None:
        return spare, (0, 0), 1
    gate = log_decay.contiguous()
    if gate.ndim == 2:
        return gate, (gate.shape[1], 0), batch // gate.shape[0]
    return gate, (gate.shape[1] * gate.shape[2], gate.shape[2]), 1


def _gate_kind(log_decay: Tensor | None) -> int:
    from kernels import walk_triton

    if log_decay is None:
        return walk_triton.NO_GATE.value
    return (walk_triton.CONSTANT_GATE if log_decay.ndim == 2 else walk_triton.SCALAR_GATE).value


def _state_like(v_BTHV: Tensor, k_dim: int) -> Tensor:
    batch, _, heads, v_dim = v_BTHV.shape
    return v_BTHV.new_empty(batch, heads, k_dim, v_dim, dtype=torch.float32)


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)
