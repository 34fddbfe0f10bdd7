"""The decoding step: a program owns some value columns of one head's state, reads them once and writes them once.

With the decayed state D = decay S and u = beta (v - D^T k), or u = v without the delta rule, the new state is D + k u^T and
its read is o = D^T q + (k . q) u. So both sums over keys are formed from the tile as it was loaded, and neither waits for
the other. A rank-one transition (RWKV-7) adds a r^T with r = b^T S to the state, and (a . q) r to the read.

Shape legend: K key, V value width, BK the padded key width, BV value columns of a program.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

NO_GATE, SCALAR_GATE, VECTOR_GATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Config(NamedTuple):
    """How the kernel is compiled.

    Args:
        elements: of the state that one program holds, key width times value columns.
        warps: warps of a program.
    """

    elements: int
    warps: int


CONFIG = Config(8192, 4)

STRIDES = ("q_b", "q_h", "k_b", "k_h", "v_b", "v_h", "gate_b", "gate_h", "beta_b", "beta_h", "a_b", "a_h", "b_b", "b_h")


@triton.jit(do_not_specialize=["heads", "group", *STRIDES])
def step_kernel(
    q, k, v, gate, beta, a, b, old, new, o,
    q_b: tl.int64, q_h: tl.int64, k_b: tl.int64, k_h: tl.int64, v_b: tl.int64, v_h: tl.int64,
    gate_b: tl.int64, gate_h: tl.int64, beta_b: tl.int64, beta_h: tl.int64,
    a_b: tl.int64, a_h: tl.int64, b_b: tl.int64, b_h: tl.int64, heads: tl.int32, group: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, RANK_ONE: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * value tiles,). `old` and `new` may be the same tensor."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    head_index, tile = program // TILES, program % TILES
    batch, head = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    shared = head // group
    i, j = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    in_state = (i < K)[:, None] & (j < V)[None, :]
    offsets = head_index.to(tl.int64) * K * V + (i[:, None] * V + j[None, :])
    state_KV = tl.load(old + offsets, mask=in_state, other=0.0).to(tl.float32)
    q_K = tl.load(q + batch * q_b + shared * q_h + i, mask=i < K, other=0.0).to(tl.float32)
    k_K = tl.load(k + batch * k_b + shared * k_h + i, mask=i < K, other=0.0).to(tl.float32)
    u_V = tl.load(v + batch * v_b + head * v_h + j, mask=j < V, other=0.0).to(tl.float32)
    if RANK_ONE:
        a_K = tl.load(a + batch * a_b + head * a_h + i, mask=i < K, other=0.0).to(tl.float32)
        b_K = tl.load(b + batch * b_b + head * b_h + i, mask=i < K, other=0.0).to(tl.float32)
        turned_V = tl.sum(b_K[:, None] * state_KV, 0)
    gate_base = gate + batch * gate_b + head * gate_h
    if GATE == SCALAR_GATE:
        state_KV *= tl.exp(tl.load(gate_base).to(tl.float32))
    elif GATE == VECTOR_GATE:
        state_KV *= tl.exp(tl.load(gate_base + i, mask=i < K, other=0.0).to(tl.float32))[:, None]
    if DELTA:
        strength = tl.load(beta + batch * beta_b + head * beta_h).to(tl.float32)
        u_V = strength * (u_V - tl.sum(k_K[:, None] * state_KV, 0))
    read_V = tl.sum(q_K[:, None] * state_KV, 0) + tl.sum(k_K * q_K, 0) * u_V
    state_KV += k_K[:, None] * u_V[None, :]
    if RANK_ONE:
        read_V += tl.sum(a_K * q_K, 0) * turned_V
        state_KV += a_K[:, None] * turned_V[None, :]
    tl.store(new + offsets, state_KV.to(new.dtype.element_ty), mask=in_state)
    tl.store(o + head_index.to(tl.int64) * V + j, read_V.to(o.dtype.element_ty), mask=j < V)


def tile_widths(k_dim: int, v_dim: int) -> tuple[int, int]:
    """The padded key width and the value columns of a program."""
    keys = max(16, triton.next_power_of_2(k_dim))
    return keys, max(1, min(CONFIG.elements // keys, triton.next_power_of_2(v_dim)))


def step(
    q_BGK: Tensor,
    k_BGK: Tensor,
    v_BHV: Tensor,
    log_decay: Tensor | None,
    beta_BH: Tensor | None,
    a_BHK: Tensor | None,
    b_BHK: Tensor | None,
    old: Tensor,
    new: Tensor,
) -> Tensor:
    """Launches the step from the contiguous state `old` to `new`; returns the output [B, H, V]."""
    batch, heads, v_dim = v_BHV.shape
    k_dim = k_BGK.shape[2]
    o_BHV = v_BHV.new_empty(batch, heads, v_dim)
    block_k, block_v = tile_widths(k_dim, v_dim)
    q, k, v = (_rows(x) for x in (q_BGK, k_BGK, v_BHV))
    gate = v if log_decay is None else log_decay if log_decay.ndim == 2 else _rows(log_decay)
    beta = v if beta_BH is None else beta_BH
    a, b = (v if x is None else _rows(x) for x in (a_BHK, b_BHK))
    strides = [stride for x in (q, k, v, gate, beta, a, b) for stride in x.stride()[:2]]
    kind = NO_GATE if log_decay is None else SCALAR_GATE if log_decay.ndim == 2 else VECTOR_GATE
    grid = (batch * heads * triton.cdiv(v_dim, block_v),)
    step_kernel[grid](
        q, k, v, gate, beta, a, b, old, new, o_BHV, *strides, heads, heads // k.shape[1],
        K=k_dim, V=v_dim, BK=block_k, BV=block_v, GATE=kind.value, DELTA=beta_BH is not None, RANK_ONE=a_BHK is not None,
        num_warps=CONFIG.warps,
    )  # fmt: skip
    return o_BHV


def _rows(x: Tensor) -> Tensor:
    """The same tensor if its last dimension is dense."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
