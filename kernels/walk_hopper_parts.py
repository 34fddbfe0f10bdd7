"""What the Hopper walks of `kernels.walk_hopper` are made of, in Gluon: memory on chip, and decays where they are needed.

Cumulated decays of a chunk come as a line of numbers, less half of the whole chunk's, beside the rows (`factors_kernel` makes
them), or follow from one rate. Each thread reads from the line what its rows and columns need, so nothing is summed or
exchanged in the walk. All exponents are <= 0: rows that enter the state are decayed on their way into registers, rows that are
read from it when they are, and pairs of a chunk where their scores are.

Shape legend: B batch, T time, H heads, N chunks of C = 64 tokens, BD and BE widths on chip of a and b, and of c and the outputs.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.delta_hopper import barriers, fetch, shared_layout
from kernels.delta_hopper_walk import at_stage
from kernels.walk_triton import LOG2_E, NO_GATE, SCALAR_GATE

LIMIT = tl.constexpr(100.0)
"""Largest exponent of two factors that stand for the decay of a pair, which fp32 can hold."""
FROM_ZERO, GIVEN, EACH_GIVEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@gluon.constexpr_function
def line_layout():
    """A line of fp32 numbers as copies bring it."""
    return gl.NVMMASharedLayout(0, 32, rank=2)


@gluon.constexpr_function
def state_layout(rows, width, groups):
    """Registers of a state, of whose rows each of the warp groups has its part, or of its columns where rows are few."""
    if rows < 64 * groups:
        return gl.NVMMADistributedLayout([3, 0], [4, groups], [16, width // groups, 16])
    return gl.NVMMADistributedLayout([3, 0], [4 * groups, 1], [16, width, 16])


@gluon.jit
def start_of(n_first, step, steps, C: gl.constexpr, REVERSE: gl.constexpr):
    """First token of a step's chunk in a walk from chunk n_first on; steps beyond the last stay at it."""
    step = gl.minimum(step, steps - 1)
    return (n_first + ((steps - 1 - step) if REVERSE else step)) * C


@gluon.jit
def program(heads, segments, PARTS: gl.constexpr):
    """Part, head, segment and batch of a program; the parts of a head are neighbours, which share the L2 cache."""
    own, rest = gl.program_id(0) % PARTS, gl.program_id(0) // PARTS
    return own, rest % heads, rest // heads % segments, rest // heads // segments


@gluon.jit
def buffers_of(
    BD: gl.constexpr, BE: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, GATE: gl.constexpr,
    DOT: gl.constexpr,
):  # fmt: skip
    """Shared memory: rows of each stage, and a line of decays; the state, outputs, scores; slots of the probe; barriers."""
    a_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BD], shared_layout(BD))
    b_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BD], shared_layout(BD))
    c_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BE], shared_layout(BE))
    stages = (a_buffers, b_buffers, c_buffers)
    if GATE == SCALAR_GATE:
        stages = (a_buffers, b_buffers, c_buffers, gl.allocate_shared_memory(gl.float32, [STAGES, 1, C], line_layout()))
    state_buffer = gl.allocate_shared_memory(DOT, [BD, BE], shared_layout(BE))
    out_buffer = gl.allocate_shared_memory(DOT, [C, BE], shared_layout(BE))
    scores_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    slots, slot_bars = out_buffer, out_buffer
    if SLOTS > 0:
        slots, slot_bars = gl.allocate_shared_memory(DOT, [SLOTS, C, BE], shared_layout(BE)), barriers(SLOTS)
    return stages, (state_buffer, out_buffer, scores_buffer), (slots, slot_bars), barriers(STAGES)


@gluon.jit
def pair_buffers_of(W: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr, DOT: gl.constexpr):
    """Shared memory of the joint walk: q, k, v and do of each stage, and a line of decays; the state, two outputs, two scores."""
    q_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, W], shared_layout(W))
    k_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, W], shared_layout(W))
    v_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, W], shared_layout(W))
    do_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, W], shared_layout(W))
    stages = (q_buffers, k_buffers, v_buffers, do_buffers)
    if GATE == SCALAR_GATE:
        lines = gl.allocate_shared_memory(gl.float32, [STAGES, 1, C], line_layout())
        stages = (q_buffers, k_buffers, v_buffers, do_buffers, lines)
    state_buffer = gl.allocate_shared_memory(DOT, [W, W], shared_layout(W))
    dk_buffer = gl.allocate_shared_memory(DOT, [C, W], shared_layout(W))
    dv_buffer = gl.allocate_shared_memory(DOT, [C, W], shared_layout(W))
    kq_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    vo_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    return stages, (state_buffer, dk_buffer, dv_buffer, kq_buffer, vo_buffer), barriers(STAGES)


@gluon.jit
def bring_pair(
    bars, sources, stages, place, heads, t, step, W: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr
):  # fmt: skip
    """Starts to copy a chunk's rows of q, k, v and do, and its line, into their stage."""
    batch, head, _, _ = place
    row = [batch, t, head, 0]
    targets = at_stage(stages, step % STAGES)
    if GATE == SCALAR_GATE:
        places = (row, row, row, row, [batch * heads + head, t])
        fetch(bars.index(step % STAGES), 2 * C * 4 * W + 4 * C, sources, places, targets)
    else:
        fetch(bars.index(step % STAGES), 2 * C * 4 * W, sources, (row, row, row, row), targets)


@gluon.jit
def pairs_seen(
    kq_CC, vo_CC, stage, rate, t, length, square: gl.constexpr, C: gl.constexpr, GATE: gl.constexpr, PROBE: gl.constexpr
):  # fmt: skip
    """Scores of keys and later queries, and their gradients, decayed; and what pairs give to the gradient of the decays.

    The latter is the sum of their products for each key and for each query, without a token's own, which has no decay.
    """
    rows, cols = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    is_seen = rows[:, None] <= cols[None, :]
    of_keys, of_queries = rows.to(gl.float32), cols.to(gl.float32)
    if GATE != NO_GATE:
        of_rows = falls(stage, rate, t, length, C, GATE, gl.SliceLayout(1, square))
        of_cols = falls(stage, rate, t, length, C, GATE, gl.SliceLayout(0, square))
        decay_CC = gl.exp2(gl.where(is_seen, of_cols[None, :] - of_rows[:, None], float("-inf")))
        kq_CC = kq_CC * decay_CC
        if PROBE:
            pairs_CC = gl.where(rows[:, None] == cols[None, :], 0.0, kq_CC * vo_CC)
            of_keys, of_queries = gl.sum(pairs_CC, 1), gl.sum(pairs_CC, 0)
        vo_CC = vo_CC * decay_CC
    else:
        kq_CC, vo_CC = gl.where(is_seen, kq_CC, 0.0), gl.where(is_seen, vo_CC, 0.0)
    return kq_CC, vo_CC, of_keys, of_queries


@gluon.jit
def bring(
    bars, sources, stages, place, heads, t, step,
    BD: gl.constexpr, BE: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr,
):  # fmt: skip
    """Starts to copy a chunk's rows of a, b and c, and its line, into their stage."""
    batch, head, _, shared = place
    ab_row, c_row = [batch, t, shared, 0], [batch, t, head, 0]
    targets = at_stage(stages, step % STAGES)
    if GATE == SCALAR_GATE:
        places = (ab_row, ab_row, c_row, [batch * heads + head, t])
        fetch(bars.index(step % STAGES), 2 * C * (2 * BD + BE) + 4 * C, sources, places, targets)
    else:
        fetch(bars.index(step % STAGES), 2 * C * (2 * BD + BE), sources, (ab_row, ab_row, c_row), targets)


@gluon.jit
def bring_probe(probe, of_probe, batch, head, t, step, BE: gl.constexpr, C: gl.constexpr, SLOTS: gl.constexpr):
    """Starts to copy a chunk's rows of the probe, which are read late in the chunk's turn, into their slot."""
    slot = step % SLOTS
    fetch(of_probe[1].index(slot), 2 * C * BE, (probe,), ([batch, t, head, 0],), (of_probe[0].index(slot),))


