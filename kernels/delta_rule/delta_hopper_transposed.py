"""The forward walk of the delta rule for Hopper on the transposed state, in Gluon.

Rows of its products are columns of the values, tokens are columns: what a product makes is the left operand of the next one in the
registers where it is, each warp group has 64 columns of the values to itself, and the chain of a chunk, which is S^T K^T,
(beta R)^T H^T and the next state, has no barrier. What does not depend on the state is made beside it
(`kernels.delta_rule.delta_hopper_beside`), and rows of the next chunks are on their way while one is computed. Q S runs while R is
prepared, the outputs' last product behind the next state. What is subtracted is negated before, so that products add to what
they correct.

Shape legend: B batch, T time, H heads, N chunks, C = 64 tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from kernels._entry import entry
from kernels.delta_rule.delta_hopper import SIZES, place, shared_layout, thread_barrier, turned_layout
from kernels.delta_rule.delta_hopper_beside import beside_buffers, rows_buffers, score
from kernels.delta_rule.delta_hopper_solve import score_and_solve, solve
from kernels.delta_rule.delta_hopper_turned import (
    error_factors,
    faded,
    operand,
    start_errors,
    state_places,
    token_factors,
    whole_decay,
)


@gluon.jit
def _errors(
    read, asked, value_VC, state_VK, h_CC, made, part,
    BK: gl.constexpr, C: gl.constexpr, EARLY: gl.constexpr, GATED: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Errors, what queries ask, the state, and the factors with which errors enter it.

    EARLY: the latter three as the next products want them. A wide state leaves no registers for factors while it is read.
    """
    if EARLY and BK == C:
        factors = error_factors(made, part, C, GATED)
    read_VC, asked = warpgroup_mma_wait(1, [read, asked])
    if not EARLY or BK > C:
        factors = error_factors(made, part, C, GATED)
    error, enter_C = start_errors(read_VC, value_VC, factors, h_CC, C, GATED, DOT), factors[1]
    if EARLY:
        state_VK, enter_C = faded(state_VK, made, part, factors[1], BK, C, GATED)
        asked_VC, error = warpgroup_mma_wait(1, [asked, error])
        if GATED:
            asked_VC = asked_VC * token_factors(made[3].index(part), C)
        error_VC = warpgroup_mma_wait(0, [error])
    else:
        asked_VC, error_VC = warpgroup_mma_wait(0, [asked, error])
    return error_VC, asked_VC, state_VK, enter_C


@gluon.jit
def _start_state(
    error_VC, asked_VC, state_VK, enter_C, k_CK, made, part,
    BK: gl.constexpr, C: gl.constexpr, EARLY: gl.constexpr, GATED: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Starts the product that makes the next state; what is written, as a left operand, and what queries asked."""
    if EARLY:
        writes = operand(error_VC * enter_C, C, DOT)
        state = warpgroup_mma(writes, k_CK, state_VK, is_async=True)
        if GATED:
            writes = operand(error_VC * token_factors(made[2].index(part), C), C, DOT)
    else:
        write_VC = error_VC * token_factors(made[2].index(part), C)
        writes = operand(write_VC, C, DOT)
        fading = writes
        if GATED:
            fading = operand(write_VC * token_factors(made[4].index(part), C), C, DOT)
            state_VK = state_VK * whole_decay(made[5].index(part), BK)
        state = warpgroup_mma(fading, k_CK, state_VK, is_async=True)
        if GATED:
            asked_VC = asked_VC * token_factors(made[3].index(part), C)
    return state, writes, asked_VC


@gluon.jit
def _leave_outputs(o, at_o, o_buffer, o_VC):
    """Starts to store the outputs of a chunk, once those of the one before and all else has left; a barrier."""
    tma.store_wait(0)
    thread_barrier()
    o_buffer.permute([1, 0]).store(o_VC)
    fence_async_shared()
    thread_barrier()
    tma.async_copy_shared_to_global(o, at_o, o_buffer)


@gluon.jit
def _keep_errors(errors, at_o, v_CV, error_VC, DOT: gl.constexpr):
    """Starts to store errors, by way of the values; once the state that entered the chunk has left."""
    v_CV.permute([1, 0]).store(error_VC.to(DOT))
    tma.store_wait(0)
    fence_async_shared()
    thread_barrier()
    tma.async_copy_shared_to_global(errors, at_o, v_CV)


@gluon.jit
def _step(
    results, place, n, step, rows, work, made, handed, state_VK, left_VC,
    BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr, HELD: gl.constexpr, EARLY: gl.constexpr,
    WALKS: gl.constexpr, WALK: gl.constexpr, GATED: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """A chunk: the next state, and its outputs; those of a walk alone leave while the next chunk's first products run."""
    o, errors, states = results
    batch, head, chunk_0, e_start = place
    part, at_o = step % 2, [batch, n * C, head, e_start]
    q_CK, k_CK = rows[0][0].index(step % STAGES), rows[0][1].index(step % STAGES)
    v_CV, o_buffer, state_buffer = rows[1].index(step % DEPTH * WALKS + WALK), work[0], work[1]
    none_VC = gl.zeros([64, C], gl.float32, turned_layout(C))
    old_VK = operand(state_VK, C, DOT)
    mbarrier.wait(rows[2][0].index(step % STAGES), step // STAGES % 2)
    read = warpgroup_mma(old_VK, k_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
    asked = warpgroup_mma(old_VK, q_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
    if WALKS == 1:  # noqa: SIM102
        # Where another walk uses the tensor cores meanwhile outputs leave at once; 32 registers more would spill.
        if step > 0:
            _leave_outputs(o, [batch, n * C - C, head, e_start], o_buffer, left_VC)
            mbarrier.arrive(handed[1].index(1 - part), count=1)
    if KEEP:
        tma.async_copy_shared_to_global(states, [chunk_0 + n, 0, e_start], state_buffer)
    mbarrier.wait(rows[2][1].index(step % DEPTH), step // DEPTH % 2)
    value_VC = v_CV.permute([1, 0]).load(turned_layout(C)).to(gl.float32)
    mbarrier.wait(handed[0].index(part), step // 2 % 2)
    error_VC, asked_VC, state_VK, enter_C = _errors(
        read, asked, value_VC, state_VK, made[0].index(step % HELD), made, part, BK, C, EARLY, GATED, DOT
    )
    if KEEP:
        _keep_errors(errors, at_o, v_CV, error_VC, DOT)
    state, writes, asked_VC = _start_state(error_VC, asked_VC, state_VK, enter_C, k_CK, made, part, BK, C, EARLY, GATED, DOT)
    written = warpgroup_mma(writes, made[1].index(part).permute([1, 0]), asked_VC, is_async=True)
    state_VK, written = warpgroup_mma_wait(1, [state, written])
    if KEEP:
        state_buffer.permute([1, 0]).store(state_VK.to(DOT))
    left_VC = warpgroup_mma_wait(0, [written]).to(DOT)
    if WALKS == 2:
        _leave_outputs(o, at_o, o_buffer, left_VC)
        mbarrier.arrive(handed[1].index(part), count=1)
        left_VC = gl.zeros([64, C], DOT, turned_layout(C))
    return state_VK, left_VC


@gluon.jit
def _walk(
    shared, given,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr,
    HELD: gl.constexpr, EARLY: gl.constexpr, WALKS: gl.constexpr, WALK: gl.constexpr, GATED: gl.constexpr, FIRST: gl.constexpr,
    LAST: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """A partition that walks over the chunks of a segment, with 64 columns of the values."""
    results, place, bounds, rows, work, made, handed = shared
    batch, head, chunk_0, e_start = place
    o_buffers, state_buffers = work
    first, last, part_index, head_index, is_last = given
    n_first, n_last = bounds
    e_start = e_start + WALK * 64
    o_buffer, state_buffer = o_buffers.index(WALK), state_buffers.index(WALK)
    state_VK = gl.zeros([64, BK], gl.float32, turned_layout(BK))
    offsets, inside = state_places(e_start, V, K, BK)
    if FIRST:
        if EARLY:
            gdc_wait()
        state_VK = gl.load(first + part_index.to(gl.int64) * K * V + offsets, mask=inside, other=0.0)
    if KEEP:
        state_buffer.permute([1, 0]).store(state_VK.to(DOT))
        fence_async_shared()
        thread_barrier()
    left_VC = gl.zeros([64, C], DOT, turned_layout(C))
    for n in range(n_first, n_last + 1):
        state_VK, left_VC = _step(
            results, (batch, head, chunk_0, e_start), n, n - n_first, rows, (o_buffer, state_buffer), made, handed, state_VK,
            left_VC, BK, C, STAGES, DEPTH, HELD, EARLY, WALKS, WALK, GATED, KEEP, DOT,
        )  # fmt: skip
    if WALKS == 1:
        _leave_outputs(results[0], [batch, n_last * C, head, e_start], o_buffer, left_VC)
    tma.store_wait(0)
    if LAST:
        gl.store(last + head_index.to(gl.int64) * K * V + offsets, state_VK, mask=inside & is_last)


@entry(do_not_specialize=SIZES, gluon=True)
def forward_kernel(
    q, k, v, h, o, errors, states, beta, gate, g, first, last,
    gate_b: tl.int64, gate_t: tl.int64, gate_every: tl.int32,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr,
    WALKS: gl.constexpr, SOLVERS: gl.constexpr, GATED: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr,
    KEEP: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """What the kernels of couplings and of the forward walk in plain Triton write, on descriptors of a chunk's blocks.

    Grid: (B * H * segments * tiles of 64 WALKS columns,). Of a program's warp groups WALKS walk, over 64 columns of the values
    each, and SOLVERS make H, one beside two walks and two beside one; without these H and g come from memory. A segment is
    `span` chunks; `first` holds the states that enter them.
    """
    # A solver waits for the keys of its own chunks only. The parity of a phase tells it from the one before, so it has to see
    # every phase of the stages that it waits for.
    gl.static_assert(STAGES % max(SOLVERS, 1) == 0)
    TILES: gl.constexpr = (V + 64 * WALKS - 1) // (64 * WALKS)
    # Where others make H beside it, a walk that reads factors early was slower under decays.
    EARLY: gl.constexpr = SOLVERS == 0
    HELD: gl.constexpr = DEPTH if EARLY else 2
    part, e_start = gl.program_id(0) // TILES, gl.program_id(0) % TILES * 64 * WALKS
    n_chunks = (length + C - 1) // C
    head_index, order, n_first, n_last = place(part, segments, segments, span, n_chunks, False)
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * n_chunks
    beta, g = beta + batch.to(gl.int64) * length * heads + head, g + chunk_0.to(gl.int64) * C
    gate += (batch // gate_every) * gate_b + head
    rows = rows_buffers(BK, C, STAGES, DEPTH, WALKS, DOT)
    o_buffers = gl.allocate_shared_memory(DOT, [WALKS, C, 64], shared_layout(64))
    state_buffers = o_buffers
    if KEEP:
        state_buffers = gl.allocate_shared_memory(DOT, [WALKS, BK, 64], shared_layout(64))
    made, inner, handed = beside_buffers(C, WALKS, SOLVERS, 2 if SOLVERS == 2 else 1, HELD, DOT, MERGE)
    bounds, where = (n_first, n_last), (batch, head, head // group, e_start)
    shared = ((o, errors, states), (batch, head, chunk_0, e_start), bounds, rows, (o_buffers, state_buffers), made, handed)
    given, pointers = (first, last, part, head_index, order == segments - 1), (beta, gate, g)
    beside = ((q, k, v), h, pointers, gate_t, where, bounds, chunk_0, rows, made, inner, handed, length, heads)
    if WALKS == 1 and SOLVERS == 0:
        gl.warp_specialize(
            [
                (_walk, (shared, given, K, V, BK, C, STAGES, DEPTH, HELD, EARLY, 1, 0, GATED, FIRST, LAST, KEEP, DOT)),
                (score, (beside, BK, C, STAGES, DEPTH, 1, 0, GATED, DOT)),
            ],
            [4],
            [168],
        )
    elif WALKS == 1:
        gl.warp_specialize(
            [
                (_walk, (shared, given, K, V, BK, C, STAGES, DEPTH, HELD, EARLY, 1, 0, GATED, FIRST, LAST, KEEP, DOT)),
                (score, (beside, BK, C, STAGES, DEPTH, 1, 2, GATED, DOT)),
                (solve, (beside, C, STAGES, 0, 2, GATED, KEEP, DOT, MERGE)),
                (solve, (beside, C, STAGES, 1, 2, GATED, KEEP, DOT, MERGE)),
            ],
            [4, 4, 4],
            [96, 120, 120] if BK == 64 else [88, 104, 104],
        )
    elif SOLVERS == 0:
        gl.warp_specialize(
            [
                (_walk, (shared, given, K, V, BK, C, STAGES, DEPTH, HELD, EARLY, 2, 0, GATED, FIRST, LAST, KEEP, DOT)),
                (_walk, (shared, given, K, V, BK, C, STAGES, DEPTH, HELD, EARLY, 2, 1, GATED, FIRST, LAST, KEEP, DOT)),
                (score, (beside, BK, C, STAGES, DEPTH, 2, 0, GATED, DOT)),
            ],
            [4, 4],
            [216, 72],
        )
    else:
        gl.warp_specialize(
            [
                (_walk, (shared, given, K, V, BK, C, STAGES, DEPTH, HELD, EARLY, 2, 0, False, FIRST, LAST, KEEP, DOT)),
                (_walk, (shared, given, K, V, BK, C, STAGES, DEPTH, HELD, EARLY, 2, 1, False, FIRST, LAST, KEEP, DOT)),
                (score_and_solve, (beside, BK, C, STAGES, DEPTH, 2, KEEP, DOT, MERGE)),
            ],
            [4, 4],
            [208, 88],
        )
