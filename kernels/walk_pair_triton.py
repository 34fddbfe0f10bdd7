"""Trial: fused key and value gradients, and walks on transposed outputs."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.walk_trial_triton import NO_GATE, SCALAR_GATE, _log_decays, _walk


@triton.jit
def _load_rows(base, stride, start, i, cols, length, WIDTH: tl.constexpr, DOT: tl.constexpr):
    mask = (start + i < length)[:, None] & (cols < WIDTH)[None, :]
    return tl.load(base + (start + i)[:, None].to(tl.int64) * stride + cols[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def _pair(
    q, q_stride, k, k_stride, v, v_stride, do, do_stride, dk, dk_stride, dv, dv_stride,
    gate, gate_stride, dlast, dfirst, rowsum, rowsum_stride, length,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    DLAST: tl.constexpr, DFIRST: tl.constexpr, PROBE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ks = tl.arange(0, BK)
    vs = tl.arange(0, BV)
    i = tl.arange(0, C)
    seen = i[:, None] <= i[None, :]
    own = i[:, None] == i[None, :]
    offsets = ks[:, None] * V + vs[None, :]
    inside = (ks < K)[:, None] & (vs < V)[None, :]
    state_KV = tl.zeros([BK, BV], tl.float32)
    if DLAST:
        state_KV = tl.load(dlast + offsets, mask=inside, other=0.0)
    n_chunks = tl.cdiv(length, C)
    for n in tl.range(0, n_chunks, num_stages=STAGES):
        start = (n_chunks - 1 - n) * C
        t_C = start + i
        k_CK = _load_rows(k, k_stride, start, i, ks, length, K, DOT)
        q_CK = _load_rows(q, q_stride, start, i, ks, length, K, DOT)
        do_CV = _load_rows(do, do_stride, start, i, vs, length, V, DOT)
        v_CV = _load_rows(v, v_stride, start, i, vs, length, V, DOT)
        entering_KV = state_KV.to(DOT)
        row_C1 = (t_C < length)[:, None]
        kq_CC = tl.dot(k_CK, tl.trans(q_CK), input_precision=PRECISION)
        vo_CC = tl.dot(v_CV, tl.trans(do_CV), input_precision=PRECISION)
        if GATE != NO_GATE:
            g_C, g_all = _log_decays(gate, gate_stride, t_C, start, length, C, GATE == SCALAR_GATE)
            read_C = tl.exp2(g_all - g_C)
            decay_CC = tl.exp2(tl.where(seen, g_C[None, :] - g_C[:, None], float("-inf")))
            kq_CC *= decay_CC
            if PROBE:
                pairs_CC = tl.where(own, 0.0, kq_CC * vo_CC)
                part_C = tl.sum(pairs_CC, 0) - tl.sum(pairs_CC, 1)
            vo_CC *= decay_CC
        else:
            kq_CC = tl.where(seen, kq_CC, 0.0)
            vo_CC = tl.where(seen, vo_CC, 0.0)
        kq_CC, vo_CC = kq_CC.to(DOT), vo_CC.to(DOT)
        dv_CV = tl.dot(k_CK, entering_KV, input_precision=PRECISION)
        if GATE != NO_GATE:
            dv_CV *= read_C[:, None]
        if PROBE:
            part_C -= tl.sum(dv_CV * v_CV.to(tl.float32), 1)
            tl.store(rowsum + t_C.to(tl.int64) * rowsum_stride, part_C, mask=t_C < length)
        dv_CV = tl.dot(kq_CC, do_CV, dv_CV, input_precision=PRECISION)
        tl.store(
            dv + t_C[:, None].to(tl.int64) * dv_stride + vs[None, :], dv_CV.to(dv.dtype.element_ty), mask=row_C1 & (vs < V)[None, :]
        )
        dk_CK = tl.dot(v_CV, tl.trans(entering_KV), input_precision=PRECISION)
        if GATE != NO_GATE:
            dk_CK *= read_C[:, None]
            state_KV *= tl.exp2(g_all)
        dk_CK = tl.dot(vo_CC, q_CK, dk_CK, input_precision=PRECISION)
        tl.store(
            dk + t_C[:, None].to(tl.int64) * dk_stride + ks[None, :], dk_CK.to(dk.dtype.element_ty), mask=row_C1 & (ks < K)[None, :]
        )
        write_KC = tl.trans(q_CK)
        if GATE != NO_GATE:
            write_KC = (write_KC.to(tl.float32) * tl.exp2(g_C)[None, :]).to(DOT)
        state_KV = tl.dot(write_KC, do_CV, state_KV, input_precision=PRECISION)
    if DFIRST:
        tl.store(dfirst + offsets, state_KV, mask=inside)


@triton.jit
def _turned(
    a, a_stride, b, b_stride, c, c_stride, out, out_stride,
    gate, gate_stride, first, last, state_d, state_e, probe, probe_stride, rowsum, rowsum_stride,
    length, e_start,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, PROBE: tl.constexpr, SIGN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_walk` with outputs and state transposed: columns of out are rows of every product."""
    d = tl.arange(0, BD)
    e = e_start + tl.arange(0, BE)
    i = tl.arange(0, C)
    # [j, i]: row j is read by column i
    seen = (i[:, None] >= i[None, :]) if REVERSE else (i[:, None] <= i[None, :])
    offsets = e[:, None] * state_e + d[None, :] * state_d
    inside = (e < E)[:, None] & (d < D)[None, :]
    state_ED = tl.zeros([BE, BD], tl.float32)
    if FIRST:
        state_ED = tl.load(first + offsets, mask=inside, other=0.0)
    n_chunks = tl.cdiv(length, C)
    for n in tl.range(0, n_chunks, num_stages=STAGES):
        start = ((n_chunks - 1 - n) if REVERSE else n) * C
        t_C = start + i
        b_CD = _load_rows(b, b_stride, start, i, d, length, D, DOT)
        a_CD = _load_rows(a, a_stride, start, i, d, length, D, DOT)
        c_CE = _load_rows(c, c_stride, start, i, e, length, E, DOT)
        scores_CC = tl.dot(b_CD, tl.trans(a_CD), input_precision=PRECISION)
        out_EC = tl.dot(state_ED.to(DOT), tl.trans(a_CD), input_precision=PRECISION)
        write_EC = tl.trans(c_CE)
        if GATE != NO_GATE:
            g_C, g_all = _log_decays(gate, gate_stride, t_C, start, length, C, GATE == SCALAR_GATE)
            if REVERSE:
                pair_CC, read_C, keep_C = g_C[:, None] - g_C[None, :], g_all - g_C, g_C
            else:
                pair_CC, read_C, keep_C = g_C[None, :] - g_C[:, None], g_C, g_all - g_C
            scores_CC = scores_CC * tl.exp2(tl.where(seen, pair_CC, float("-inf")))
            out_EC = out_EC * tl.exp2(read_C)[None, :]
            write_EC = (write_EC.to(tl.float32) * tl.exp2(keep_C)[None, :]).to(DOT)
            state_ED = state_ED * tl.exp2(g_all)
        else:
            scores_CC = tl.where(seen, scores_CC, 0.0)
        in_out = (t_C < length)[None, :] & (e < E)[:, None]
        if PROBE:
            probe_EC = tl.load(probe + t_C[None, :].to(tl.int64) * probe_stride + e[:, None], mask=in_out, other=0.0).to(tl.float32)
            tl.store(rowsum + t_C.to(tl.int64) * rowsum_stride, SIGN * tl.sum(out_EC * probe_EC, 0), mask=t_C < length)
        out_EC = tl.dot(tl.trans(c_CE), scores_CC.to(DOT), out_EC, input_precision=PRECISION)
        state_ED = tl.dot(write_EC, b_CD, state_ED, input_precision=PRECISION)
        tl.store(out + t_C[None, :].to(tl.int64) * out_stride + e[:, None], out_EC.to(out.dtype.element_ty), mask=in_out)
    if LAST:
        tl.store(last + offsets, state_ED, mask=inside)


