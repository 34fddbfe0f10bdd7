"""The walks with transposed outputs: the rows of every product are columns of outputs instead of tokens of a chunk.

Then a product's left operand is the state or a transposed tile of values, which 8 warps can share where the 64 tokens of a
chunk would be given twice to 4 of them. Which of the two forms is faster depends on widths and gates (docs/kernels.md).

Shape legend: C tokens of a chunk, D width of a and b, E width of c, K key, V value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.walks.walk_triton import FULL_PROBE, NO_GATE, SCALAR_GATE, STATE_PROBE, _load_rows, _log_decays


@triton.jit
def _walk_turned(
    a, a_stride, b, b_stride, c, c_stride, out, out_stride,
    gate, gate_stride, state_ED, probe, probe_stride, rowsum, length, e_start,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, PROBE: tl.constexpr, SIGN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`kernels.walks.walk_triton._walk` with columns of c as the rows of every product and of the state; returns the last state."""
    d = tl.arange(0, BD)
    e = e_start + tl.arange(0, BE)
    i = tl.arange(0, C)
    # scores[j, i] is what row j gives to row i
    seen = (i[:, None] >= i[None, :]) if REVERSE else (i[:, None] <= i[None, :])
    n_chunks = tl.cdiv(length, C)
    for n in tl.range(0, n_chunks, num_stages=STAGES):
        start = ((n_chunks - 1 - n) if REVERSE else n) * C
        t_C = start + i
        b_CD = _load_rows(b, b_stride, t_C, d, length, D, DOT)
        c_CE = _load_rows(c, c_stride, t_C, e, length, E, DOT)
        a_CD = _load_rows(a, a_stride, t_C, d, length, D, DOT)
        scores_CC = tl.dot(b_CD, tl.trans(a_CD), input_precision=PRECISION)
        out_EC = tl.dot(state_ED.to(DOT), tl.trans(a_CD), input_precision=PRECISION)
        write_EC = tl.trans(c_CE)
        if GATE != NO_GATE:
            g_C, g_all = _log_decays(gate, gate_stride, t_C, start, length, C, GATE == SCALAR_GATE)
            # Only exponents that are <= 0 are used; those of later tokens would overflow and are masked before.
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
        t_rows, in_out = t_C.to(tl.int64), (t_C < length)[None, :] & (e < E)[:, None]
        if PROBE == STATE_PROBE:
            probe_EC = tl.load(probe + t_rows[None, :] * probe_stride + e[:, None], mask=in_out, other=0.0).to(DOT)
            tl.store(rowsum + t_rows, SIGN * tl.sum(out_EC * probe_EC.to(tl.float32), 0), mask=t_C < length)
        if PROBE == FULL_PROBE:
            own_C = tl.sum(tl.where(i[:, None] == i[None, :], scores_CC, 0.0), 0)
            scores_CC = tl.where(i[:, None] == i[None, :], 0.0, scores_CC)
        out_EC = tl.dot(tl.trans(c_CE), scores_CC.to(DOT), out_EC, input_precision=PRECISION)
        state_ED = tl.dot(write_EC, b_CD, state_ED, input_precision=PRECISION)
        if PROBE == FULL_PROBE:
            probe_EC = tl.load(probe + t_rows[None, :] * probe_stride + e[:, None], mask=in_out, other=0.0).to(DOT)
            tl.store(rowsum + t_rows, SIGN * tl.sum(out_EC * probe_EC.to(tl.float32), 0), mask=t_C < length)
            out_EC += own_C[None, :] * tl.trans(c_CE).to(tl.float32)
        tl.store(out + t_rows[None, :] * out_stride + e[:, None], out_EC.to(out.dtype.element_ty), mask=in_out)
    return state_ED


@triton.jit
def _walk_keys_and_values_turned(
    q, q_stride, k, k_stride, v, v_stride, do, do_stride, dk, dk_stride, dv, dv_stride,
    gate, gate_stride, state_KV, rowsum, length,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    PROBE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_walk_keys_and_values` with transposed outputs, whose K and V rows are enough for 8 warps where 64 tokens are not."""
    ks = tl.arange(0, BK)
    vs = tl.arange(0, BV)
    i = tl.arange(0, C)
    seen = i[:, None] >= i[None, :]
    n_chunks = tl.cdiv(length, C)
    for n in tl.range(0, n_chunks, num_stages=STAGES):
        start = (n_chunks - 1 - n) * C
        t_C = start + i
        k_CK = _load_rows(k, k_stride, t_C, ks, length, K, DOT)
        q_CK = _load_rows(q, q_stride, t_C, ks, length, K, DOT)
        do_CV = _load_rows(do, do_stride, t_C, vs, length, V, DOT)
        v_CV = _load_rows(v, v_stride, t_C, vs, length, V, DOT)
        leaving_KV = state_KV.to(DOT)
        qk_CC = tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION)
        ov_CC = tl.dot(do_CV, tl.trans(v_CV), input_precision=PRECISION)
        if GATE != NO_GATE:
            g_C, g_all = _log_decays(gate, gate_stride, t_C, start, length, C, GATE == SCALAR_GATE)
            read_C = tl.exp2(g_all - g_C)
            decay_CC = tl.exp2(tl.where(seen, g_C[:, None] - g_C[None, :], float("-inf")))
            qk_CC *= decay_CC
            if PROBE:
                pairs_CC = tl.where(i[:, None] == i[None, :], 0.0, qk_CC * ov_CC)
                sum_C = tl.sum(pairs_CC, 1) - tl.sum(pairs_CC, 0)
            ov_CC *= decay_CC
        else:
            qk_CC = tl.where(seen, qk_CC, 0.0)
            ov_CC = tl.where(seen, ov_CC, 0.0)
        qk_CC, ov_CC = qk_CC.to(DOT), ov_CC.to(DOT)
        t_rows, inside_1C = t_C.to(tl.int64), (t_C < length)[None, :]
        dv_VC = tl.dot(tl.trans(leaving_KV), tl.trans(k_CK), input_precision=PRECISION)
        if GATE != NO_GATE:
            dv_VC *= read_C[None, :]
        if PROBE:
            sum_C -= tl.sum(dv_VC * tl.trans(v_CV).to(tl.float32), 0)
            tl.store(rowsum + t_rows, sum_C, mask=t_C < length)
        dv_VC = tl.dot(tl.trans(do_CV), qk_CC, dv_VC, input_precision=PRECISION)
        tl.store(dv + t_rows[None, :] * dv_stride + vs[:, None], dv_VC.to(dv.dtype.element_ty), mask=inside_1C & (vs < V)[:, None])
        dk_KC = tl.dot(leaving_KV, tl.trans(v_CV), input_precision=PRECISION)
        write_KC = tl.trans(q_CK)
        if GATE != NO_GATE:
            dk_KC *= read_C[None, :]
            state_KV *= tl.exp2(g_all)
            write_KC = (write_KC.to(tl.float32) * tl.exp2(g_C)[None, :]).to(DOT)
        dk_KC = tl.dot(tl.trans(q_CK), ov_CC, dk_KC, input_precision=PRECISION)
        tl.store(dk + t_rows[None, :] * dk_stride + ks[:, None], dk_KC.to(dk.dtype.element_ty), mask=inside_1C & (ks < K)[:, None])
        state_KV = tl.dot(write_KC, do_CV, state_KV, input_precision=PRECISION)
    return state_KV
