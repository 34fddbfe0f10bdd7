"""What the Hopper walks of `kernels.walk_hopper` are made of, in Gluon: memory on chip, decays, and the states they start from.

Decays are scalings of what enters the sums and of what leaves them (`decays_of`): rows of c are scaled where they lie in shared
memory, before any product reads them, and rows of sums when they are done. No pair of tokens is decayed on its own, unless a
chunk decays by more than 16-bit scalings can hold, which is mended after the fact.

Shape legend: B batch, T time, H heads, P segments, C = 64 tokens of a chunk, D width of a and b, E width of c and out.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from kernels.delta_hopper import barriers, fetch, shared_layout
from kernels.delta_hopper_walk import at_stage
from kernels.walk_triton import LOG2_E, NO_GATE, SCALAR_GATE

LIMIT, LIMIT_FP16 = tl.constexpr(60.0), tl.constexpr(6.0)
"""Largest exponents of the scalings that stand for a decay."""
FROM_ZERO, GIVEN, EACH_GIVEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@gluon.jit
def program(heads, segments, PARTS: gl.constexpr, TILES: gl.constexpr):
    """Part, tile, head, segment and batch of a program; those of a head are neighbours, which share the L2 cache."""
    own, rest = gl.program_id(0) % (PARTS * TILES), gl.program_id(0) // (PARTS * TILES)
    return own // TILES, own % TILES, rest % heads, rest // heads % segments, rest // heads // segments


@gluon.jit
def gate_of(gate, batch, head, length, heads, gate_every, GATE: gl.constexpr):
    """Where a head's log decays start."""
    return gate + ((batch.to(gl.int64) * length * heads + head) if GATE == SCALAR_GATE else (batch // gate_every * heads + head))


@gluon.jit
def start_of(n_first, step, steps, C: gl.constexpr, REVERSE: gl.constexpr):
    """First token of a step's chunk; steps beyond the last stay at it."""
    step = gl.minimum(step, steps - 1)
    return (n_first + ((steps - 1 - step) if REVERSE else step)) * C


@gluon.jit
def buffers_of(
    BD: gl.constexpr, BE: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, DOT: gl.constexpr
):  # fmt: skip
    """Shared memory: a, b and c of each stage; the state, outputs, scores and a line of numbers; slots of the probe; barriers."""
    a_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BD], shared_layout(BD))
    b_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BD], shared_layout(BD))
    c_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BE], shared_layout(BE))
    state_buffer = gl.allocate_shared_memory(DOT, [BD, BE], shared_layout(BE))
    out_buffer = gl.allocate_shared_memory(DOT, [C, BE], shared_layout(BE))
    scores_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    line_buffer = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    slots, slot_bars = out_buffer, line_buffer
    if SLOTS > 0:
        slots, slot_bars = gl.allocate_shared_memory(DOT, [SLOTS, C, BE], shared_layout(BE)), barriers(SLOTS)
    work = (state_buffer, out_buffer, scores_buffer, line_buffer)
    return (a_buffers, b_buffers, c_buffers), work, (slots, slot_bars), barriers(STAGES)


@gluon.jit
def bring(bars, sources, stages, place, t, step, BD: gl.constexpr, BE: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr):
    """Starts to copy a chunk's rows of a, b and c into their stage."""
    batch, ab_head, c_head, e_start = place
    places = ([batch, t, ab_head, 0], [batch, t, ab_head, 0], [batch, t, c_head, e_start])
    fetch(bars.index(step % STAGES), 2 * C * (2 * BD + BE), sources, places, at_stage(stages, step % STAGES))


@gluon.jit
def bring_probe(probe, of_probe, place, t, step, BE: gl.constexpr, C: gl.constexpr, SLOTS: gl.constexpr):
    """Starts to copy a chunk's rows of the probe, which are read late in the chunk's turn, into their slot."""
    batch, _, c_head, e_start = place
    slots, bars = of_probe
    slot = step % SLOTS
    fetch(bars.index(slot), 2 * C * BE, (probe,), ([batch, t, c_head, e_start],), (slots.index(slot),))


@gluon.jit
def steps_of(gate, t, length, heads, cols, GATE: gl.constexpr):
    """Log2 decays of a chunk's tokens, as columns; padding does not decay."""
    if GATE == SCALAR_GATE:
        return gl.load(gate + (t + cols).to(gl.int64) * heads, mask=t + cols < length, other=0.0) * LOG2_E
    return gl.load(gate + 0 * cols, mask=t + cols < length, other=0.0) * LOG2_E


@gluon.jit
def decays_of(step_C, rows, cols, REVERSE: gl.constexpr, DOT: gl.constexpr):
    """A chunk's decays as scalings of what enters the sums and of what leaves them, all in log2, for rows of scores.

    Row j gives exp(G_i - G_j) c_j to row i, and that is leave_i enter_j with leave = exp(G - middle) and enter = 1 / leave. Both
    are cut at 2^limit, which the products' dtype can hold; a chunk that decays by more is rough, and `rest` is what is missing.

    Returns:
        The exponent of leave (that of enter is its negative), `rest`, half of the chunk's exponent, the part of that half by
        which the state is scaled for its reader, and whether the chunk is rough.
    """
    limit: gl.constexpr = LIMIT_FP16 if tl.float16 == DOT else LIMIT
    g_C = gl.sum(gl.where(rows[:, None] >= cols[None, :], step_C[None, :], 0.0), 1)
    half = 0.5 * gl.sum(step_C, 0)
    whole_C = (half - g_C) if REVERSE else (g_C - half)
    leave_C = gl.minimum(gl.maximum(whole_C, -limit), limit)
    return leave_C, whole_C - leave_C, half, gl.maximum(half, -limit), half < -limit


@gluon.jit
def enter(c_CE, leave_C, narrow: gl.constexpr, DOT: gl.constexpr):
    """Scales rows of c where they lie, for the sums that they enter."""
    factor_C = gl.exp2(-gl.convert_layout(leave_C, gl.SliceLayout(1, narrow)))
    c_CE.store((c_CE.load(narrow).to(gl.float32) * factor_C[:, None]).to(DOT))


@gluon.jit
def seen(scores_CC, decays, rows, cols, line_buffer, square: gl.constexpr, GATE: gl.constexpr, REVERSE: gl.constexpr):
    """Scores of pairs that see each other, with what the cut scalings lack of their decay."""
    is_seen = (rows[:, None] <= cols[None, :]) if REVERSE else (rows[:, None] >= cols[None, :])
    scores_CC = gl.where(is_seen, scores_CC, 0.0)
    if GATE != NO_GATE:  # noqa: SIM102 - one is known to the compiler, the other to the chip
        if decays[4]:
            line_buffer.store(decays[1])
            fall_CC = decays[1][:, None] - line_buffer.load(gl.SliceLayout(0, square))[None, :]
            scores_CC = scores_CC * gl.exp2(gl.where(is_seen, fall_CC, 0.0))
    return scores_CC


@gluon.jit
def mended(out_CE, a_CD, state_buffer, none_CE, decays, of_rows: gl.constexpr, GATE: gl.constexpr, ADDED: gl.constexpr):
    """Sums of a chunk with what earlier chunks give decayed as it should be, where a rough chunk's scalings were cut.

    ADDED: what the chunk's own tokens give is among the sums, so the part of earlier chunks is made once more.
    """
    if GATE != NO_GATE:  # noqa: SIM102
        if decays[4]:
            factor_C = gl.exp2(gl.convert_layout(decays[2] + decays[1] - decays[3], of_rows))
            if ADDED:
                again = warpgroup_mma(a_CD, state_buffer, none_CE, use_acc=False, is_async=True)
                out_CE += warpgroup_mma_wait(0, [again]) * (factor_C - 1.0)[:, None]
            else:
                out_CE = out_CE * factor_C[:, None]
    return out_CE


@gluon.jit
def entering(
    given, sums, decays, batch, piece, heads, head, segments, offsets, inside, narrow: gl.constexpr,
    SIZE: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr, START: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """The state that a segment starts from: given to each, or what segments before it make of that of the sequence."""
    state_DE = gl.zeros([BD, BE], gl.float32, narrow)
    if START == EACH_GIVEN:
        index = (batch * segments + piece) * heads + head
        state_DE += gl.load(given + index.to(gl.int64) * SIZE + offsets, mask=inside, other=0.0)
    else:
        if START == GIVEN:
            state_DE += gl.load(given + (batch * heads + head).to(gl.int64) * SIZE + offsets, mask=inside, other=0.0)
        for n in range((segments - 1 - piece) if REVERSE else piece):
            index = (batch * segments + ((segments - 1 - n) if REVERSE else n)) * heads + head
            added = gl.load(sums + index.to(gl.int64) * SIZE + offsets, mask=inside, other=0.0)
            state_DE = state_DE * gl.exp2(gl.load(decays + index)) + added
    return state_DE
