"""The forward walk of the delta rule for Hopper on the transposed state, in Gluon.

Rows of its products are columns of the values, tokens are columns: what a product makes is the left operand of the next one in the
registers where it is, each warp group has 64 columns of the values to itself, and the chain of a chunk, which is S^T K^T,
(beta R)^T H^T and the next state, has no barrier. What does not depend on the state is made beside it
(`kernels.delta_hopper_beside`), and rows of the next chunks are on their way while one is computed. Q S runs while R is prepared, the
outputs' last product behind the next state. What is subtracted is negated before, so that products add to what they correct.

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

from kernels.delta_hopper import SIZES, barriers, fetch, place, shared_layout, thread_barrier, turned_layout
from kernels.delta_hopper_beside import beside, beside_buffers


@gluon.jit
def operand(x, C: gl.constexpr, GROUPS: gl.constexpr, DOT: gl.constexpr):
    """Sums as the left operand of the next product, in the registers where they are."""
    return gl.convert_layout(x.to(DOT), gl.DotOperandLayout(0, turned_layout(C, GROUPS), 2))


@gluon.jit
def token_factors(buffer, C: gl.constexpr, GROUPS: gl.constexpr):
    """A factor of each token, for the columns of sums."""
    return buffer.load(gl.SliceLayout(0, turned_layout(C, GROUPS)))[None, :]


@gluon.jit
def whole_decay(buffer, BK: gl.constexpr, GROUPS: gl.constexpr):
    """The decay of a whole chunk, for the rows of a state."""
    return buffer.load(gl.SliceLayout(1, turned_layout(BK, GROUPS)))[:, None]


@gluon.jit
def state_places(e_start, V: gl.constexpr, K: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr):
    """Where a tile of a state's columns is in [K, V], for its transpose, and what of it is inside."""
    wide: gl.constexpr = turned_layout(BK, GROUPS)
    e, d = e_start + gl.arange(0, BV, gl.SliceLayout(1, wide)), gl.arange(0, BK, gl.SliceLayout(0, wide))
    return d[None, :] * V + e[:, None], (d < K)[None, :] & (e < V)[:, None]


@gluon.jit
def bring(bars, sources, at, step, targets, STAGES: gl.constexpr, BYTES: gl.constexpr):
    """Starts to copy a chunk's rows, one block of each source, into their places of a step."""
    places = ()
    views = ()
    for source in gl.static_range(len(sources)):
        places, views = places + (at,), views + (targets[source].index(step % STAGES),)  # noqa: RUF005
    fetch(bars.index(step % STAGES), BYTES, sources, places, views)


@gluon.jit
def start_errors(read_VC, value_VC, part, made, C: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr, DOT: gl.constexpr):
    """Starts the product that makes the errors E of what is read, K S, and the values."""
    if GATED:
        read_VC = read_VC * token_factors(made[3].index(part), C, GROUPS)
    rest_VC = value_VC - read_VC
    beta = token_factors(made[2].index(part), C, GROUPS)
    return warpgroup_mma(operand(rest_VC * -beta, C, GROUPS, DOT), made[0].index(part).permute([1, 0]), rest_VC, is_async=True)


@gluon.jit
def start_state(
    error_VC, state_VK, k_CK, part, made, C: gl.constexpr, BK: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr,
    DOT: gl.constexpr,
):  # fmt: skip
    """Starts the product that makes the next state; what is written, as a left operand."""
    write_VC = error_VC * token_factors(made[2].index(part), C, GROUPS)
    writes = operand(write_VC, C, GROUPS, DOT)
    fading = writes
    if GATED:
        fading = operand(write_VC * token_factors(made[4].index(part), C, GROUPS), C, GROUPS, DOT)
        state_VK = state_VK * whole_decay(made[5].index(part), BK, GROUPS)
    return warpgroup_mma(fading, k_CK, state_VK, is_async=True), writes


