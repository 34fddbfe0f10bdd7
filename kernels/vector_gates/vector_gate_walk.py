"""The walks over chunks, forward and in reverse, which hold the state and its gradient in registers.

Forward, with the names of `kernels.vector_gates.vector_gate_prepare` and the factors of `kernels.vector_gates.vector_gate_middle`:

    S_m = enter S,  R = V - K' S_m,  E = R - H (beta R),  U = beta E,  O = Q' S_m + P U,  S <- leave (carry S_m + W^T U)

In reverse, with dS the gradient of the state that leaves the chunk:

    dS_m = leave dS,  dU = P^T dO + W dS_m,  Z = dU - H^T (beta dU),  dbeta = rowsum(E o Z),  dV = beta Z
    dS <- enter (carry dS_m + Q'^T dO - K'^T dV)

Without the delta rule E is V and dV is dU. The columns of the state are split over programs, and where there are few heads the
chunks too, since without the delta rule a segment of them only multiplies rows of the state: a first walk finds what each
segment adds to a state, `join_kernel` what enters it, and the second walk is that of all segments at once.

Shape legend: B batch, T time, H heads, N chunks, C tokens of a chunk, K key, V value width; KP and VP are padded widths.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry
from kernels.vector_gates.vector_gate_middle import load_factors
from kernels.vector_gates.vector_gate_rows import SIZES, load_beta, load_rows, store_rows


@triton.jit
def _program(
    heads, segments, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """What a program of a walk works on: its place among all, rows and columns, and where they are in dense memory.

    Returns:
        The segment among all, the tile of values, the head among all, the number of the segment, batch and head; tokens of a
        chunk, key channels, columns of values; places in [C, KP], in [C, C] and in a state [K, V], and which of these exist.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    index, tile = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES
    head_index, segment = index // segments, (index % segments).to(tl.int32)
    batch, head = head_index // heads, head_index % heads
    i_C, d_K, e_V = tl.arange(0, C), tl.arange(0, KP), tile * BV + tl.arange(0, BV)
    by_key_CK, square_CC = i_C[:, None] * KP + d_K[None, :], i_C[:, None] * C + i_C[None, :]
    by_state = d_K[:, None] * V + e_V[None, :]
    in_state = (d_K < K)[:, None] & (e_V < V)[None, :]
    places = (by_key_CK, square_CC, by_state, in_state)
    return (index, tile, head_index, segment, batch, head), (i_C, d_K, e_V), places


