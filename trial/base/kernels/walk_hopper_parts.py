"""What the Hopper walk of `kernels.walk_hopper` is made of, in Gluon: memory on chip and decays.

Decays are scalings of what enters the sums and of what leaves them (`decays_of`): values are scaled where they lie in shared
memory, before any product reads them, and outputs when they are done. No pair of tokens is decayed on its own, unless a
chunk decays by more than 16-bit scalings can hold, which is mended after the fact.

Shape legend: B batch, T time, H heads, C = 64 tokens of a chunk, K key, V value width, W both on chip.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from kernels.delta_hopper import barriers, fetch, shared_layout
from kernels.delta_hopper_walk import at_stage
from kernels.walk_triton import LOG2_E, NO_GATE, SCALAR_GATE

LIMIT = tl.constexpr(60.0)
"""Largest exponent of the scalings that stand for a decay, which bf16 can hold."""


@gluon.jit
def gate_of(gate, batch, head, length, heads, gate_every, GATE: gl.constexpr):
    """Where a head's log decays start."""
    return gate + ((batch.to(gl.int64) * length * heads + head) if GATE == SCALAR_GATE else (batch // gate_every * heads + head))


@gluon.jit
def start_of(step, steps, C: gl.constexpr):
    """First token of a step's chunk; steps beyond the last stay at it."""
    return gl.minimum(step, steps - 1) * C


@gluon.jit
def buffers_of(W: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, DOT: gl.constexpr):
    """Shared memory: q, k and v of each stage; the state, outputs, scores and a line of numbers; barriers."""
    q_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, W], shared_layout(W))
    k_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, W], shared_layout(W))
    v_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, W], shared_layout(W))
    state_buffer = gl.allocate_shared_memory(DOT, [W, W], shared_layout(W))
    out_buffer = gl.allocate_shared_memory(DOT, [C, W], shared_layout(W))
    scores_buffer = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    line_buffer = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return (q_buffers, k_buffers, v_buffers), (state_buffer, out_buffer, scores_buffer, line_buffer), barriers(STAGES)


@gluon.jit
def bring(bars, sources, stages, batch, head, t, step, W: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr):
    """Starts to copy a chunk's rows of q, k and v into their stage."""
    row = [batch, t, head, 0]
    fetch(bars.index(step % STAGES), 2 * C * 3 * W, sources, (row, row, row), at_stage(stages, step % STAGES))


@gluon.jit
def steps_of(gate, t, length, heads, cols, GATE: gl.constexpr):
    """Log2 decays of a chunk's tokens, as columns; padding does not decay."""
    if GATE == SCALAR_GATE:
        return gl.load(gate + (t + cols).to(gl.int64) * heads, mask=t + cols < length, other=0.0) * LOG2_E
    return gl.load(gate + 0 * cols, mask=t + cols < length, other=0.0) * LOG2_E


@gluon.jit
def decays_of(step_C, rows, cols):
    """A chunk's decays as scalings of what enters the sums and of what leaves them, all in log2, for rows of scores.

    Row j gives exp(G_i - G_j) v_j to row i, and that is leave_i enter_j with leave = exp(G - middle) and enter = 1 / leave. Both
    are cut at 2^LIMIT; a chunk that decays by more is rough, and `rest` is what is missing.

    Returns:
        The exponent of leave (that of enter is its negative), `rest`, half of the chunk's exponent, the part of that half by
        which the state is scaled for its reader, and whether the chunk is rough.
    """
    g_C = gl.sum(gl.where(rows[:, None] >= cols[None, :], step_C[None, :], 0.0), 1)
    half = 0.5 * gl.sum(step_C, 0)
    whole_C = g_C - half
    leave_C = gl.minimum(gl.maximum(whole_C, -LIMIT), LIMIT)
    return leave_C, whole_C - leave_C, half, gl.maximum(half, -LIMIT), half < -LIMIT


@gluon.jit
def enter(v_CV, leave_C, narrow: gl.constexpr, DOT: gl.constexpr):
    """Scales values where they lie, for the sums that they enter."""
    factor_C = gl.exp2(-gl.convert_layout(leave_C, gl.SliceLayout(1, narrow)))
    v_CV.store((v_CV.load(narrow).to(gl.float32) * factor_C[:, None]).to(DOT))


@gluon.jit
def seen(scores_CC, decays, rows, cols, line_buffer, square: gl.constexpr, GATE: gl.constexpr):
    """Scores of pairs that see each other, with what the cut scalings lack of their decay."""
    is_seen = rows[:, None] >= cols[None, :]
    scores_CC = gl.where(is_seen, scores_CC, 0.0)
    if GATE != NO_GATE:  # noqa: SIM102 - one is known to the compiler, the other to the chip
        if decays[4]:
            line_buffer.store(decays[1])
            fall_CC = decays[1][:, None] - line_buffer.load(gl.SliceLayout(0, square))[None, :]
            scores_CC = scores_CC * gl.exp2(gl.where(is_seen, fall_CC, 0.0))
    return scores_CC


@gluon.jit
def mended(o_CV, q_CK, state_buffer, none_CV, decays, of_rows: gl.constexpr, GATE: gl.constexpr):
    """Outputs of a chunk with what earlier chunks give decayed as it should be, where a rough chunk's scalings were cut."""
    if GATE != NO_GATE:  # noqa: SIM102
        if decays[4]:
            factor_C = gl.exp2(gl.convert_layout(decays[2] + decays[1] - decays[3], of_rows))
            again = warpgroup_mma(q_CK, state_buffer, none_CV, use_acc=False, is_async=True)
            o_CV += warpgroup_mma_wait(0, [again]) * (factor_C - 1.0)[:, None]
    return o_CV