@triton.jit
def _pair_turned(
    q, q_stride, k, k_stride, v, v_stride, do, do_stride, dk, dk_stride, dv, dv_stride,
    gate, gate_stride, dlast, dfirst, rowsum, rowsum_stride, length,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    DLAST: tl.constexpr, DFIRST: tl.constexpr, PROBE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ks = tl.arange(0, BK)
    vs = tl.arange(0, BV)
    i = tl.arange(0, C)
    seen = i[:, None] >= i[None, :]
    own = i[:, None] == i[None, :]
    offsets = ks[:, None] * V + vs[None, :]
    inside = (ks < K)[:, None] & (vs < V)[None, :]
    state_KV = tl.zeros([BK, BV], tl.float32)
    if DLAST:
        state_KV = tl.load(dlast + offsets, mask=inside, other=0.0)
    n_chunks = tl.cdiv(length, C)
    for n in tl.range(0, n_chunks, num_stages=STAGES):
        start = (n_chunks - 1 - n) * C
        t_C = start + i
        k_CK = _load_rows(k, k_stride, start, i, ks, length, K, DOT)
        q_CK = _load_rows(q, q_stride, start, i, ks, length, K, DOT)
        do_CV = _load_rows(do, do_stride, start, i, vs, length, V, DOT)
        v_CV = _load_rows(v, v_stride, start, i, vs, length, V, DOT)
        entering_KV = state_KV.to(DOT)
        row_1C = (t_C < length)[None, :]
        qk_CC = tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION)
        ov_CC = tl.dot(do_CV, tl.trans(v_CV), input_precision=PRECISION)
        if GATE != NO_GATE:
            g_C, g_all = _log_decays(gate, gate_stride, t_C, start, length, C, GATE == SCALAR_GATE)
            read_C = tl.exp2(g_all - g_C)
            decay_CC = tl.exp2(tl.where(seen, g_C[:, None] - g_C[None, :], float("-inf")))
            qk_CC *= decay_CC
            if PROBE:
                pairs_CC = tl.where(own, 0.0, qk_CC * ov_CC)
                part_C = tl.sum(pairs_CC, 1) - tl.sum(pairs_CC, 0)
            ov_CC *= decay_CC
        else:
            qk_CC = tl.where(seen, qk_CC, 0.0)
            ov_CC = tl.where(seen, ov_CC, 0.0)
        qk_CC, ov_CC = qk_CC.to(DOT), ov_CC.to(DOT)
        dv_VC = tl.dot(tl.trans(entering_KV), tl.trans(k_CK), input_precision=PRECISION)
        if GATE != NO_GATE:
            dv_VC *= read_C[None, :]
        if PROBE:
            part_C -= tl.sum(dv_VC * tl.trans(v_CV).to(tl.float32), 0)
            tl.store(rowsum + t_C.to(tl.int64) * rowsum_stride, part_C, mask=t_C < length)
        dv_VC = tl.dot(tl.trans(do_CV), qk_CC, dv_VC, input_precision=PRECISION)
        tl.store(
            dv + t_C[None, :].to(tl.int64) * dv_stride + vs[:, None], dv_VC.to(dv.dtype.element_ty), mask=row_1C & (vs < V)[:, None]
        )
        dk_KC = tl.dot(entering_KV, tl.trans(v_CV), input_precision=PRECISION)
        if GATE != NO_GATE:
            dk_KC *= read_C[None, :]
            state_KV *= tl.exp2(g_all)
        dk_KC = tl.dot(tl.trans(q_CK), ov_CC, dk_KC, input_precision=PRECISION)
        tl.store(
            dk + t_C[None, :].to(tl.int64) * dk_stride + ks[:, None], dk_KC.to(dk.dtype.element_ty), mask=row_1C & (ks < K)[:, None]
        )
        write_KC = tl.trans(q_CK)
        if GATE != NO_GATE:
            write_KC = (write_KC.to(tl.float32) * tl.exp2(g_C)[None, :]).to(DOT)
        state_KV = tl.dot(write_KC, do_CV, state_KV, input_precision=PRECISION)
    if DFIRST:
        tl.store(dfirst + offsets, state_KV, mask=inside)


@triton.jit
def turned_forward_kernel(
    q, k, v, gate, first, o, last,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    gate_b: tl.int64, gate_t: tl.int64, length: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    head_index, tile = program // TILES, program % TILES
    batch, head = head_index // heads, head_index % heads
    wide, shared = batch.to(tl.int64), head // group
    state = head_index.to(tl.int64) * K * V
    _turned(
        q + (wide * q_b + shared * q_h) * UNIT, q_t * UNIT, k + (wide * k_b + shared * k_h) * UNIT, k_t * UNIT,
        v + (wide * v_b + head * v_h) * UNIT, v_t * UNIT, o + (wide * length * heads + head) * V, heads * V,
        gate + (batch // gate_every) * gate_b + head, gate_t, first + state, last + state, V, 1, q, 0, q, 0,
        length, tile * BV,
        K, V, BK, BV, C, GATE, False, FIRST, LAST, False, 1, DOT, PRECISION, STAGES,
    )  # fmt: skip


@triton.jit
def pair_backward_kernel(
    q, k, v, gate, first, do, dlast, dq, dk, dv, dfirst, rowsums,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    do_b: tl.int64, do_t: tl.int64, do_h: tl.int64, gate_b: tl.int64, gate_t: tl.int64,
    length: tl.int32, batches: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TK: tl.constexpr, ROLES: tl.constexpr,
    TURNED: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, FIRST: tl.constexpr, DLAST: tl.constexpr,
    GATE_GRAD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROLES: 0 both, 1 only queries, 2 only keys and values."""
    QUERY_TILES: tl.constexpr = 0 if ROLES == 2 else (K + TK - 1) // TK
    PER_HEAD: tl.constexpr = QUERY_TILES + (0 if ROLES == 1 else 1)
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
    if ROLES != 1 and part == PER_HEAD - 1:
        rowsum = rowsums + row
        if TURNED:
            _pair_turned(
                q_base, q_stride, k_base, k_stride, v_base, v_stride, do_base, do_stride, dk + row * K, heads * K,
                dv + row * V, heads * V, gate_base, gate_t, dlast + state, dfirst + state, rowsum, heads, length,
                K, V, BK, BV, C, GATE, DLAST, FIRST, GATE_GRAD, DOT, PRECISION, STAGES,
            )  # fmt: skip
        else:
            _pair(
                q_base, q_stride, k_base, k_stride, v_base, v_stride, do_base, do_stride, dk + row * K, heads * K,
                dv + row * V, heads * V, gate_base, gate_t, dlast + state, dfirst + state, rowsum, heads, length,
                K, V, BK, BV, C, GATE, DLAST, FIRST, GATE_GRAD, DOT, PRECISION, STAGES,
            )  # fmt: skip
    elif ROLES != 2:
        rowsum = rowsums + (1 + part).to(tl.int64) * batches * length * heads + row
        if TURNED:
            _turned(
                do_base, do_stride, v_base, v_stride, k_base, k_stride, dq + row * K, heads * K,
                gate_base, gate_t, first + state, dfirst, 1, V, q_base, q_stride, rowsum, heads, length, part * TK,
                V, K, BV, TK, C, GATE, False, FIRST, False, GATE_GRAD, 1, DOT, PRECISION, STAGES,
            )  # fmt: skip
        else:
            _walk(
                do_base, do_stride, v_base, v_stride, k_base, k_stride, dq + row * K, heads * K,
                gate_base, gate_t, first + state, dfirst, 1, V, q_base, q_stride, rowsum, heads, length, part * TK,
                V, K, BV, TK, C, GATE, False, FIRST, False, GATE_GRAD, 1, DOT, PRECISION, STAGES,
            )  # fmt: skip


@triton.jit
def one_kernel(
    q, k, v, gate, first, do, dlast, dq, dk, dv, dfirst, rowsums,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    do_b: tl.int64, do_t: tl.int64, do_h: tl.int64, gate_b: tl.int64, gate_t: tl.int64,
    length: tl.int32, batches: tl.int32, heads: tl.int32, group: tl.int32, gate_every: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TK: tl.constexpr, TV: tl.constexpr, ROLE: tl.constexpr,
    UNIT: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, FIRST: tl.constexpr, DLAST: tl.constexpr,
    GATE_GRAD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    KEY_TILES: tl.constexpr = (K + TK - 1) // TK
    VALUE_TILES: tl.constexpr = (V + TV - 1) // TV
    PER_HEAD: tl.constexpr = VALUE_TILES if ROLE == 2 else KEY_TILES
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
    if ROLE == 0:
        _walk(
            do_base, do_stride, v_base, v_stride, k_base, k_stride, dq + row * K, heads * K,
            gate_base, gate_t, first + state, dfirst, 1, V, q_base, q_stride, rowsum, heads, length, part * TK,
            V, K, BV, TK, C, GATE, False, FIRST, False, GATE_GRAD, 1, DOT, PRECISION, STAGES,
        )  # fmt: skip
    elif ROLE == 1:
        _walk(
            v_base, v_stride, do_base, do_stride, q_base, q_stride, dk + row * K, heads * K,
            gate_base, gate_t, dlast + state, dfirst, 1, V, k_base, k_stride, rowsum, heads, length, part * TK,
            V, K, BV, TK, C, GATE, True, DLAST, False, GATE_GRAD, -1, DOT, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _walk(
            k_base, k_stride, q_base, q_stride, do_base, do_stride, dv + row * V, heads * V,
            gate_base, gate_t, dlast + state, dfirst + state, V, 1, q, 0, rowsum, 0, length, part * TV,
            K, V, BK, TV, C, GATE, True, DLAST, FIRST, False, 1, DOT, PRECISION, STAGES,
        )  # fmt: skip