@entry(do_not_specialize=SIZES)
def walk_kernel(
    factors, reads, writes, erases, scores, couplings, v, beta, first, o, last, states, errors, decays,
    v_b: tl.int64, v_t: tl.int32, v_h: tl.int64, length: tl.int32, heads: tl.int32, segments: tl.int32, per: tl.int32,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr,
    C: tl.constexpr, DELTA: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, KEEP: tl.constexpr, OUT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * segments * value tiles,); a segment has `per` chunks.

    KEEP writes S_m of each chunk to states, [B, H, N, KP, VP], and with the delta rule E to errors, [B, T, H, V], for the
    gradients. Without OUT only the state that a segment makes out of none goes to last, [B, H, segments, K, V], and its decay to
    decays, [B, H, segments, KP]; `first` has a state for each segment, too.
    """
    at, rows, places = _program(heads, segments, K, V, KP, BV, C)
    index, tile, head_index, segment, batch, head = at
    i_C, d_K, e_V = rows
    by_key_CK, square_CC, by_state, in_state = places
    v += (batch * v_b + head * v_h) * UNIT
    row = batch * length * heads + head
    state_KV = tl.zeros([KP, BV], tl.float32)
    if FIRST:
        state_KV = tl.load(first + index * K * V + by_state, mask=in_state, other=0.0)
    decay_K = tl.zeros([KP], tl.float32) + 1.0
    chunks = tl.cdiv(length, C)
    for n in tl.range(segment * per, tl.minimum(segment * per + per, chunks), num_stages=STAGES):
        block = head_index * chunks + n
        start, left = tl.cast(n, tl.int64) * C, length - n * C
        here = row + start * heads
        write_CK = tl.load(writes + block * C * KP + by_key_CK)
        enter_K, carry_K, leave_K = load_factors(factors, block, d_K, KP)
        u_CV = load_rows(v + start * v_t * UNIT, v_t * UNIT, i_C, e_V, left, V, DOT)
        state_KV *= enter_K[:, None]
        before_KV = state_KV.to(DOT)
        if DELTA:
            beta_C = load_beta(beta + here, heads, i_C, left)
            coupling_CC = tl.load(couplings + block * C * C + square_CC)
            erase_CK = tl.load(erases + block * C * KP + by_key_CK)
            error_CV = u_CV.to(tl.float32) - tl.dot(erase_CK, before_KV, input_precision=PRECISION)
            error_CV -= tl.dot(coupling_CC, (error_CV * beta_C[:, None]).to(DOT), input_precision=PRECISION)
            if KEEP:
                store_rows(errors + here * V, heads * V, i_C, e_V, left, error_CV, V)
            u_CV = (error_CV * beta_C[:, None]).to(DOT)
        if OUT:
            read_CK = tl.load(reads + block * C * KP + by_key_CK)
            score_CC = tl.load(scores + block * C * C + square_CC)
            o_CV = tl.dot(read_CK, before_KV, input_precision=PRECISION)
            o_CV = tl.dot(score_CC, u_CV, o_CV, input_precision=PRECISION)
            if KEEP:  # late, since their way out may then share memory with the operand that they were
                tl.store(states + block * KP * VP + d_K[:, None] * VP + e_V[None, :], before_KV)
            store_rows(o + here * V, heads * V, i_C, e_V, left, o_CV, V)
        else:
            decay_K *= enter_K * carry_K * leave_K
        state_KV = tl.dot(tl.trans(write_CK), u_CV, state_KV * carry_K[:, None], input_precision=PRECISION) * leave_K[:, None]
    if not OUT:
        tl.store(last + index * K * V + by_state, state_KV, mask=in_state)
        tl.store(decays + index * KP + d_K, decay_K, mask=(d_K < KP) & (tile == 0))
    elif LAST:
        tl.store(last + head_index * K * V + by_state, state_KV, mask=in_state & (segment == segments - 1))


@triton.jit
def _through_erasure(
    du_CV, grad_KV, erase_CK, coupling_CC, errors, beta, dbeta, heads, i_C, e_V, left,
    V: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DV, and dS less what the erasure of the chunk has read; writes dbeta."""
    beta_C = load_beta(beta, heads, i_C, left)
    error_CV = load_rows(errors, heads * V, i_C, e_V, left, V, tl.float32)
    du_CV -= tl.dot(tl.trans(coupling_CC), (beta_C[:, None] * du_CV).to(DOT), input_precision=PRECISION)
    tl.store(dbeta + i_C * heads, tl.sum(du_CV * error_CV, 1), mask=i_C < left)
    du_CV *= beta_C[:, None]
    return du_CV, tl.dot(tl.trans(erase_CK), (-du_CV).to(DOT), grad_KV, input_precision=PRECISION)