@gluon.jit
def _walk(
    sources, results, place, bounds, rows, work, bars, made, handed, states, length,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, GATED: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, KEEP: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """The partition that walks over the chunks of a segment."""
    q, k, v = sources
    o, errors, kept_states = results
    batch, head, shared_head, chunk_0, e_start = place
    n_first, n_last = bounds
    qk_buffers, v_buffers = rows
    o_buffer, state_buffer = work
    qk_bars, v_bars = bars
    ready_bars, free_bars = handed
    first, last, part_index, head_index, is_last = states
    narrow: gl.constexpr = turned_layout(C, GROUPS)
    none_VC = gl.zeros([BV, C], gl.float32, narrow)
    for early in gl.static_range(STAGES - 1):
        at = [batch, gl.minimum(n_first + early, n_last) * C, shared_head, 0]
        bring(qk_bars, (q, k), at, early, qk_buffers, STAGES, 4 * C * BK)
    bring(v_bars, (v,), [batch, n_first * C, head, e_start], 0, (v_buffers,), 2, 2 * C * BV)
    state_VK = gl.zeros([BV, BK], gl.float32, turned_layout(BK, GROUPS))
    offsets, inside = state_places(e_start, V, K, BK, BV, GROUPS)
    if FIRST:
        state_VK = gl.load(first + part_index.to(gl.int64) * K * V + offsets, mask=inside, other=0.0)
    if KEEP:
        state_buffer.permute([1, 0]).store(state_VK.to(DOT))
        fence_async_shared()
    thread_barrier()
    for n in range(n_first, n_last + 1):
        step, part, at_o = n - n_first, (n - n_first) % 2, [batch, n * C, head, e_start]
        q_CK, k_CK, v_CV = qk_buffers[0].index(step % STAGES), qk_buffers[1].index(step % STAGES), v_buffers.index(part)
        old_VK = operand(state_VK, C, GROUPS, DOT)
        mbarrier.wait(qk_bars.index(step % STAGES), step // STAGES % 2)
        read = warpgroup_mma(old_VK, k_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
        asked = warpgroup_mma(old_VK, q_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
        if KEEP:
            tma.store_wait(1)  # the errors of the chunk before, which left by way of its values
            tma.async_copy_shared_to_global(kept_states, [chunk_0 + n, 0, e_start], state_buffer)
        at = [batch, gl.minimum(n + STAGES - 1, n_last) * C, shared_head, 0]
        bring(qk_bars, (q, k), at, step + STAGES - 1, qk_buffers, STAGES, 4 * C * BK)
        at_v = [batch, gl.minimum(n + 1, n_last) * C, head, e_start]
        bring(v_bars, (v,), at_v, step + 1, (v_buffers,), 2, 2 * C * BV)
        mbarrier.wait(v_bars.index(part), step // 2 % 2)
        value_VC = v_CV.permute([1, 0]).load(narrow).to(gl.float32)
        mbarrier.wait(ready_bars.index(part), step // 2 % 2)
        read_VC, asked = warpgroup_mma_wait(1, [read, asked])
        error = start_errors(read_VC, value_VC, part, made, C, GROUPS, GATED, DOT)
        asked_VC, error_VC = warpgroup_mma_wait(0, [asked, error])
        if KEEP:
            v_CV.permute([1, 0]).store(error_VC.to(DOT))
        state, writes = start_state(error_VC, state_VK, k_CK, part, made, C, BK, GROUPS, GATED, DOT)
        if GATED:
            asked_VC = asked_VC * token_factors(made[3].index(part), C, GROUPS)
        written = warpgroup_mma(writes, made[1].index(part).permute([1, 0]), asked_VC, is_async=True)
        if KEEP:
            fence_async_shared()
            thread_barrier()
            tma.async_copy_shared_to_global(errors, at_o, v_CV)
            tma.store_wait(1)  # the state that entered the chunk, and before it the outputs of the last one
        else:
            tma.store_wait(0)
        state_VK, written = warpgroup_mma_wait(1, [state, written])
        thread_barrier()
        if KEEP:
            state_buffer.permute([1, 0]).store(state_VK.to(DOT))
        o_buffer.permute([1, 0]).store(warpgroup_mma_wait(0, [written]).to(DOT))
        fence_async_shared()
        thread_barrier()
        tma.async_copy_shared_to_global(o, at_o, o_buffer)
        mbarrier.arrive(free_bars.index(part), count=1)
    leave(qk_bars, v_bars, n_last - n_first + 1, STAGES)
    tma.store_wait(0)
    if LAST:
        gl.store(last + head_index.to(gl.int64) * K * V + offsets, state_VK, mask=inside & is_last)


@gluon.jit
def leave(qk_bars, v_bars, steps, STAGES: gl.constexpr):
    """Waits for copies that were started beyond the last chunk."""
    for late in gl.static_range(STAGES - 1):
        mbarrier.wait(qk_bars.index((steps + late) % STAGES), (steps + late) // STAGES % 2)
    mbarrier.wait(v_bars.index(steps % 2), steps // 2 % 2)


@gluon.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, h, o, errors, states, beta, gate, g, first, last,
    gate_b: tl.int64, gate_t: tl.int64, gate_every: tl.int32,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, GATED: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr,
    KEEP: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """What the kernels of couplings and of the forward walk of `kernels.delta_triton` write, on descriptors of a chunk's blocks.

    Grid: (B * H * segments * value tiles,), of GROUPS warp groups that walk over 64 columns of the values each, and one beside them
    with REGISTERS registers a thread. A segment is `span` chunks; `first` holds the states that enter them.
    """
    TILES: gl.constexpr = (V + BV - 1) // BV
    part, tile, n_chunks = gl.program_id(0) // TILES, gl.program_id(0) % TILES, (length + C - 1) // C
    head_index, order, n_first, n_last = place(part, segments, segments, span, n_chunks, False)
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * n_chunks
    beta, g = beta + batch.to(gl.int64) * length * heads + head, g + chunk_0.to(gl.int64) * C
    gate += (batch // gate_every) * gate_b + head
    q_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    k_buffers = gl.allocate_shared_memory(DOT, [STAGES, C, BK], shared_layout(BK))
    v_buffers = gl.allocate_shared_memory(DOT, [2, C, BV], shared_layout(BV))
    o_buffer = gl.allocate_shared_memory(DOT, [C, BV], shared_layout(BV))
    state_buffer = o_buffer
    if KEEP:
        state_buffer = gl.allocate_shared_memory(DOT, [BK, BV], shared_layout(BV))
    made, inner, handed = beside_buffers(C, BV, DOT, MERGE)
    bars = (barriers(STAGES), barriers(2))
    gl.warp_specialize(
        [
            (_walk, (
                (q, k, v), (o, errors, states), (batch, head, head // group, chunk_0, tile * BV), (n_first, n_last),
                ((q_buffers, k_buffers), v_buffers), (o_buffer, state_buffer), bars, made, handed,
                (first, last, part, head_index, order == segments - 1), length,
                K, V, BK, BV, GROUPS, C, STAGES, GATED, FIRST, LAST, KEEP, DOT,
            )),
            (beside, (
                h, (beta, gate, g), gate_t, (n_first, n_last), chunk_0, (q_buffers, k_buffers), bars[0], made, inner, handed,
                tile == 0, length, heads, C, BV, STAGES, GATED, True, False, KEEP, DOT, MERGE,
            )),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip
