"""Launches the kernels of Taylor linear attention on torch tensors: configurations, strides and allocations.

Shape legend: B batch, T time, H heads, K width of q and k, V width of v, N chunks, R rows of the sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.operands import _dot_dtype, _narrow, _precision, _rows, _triton_dtype, padded, product_width

MAX_KEY, MAX_VALUE = 64, 256
SCAN_BLOCK = 1024


class Config(NamedTuple):
    """How a kernel is compiled.

    Args:
        queries: queries of a tile.
        keys: keys of a tile, or tokens of a step of the sums.
        rows: rows of the sums of a tile.
        warps: warps of a program.
        stages: depth of the software pipeline that loads tiles.
        registers: most registers of a thread, None for as many as the compiler likes; fewer let more programs share an SM.
        row_stages: depth of the pipeline that loads tiles of the sums that enter a chunk.
    """

    queries: int
    keys: int
    rows: int
    warps: int
    stages: int
    registers: int | None = None
    row_stages: int = 1


class Configs(NamedTuple):
    """The configurations of the four kernels with matrix products."""

    forward: Config
    state: Config
    query: Config
    key: Config


# By the width of v (the first at least as large counts), for 16-bit and for fp32 operands.
SIXTEEN_BIT = {
    64: Configs(
        Config(64, 64, 32, 4, 3, registers=128), Config(0, 64, 64, 4, 3), Config(64, 64, 32, 4, 3), Config(64, 64, 32, 4, 2)
    ),
    128: Configs(Config(128, 64, 64, 8, 2), Config(0, 64, 64, 4, 2), Config(64, 64, 64, 4, 2), Config(64, 64, 64, 8, 2)),
    256: Configs(Config(128, 64, 64, 8, 2), Config(0, 64, 64, 4, 2), Config(64, 32, 32, 8, 1), Config(32, 64, 32, 8, 1)),
}
FP32 = {
    64: Configs(*[Config(32, 32, 32, 4, 1)] * 3, Config(16, 32, 16, 8, 1)),
    128: Configs(*[Config(32, 32, 16, 4, 1)] * 2, Config(16, 16, 16, 4, 1), Config(16, 32, 16, 8, 1)),
    256: Configs(*[Config(16, 16, 16, 4, 1)] * 4),
}
VALUE_TILE = 128
WALKED, WALK_STEP, WALK_ROWS, WALK_WARPS, WALK_STAGES = (16, 64), 128, 32, 8, 3
"""Widths of heads whose sequences are walked whole where they fill the chip; tokens of a step, rows of a tile, warps, stages."""
WALKED_FROM, MULTIPROCESSORS = 2048, 132
"""Fewest tokens of such a sequence, and how many are walked at a time on the device where that was measured."""
# Tokens of a chunk by the width of q: features cost about K^2 / 2 rows a token, scores half a chunk of them.
CHUNKS = {8: 256, 16: 512, 24: 1024, 32: 2048, 64: 8192}


def configs(v_dim: int, dtype: torch.dtype) -> Configs:
    """The shipped configurations."""
    table = FP32 if dtype == torch.float32 else SIXTEEN_BIT
    return next(config for limit, config in table.items() if v_dim <= limit)


def chunk_length(k_dim: int) -> int:
    """Tokens of a chunk."""
    return next(length for limit, length in CHUNKS.items() if k_dim <= limit)


def n_rows(k_dim: int) -> int:
    """R, the rows of the sums of monomials."""
    return 1 + k_dim + k_dim * (k_dim + 1) // 2


class _Call(NamedTuple):
    """What the launches of one call share."""

    batch: int
    length: int
    heads: int
    k_dim: int
    v_dim: int
    chunk: int
    chunks: int
    dot: torch.dtype
    wide: torch.dtype

    def constants(self) -> dict[str, object]:
        """Compile-time arguments of every kernel with matrix products."""
        types = {"DOT": _triton_dtype(self.dot), "WIDE": _triton_dtype(self.wide), "PRECISION": _precision(self.dot)}
        return {"K": self.k_dim, "V": self.v_dim, "BK": padded(self.k_dim), **types}


def _call(q: Tensor, k: Tensor, v: Tensor) -> _Call:
    batch, length, heads, v_dim = v.shape
    chunk = chunk_length(k.shape[3])
    dot = _dot_dtype(q, k, v)
    # sums of many products leave the range of fp16
    wide = dot if dot == torch.float32 else torch.bfloat16
    return _Call(batch, length, heads, k.shape[3], v_dim, chunk, -(-length // chunk), dot, wide)


def forward(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, first: Tensor | None, first_norm: Tensor | None,
    norm: bool, eps: float, last: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Taylor linear attention.

    Args:
        q_BTHK: queries.
        k_BTHK: keys.
        v_BTHV: values.
        first: sums of monomials before the first token, [B, H, R, V] in fp32, or None for zero.
        first_norm: the normaliser's, [B, H, R], with `first` if `norm`.
        norm: whether outputs are divided by the sum of their weights.
        eps: added to that sum.
        last: whether the sums after the last token are wanted.

    Returns:
        The outputs in the dtype of v; 1 / (sum of weights + eps) [B, T, H]; the sums that enter each chunk, weighted, [B, H,
        N, R, V], and the normaliser's [B, H, N, R]; the last sums and the normaliser's. What is not needed is empty.
    """
    from kernels.taylor_features import taylor_triton

    call = _call(q_BTHK, k_BTHK, v_BTHV)
    if not (norm or last) and first is None and walks(call):
        return _walk(call, q_BTHK, k_BTHK, v_BTHV)
    config = configs(call.v_dim, call.dot).forward
    y = torch.empty_like(v_BTHV, memory_format=torch.contiguous_format)
    scale = _fresh(v_BTHV, *(call.batch, call.length, call.heads) if norm else (0,))
    entering = _entering(call, k_BTHK, v_BTHV, None, first, first_norm, norm=norm, last=last)
    (q, k, v), strides, unit = _rows(*_narrow(call.dot, q_BTHK, k_BTHK, v_BTHV))
    tile = min(VALUE_TILE, product_width(call.v_dim, call.dot))
    blocks = -(-call.length // config.queries) * -(-call.v_dim // tile)
    taylor_triton.forward_kernel[(call.batch * call.heads * blocks,)](
        q, k, v, entering[0], entering[1], y, scale, *strides, call.length, call.heads, call.chunk, call.chunks, eps,
        **call.constants(), BV=tile, BF=config.rows, UNIT=unit, BM=config.queries, BN=config.keys, NORM=norm,
        FIRST=first is not None, STAGES=config.stages, ROW_STAGES=config.row_stages, num_warps=config.warps,
        maxnreg=config.registers,
    )  # fmt: skip
    return y, scale, *entering


def walks(call: _Call) -> bool:
    """Whether each program walks over a sequence: long ones, as many as leave few multiprocessors idle."""
    sequences = call.batch * call.heads
    waves = -(-sequences // MULTIPROCESSORS)
    fits = (call.k_dim, call.v_dim) == WALKED and call.dot == torch.bfloat16 and call.length >= WALKED_FROM
    return fits and sequences >= 0.9 * waves * MULTIPROCESSORS


def _walk(call: _Call, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor) -> tuple[Tensor, ...]:
    """What `forward` returns without a division, and without sums before or after the tokens."""
    from kernels.taylor_features import taylor_walk_triton

    y = torch.empty_like(v_BTHV, memory_format=torch.contiguous_format)
    shape = (call.batch, call.heads, call.chunks, n_rows(call.k_dim), call.v_dim)
    entering, nothing = v_BTHV.new_empty(shape, dtype=call.wide), [_fresh(v_BTHV, 0) for _ in range(4)]
    (q, k, v), strides, unit = _rows(*_narrow(call.dot, q_BTHK, k_BTHK, v_BTHV))
    taylor_walk_triton.walk_kernel[(call.batch * call.heads,)](
        q, k, v, entering, y, *strides, call.length, call.heads, call.chunk, call.chunks, **call.constants(),
        BV=product_width(call.v_dim, call.dot), F=WALK_ROWS, UNIT=unit, C=WALK_STEP, STAGES=WALK_STAGES, num_warps=WALK_WARPS,
    )  # fmt: skip
    return y, nothing[0], entering, *nothing[1:]


def backward(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, y: Tensor, scale: Tensor, entering: Tensor, entering_norm: Tensor,
    dy_BTHV: Tensor, dlast: Tensor | None, dlast_norm: Tensor | None, norm: bool, first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of `forward`.

    Args:
        q_BTHK: as for `forward`, and so are k and v.
        k_BTHK: keys.
        v_BTHV: values.
        y: what `forward` returned, and so are scale, entering and entering_norm.
        scale: 1 / (sum of weights + eps).
        entering: sums that enter each chunk.
        entering_norm: the normaliser's.
        dy_BTHV: gradient of the outputs.
        dlast: gradient of the last sums, or None for zero.
        dlast_norm: gradient of the normaliser's.
        norm: as for `forward`.
        first: whether sums enter the first chunk, whose gradient is then wanted.

    Returns:
        Gradients of q, k, v, and of the first sums and the normaliser's, empty without `first`.
    """
    from kernels.taylor_features import taylor_grad_triton

    call = _call(q_BTHK, k_BTHK, v_BTHV)
    chosen = configs(call.v_dim, call.dot)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BTHK, k_BTHK, v_BTHV))
    (q, k, v, dy), strides, unit = _rows(*_narrow(call.dot, q_BTHK, k_BTHK, v_BTHV, dy_BTHV))
    shift = _fresh(v_BTHV, *scale.shape)
    sizes = (call.length, call.heads, call.chunk, call.chunks)
    shared = {**call.constants(), "BV": product_width(call.v_dim, call.dot), "UNIT": unit, "NORM": norm}
    query, key = chosen.query, chosen.key
    taylor_grad_triton.query_kernel[(call.batch * call.heads * -(-call.length // query.queries),)](
        q, k, v, entering, entering_norm, y, dy, scale, dq, shift, *strides, *sizes, **shared, BF=query.rows,
        BM=query.queries, BN=query.keys, FIRST=first, STAGES=query.stages,
        ROW_STAGES=query.row_stages, num_warps=query.warps, maxnreg=query.registers,
    )  # fmt: skip
    leaving, leaving_norm, dfirst, dfirst_norm = _entering(
        call, q_BTHK, dy_BTHV, (scale, shift), dlast, dlast_norm, norm=norm, last=first
    )
    taylor_grad_triton.key_kernel[(call.batch * call.heads * -(-call.length // key.keys),)](
        q, k, v, leaving, leaving_norm, dy, scale, shift, dk, dv, *strides, *sizes, **shared, BF=key.rows,
        BM=key.queries, BN=key.keys, LAST=dlast is not None, STAGES=key.stages,
        ROW_STAGES=key.row_stages, num_warps=key.warps, maxnreg=key.registers,
    )  # fmt: skip
    return dq, dk, dv, dfirst, dfirst_norm


def _entering(
    call: _Call, x: Tensor, c: Tensor, rescale: tuple[Tensor, Tensor] | None, first: Tensor | None, first_norm: Tensor | None,
    *, norm: bool, last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sums of monomials of x times c that enter each chunk, from the past or, with `rescale`, from the future.

    Returns:
        Weighted sums and the normaliser's for each chunk, and the plain sums of everything (with `rescale`: weighted).
    """
    from kernels.taylor_features import taylor_triton

    # The last chunk is read by none, the first in reverse, unless the sum of everything is wanted.
    reverse = rescale is not None
    low, high = (0 if last else 1, call.chunks) if reverse else (0, call.chunks if last else call.chunks - 1)
    if call.chunks == 1 and first is None and not last:
        return c.new_empty(0, dtype=call.wide), *(_fresh(c, 0) for _ in range(3))
    rows = n_rows(call.k_dim)
    shape = (call.batch, call.heads, call.chunks, rows)
    sums, norms = c.new_empty(*shape, call.v_dim, dtype=call.wide), _fresh(c, *shape if norm else (0,))
    entering, entering_norm = torch.empty_like(sums), torch.empty_like(norms)
    end, end_norm = (_fresh(c, *size) if last else _fresh(c, 0) for size in ((*shape[:2], rows, call.v_dim), (*shape[:2], rows)))
    end_norm = end_norm if norm else _fresh(c, 0)
    if high > low:
        (x, c), strides, unit = _rows(*_narrow(call.dot, x, c))
        config, tile = configs(call.v_dim, call.dot).state, min(VALUE_TILE, product_width(call.v_dim, call.dot))
        tiles = -(-rows // config.rows) * -(-call.v_dim // tile)
        scale, shift = rescale if rescale is not None else (sums, sums)
        taylor_triton.state_kernel[(call.batch * call.heads * (high - low) * tiles,)](
            x, c, scale, shift, sums, norms, *strides, call.length, call.heads, call.chunk, low, high - low, call.chunks,
            **call.constants(), BV=tile, BF=config.rows, UNIT=unit, BT=config.keys, NORM=norm, WEIGHTED=reverse,
            STAGES=config.stages, num_warps=config.warps, maxnreg=config.registers,
        )  # fmt: skip
    tiles = -(-rows * call.v_dim // SCAN_BLOCK) + (-(-rows // SCAN_BLOCK) if norm else 0)
    taylor_triton.scan_kernel[(call.batch * call.heads * tiles,)](
        sums, norms, sums if first is None else first.contiguous(), norms if first_norm is None else first_norm.contiguous(),
        entering, entering_norm, end, end_norm, call.chunks, low, high, K=call.k_dim, V=call.v_dim, BLOCK=SCAN_BLOCK,
        NORM=norm, REVERSE=reverse, FIRST=first is not None, LAST=last, num_warps=4,
    )  # fmt: skip
    return entering, entering_norm, end, end_norm


def _fresh(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