@entry(do_not_specialize=SIZES)
def reverse_kernel(
    factors, reads, writes, erases, scores, couplings, errors, do, beta, dlast, dv, dbeta, dfirst, dstates, decays,
    do_b: tl.int64, do_t: tl.int32, do_h: tl.int64, length: tl.int32, batches: tl.int32, heads: tl.int32, segments: tl.int32,
    per: tl.int32,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr,
    C: tl.constexpr, DELTA: tl.constexpr, FIRST: tl.constexpr, DLAST: tl.constexpr, OUT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * value tiles,). dstates, [B, H, N, KP, VP], gets dS_m of each chunk.

    dbeta is [value tiles, B, T, H], to be summed over the first axis. FIRST writes dfirst, the gradient of S_0. Without OUT
    only the gradient that a segment makes out of none goes to dfirst, [B, H, segments, K, V], and its decay to decays,
    [B, H, segments, KP]; `dlast` has a gradient for each segment, too.
    """
    at, rows, places = _program(heads, segments, K, V, KP, BV, C)
    index, tile, head_index, segment, batch, head = at
    i_C, d_K, e_V = rows
    by_key_CK, square_CC, by_state, in_state = places
    do += (batch * do_b + head * do_h) * UNIT
    row = batch * length * heads + head
    dbeta += (tile.to(tl.int64) * batches * length * heads) + row
    grad_KV = tl.zeros([KP, BV], tl.float32)
    if DLAST:
        grad_KV = tl.load(dlast + index * K * V + by_state, mask=in_state, other=0.0)
    decay_K = tl.zeros([KP], tl.float32) + 1.0
    chunks = tl.cdiv(length, C)
    begin, end = segment * per, tl.minimum(segment * per + per, chunks)
    for step in tl.range(0, end - begin, num_stages=STAGES):
        n = end - 1 - step
        block = head_index * chunks + n
        start, left = tl.cast(n, tl.int64) * C, length - n * C
        here = row + start * heads
        read_CK = tl.load(reads + block * C * KP + by_key_CK)
        enter_K, carry_K, leave_K = load_factors(factors, block, d_K, KP)
        do_CV = load_rows(do + start * do_t * UNIT, do_t * UNIT, i_C, e_V, left, V, DOT)
        grad_KV *= leave_K[:, None]
        if OUT:
            write_CK = tl.load(writes + block * C * KP + by_key_CK)
            score_CC = tl.load(scores + block * C * C + square_CC)
            after_KV = grad_KV.to(DOT)
            du_CV = tl.dot(tl.trans(score_CC), do_CV, input_precision=PRECISION)
            du_CV = tl.dot(write_CK, after_KV, du_CV, input_precision=PRECISION)
            tl.store(dstates + block * KP * VP + d_K[:, None] * VP + e_V[None, :], after_KV)
        else:
            decay_K *= enter_K * carry_K * leave_K
        grad_KV = tl.dot(tl.trans(read_CK), do_CV, grad_KV * carry_K[:, None], input_precision=PRECISION)
        if DELTA:
            du_CV, grad_KV = _through_erasure(
                du_CV, grad_KV, tl.load(erases + block * C * KP + by_key_CK), tl.load(couplings + block * C * C + square_CC),
                errors + here * V, beta + here, dbeta + start * heads, heads, i_C, e_V, left, V, DOT, PRECISION,
            )  # fmt: skip
        if OUT:
            store_rows(dv + here * V, heads * V, i_C, e_V, left, du_CV, V)
        grad_KV *= enter_K[:, None]
    if not OUT:
        tl.store(dfirst + index * K * V + by_state, grad_KV, mask=in_state)
        tl.store(decays + index * KP + d_K, decay_K, mask=(d_K < KP) & (tile == 0))
    elif FIRST:
        tl.store(dfirst + head_index * K * V + by_state, grad_KV, mask=in_state & (segment == 0))


@entry(do_not_specialize=SIZES)
def join_kernel(
    sums, decays, first, segments: tl.int32,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turns what segments add to a state into the state that enters each, in place. Grid: (B * H * tiles of K V,).

    sums is [B, H, segments, K, V], decays [B, H, segments, KP]; REVERSE for the gradients, which come from behind.
    """
    TILES: tl.constexpr = (K * V + BLOCK - 1) // BLOCK
    head_index, tile = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES
    element = tile * BLOCK + tl.arange(0, BLOCK)
    inside = element < K * V
    state = tl.zeros([BLOCK], tl.float32)
    if FIRST:
        state = tl.load(first + head_index * K * V + element, mask=inside, other=0.0)
    for step in tl.range(0, segments):
        index = head_index * segments + (segments - 1 - step if REVERSE else step)
        own = tl.load(sums + index * K * V + element, mask=inside, other=0.0)
        tl.store(sums + index * K * V + element, state, mask=inside)
        state = state * tl.load(decays + index * KP + element // V, mask=inside, other=0.0) + own
