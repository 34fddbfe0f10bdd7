"""Taylor linear attention, forward: scores 1 + s + s^2 / 2 inside a chunk, features only between chunks.

With s = q . k / sqrt(K) a weight is phi(q) . phi(k), phi being all monomials of degree at most two. Inside a chunk a weight
is a polynomial of the score, so no feature is built. The sums over earlier chunks need features: for each chunk on its
own `state_kernel` sums phi(k) v^T, `scan_kernel` adds the sums up along time, and `forward_kernel` reads what enters its
chunk. All three are parallel over chunks.

A monomial x_a x_b is the product of two columns of (x E1) and (x E2), where E1 and E2 hold one 1 in each column: the tensor
cores select columns exactly, and their accumulators have the layout that the next product wants. Rows of the sums are
the K monomials x_a, then those of x_a x_(a+d mod K) for d = 0 .. K/2, and the constant 1; for even K the last d has only half
as many, since the others are the same pairs. The sums are of plain monomials; `weights` of a row multiply what is read from them.

Shape legend: B batch, T time, H heads, C tokens of a chunk, N chunks, K width of q and k, V width of v, R rows of the sums,
M and N queries and keys of a tile, F rows of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._entry import entry

# Run-time integers: with these unspecialised, a new batch, length or head count compiles nothing.
STRIDES = tuple(f"{tensor}_{axis}" for tensor in ("x", "c", "q", "k", "v", "dy") for axis in "bth")
COUNTS = ("length", "heads", "chunk", "chunks", "first_chunk", "some_chunks", "all_chunks", "low", "high")
SIZES = (*STRIDES, *COUNTS)


@triton.jit
def load_tile(base, stride, t_M, cols, length, WIDTH: tl.constexpr):
    """Rows t_M of a matrix with WIDTH columns, zero beyond its edges."""
    mask = (t_M < length)[:, None] & (cols < WIDTH)[None, :]
    return tl.load(base + t_M[:, None].to(tl.int64) * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def first_factor(i, f, K: tl.constexpr, DOT: tl.constexpr):
    """E1 at rows i and columns f, which broadcast against each other."""
    return ((i == f % K) & (f < K + K * (K + 1) // 2)).to(DOT)


@triton.jit
def second_factor(i, f, K: tl.constexpr, DOT: tl.constexpr):
    """E2 at rows i and columns f, which broadcast against each other."""
    return ((i == (f + f // K - 1) % K) & (f >= K) & (f < K + K * (K + 1) // 2)).to(DOT)


@triton.jit
def first_one(f, K: tl.constexpr):
    """1 for the constant row, whose first factor is no column of x."""
    return (f == K + K * (K + 1) // 2).to(tl.float32)


@triton.jit
def second_one(f, K: tl.constexpr):
    """1 for the rows whose second factor is no column of x."""
    return ((f < K) | (f == K + K * (K + 1) // 2)).to(tl.float32)


@triton.jit
def factors(x_MK, i, f, K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The two factors of each monomial of x in rows f, [M, F] in fp32."""
    first_MF = tl.dot(x_MK, first_factor(i[:, None], f[None, :], K, DOT), input_precision=PRECISION)
    second_MF = tl.dot(x_MK, second_factor(i[:, None], f[None, :], K, DOT), input_precision=PRECISION)
    return first_MF + first_one(f, K)[None, :], second_MF + second_one(f, K)[None, :]


@triton.jit
def polynomial(score, K: tl.constexpr):
    """1 + s + s^2 / 2 of s = score / sqrt(K), in two multiply-adds."""
    return (score * (0.5 / K) + K**-0.5) * score + 1.0


