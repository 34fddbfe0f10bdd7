"""One walk over chunks is the whole of linear attention with scalar decays, forward and backward.

With cumulated log decay G and rows a, b [T, D], c [T, E], a walk computes

    out_i = sum_{j <= i} exp(G_i - G_j) (a_i . b_j) c_j,        in reverse: sum_{j >= i} exp(G_j - G_i) (a_i . b_j) c_j

by holding the matrix state sum_j decay_j b_j c_j^T of everything before the chunk in registers. The four uses are

    o  = walk(q, k, v)       dv = reverse walk(k, q, do)
    dq = walk(do, v, k)      dk = reverse walk(v, do, q)

so that no score matrix, no feature and no state between chunks ever reaches memory. The columns of c are split over
programs, which need no reduction among them. The gradient of the log decays follows from rowsums that two of the walks
form on the way: dL/dG_i = q_i . dq_i - k_i . dk_i, and log decay t is part of every G_i with i >= t.

Shape legend: B batch, T time, H heads, C tokens of a chunk, D width of a and b, E width of c.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry

NO_GATE, CONSTANT_GATE, SCALAR_GATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(base, stride, t_C, cols, length, WIDTH: tl.constexpr, DOT: tl.constexpr):
    """Rows t_C of a matrix with WIDTH columns, zero beyond its edges, in the dtype of the tensor cores."""
    mask = (t_C < length)[:, None] & (cols < WIDTH)[None, :]
    return tl.load(base + t_C[:, None].to(tl.int64) * stride + cols[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def _log_decays(gate, gate_stride, t_C, start, length, C: tl.constexpr, SCALAR: tl.constexpr):
    """Log2 decays of a chunk: cumulated up to and with each token, and of the whole chunk; padding does not decay."""
    if SCALAR:
        step_C = tl.load(gate + t_C.to(tl.int64) * gate_stride, mask=t_C < length, other=0.0) * LOG2_E
        return tl.cumsum(step_C, 0), tl.sum(step_C, 0)
    step = tl.load(gate) * LOG2_E
    return step * (tl.minimum(t_C + 1, length) - start).to(tl.float32), step * tl.minimum(length - start, C).to(tl.float32)


@triton.jit
def _walk(
    a, a_stride, b, b_stride, c, c_stride, out, out_stride,
    gate, gate_stride, first, last, state_d, state_e, probe, probe_stride, rowsum, rowsum_stride,
    length, e_start,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, PROBE: tl.constexpr, SIGN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One head's walk for columns e_start .. e_start + BE of c and out; see the module docstring.

    FIRST and LAST read and write the state at [d * state_d + e * state_e]. PROBE writes SIGN * sum_e probe * out for
    each row, which is this tile's part of the gradient of G.
    """
    d = tl.arange(0, BD)
    e = e_start + tl.arange(0, BE)
    i = tl.arange(0, C)
    seen = (i[:, None] <= i[None, :]) if REVERSE else (i[:, None] >= i[None, :])
    state_offsets = d[:, None] * state_d + e[None, :] * state_e
    in_state = (d < D)[:, None] & (e < E)[None, :]
    state_DE = tl.zeros([BD, BE], tl.float32)
    if FIRST:
        state_DE = tl.load(first + state_offsets, mask=in_state, other=0.0)
    n_chunks = tl.cdiv(length, C)
    for n in tl.range(0, n_chunks, num_stages=STAGES):
        start = ((n_chunks - 1 - n) if REVERSE else n) * C
        t_C = start + i
        a_CD = _load_rows(a, a_stride, t_C, d, length, D, DOT)
        b_CD = _load_rows(b, b_stride, t_C, d, length, D, DOT)
        c_CE = _load_rows(c, c_stride, t_C, e, length, E, DOT)
        scores_CC = tl.dot(a_CD, tl.trans(b_CD), input_precision=PRECISION)
        out_CE = tl.dot(a_CD, state_DE.to(DOT), input_precision=PRECISION)
        write_CE = c_CE
        if GATE != NO_GATE:
            g_C, g_all = _log_decays(gate, gate_stride, t_C, start, length, C, GATE == SCALAR_GATE)
            # Only exponents that are <= 0 are used; those of later tokens would overflow and are masked before.
            if REVERSE:
                pair_CC, read_C, keep_C = g_C[None, :] - g_C[:, None], g_all - g_C, g_C
            else:
                pair_CC, read_C, keep_C = g_C[:, None] - g_C[None, :], g_C, g_all - g_C
            scores_CC = scores_CC * tl.exp2(tl.where(seen, pair_CC, float("-inf")))
            out_CE = out_CE * tl.exp2(read_C)[:, None]
            write_CE = (c_CE.to(tl.float32) * tl.exp2(keep_C)[:, None]).to(DOT)
            state_DE = state_DE * tl.exp2(g_all)
        else:
            scores_CC = tl.where(seen, scores_CC, 0.0)
        if PROBE:
            # What a token adds to itself has no decay. It would cancel between q . dq and k . dk, and drown small gradients.
            own_C = tl.sum(tl.where(i[:, None] == i[None, :], scores_CC, 0.0), 1)
            scores_CC = tl.where(i[:, None] == i[None, :], 0.0, scores_CC)
        out_CE = tl.dot(scores_CC.to(DOT), c_CE, out_CE, input_precision=PRECISION)
        state_DE = tl.dot(tl.trans(b_CD), write_CE, state_DE, input_precision=PRECISION)
        in_out = (t_C < length)[:, None] & (e < E)[None, :]
        t_rows = t_C.to(tl.int64)
        if PROBE:
            probe_CE = tl.load(probe + t_rows[:, None] * probe_stride + e[None, :], mask=in_out, other=0.0).to(DOT)
            tl.store(rowsum + t_rows * rowsum_stride, SIGN * tl.sum(out_CE * probe_CE.to(tl.float32), 1), mask=t_C < length)
            out_CE += own_C[:, None] * c_CE.to(tl.float32)
        tl.store(out + t_rows[:, None] * out_stride + e[None, :], out_CE.to(out.dtype.element_ty), mask=in_out)
    if LAST:
        tl.store(last + state_offsets, state_DE, mask=in_state)


