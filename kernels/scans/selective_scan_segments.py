"""Selective scans of very few channels in segments: what each segment does to a state, and from it the states that enter segments.

A segment of h_t = a_t h_{t-1} + u_t b_t maps the state before it to product * state + end; the product is exp(-rate * sum of dt).
Backward the same holds for e_t = a_t (e_{t+1} + dy_t c_t), the gradient that reaches h_{t-1}. Ends cost a pass of their own through
all segments but one, so they are made only where whole sequences leave a part of the device idle.

Shape legend: B batch, S segments, T time, D channels, N = 16 states, M members, L tokens of a tile, C channels of a program.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels._entry import entry
from kernels.scans.selective_scan_gluon import fetch, time_steps
from kernels.scans.selective_scan_quads import LOG2_E, STATES, opened, rows_layout

WARPS = 4
"""Warps of a program that walks a segment, each with 8 channels."""
ENOUGH, PROGRAMS = 200, 512
"""Programs of whole sequences that keep a device busy; with fewer, sequences are cut into segments for so many."""
SHORTEST_SEGMENT = 4
"""Tiles below which a pass through a segment costs more than it gains."""
BLOCK = 256
"""Channels of a program that goes from one segment to the next."""


@gluon.constexpr_function
def ends_layout(warps):
    """States [N, C]: four lanes have those of a channel, four beside each other of every sixteen."""
    return gl.BlockedLayout([4, 1], [4, 8], [1, warps], [0, 1])


@entry(do_not_specialize=["n_tokens", "n_segments", "segment_tiles", "sequences_per_member"], gluon=True)
def segment_ends(  # noqa: PLR0915 - one loop, whose values live in registers
    x_ptr, dt_ptr, rate_ptr, b_ptr, bias_ptr, gate_ptr, steps_ptr, ends_ptr,
    gate_stride, n_tokens, width, n_states, n_segments, segment_tiles, sequences_per_member,
    REVERSE: gl.constexpr, GATED: gl.constexpr, C: gl.constexpr, L: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Ends [B, S, N, D] of all segments but the last to be walked, sums of their dt [B, S, D]; in reverse x is dy, b is c."""
    NC: gl.constexpr = ends_layout(WARPS)
    LC: gl.constexpr = rows_layout(C, WARPS)
    LN: gl.constexpr = rows_layout(STATES, WARPS)
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    n_blocks = (width + C - 1) // C
    start, rest = gl.program_id(0) % n_blocks * C, gl.program_id(0) // n_blocks
    segment, sequence = rest % (n_segments - 1), (rest // (n_segments - 1)).to(gl.int64)
    if REVERSE:
        segment += 1
    member = sequence // sequences_per_member
    x_ptr, dt_ptr = x_ptr + sequence * n_tokens * width, dt_ptr + sequence * n_tokens * width
    b_ptr, gate_ptr = b_ptr + sequence * n_tokens * n_states, gate_ptr + sequence * n_tokens * gate_stride
    dt_buffers = gl.allocate_shared_memory(gl.float32, [2, L, C], shared)
    u_buffers = gl.allocate_shared_memory(gl.float32, [2, L, C], shared)
    b_buffers = gl.allocate_shared_memory(gl.float32, [2, L, STATES], shared)
    n_N, channel_C = gl.arange(0, STATES, gl.SliceLayout(1, NC)), start + gl.arange(0, C, gl.SliceLayout(0, NC))
    inside_NC = (n_N < n_states)[:, None] & (channel_C < width)[None, :]
    turned_NC = channel_C[None, :] * n_states + n_N[:, None]
    slope_NC = gl.load(rate_ptr + (member * n_states * width + turned_NC), mask=inside_NC, other=0.0).to(gl.float32) * -LOG2_E
    column_C = start + gl.arange(0, C, gl.SliceLayout(0, LC))
    h_NC, steps_C = gl.zeros([STATES, C], gl.float32, NC), gl.zeros([C], gl.float32, gl.SliceLayout(0, LC))
    first, step = segment * segment_tiles * L, L
    tiles = gl.minimum(segment_tiles, (n_tokens - first + L - 1) // L)
    if REVERSE:
        first, step = first + (tiles - 1) * L, -L
    if GATED:
        bias_C = gl.load(bias_ptr + member * width + column_C, mask=column_C < width, other=0.0).to(gl.float32)
        z_LC = fetch(gate_ptr, first, gate_stride, n_tokens, width, start, L, C, LC)
    dt_LC = fetch(dt_ptr, first, width, n_tokens, width, start, L, C, LC)
    x_LC = fetch(x_ptr, first, width, n_tokens, width, start, L, C, LC)
    b_LN = fetch(b_ptr, first, n_states, n_tokens, n_states, 0, L, STATES, LN)
    for tile in range(tiles):
        now, following = tile % 2, gl.maximum(first + step, 0)  # in the last turn loads that nobody uses
        if GATED:
            dt_LC = time_steps(dt_LC, bias_C, first, n_tokens, L, LC)
            if REVERSE:
                x_LC = x_LC * opened(z_LC)[0]
            z_LC = fetch(gate_ptr, following, gate_stride, n_tokens, width, start, L, C, LC)
        dt, u, b = dt_buffers.index(now), u_buffers.index(now), b_buffers.index(now)
        dt.store(dt_LC)
        u.store(x_LC if REVERSE else dt_LC * x_LC)
        b.store(b_LN)
        steps_C += gl.sum(dt_LC, 0)
        dt_LC = fetch(dt_ptr, following, width, n_tokens, width, start, L, C, LC)
        x_LC = fetch(x_ptr, following, width, n_tokens, width, start, L, C, LC)
        b_LN = fetch(b_ptr, following, n_states, n_tokens, n_states, 0, L, STATES, LN)
        for t in gl.static_range(L - 1 if REVERSE else 0, -1 if REVERSE else L, -1 if REVERSE else 1):
            factor_NC = gl.exp2(slope_NC * dt.slice(t, 1, 0).load(NC))
            input_NC = u.slice(t, 1, 0).load(NC) * b.permute([1, 0]).slice(t, 1, 1).load(NC)
            h_NC = factor_NC * (h_NC + input_NC) if REVERSE else gl.fma(h_NC, factor_NC, input_NC)
        first = following
    place = (sequence * n_segments + segment) * width
    gl.store(ends_ptr + (place * n_states + n_N[:, None] * width + channel_C[None, :]), h_NC, mask=inside_NC)
    gl.store(steps_ptr + (place + column_C), steps_C, mask=column_C < width)


@entry(do_not_specialize=["width", "n_states", "n_segments", "sequences_per_member"])
def enter_segments(
    rate_ptr, first_ptr, steps_ptr, ends_ptr, states_ptr, width, n_states, n_segments, sequences_per_member,
    FIRST: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States [B, S, N, D] that enter segments, from that [B, D, N] of the whole sequence. Grid: (B * N * blocks of channels,)."""
    n_blocks = tl.cdiv(width, BLOCK)
    channel_C, rest = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK), tl.program_id(0) // n_blocks
    n, sequence = rest % n_states, (rest // n_states).to(tl.int64)
    inside_C = channel_C < width
    own_C = (sequence // sequences_per_member * width + channel_C) * n_states + n
    slope_C = tl.load(rate_ptr + own_C, mask=inside_C, other=0.0).to(tl.float32) * -LOG2_E
    h_C = tl.zeros([BLOCK], tl.float32)
    if FIRST:
        h_C = tl.load(first_ptr + (sequence * width + channel_C) * n_states + n, mask=inside_C, other=0.0).to(tl.float32)
    for step in range(n_segments):
        place = sequence * n_segments + ((n_segments - 1 - step) if REVERSE else step)
        at_C = (place * n_states + n) * width + channel_C
        tl.store(states_ptr + at_C, h_C, mask=inside_C)
        walked_C = inside_C & (step < n_segments - 1)
        factor_C = tl.exp2(slope_C * tl.load(steps_ptr + place * width + channel_C, mask=walked_C, other=0.0))
        h_C = factor_C * h_C + tl.load(ends_ptr + at_C, mask=walked_C, other=0.0)


def entering_states(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    rate_MDN: Tensor,
    b_BTN: Tensor,
    around: tuple[Tensor, Tensor, Tensor],
    gate_stride: int,
    first_BDN: Tensor | None,
    segments: tuple[int, int],
    tile: int,
    *,
    gated: bool,
    reverse: bool,
) -> Tensor:
    """States that enter the segments of a scan, or, in reverse, gradients of those that leave them; [B, S, N, D] in fp32.

    Args:
        x_BTD: inputs; in reverse, gradients of outputs.
        dt_BTD: time steps, raw if gated.
        rate_MDN: rates.
        b_BTN: write vectors; in reverse, read vectors.
        around: bias, skip and gate of a gated scan.
        gate_stride: distance of the gate's tokens.
        first_BDN: what enters the first segment to be walked; None means zero.
        segments: how many, and tiles of each.
        tile: tokens of a tile.
    """
    batch, length, width = x_BTD.shape
    members, _, n_states = rate_MDN.shape
    n_segments, segment_tiles = segments
    steps_BSD = x_BTD.new_empty(batch, n_segments, width, dtype=torch.float32)
    ends_BSND, states_BSND = (x_BTD.new_empty(batch, n_segments, n_states, width, dtype=torch.float32) for _ in range(2))
    channels = 8 * WARPS
    segment_ends[(batch * (n_segments - 1) * -(-width // channels),)](
        x_BTD, dt_BTD, rate_MDN, b_BTN, around[0], around[2], steps_BSD, ends_BSND,
        gate_stride, length, width, n_states, n_segments, segment_tiles, batch // members,
        REVERSE=reverse, GATED=gated, C=channels, L=tile, WARPS=WARPS, num_warps=WARPS,
    )  # fmt: skip
    enter_segments[(batch * n_states * -(-width // BLOCK),)](
        rate_MDN, steps_BSD if first_BDN is None else first_BDN, steps_BSD, ends_BSND, states_BSND, width, n_states, n_segments,
        batch // members, FIRST=first_BDN is not None, REVERSE=reverse, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return states_BSND


def share_out(batch: int, n_tiles: int, blocks: int) -> tuple[int, int]:
    """Segments of each sequence, and tiles of each, from the shape alone."""
    wanted = 1
    if 0 < batch * blocks < ENOUGH:
        wanted = max(1, min(PROGRAMS // (batch * blocks), n_tiles // SHORTEST_SEGMENT))
    tiles = -(-n_tiles // wanted)
    return -(-n_tiles // tiles), tiles