@triton.jit
def weights(f, K: tl.constexpr):
    """Weight of a row: 1 + s + s^2 / 2 = sum_f weight_f monomial_f(q) monomial_f(k)."""
    shift = f // K - 1
    pair = tl.where(shift == 0, 0.5 / K, 1.0 / K)
    return tl.where(f < K, K**-0.5, tl.where(f < K + K * (K + 1) // 2, pair, 1.0))


@entry(do_not_specialize=SIZES)
def state_kernel(
    x, c, scale, shift, sums, norms,
    x_b: tl.int64, x_t: tl.int64, x_h: tl.int64, c_b: tl.int64, c_t: tl.int64, c_h: tl.int64,
    length: tl.int32, heads: tl.int32, chunk: tl.int32, first_chunk: tl.int32, some_chunks: tl.int32, all_chunks: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, UNIT: tl.constexpr,
    BT: tl.constexpr, NORM: tl.constexpr, WEIGHTED: tl.constexpr, DOT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of a chunk: sum_t monomial(x_t) scale_t c_t^T, and sum_t monomial(x_t) shift_t; scale = shift = 1 if not WEIGHTED.

    Grid: (B * H * some_chunks * tiles of rows * tiles of V,). Strides of x and c count UNIT elements.
    """
    ROWS: tl.constexpr = K + K * (K + 1) // 2 + 1
    ROW_TILES: tl.constexpr = (ROWS + BF - 1) // BF
    TILES: tl.constexpr = ROW_TILES * ((V + BV - 1) // BV)
    program = tl.program_id(0)
    tile, outer = program % TILES, program // TILES
    head_index, n = outer // some_chunks, first_chunk + outer % some_chunks
    batch, head = (head_index // heads).to(tl.int64), head_index % heads
    f = tile % ROW_TILES * BF + tl.arange(0, BF)
    e = tile // ROW_TILES * BV + tl.arange(0, BV)
    i = tl.arange(0, BK)
    x += (batch * x_b + head * x_h) * UNIT
    c += (batch * c_b + head * c_h) * UNIT
    scalar = batch * length * heads + head
    first_FK, second_FK = first_factor(i[None, :], f[:, None], K, DOT), second_factor(i[None, :], f[:, None], K, DOT)
    first_F, second_F = first_one(f, K), second_one(f, K)
    sums_FV = tl.zeros([BF, BV], tl.float32)
    norms_F = tl.zeros([BF], tl.float32)
    for start in tl.range(n * chunk, tl.minimum((n + 1) * chunk, length), BT, num_stages=STAGES):
        t = start + tl.arange(0, BT)
        x_KT = tl.trans(load_tile(x, x_t * UNIT, t, i, length, K).to(DOT))
        c_TV = load_tile(c, c_t * UNIT, t, e, length, V).to(WIDE)
        phi_FT = (tl.dot(first_FK, x_KT, input_precision=PRECISION) + first_F[:, None]) * (
            tl.dot(second_FK, x_KT, input_precision=PRECISION) + second_F[:, None]
        )
        if NORM:
            shift_T = (t < length).to(tl.float32)
            if WEIGHTED:
                shift_T = tl.load(shift + scalar + t.to(tl.int64) * heads, mask=t < length, other=0.0)
            norms_F += tl.sum(phi_FT * shift_T[None, :], 1)
            if WEIGHTED:
                phi_FT *= tl.load(scale + scalar + t.to(tl.int64) * heads, mask=t < length, other=0.0)[None, :]
        sums_FV = tl.dot(phi_FT.to(WIDE), c_TV, sums_FV, input_precision=PRECISION)
    row = (head_index.to(tl.int64) * all_chunks + n) * ROWS + f
    tl.store(sums + row[:, None] * V + e[None, :], sums_FV.to(sums.dtype.element_ty), mask=(f < ROWS)[:, None] & (e < V)[None, :])
    if NORM and tile // ROW_TILES == 0:
        tl.store(norms + row, norms_F, mask=f < ROWS)


@triton.jit
def _scan(
    sums, first, entering, last, element, head_index, all_chunks, low, high,
    WIDTH: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Running sums over chunks of one tile of elements; chunks outside low .. high have no sums of their own."""
    SIZE: tl.constexpr = (K + K * (K + 1) // 2 + 1) * WIDTH
    inside = element < SIZE
    weight = weights(element // WIDTH, K)
    carry = tl.zeros(element.shape, tl.float32)
    if FIRST:
        carry = tl.load(first + head_index * SIZE + element, mask=inside, other=0.0)
        if REVERSE:
            carry = carry / weight
    for step in tl.range(all_chunks):
        n = (all_chunks - 1 - step) if REVERSE else step
        offset = (head_index * all_chunks + n) * SIZE + element
        tl.store(entering + offset, (carry * weight).to(entering.dtype.element_ty), mask=inside)
        carry += tl.load(sums + offset, mask=inside & (n >= low) & (n < high), other=0.0).to(tl.float32)
    if LAST:
        if REVERSE:
            carry = carry * weight
        tl.store(last + head_index * SIZE + element, carry, mask=inside)


@entry(do_not_specialize=SIZES)
def scan_kernel(
    sums, norms, first, first_norm, entering, entering_norm, last, last_norm,
    all_chunks: tl.int32, low: tl.int32, high: tl.int32,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, REVERSE: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """What enters each chunk, weighted for reading, and the sums after the last chunk (before the first, if REVERSE).

    `first` and `last` are plain sums in time's direction and gradients of plain sums in reverse.
    Grid: (B * H * (tiles of the sums + tiles of the normaliser's sums),).
    """
    ROWS: tl.constexpr = K + K * (K + 1) // 2 + 1
    SUM_TILES: tl.constexpr = (ROWS * V + BLOCK - 1) // BLOCK
    TILES: tl.constexpr = SUM_TILES + ((ROWS + BLOCK - 1) // BLOCK if NORM else 0)
    program = tl.program_id(0)
    head_index, tile = (program // TILES).to(tl.int64), program % TILES
    element = tl.arange(0, BLOCK)
    if tile < SUM_TILES:
        element += tile * BLOCK
        _scan(sums, first, entering, last, element, head_index, all_chunks, low, high, V, K, REVERSE, FIRST, LAST)
    else:
        element += (tile - SUM_TILES) * BLOCK
        _scan(
            norms, first_norm, entering_norm, last_norm, element, head_index, all_chunks, low, high,
            1, K, REVERSE, FIRST, LAST,
        )  # fmt: skip


@entry(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, entering, entering_norm, y, scale,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64,
    length: tl.int32, heads: tl.int32, chunk: tl.int32, chunks: tl.int32, eps: tl.float32,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr, FIRST: tl.constexpr,
    DOT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, ROW_STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs of one tile of queries, and scale = 1 / (sum of the weights + eps) if NORM.

    Grid: (B * H * ceil(T / BM) * tiles of V,). FIRST: sums enter the first chunk too. BM divides the chunk.
    """
    VALUE_TILES: tl.constexpr = (V + BV - 1) // BV
    ROWS: tl.constexpr = K + K * (K + 1) // 2 + 1
    program = tl.program_id(0)
    value_tile, outer = program % VALUE_TILES, program // VALUE_TILES
    blocks = tl.cdiv(length, BM)
    head_index, start = outer // blocks, outer % blocks * BM
    batch, head = (head_index // heads).to(tl.int64), head_index % heads
    i, e, m = tl.arange(0, BK), value_tile * BV + tl.arange(0, BV), start + tl.arange(0, BM)
    k += (batch * k_b + head * k_h) * UNIT
    v += (batch * v_b + head * v_h) * UNIT
    q_MK = load_tile(q + (batch * q_b + head * q_h) * UNIT, q_t * UNIT, m, i, length, K).to(DOT)
    o_MV = tl.zeros([BM, BV], tl.float32)
    z_M = tl.zeros([BM], tl.float32)
    n = start // chunk
    for first_key in tl.range(n * chunk, start, BN, num_stages=STAGES):
        t = first_key + tl.arange(0, BN)
        k_NK = load_tile(k, k_t * UNIT, t, i, length, K).to(DOT)
        v_NV = load_tile(v, v_t * UNIT, t, e, length, V).to(DOT)
        p_MN = polynomial(tl.dot(q_MK, tl.trans(k_NK), input_precision=PRECISION), K)
        z_M += tl.sum(p_MN, 1)
        o_MV = tl.dot(p_MN.to(DOT), v_NV, o_MV, input_precision=PRECISION)
    for first_key in tl.range(start, tl.minimum(start + BM, length), BN, num_stages=1):
        t = first_key + tl.arange(0, BN)
        k_NK = load_tile(k, k_t * UNIT, t, i, length, K).to(DOT)
        v_NV = load_tile(v, v_t * UNIT, t, e, length, V).to(DOT)
        p_MN = polynomial(tl.dot(q_MK, tl.trans(k_NK), input_precision=PRECISION), K)
        p_MN = tl.where(m[:, None] >= t[None, :], p_MN, 0.0)
        z_M += tl.sum(p_MN, 1)
        o_MV = tl.dot(p_MN.to(DOT), v_NV, o_MV, input_precision=PRECISION)
    row = (head_index.to(tl.int64) * chunks + n) * ROWS
    for first_row in tl.range(0, ROWS if FIRST else tl.where(n > 0, ROWS, 0), BF, num_stages=ROW_STAGES):
        f = first_row + tl.arange(0, BF)
        in_rows = (f < ROWS)[:, None] & (e < V)[None, :]
        state_FV = tl.load(entering + (row + f)[:, None] * V + e[None, :], mask=in_rows, other=0.0)
        first_MF, second_MF = factors(q_MK, i, f, K, DOT, PRECISION)
        phi_MF = first_MF * second_MF
        if NORM:
            z_M += tl.sum(phi_MF * tl.load(entering_norm + row + f, mask=f < ROWS, other=0.0)[None, :], 1)
        o_MV = tl.dot(phi_MF.to(WIDE), state_FV, o_MV, input_precision=PRECISION)
    token = batch * length * heads + m.to(tl.int64) * heads + head
    if NORM:
        scale_M = 1.0 / (z_M + eps)
        o_MV = o_MV * scale_M[:, None]
        if value_tile == 0:
            tl.store(scale + token, scale_M, mask=m < length)
    tl.store(y + token[:, None] * V + e[None, :], o_MV.to(y.dtype.element_ty), mask=(m < length)[:, None] & (e < V)[None, :])