@entry
def forward_kernel(
    q, k, v, gate, first, o, last,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    gate_b: tl.int64, gate_t: tl.int64, length: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * value tiles,). Strides of q, k, v count UNIT elements, which tells the compiler their alignment."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    head_index, tile = program // TILES, program % TILES
    batch, head = head_index // heads, head_index % heads
    wide, shared = batch.to(tl.int64), head // group
    state = head_index.to(tl.int64) * K * V
    _walk(
        q + (wide * q_b + shared * q_h) * UNIT, q_t * UNIT, k + (wide * k_b + shared * k_h) * UNIT, k_t * UNIT,
        v + (wide * v_b + head * v_h) * UNIT, v_t * UNIT, o + (wide * length * heads + head) * V, heads * V,
        gate + (batch // gate_every) * gate_b + head, gate_t, first + state, last + state, V, 1, q, 0, q, 0,
        length, tile * BV,
        K, V, BK, BV, C, GATE, False, FIRST, LAST, False, 1, DOT, PRECISION, STAGES,
    )  # fmt: skip


@entry
def backward_kernel(
    q, k, v, gate, first, do, dlast, dq, dk, dv, dfirst, rowsums,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    do_b: tl.int64, do_t: tl.int64, do_h: tl.int64, gate_b: tl.int64, gate_t: tl.int64,
    length: tl.int32, batches: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TK: tl.constexpr, TV: tl.constexpr,
    UNIT: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, FIRST: tl.constexpr, DLAST: tl.constexpr,
    GATE_GRAD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * (2 key tiles + value tiles),); the three walks of a head are neighbours and share the L2 cache.

    Key tiles are TK wide, value tiles TV. `rowsums` is [2 key tiles, B, T, H]; its sum over the first axis is dL/dG.
    """
    KEY_TILES: tl.constexpr = (K + TK - 1) // TK
    VALUE_TILES: tl.constexpr = (V + TV - 1) // TV
    PER_HEAD: tl.constexpr = 2 * KEY_TILES + VALUE_TILES
    program = tl.program_id(0)
    head_index, part = program // PER_HEAD, program % PER_HEAD
    batch, head = head_index // heads, head_index % heads
    wide, shared = batch.to(tl.int64), head // group
    row = wide * length * heads + head
    state = head_index.to(tl.int64) * K * V
    q_base, q_stride = q + (wide * q_b + shared * q_h) * UNIT, q_t * UNIT
    k_base, k_stride = k + (wide * k_b + shared * k_h) * UNIT, k_t * UNIT
    v_base, v_stride = v + (wide * v_b + head * v_h) * UNIT, v_t * UNIT
    do_base, do_stride = do + (wide * do_b + head * do_h) * UNIT, do_t * UNIT
    gate_base = gate + (batch // gate_every) * gate_b + head
    rowsum = rowsums + part.to(tl.int64) * batches * length * heads + row
    if part < KEY_TILES:
        _walk(
            do_base, do_stride, v_base, v_stride, k_base, k_stride, dq + row * K, heads * K,
            gate_base, gate_t, first + state, dfirst, 1, V, q_base, q_stride, rowsum, heads, length, part * TK,
            V, K, BV, TK, C, GATE, False, FIRST, False, GATE_GRAD, 1, DOT, PRECISION, STAGES,
        )  # fmt: skip
    elif part < 2 * KEY_TILES:
        _walk(
            v_base, v_stride, do_base, do_stride, q_base, q_stride, dk + row * K, heads * K,
            gate_base, gate_t, dlast + state, dfirst, 1, V, k_base, k_stride, rowsum, heads, length, (part - KEY_TILES) * TK,
            V, K, BV, TK, C, GATE, True, DLAST, False, GATE_GRAD, -1, DOT, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _walk(
            k_base, k_stride, q_base, q_stride, do_base, do_stride, dv + row * V, heads * V,
            gate_base, gate_t, dlast + state, dfirst + state, V, 1, q, 0, rowsum, 0, length, (part - 2 * KEY_TILES) * TV,
            K, V, BK, TV, C, GATE, True, DLAST, FIRST, False, 1, DOT, PRECISION, STAGES,
        )  # fmt: skip
