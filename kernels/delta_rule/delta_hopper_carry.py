"""What a segment of a long sequence does to a state, for Hopper: where heads are few, segments of a sequence run at once.

A segment takes the state S that enters it to R S + C, and the gradient of the state that leaves it to that of the one that
enters in the same form. A warp group walks over a segment with 64 columns of the state, transposed as in
`delta_hopper_transposed`: from zero for C, and from columns of the identity, without values (or gradients of outputs),
for R. Two share a program's keys and couplings, and a third brings them. Then `delta_combine_triton` goes through the segments.

Segments are counted in the order of the walk: the first starts with the state given, or zero, and needs no R; what the last
leaves is left to the walk proper. `ends` is [B * H, segments - 1, K, columns of C and then of R] in fp32.

Under decays the beginning of a segment may not reach its end (`delta_hopper_reach`): it is not walked over, and R is then zero.

Shape legend: B batch, T time, H heads, N chunks, C = 64 tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels._entry import entry
from kernels.delta_rule.delta_hopper import SIZES, place, thread_barrier, turned_layout
from kernels.delta_rule.delta_hopper_carry_feed import carry_buffers, feed
from kernels.delta_rule.delta_hopper_reach import reaching_chunks
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
def _start(
    given, head_index, order, forgotten, e_start, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, GIVEN: gl.constexpr
):  # fmt: skip
    """The columns of a state with which a walk starts, transposed: of the state given, of the identity, or of zero.

    Zero too if the walk starts behind chunks of its segment, whose number is `forgotten`.
    """
    VALUES: gl.constexpr = (V + 63) // 64 * 64
    wide: gl.constexpr = turned_layout(BK)
    e, d = e_start + gl.arange(0, 64, gl.SliceLayout(1, wide)), gl.arange(0, BK, gl.SliceLayout(0, wide))
    state_VK = gl.where((d[None, :] == e[:, None] - VALUES) & (forgotten == 0), 1.0, 0.0)
    if GIVEN:
        offsets, inside = state_places(e_start, V, K, BK)
        wanted = inside & (order == 0) & (forgotten == 0)
        state_VK += gl.load(given + head_index.to(gl.int64) * K * V + offsets, mask=wanted, other=0.0)
    return state_VK


@gluon.jit
def _ahead(
    state_VK, steps, rows, made, bars,
    BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr, WALK: gl.constexpr, WRITES: gl.constexpr,
    GATED: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """The state that leaves a segment: `kernels.delta_rule.delta_hopper_transposed` without outputs."""
    none_VC = gl.zeros([64, C], gl.float32, turned_layout(C))
    for step in range(steps):
        part, stage = step % 2, step % STAGES
        k_CK, value_VC = rows[0].index(stage), none_VC
        old_VK = operand(state_VK, C, DOT)
        mbarrier.wait(bars[0].index(stage), step // STAGES % 2)
        read = warpgroup_mma(old_VK, k_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
        if WRITES:
            value_VC = rows[1].index(stage * TILES + WALK).permute([1, 0]).load(turned_layout(C)).to(gl.float32)
        mbarrier.wait(bars[1].index(part), step // 2 % 2)
        factors = error_factors(made, part, C, GATED)
        read_VC = warpgroup_mma_wait(0, [read])
        error = start_errors(read_VC, value_VC, factors, made[0].index(stage), C, GATED, DOT)
        state_VK, enter_C = faded(state_VK, made, part, factors[1], BK, C, GATED)
        error_VC = warpgroup_mma_wait(0, [error])
        state = warpgroup_mma(operand(error_VC * enter_C, C, DOT), k_CK, state_VK, is_async=True)
        state_VK = warpgroup_mma_wait(0, [state])
        thread_barrier()
        mbarrier.arrive(bars[2].index(part), count=1)
    return state_VK


@gluon.jit
def _back(
    dstate_VK, steps, rows, made, bars,
    BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr, WALK: gl.constexpr, WRITES: gl.constexpr,
    GATED: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """The gradient of the state that enters a segment: its chain is dS^T K^T, (beta dU)^T H, the next gradient."""
    none_VC = gl.zeros([64, C], gl.float32, turned_layout(C))
    for step in range(steps):
        part, stage = step % 2, step % STAGES
        k_CK = rows[0].index(stage)
        old_VK = operand(dstate_VK, C, DOT)
        mbarrier.wait(bars[0].index(stage), step // STAGES % 2)
        dwrite = warpgroup_mma(old_VK, k_CK.permute([1, 0]), none_VC, use_acc=False, is_async=True)
        mbarrier.wait(bars[1].index(part), step // 2 % 2)
        minus_C = -token_factors(made[2].index(part), C)
        if WRITES:
            do_VC = rows[1].index(stage * TILES + WALK).permute([1, 0]).load(turned_layout(C))
            asked = warpgroup_mma(operand(do_VC, C, DOT), made[1].index(part), none_VC, use_acc=False, is_async=True)
            dwrite_VC, asked = warpgroup_mma_wait(1, [dwrite, asked])
            if GATED:
                dwrite_VC = dwrite_VC * token_factors(made[4].index(part), C)
            dwrite_VC += warpgroup_mma_wait(0, [asked])
        else:
            dwrite_VC = warpgroup_mma_wait(0, [dwrite])
            if GATED:
                dwrite_VC = dwrite_VC * token_factors(made[4].index(part), C)
        y = warpgroup_mma(operand(dwrite_VC * minus_C, C, DOT), made[0].index(stage), dwrite_VC, is_async=True)
        if GATED:
            dstate_VK = dstate_VK * whole_decay(made[5].index(part), BK)
        if WRITES:
            do_VC = do_VC.to(gl.float32)
            if GATED:
                do_VC = do_VC * token_factors(made[3].index(part), C)
            dstate = warpgroup_mma(operand(do_VC, C, DOT), rows[2].index(stage), dstate_VK, is_async=True)
            y_VC, dstate = warpgroup_mma_wait(1, [y, dstate])
        else:
            dstate, y_VC = dstate_VK, warpgroup_mma_wait(0, [y])
        y_VC = y_VC * minus_C
        if GATED:
            y_VC = y_VC * token_factors(made[3].index(part), C)
        dstate = warpgroup_mma(operand(y_VC, C, DOT), k_CK, dstate, is_async=True)
        dstate_VK = warpgroup_mma_wait(0, [dstate])
        thread_barrier()
        mbarrier.arrive(bars[2].index(part), count=1)
    return dstate_VK


@gluon.jit
def _walk(
    steps, rows, made, bars, given, ends, place,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
    WALK: gl.constexpr, REVERSE: gl.constexpr, GATED: gl.constexpr, GIVEN: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """A partition that walks over a segment, with 64 columns of C or of R."""
    head_index, order, slot, first_unit, forgotten = place
    WIDTH: gl.constexpr = ((V + 63) // 64 + (K + 63) // 64) * 64
    step_of: gl.constexpr = _back if REVERSE else _ahead
    e_start = (first_unit + WALK) * 64
    state_VK = _start(given, head_index, order, forgotten, e_start, K, V, BK, GIVEN)
    if WALK < TILES:
        if first_unit == 0:
            state_VK = step_of(state_VK, steps, rows, made, bars, BK, C, STAGES, TILES, WALK, True, GATED, DOT)
        else:
            state_VK = step_of(state_VK, steps, rows, made, bars, BK, C, STAGES, TILES, WALK, False, GATED, DOT)
    else:
        state_VK = step_of(state_VK, steps, rows, made, bars, BK, C, STAGES, TILES, WALK, False, GATED, DOT)
    offsets, inside = state_places(e_start, WIDTH, K, BK)
    gl.store(ends + slot.to(gl.int64) * K * WIDTH + offsets, state_VK, mask=inside)


@entry(do_not_specialize=SIZES, gluon=True)
def carry_kernel(
    k, h, v, q, beta, g, given, ends,
    length: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32, span: tl.int32,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    REVERSE: gl.constexpr, GATED: gl.constexpr, GIVEN: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Grid: (B * H * (segments - 1) * pairs of 64 columns of C and of R,). REVERSE: of gradients, with those of outputs for v."""
    gdc_launch_dependents()
    gdc_wait()
    TILES: gl.constexpr = (V + 63) // 64
    PROGRAMS: gl.constexpr = (TILES + (K + 63) // 64 + 1) // 2
    slot, first_unit = gl.program_id(0) // PROGRAMS, gl.program_id(0) % PROGRAMS * 2
    n_chunks = (length + C - 1) // C
    head_index, order, n_first, n_last = place(slot, segments - 1, segments, span, n_chunks, REVERSE)
    batch, head, chunk_0 = head_index // heads, head_index % heads, head_index * n_chunks
    pointers = (beta + batch.to(gl.int64) * length * heads + head, g + chunk_0.to(gl.int64) * C)
    chunks = n_last - n_first + 1
    if GATED:
        reaching = reaching_chunks(pointers[1], n_first, n_last, C, REVERSE, 4, False)
        if REVERSE:
            n_last = n_first + reaching - 1
        else:
            n_first = n_last - reaching + 1
    forgotten = chunks - (n_last - n_first + 1)
    if (first_unit > 0) & ((order == 0) | (forgotten > 0)):  # nobody reads R of the first, and others are zero
        n_last = n_first - 1
    rows, made, bars = carry_buffers(BK, C, STAGES, TILES, REVERSE, DOT)
    where, bounds = (batch, head, head // group, chunk_0, first_unit == 0), (n_first, n_last)
    at, steps = (head_index, order, slot, first_unit, forgotten), n_last - n_first + 1
    gl.warp_specialize(
        [
            (_walk, (steps, rows, made, bars, given, ends, at, K, V, BK, C, STAGES, TILES, 0, REVERSE, GATED, GIVEN, DOT)),
            (_walk, (steps, rows, made, bars, given, ends, at, K, V, BK, C, STAGES, TILES, 1, REVERSE, GATED, GIVEN, DOT)),
            (feed, (
                (k, h, v, q), pointers, where, bounds, rows, made, bars, length, heads,
                BK, C, STAGES, TILES, REVERSE, GATED, DOT,
            )),
        ],
        [4, 4],
        [208, 88],
    )  # fmt: skip