@gluon.jit
def rate_of(gate, batch, head, heads, gate_every, LOADED: gl.constexpr):
    """Log2 decay of a token under a constant gate, else anything."""
    rate = 0.0
    if LOADED:
        rate = gl.load(gate + (batch // gate_every * heads + head)) * LOG2_E
    return rate


@gluon.jit
def half_of(lines, rate, batch, head, heads, t, length, C: gl.constexpr, GATE: gl.constexpr):
    """Half of a chunk's log2 decay."""
    half = 0.0
    if GATE == SCALAR_GATE:
        chunks = (length + C - 1) // C
        half = gl.load(lines + ((batch * heads + head).to(gl.int64) * chunks * C + t + C - 1))
    elif GATE != NO_GATE:
        half = 0.5 * rate * gl.minimum(length - t, C).to(gl.float32)
    return half


@gluon.jit
def falls(stage, rate, t, length, C: gl.constexpr, GATE: gl.constexpr, LAYOUT: gl.constexpr):
    """Log2 decays of a chunk up to and with each token, less half of the chunk's; padding does not decay."""
    if GATE == SCALAR_GATE:
        return stage[-1]._reinterpret(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0])).load(LAYOUT)
    count = gl.minimum(length - t, C).to(gl.float32)
    return rate * (gl.minimum((gl.arange(0, C, LAYOUT) + 1).to(gl.float32), count) - 0.5 * count)


@gluon.jit
def seen(
    scores_CC, stage, rate, half, t, length, square: gl.constexpr,
    C: gl.constexpr, GATE: gl.constexpr, REVERSE: gl.constexpr, FACTORS: gl.constexpr,
):  # fmt: skip
    """Scores of pairs that see each other, decayed."""
    rows, cols = gl.arange(0, C, gl.SliceLayout(1, square)), gl.arange(0, C, gl.SliceLayout(0, square))
    is_seen = (rows[:, None] <= cols[None, :]) if REVERSE else (rows[:, None] >= cols[None, :])
    if GATE != NO_GATE:
        of_rows = falls(stage, rate, t, length, C, GATE, gl.SliceLayout(1, square))
        of_cols = falls(stage, rate, t, length, C, GATE, gl.SliceLayout(0, square))
        if REVERSE:
            of_rows, of_cols = -of_rows, -of_cols
        if FACTORS:
            if half < -LIMIT:
                scores_CC = scores_CC * gl.exp2(gl.where(is_seen, of_rows[:, None] - of_cols[None, :], float("-inf")))
            else:
                scores_CC = gl.where(is_seen, scores_CC * gl.exp2(of_rows)[:, None] * gl.exp2(-of_cols)[None, :], 0.0)
        else:
            scores_CC = scores_CC * gl.exp2(gl.where(is_seen, of_rows[:, None] - of_cols[None, :], float("-inf")))
    else:
        scores_CC = gl.where(is_seen, scores_CC, 0.0)
    return scores_CC


@gluon.jit
def entering(
    b_CD, stage, rate, half, t, length, tall: gl.constexpr,
    C: gl.constexpr, GATE: gl.constexpr, REVERSE: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Rows of b, transposed and decayed to where the state leaves the chunk, as the left operand of its product."""
    left: gl.constexpr = gl.DotOperandLayout(0, tall, 2)
    fall_C = falls(stage, rate, t, length, C, GATE, gl.SliceLayout(0, left))
    keep_C = gl.exp2((half + fall_C) if REVERSE else (half - fall_C))
    return (b_CD.permute([1, 0]).load(left).to(gl.float32) * keep_C[None, :]).to(DOT)


@gluon.jit
def state_of(
    given, sums, decays, place, heads, segments, offsets, inside, tall: gl.constexpr,
    SIZE: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr, START: gl.constexpr, CUT: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """The state that a walk starts from: zero, given to each sequence or segment, and what the segments before make of it."""
    batch, head, piece, _ = place
    state_DE = gl.zeros([BD, BE], gl.float32, tall)
    if START == EACH_GIVEN:
        index = (batch * segments + piece) * heads + head
        state_DE += gl.load(given + index.to(gl.int64) * SIZE + offsets, mask=inside, other=0.0)
    else:
        if START == GIVEN:
            state_DE += gl.load(given + (batch * heads + head).to(gl.int64) * SIZE + offsets, mask=inside, other=0.0)
        if CUT:
            for n in range((segments - 1 - piece) if REVERSE else piece):
                index = (batch * segments + ((segments - 1 - n) if REVERSE else n)) * heads + head
                added = gl.load(sums + index.to(gl.int64) * SIZE + offsets, mask=inside, other=0.0)
                state_DE = state_DE * gl.exp2(gl.load(decays + index)) + added
    return state_DE
