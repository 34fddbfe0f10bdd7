"""A tile of tokens in the registers of a thread, taken apart into rows: recurrences along them and sums across channels.

Where a thread holds all rows of a tile, as `kernels.scans.selective_scan_triton` has it, taking it apart only names registers.

Shape legend: L tokens of a tile, C channels of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unstack(x, L: tl.constexpr, C: tl.constexpr):
    """The rows of [L, C], L being a power of two, as a tuple; where a thread holds all rows, only names for its registers."""
    if L == 1:
        rows = (tl.reshape(x, [C]),)
    else:
        even, odd = tl.split(tl.permute(tl.reshape(x, [L // 2, 2, C]), (0, 2, 1)))
        evens, odds = unstack(even, L // 2, C), unstack(odd, L // 2, C)
        rows = (evens[0], odds[0])
        for n in tl.static_range(1, L // 2):
            rows = rows + (evens[n], odds[n])
    return rows


@triton.jit
def stack(rows, L: tl.constexpr, C: tl.constexpr):
    """[L, C] of L rows [C]."""
    if L == 1:
        x = tl.reshape(rows[0], [1, C])
    else:
        evens, odds = (rows[0],), (rows[1],)
        for n in tl.static_range(1, L // 2):
            evens, odds = evens + (rows[2 * n],), odds + (rows[2 * n + 1],)
        both = tl.join(stack(evens, L // 2, C), stack(odds, L // 2, C))
        x = tl.reshape(tl.permute(both, (0, 2, 1)), [L, C])
    return x


@triton.jit
def spread(x_L, L: tl.constexpr, C: tl.constexpr):
    """A number for each token, as rows for all channels."""
    return unstack(tl.broadcast_to(x_L.to(tl.float32)[:, None], [L, C]), L, C)


@triton.jit
def over_channels(x_LC, L: tl.constexpr, C: tl.constexpr, DOTS: tl.constexpr):
    """Sums over channels, in 16 bit by a product whose right operand is what threads hold already.

    Tensor cores want rows of that operand in four neighbouring lanes and, there, in pairs of registers: with lanes and pairs of
    tokens as its rows nothing has to move. The left operand picks out the rows of a token.
    """
    if DOTS:
        k = tl.arange(0, 4 * L)
        pick_LK = (tl.arange(0, L)[:, None] == (k // 8 * 2 + k % 2)[None, :]).to(x_LC.dtype)
        x_KQ = tl.reshape(tl.permute(tl.reshape(x_LC, [L // 2, 2, C // 4, 4]), (0, 3, 1, 2)), [4 * L, C // 4])
        sums_L = tl.sum(tl.dot(pick_LK, x_KQ), axis=1)
    else:
        sums_L = tl.sum(x_LC, axis=1)
    return sums_L


@triton.jit
def decay(log2_C, EXACT: tl.constexpr):
    """2^x for x <= 0; EXACT: a series where that is close to one.

    The hardware's exponential may be off by 2^-22 to one side. A state that lives for thousands of tokens multiplies as many
    factors, all of them close to one, and so adds these errors up; those of the series are roundings, and as often up as down.
    """
    factor_C = tl.exp2(log2_C)
    if EXACT:
        series_C = 0.009618129 * log2_C + 0.055504109
        series_C = series_C * log2_C + 0.24022651
        series_C = series_C * log2_C + 0.69314718
        factor_C = tl.where(log2_C > -0.03125, series_C * log2_C + 1.0, factor_C)
    return factor_C


@triton.jit
def replay(h_C, slope_C, dt, u, b, L: tl.constexpr, EXACT: tl.constexpr):
    """Factors of a tile's tokens; the state before each of them and after the last."""
    factors = (decay(dt[0] * slope_C, EXACT),)
    states = (h_C, factors[0] * h_C + u[0] * b[0])
    for t in tl.static_range(1, L):
        factors = factors + (decay(dt[t] * slope_C, EXACT),)
        states = states + (factors[t] * states[t] + u[t] * b[t],)
    return factors, states


@triton.jit
def reverse(e_C, factors, states, dt, dy, c, L: tl.constexpr):
    """Gradients of the states and of the log factors, from the last token to the first; what reaches the state before the tile.

    e_t = a_t dh_t is what reaches h_{t-1}, and e_t h_{t-1} is the gradient of log a_t. Last comes that of the rate.
    """
    dh_C = dy[L - 1] * c[L - 1] + e_C
    e_C = factors[L - 1] * dh_C
    dhs, dlogs = (dh_C,), (e_C * states[L - 1],)
    drate_C = dlogs[0] * dt[L - 1]
    for back in tl.static_range(1, L):
        dh_C = dy[L - 1 - back] * c[L - 1 - back] + e_C
        e_C = factors[L - 1 - back] * dh_C
        dlog_C = e_C * states[L - 1 - back]
        drate_C += dlog_C * dt[L - 1 - back]
        dhs, dlogs = (dh_C,) + dhs, (dlog_C,) + dlogs
    return dhs, dlogs, e_C, drate_C


@triton.jit
def log_1p(t):
    """log(1 + t) for t in [0, 1], relative error below 3e-7: t times an interpolation of log(1 + t) / t at nine Chebyshev points.

    Operators only, so that Gluon kernels can call it too.
    """
    ratio = 0.0051261018961668015 * t - 0.029074065387248993
    ratio = ratio * t + 0.0775160863995552
    ratio = ratio * t - 0.13602247834205627
    ratio = ratio * t + 0.19076880812644958
    ratio = ratio * t - 0.2483539879322052
    ratio = ratio * t + 0.3331812024116516
    ratio = ratio * t - 0.4999944567680359
    return t * (ratio * t + 0.9999999403953552)
